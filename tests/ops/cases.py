"""What the sweep runs: an op, its operands, and how its result is compared; strategies that draw them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from qgraph.ir.dtypes import BF16, BOOL, F16, F32, I8, I16, I32, I64, U8, U16, U32, U64, DType
from qgraph.ir.op import Op
from qgraph.quant import Quantization, QuantizedTensor, pack

FLOATS = (F32, F16, BF16)
SIGNED = (I8, I16, I32, I64)
INTS = (*SIGNED, U8, U16, U32, U64)
ANY = (*FLOATS, BOOL, *INTS)
SCHEMES = [
    *(Quantization(bits=b, group_size=32) for b in (2, 3, 4, 5, 6, 8)),
    *(Quantization.of_mode(m) for m in ("mxfp4", "mxfp8", "nvfp4")),
]


@dataclass(repr=False)
class Case:
    """One evaluation. `compare`: how values are compared in float32 and for exact dtypes.

    "exact": equal. "near": within the elementwise tolerance. "sum": the bound of a sum of `k` terms, with
    `magnitude` (or the reference on magnitudes) as A. "sorted": equal after sorting along the op's axis.
    "positions": equal elements at the positions. "parts": several results, all equal. "type": the type only.
    """

    op: Op
    operands: list[Any] = field(default_factory=list)
    compare: str = "exact"
    k: int = 1
    magnitude: Any = None

    def __repr__(self):
        return f"{self.op}({', '.join(map(repr, self.operands))})"

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))


seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1, 1, 2, 3, 4, 5, 7])
sizes_or_zero = st.sampled_from([1, 2, 3, 4, 5, 7, 0])


@st.composite
def shapes(draw, low=1, high=4, empty=True):
    """Ranks low … high, sizes small, some 1, some 0."""
    rank = draw(st.integers(low, high))
    return tuple(draw(sizes_or_zero if empty else sizes) for _ in range(rank))


@st.composite
def broadcasting(draw, n, shape=None):
    """n shapes that broadcast to one."""
    full = draw(shapes(0)) if shape is None else shape
    out = []
    for _ in range(n):
        cut = draw(st.integers(0, len(full)))
        out.append(tuple(1 if draw(st.booleans()) and s else s for s in full[cut:]))
    out[draw(st.integers(0, n - 1))] = full
    return out


def data(seed, shape, dtype=F32, low=None, high=None, grid=False):
    """An mx.array of order 1; uniform in low … high where given; on multiples of 1/4 with `grid`."""
    rng = np.random.default_rng(seed)
    if dtype is BOOL:
        return mx.array(rng.random(shape) < 0.5)
    if dtype.is_int:
        first = (0 if dtype.name[0] == "u" else -9) if low is None else low
        x = rng.integers(int(first), int(10 if high is None else high), shape)
        return mx.array(x.astype(np.int64)).astype(dtype.mlx)
    x = rng.standard_normal(shape) if low is None else rng.uniform(low, high, shape)
    x = np.round(x * 4) / 4 if grid else x
    return mx.array(np.asarray(x, np.float32)).astype(dtype.mlx)


@st.composite
def arrays(draw, shape=None, dtypes=(F32,), **limits):
    """An array of a drawn shape and dtype."""
    shape = draw(shapes()) if shape is None else shape
    return data(draw(seeds), shape, draw(st.sampled_from(dtypes)), **limits)


def indices(seed, shape, n, dtype=I32):
    """Indices from -n to n - 1, or from 0 for an unsigned dtype; some arrays hold others, out of range."""
    rng = np.random.default_rng(seed)
    over = 3 if rng.integers(3) == 0 else 0
    x = rng.integers(0 if dtype.name[0] == "u" else -n - over, n + over, shape)
    return mx.array(x.astype(np.int64)).astype(dtype.mlx)


INDEX_DTYPES = st.sampled_from([I32, U32, I64, U8, I8, U64])


@st.composite
def packed(draw, rank=None, schemes=tuple(SCHEMES), lead=None):
    """A QuantizedTensor, its packed axis last or moved in front of the rows."""
    q = draw(st.sampled_from(schemes))
    if lead is None:
        rank = draw(st.integers(2, 4)) if rank is None else rank
        lead = tuple(draw(st.sampled_from([1, 2, 3])) for _ in range(rank - 1))
    k = q.group_size * draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([F32, BF16]))
    return pack(data(draw(seeds), (*lead, k), dtype), q)


def turned(w: QuantizedTensor) -> QuantizedTensor:
    """The last two axes exchanged: the same storage."""
    return QuantizedTensor(
        w.packed, w.scales, w.biases, w.quantization, w.global_scale, w.dtype, -2 if w.axis == -1 else -1
    )


def axis_of(draw, shape):
    """Any axis."""
    return draw(st.integers(0, len(shape) - 1))


def axes_of(draw, shape):
    """Any set of axes, in order."""
    return tuple(i for i in range(len(shape)) if draw(st.booleans()))


def kind(dtype: DType) -> str:
    """One of the three groups that rules distinguish."""
    return "float" if dtype.is_float else "bool" if dtype is BOOL else "int"
