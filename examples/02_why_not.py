"""A product that cannot run on packed words is dequantized, and says why and where."""

import mlx.core as mx

import qgraph as qg


@qg.jit
def scores(x, w):
    """The first half of the columns would do, but the cut goes through a group of 64."""
    aligned = x @ w.T
    cut = x[:, :96] @ w[:, :96].T
    return aligned + cut


x, w = mx.ones((1, 192)), qg.quantize(mx.ones((32, 192)), group_size=64)
print(scores.report(x, w))
print("\nthe graph after the passes:")
print(scores.optimized(x, w))

try:
    qg.jit(strict=True)(scores.function)(x, w)
except qg.StrictError as error:
    print(f"\nwith strict=True:\n{error}")
