"""A quantized value made in the graph, of the arrays that store it: what code written for MLX's kernels passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import F32, U32, DType
from qgraph.ir.op import Op, Operand, Storage, Types
from qgraph.ir.types import Packing, TensorType
from qgraph.ops.quantized import DEFAULT
from qgraph.quant import Quantization


@dataclass(frozen=True)
class Pack(Op):
    """The quantized value that packed words, scales, biases and a global scale (as given) store."""

    name = "pack"
    view = True
    packed = True
    quantization: Quantization = DEFAULT
    dtype: DType = F32

    def infer(self, packed: TensorType, scales: TensorType, *rest: TensorType) -> TensorType:
        """The shape of the words with the last axis counted in numbers."""
        q = self.quantization
        if packed.dtype is not U32 or not packed.shape:
            raise DTypeError(f"pack: the words are {packed}", fix="pass u32 words, packed along the last axis")
        has_global = len(rest) > q.has_biases
        shape = (*packed.shape[:-1], packed.shape[-1] * 32 // q.bits)
        out = TensorType(shape, self.dtype, Packing(q, scales.dtype, -1, has_global))
        out.check()
        given = [TensorType(p.shape, p.dtype) for p in out.storage]
        if given != [packed, scales, *rest]:
            found, wanted = (", ".join(map(str, t)) for t in ([packed, scales, *rest], given))
            raise ShapeError(f"pack: {found} do not store {out}", fix=f"it is stored as {wanted}")
        return out

    def carry(self, *parts: TensorType) -> Packing | str:
        return self.infer(*parts).packing or ""

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """The arrays themselves."""
        packed, scales, *rest = operands
        biases = rest.pop(0) if self.quantization.has_biases else None
        return Storage(packed, scales, biases, rest[0] if rest else None)

    def reference(self, packed: Any, scales: Any, *rest: Any) -> Any:
        """The numbers."""
        from qgraph.ops.formats import decode

        return decode(self.quantization, packed, scales, *rest)

