"""A quantized value made in the graph, of the arrays that store it, which code for MLX's kernels passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import F32, U32, DType
from qgraph.ir.op import Op, Operand, Storage, Types
from qgraph.ir.types import Packing, TensorType
from qgraph.ops.quantize import DEFAULT, Quantize
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
            raise DTypeError(f"pack: the words are {packed}", fix="pass u32 words, their axis last")
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


@dataclass(frozen=True)
class QuantizeParts(Op):
    """The arrays that store a value quantized along its last axis: words, scales and, if affine, biases.

    For code that keeps them apart. As one value, see `qgraph.ops.quantized.Quantize`.
    """

    name = "quantize_parts"
    quantization: Quantization = DEFAULT
    flops_per_element = 6

    def infer(self, w: TensorType, *global_scale: TensorType) -> Types:
        """The components of the quantized value's type."""
        whole = Quantize(self.quantization).infer(w, *global_scale)
        return tuple(TensorType(part.shape, part.dtype) for part in whole.storage)[: self._count()]

    def _count(self) -> int:
        return 2 + self.quantization.has_biases

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.quantize`."""
        return Quantize(self.quantization).call(operands, inputs)

    def reference(self, w: Any, *global_scale: Any) -> Any:
        """What MLX makes of it: which words stand for a number is MLX's definition."""
        import mlx.core as mx
        import numpy as np

        given = [mx.array(np.ascontiguousarray(x, np.float32)) for x in (w, *global_scale)]
        types = tuple(TensorType(tuple(x.shape), F32) for x in given)
        names = tuple(f"x{i}" for i in range(len(given)))
        made = eval(
            Quantize(self.quantization).call(names, types), {"mx": mx}, dict(zip(names, given, strict=True))
        )
        parts = [np.array(x) for x in made]
        return tuple(x.astype(np.float64) if x.dtype.kind == "f" else x for x in parts)
