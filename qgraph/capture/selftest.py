"""Whether this MLX reports graphs in the form that the table reads: asked once, before a capture.

The interface is marked experimental, and its arguments are numbers without names: another MLX may encode
them otherwise, and a graph made of them would be wrong without a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from qgraph._errors import QGraphError
from qgraph.capture.records import record

TESTED = "mlx>=0.32.4,<0.33"
# Every primitive of `sample` whose arguments the table reads, with what MLX 0.32.4 says of it.
EXPECTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("AddMM", (0.5, 2.0)),
    ("Arange", (1.0, 7.0, 2.0)),
    ("ArgPartition", (3, 1)),
    ("ArgReduce", (1, 1)),
    ("AsType", (mx.bfloat16,)),
    ("BitwiseBinary", (3,)),
    ("Concatenate", (1,)),
    ("Convolution", ((2,), (1,), (1,), (1,), (1,), 1, False)),
    ("DynamicSlice", ((1,), (2, 5))),
    ("DynamicSliceUpdate", ((1,),)),
    ("Equal", (True,)),
    ("Gather", ((0,), (1, 32))),
    ("GatherAxis", (0,)),
    ("GatherQMM", (32, 4, 0, True, False, True)),
    ("Log", (0,)),
    ("Pad", ((0, 1), (0, 2), (1, 0))),
    ("Quantize", (32, 8, 0, False)),
    ("QuantizedMatmul", (32, 4, 0, True)),
    ("QuantizedMatmul", (32, 4, 1, True)),
    ("Reduce", (0, (0,))),
    ("Reduce", (2, (1,))),
    ("Reduce", (4, (0,))),
    ("Scan", (2, 1, True, False)),
    ("Scatter", (0, (0,))),
    ("Scatter", (2, (0,))),
    ("ScatterAxis", (1, 0)),
    ("Slice", ((1, 1), (-3, 3), (-1, 1))),
    ("SliceUpdate", (4, (0, 2), (2, 4), (1, 1))),
    ("Softmax", (True,)),
    ("Split", ((8,), 1)),
    ("Sqrt", (True,)),
    ("Transpose", ((1, 0),)),
    ("Unflatten", (1, (4, 8))),
)


def sample(
    x: mx.array, w: mx.array, s: mx.array, w4: mx.array, s4: mx.array, i: mx.array, u: mx.array
) -> Sequence[mx.array]:
    """A function of arguments that tell one encoding from another. Nothing of it is ever evaluated.

    Shape: x (2, 32), w (8, 4), s (8, 1), w4 (8, 4), s4 (8, 1), i (3), u (3, 32).
    """
    index = i.reshape(3, 1)
    changed = mx.array(x)
    changed[:, 2:4] = u[:2, :2]
    return [
        mx.quantized_matmul(x, w, s, s, transpose=True, group_size=32, bits=4),
        mx.quantized_matmul(x, w4, s4, transpose=True, group_size=32, bits=4, mode="mxfp4"),
        mx.gather_qmm(
            u[:, None], w[None], s[None], s[None], None, i, group_size=32, bits=4, sorted_indices=True
        ),
        *mx.quantize(x, group_size=32, bits=8),
        mx.addmm(x, x, mx.concatenate([x] * 16, 0), alpha=0.5, beta=2.0),
        mx.arange(1, 7, 2),
        mx.argpartition(x, 3, axis=1),
        mx.argmax(x, axis=1),
        x.astype(mx.bfloat16),
        mx.left_shift(i, i),
        mx.concatenate([x, u[:2]], axis=1),
        mx.conv1d(u[None], u.reshape(1, 3, 32), stride=2, padding=1),
        mx.slice(x, i[:1], (1,), (2, 5)),
        mx.slice_update(x, u[:2], i[:1], (1,)),
        mx.array_equal(x, x * 2, equal_nan=True),
        x[i],
        mx.take_along_axis(u, index, axis=0),
        mx.log2(x),
        mx.pad(x, [(0, 1), (2, 0)]),
        mx.all(x, axis=0),
        mx.sum(x, axis=1),
        mx.min(x, axis=0),
        mx.cumsum(x, axis=1, reverse=True, inclusive=False),
        x.at[i].maximum(u),
        x.at[i].add(u),
        mx.put_along_axis(u, index, u[:, :1], axis=0),
        x[::-1, 1:3],
        changed,
        mx.softmax(x, -1, precise=True),
        *mx.split(x, [8], axis=1),
        mx.rsqrt(x),
        x.T,
        mx.unflatten(x, 1, (4, 8)),
    ]


@cache
def check_encodings() -> None:
    """Raise unless this MLX reports `sample` as the tested one does.  Errors: QGraphError."""
    problem = difference()
    if problem:
        raise QGraphError(
            f"MLX {_version()} reports its graph in another form than qgraph reads: {problem}",
            fix=f'install a tested one, pip install "{TESTED}"; qg.jit does not depend on it',
        )


def _version() -> str:
    return str(getattr(mx, "__version__", "of this version"))


def difference() -> str:
    """What MLX reports of `sample` other than expected; empty if nothing."""
    try:
        recording = record(sample, _operands())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = {(r.name, plain(r.arguments)) for r in recording.records}
    for name, arguments in EXPECTED:
        if (name, plain(arguments)) not in found:
            others = sorted(text for other, text in found if other == name)
            return f"{name}{plain(arguments)} is now {' or '.join(others) or 'not reported'}"
    return ""


def plain(arguments: Sequence[Any]) -> str:
    """Arguments as text in which lists are tuples; 1, 1.0 and True differ."""
    return repr(_tuples(arguments))


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, (list, tuple)) else x  # pyright: ignore[reportUnknownArgumentType]


def _operands() -> list[mx.array]:
    floats = {"x": (2, 32), "s": (8, 1), "u": (3, 32)}
    x, s, u = (mx.zeros(shape) for shape in floats.values())
    w, w4 = mx.zeros((8, 4), mx.uint32), mx.ones((8, 4), mx.uint32)
    return [x, w, s, w4, mx.zeros((8, 1), mx.uint8), mx.zeros(3, mx.uint32), u]
