"""The ops that qgraph's native CPU kernels compute, and the calls that programs make of them.

An op with a native kernel has the field `kernel`; see `qgraph.ir.op.KERNEL` and `Op.native`.
"""

from __future__ import annotations

from typing import Any

from qgraph.ir.dtypes import BF16, F16, F32
from qgraph.ir.op import NATIVE, Storage, literal
from qgraph.ir.types import TensorType
from qgraph.quant import Quantization

DTYPES = (F32, BF16, F16)  # of activations, scales and results


def floats(*types: TensorType) -> bool:
    """Whether the kernels know the dtypes."""
    return all(t.dtype in DTYPES for t in types)


def call(function: str, *arguments: object, **keywords: object) -> str:
    """Source of a call: positional arguments are source, keywords are values (of which a DType is one).

    >>> call("rms_norm", "x", None, eps=1e-6)
    'native.rms_norm(x, None, eps=1e-06)'
    """
    given = [*map(str, arguments), *(f"{k}={literal(v)}" for k, v in keywords.items())]
    return f"{NATIVE}.{function}({', '.join(given)})"


def scheme(q: Quantization) -> dict[str, Any]:
    """The keywords by which the kernels name a scheme."""
    return {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}


def components(w: Storage) -> tuple[Any, ...]:
    """Words, scales, biases and global scale, None where there is none."""
    return (w.packed, w.scales, w.biases, w.global_scale)
