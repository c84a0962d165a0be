"""dot with a packed operand → quantized_matmul.

dot(x, transpose(w))   → quantized_matmul(x, w, transpose=True)     w stored (out, in)
dot(x, w)              → quantized_matmul(x, w, transpose=False)    w stored (in, out)
dot(w, x)              → transpose(dot(transpose(x), transpose(w)))
dot(w1, w2)            → dot of the larger one with the smaller one dequantized
gather_mm(x, w, …)     → gather_qmm(x, w, …)                        mixture of experts
addmm(c, x, w)         → add(dot(x, w), c)                          which the above then meet; either side

The frontends bring einsum, tensordot, inner and vecdot to this form. Any view of a weight that keeps
its groups whole is still packed here, whatever axes it permuted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import qgraph as qg
from qgraph.ir.dtypes import DType, promote
from qgraph.ops.dispatch import apply
from qgraph.ops.linear import AddMm
from qgraph.ops.moe import GatherMm, GatherQmm
from qgraph_passes.fold_transpose import ComposeTransposes

KERNEL_DTYPES = ("f32", "f16", "bf16")


class Product(qg.Rule):
    """What all products with one packed operand require."""

    def check(self, m: qg.Match, x: Any, w: Any, **_: Any) -> None:
        m.require(x.type.packing is None, "both operands are quantized", x)
        m.require(m.type.dtype.name in KERNEL_DTYPES, f"there is no kernel for {m.type.dtype}", x)
        axis = w.type.packing.axis
        m.require(axis in (-1, -2), f"groups run along axis {axis}, a batch axis of the product", w)


class RightOperand(Product):
    """dot(x, w) → quantized_matmul(x, w)."""

    def pattern(self, x: qg.Array, w: qg.Quantized) -> Any:
        return qg.dot(x, w)

    def rewrite(self, m: qg.Match, x: Any, w: Any) -> qg.Array:
        transpose = w.type.packing.axis == -2
        stored = qg.swapaxes(w, -1, -2) if transpose else w
        # MLX would take a lower rank of x to mean the first matrix of w only.
        rank = x.ndim
        if stored.ndim > 2 and rank < 3:
            x = qg.reshape(x, (1,) * (3 - rank) + x.shape)
        out = kernel(qg.quantized_matmul, x, stored, m.type.dtype, transpose=transpose)
        return qg.reshape(out, m.type.shape)


class LeftOperand(Product):
    """dot(w, x) → (xᵀ wᵀ)ᵀ, whose right operand is packed."""

    def pattern(self, w: qg.Quantized, x: qg.Array) -> Any:
        return qg.dot(w, x)

    def rewrite(self, m: qg.Match, w: Any, x: Any) -> qg.Array:
        flipped = qg.swapaxes(w, -1, -2)
        if x.ndim == 1:
            return qg.dot(x, flipped)
        return qg.swapaxes(qg.dot(qg.swapaxes(x, -1, -2), flipped), -1, -2)


class BothOperands(qg.Rule):
    """dot(w1, w2) → dot with the smaller one dequantized: MLX has no kernel for two packed operands."""

    def pattern(self, a: qg.Quantized, b: qg.Quantized) -> Any:
        return qg.dot(a, b)

    def rewrite(self, m: qg.Match, a: Any, b: Any) -> qg.Array:
        smaller = "left" if a.type.nbytes <= b.type.nbytes else "right"
        m.note(f"both operands are quantized: the {smaller} one, the smaller, is dequantized")
        return qg.dot(qg.dequantize(a), b) if smaller == "left" else qg.dot(a, qg.dequantize(b))


class Split(qg.Rule):
    """What both rules for addmm require."""

    def check(self, m: qg.Match, c: Any, **_: Any) -> None:
        m.require(m.type.dtype.name in KERNEL_DTYPES, f"there is no kernel for {m.type.dtype}", c)


class SplitAddMm(Split):
    """addmm(c, x, w) → add(alpha * dot(x, w), beta * c): no quantized kernel adds."""

    def pattern(self, c: qg.Array, x: qg.Array, w: qg.Quantized) -> Any:
        return qg.addmm(c, x, w)

    def rewrite(self, m: qg.Match, c: Any, x: Any, w: Any) -> qg.Array:
        return _split(m, c, x, w)


class SplitAddMmLeft(Split):
    """The same with a packed left operand."""

    def pattern(self, c: qg.Array, w: qg.Quantized, x: qg.Array) -> Any:
        return qg.addmm(c, w, x)

    def rewrite(self, m: qg.Match, c: Any, w: Any, x: Any) -> qg.Array:
        return _split(m, c, w, x)


def _split(m: qg.Match, c: Any, a: Any, b: Any) -> qg.Array:
    """In the dtype of the sum, to which MLX's addmm promotes all three."""
    op = m.root.op
    assert isinstance(op, AddMm)
    dtype = m.type.dtype.mlx
    product: Any = qg.dot(qg.astype(a, dtype), qg.astype(b, dtype))
    product = product if op.alpha == 1 else qg.multiply(product, op.alpha)
    c = qg.astype(c, dtype)
    return qg.add(product, c if op.beta == 1 else qg.multiply(c, op.beta))


class Gather(Product):
    """gather_mm(x, w, …) → gather_qmm(x, w, …)."""

    def rewrite(self, m: qg.Match, x: Any, w: Any, **indices: Any) -> qg.Array:
        transpose, op = w.type.packing.axis == -2, m.root.op
        assert isinstance(op, GatherMm)
        stored = qg.swapaxes(w, -1, -2) if transpose else w
        gather = GatherQmm(op.lhs, op.rhs, op.sorted_indices, transpose)

        def gathered(x: Any, w: Any) -> Any:
            return apply(gather, x, w, *indices.values())

        return kernel(gathered, x, stored, m.type.dtype)


class GatherBoth(Gather):
    """gather_mm with indices of both sides."""

    def pattern(self, x: qg.Array, w: qg.Quantized, i: qg.Array, j: qg.Array) -> Any:
        return qg.gather_mm(x, w, i, j)


class GatherOne(Gather):
    """gather_mm with indices of one side."""

    def pattern(self, x: qg.Array, w: qg.Quantized, i: qg.Array) -> Any:
        return qg.gather_mm(x, w, i)


class GatherNone(Gather):
    """gather_mm of all matrices in order."""

    def pattern(self, x: qg.Array, w: qg.Quantized) -> Any:
        return qg.gather_mm(x, w)


def kernel(function: Any, x: Any, w: Any, dtype: DType, **options: Any) -> Any:
    """Call a quantized kernel such that the result has `dtype`: what MLX would promote silently is cast."""
    x = qg.astype(x, promote(x.type.dtype, dtype).mlx)
    return qg.astype(function(x, w, **options), dtype.mlx)


@dataclass(frozen=True)
class QuantizeDot(qg.Pass):
    """Contract with packed words wherever an operand is packed."""

    name = "quantize-dot"
    after = ("fold-transpose",)
    rules = (
        *(SplitAddMm, SplitAddMmLeft, BothOperands, RightOperand, LeftOperand),
        *(GatherBoth, GatherOne, GatherNone, ComposeTransposes),
    )
