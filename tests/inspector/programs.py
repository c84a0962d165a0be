"""Small functions to look at."""

from __future__ import annotations

import mlx.core as mx

import qgraph as qg


def quantized(*shape: int, seed: int = 0) -> qg.QuantizedTensor:
    return qg.quantize(mx.random.normal(shape, key=mx.random.key(seed)))


@qg.jit
def layers(x, weights, odd):
    for i, w in enumerate(weights):
        with qg.scope(f"layers.{i}"):
            x = qg.silu(x @ w.T)
            x = x + (x[:, :32] @ w[:, :32].T).astype(mx.float16).astype(mx.float32)
    with qg.scope("head"):
        return x @ odd.T


def layers_arguments():
    return mx.ones((2, 64)), [quantized(64, 64, seed=i) for i in range(3)], mx.ones((8, 64))


@qg.jit
def adapter(x, w, a, b, other):
    with qg.scope("layers.3.attn"):
        base = x @ w.T
        return base + 2.0 * ((other @ a) @ b)


def adapter_arguments():
    return mx.ones((2, 64)), quantized(32, 64), mx.ones((64, 4)), mx.ones((4, 32)), mx.ones((2, 64))
