"""The reference interpreter: a graph in NumPy, in float64. The oracle of the tests, never the product.

A quantized value is the array of its numbers. In "ideal" mode floats are never rounded; "faithful" mode
rounds every result to its dtype, as an executor that computes each op exactly would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from qgraph.ir.dtypes import DType
from qgraph.ir.graph import Graph, Value
from qgraph.ir.op import Input
from qgraph.quant import QuantizedTensor, unpack

Mode = Literal["ideal", "faithful"]


def to_numpy(x: mx.array | QuantizedTensor) -> Any:
    """An array as the interpreter holds it: float64 for floats, the numbers of a quantized value."""
    if isinstance(x, QuantizedTensor):
        x = _numbers(x)
    if mx.issubdtype(x.dtype, mx.floating):
        return _array(x.astype(mx.float32) if x.dtype != mx.float64 else x).astype(np.float64)
    return _array(x)


def _array(x: Any) -> Any:
    return np.array(x)


def _numbers(x: QuantizedTensor) -> mx.array:
    """Unpacked in f32 from f32 scales: MLX computes s * q + b in the dtype of the scales."""
    if x.biases is None:
        return unpack(x, mx.float32)
    scales, biases = x.scales.astype(mx.float32), x.biases.astype(mx.float32)
    wide = QuantizedTensor(x.packed, scales, biases, x.quantization, dtype=mx.float32, axis=x.axis)
    return unpack(wide, mx.float32)


def evaluate(graph: Graph, inputs: Sequence[Any], mode: Mode = "ideal") -> list[Any]:
    """The outputs of `graph` for NumPy inputs (see `to_numpy`), in order."""
    values: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
    if mode == "faithful":
        values = {v: round_to(v.type.dtype, x) for v, x in values.items()}
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if isinstance(node.op, Input):
                continue
            made = node.op.reference(*(values[v] for v in node.inputs))
            results = made if len(node.outputs) > 1 else (made,)
            for v, x in zip(node.outputs, results, strict=True):
                values[v] = round_to(v.type.dtype, x) if mode == "faithful" and v.type.packing is None else x
    return [values[v] for v in graph.outputs]


def round_to(dtype: DType, x: Any) -> Any:
    """`x` rounded to `dtype`, still as float64; exact dtypes pass.

    >>> from qgraph.ir.dtypes import BF16
    >>> float(round_to(BF16, np.float64(1.003)))
    1.0
    """
    if not dtype.is_float or dtype.name == "f64":
        return x
    if dtype.name == "bf16":
        return _round_bfloat16(np.asarray(x, np.float32))
    return np.asarray(x).astype({"f16": np.float16, "f32": np.float32}[dtype.name]).astype(np.float64)


def _round_bfloat16(x: Any) -> Any:
    """Keep the upper 16 bits of a float32, rounding halves to even; what is not finite stays."""
    bits: Any = x.view(np.uint32)
    rounded: Any = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    kept: Any = rounded.astype(np.uint32).view(np.float32)
    return np.asarray(np.where(np.isfinite(x), kept, x), np.float64)
