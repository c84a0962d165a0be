"""What the inputs of a fuzzed graph may hold, written into their labels, so that the text form says all.

%x3.in.-2.4: i32[3]    whole numbers from -2 to 4 (for a float: any number between them)
%x3.perm.1.5: i32[2,3] along axis 1 different numbers out of 0 … 4
%x3: f32[3]            normal floats, whole numbers 0 and 1, both booleans
"""

from __future__ import annotations

import re
from zlib import crc32

import mlx.core as mx
import numpy as np

from qgraph.execute.reference import to_numpy
from qgraph.ir import Graph, TensorType, Value
from qgraph.quant import QuantizedTensor, pack

_WITHIN = re.compile(r".*\.in\.(-?\d+)\.(-?\d+)")
_PERMUTED = re.compile(r".*\.perm\.(\d+)\.(\d+)")


def within(label: str, low: int, high: int) -> str:
    return f"{label}.in.{low}.{high}"


def permuted(label: str, axis: int, size: int) -> str:
    return f"{label}.perm.{axis}.{size}"


def limits(label: str) -> tuple[int, int] | None:
    """The range that a label names."""
    m = _WITHIN.fullmatch(label)
    return (int(m[1]), int(m[2])) if m else None


def data(label: str, t: TensorType, rng: np.random.Generator):
    """Numbers of a logical type, as the reference holds them."""
    m = _PERMUTED.fullmatch(label)
    if m:
        axis, size = int(m[1]), int(m[2])
        full = [size if i == axis else n for i, n in enumerate(t.shape)]
        order = np.argsort(rng.random(full), axis)
        return order[tuple(slice(0, n) for n in t.shape)].astype(t.dtype.mlx_name)
    range_ = limits(label)
    if t.dtype.name == "bool":
        return rng.random(t.shape) < 0.5
    if t.dtype.is_float:
        return np.asarray(rng.uniform(*range_, t.shape) if range_ else rng.standard_normal(t.shape))
    if t.dtype.is_complex:
        return rng.standard_normal(t.shape) + 1j * rng.standard_normal(t.shape)
    low, high = range_ or (0, 1)
    return rng.integers(low, high + 1, t.shape).astype(t.dtype.mlx_name)


def numbers(graph: Graph, seed: int) -> dict[Value, object]:
    """Inputs for the reference."""
    return {v: data(v.op.label, v.type, _rng(v, seed)) for v in graph.inputs}


def arrays(graph: Graph, seed: int) -> dict[Value, mx.array | QuantizedTensor]:
    """Inputs for MLX, packed where the type says so."""
    return {v: _array(v.type, data(v.op.label, v.type, _rng(v, seed))) for v in graph.inputs}


def _rng(v: Value, seed: int) -> np.random.Generator:
    """One for each input: the numbers of the others stay as they are while a graph shrinks."""
    return np.random.default_rng([seed, crc32(v.op.label.encode())])


def as_numbers(inputs):
    """What the reference holds for MLX inputs."""
    return {v: to_numpy(x) for v, x in inputs.items()}


def _array(t: TensorType, x) -> mx.array | QuantizedTensor:
    dense = mx.array(np.asarray(x, np.float32) if t.dtype.is_float else x)
    if t.packing is None:
        return dense.astype(t.dtype.mlx)
    q = t.packing.quantization
    stored = dense.transpose(t.storage_axes).astype((t.packing.scales if q.has_biases else t.dtype).mlx)
    scale = mx.max(mx.abs(stored)).astype(mx.float32) if t.packing.global_scale else None
    w = pack(mx.contiguous(stored), q, scale)
    return QuantizedTensor(
        w.packed, w.scales, w.biases, q, w.global_scale, dtype=t.dtype.mlx, axis=t.packing.axis
    )
