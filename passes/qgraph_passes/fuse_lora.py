"""A LoRA branch beside a packed base → quantized_lora_matmul. The packed words stay as they are.

quantized_matmul(x, w) + s * dot(dot(x, a), b)             in any order, with casts (mlx-lm casts the
                                                           branch to x's dtype before it adds)
quantized_matmul(x, w) + dot(dot(x, a), b)                 a scale of 1
quantized_matmul(x, w) + c + s * dot(dot(x, a), b)         c the bias of the base: it is added last
with reassociate=true also, since these round elsewhere:
quantized_matmul(x, w) + dot(dot(x, s * a), b)
dot(x, w + s * dot(a, b))                                  the merged form: never built
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import qgraph as qg
from qgraph.ir.dtypes import promote
from qgraph.ops.quantized import QuantizedMatmul
from qgraph.rewrite import Rule
from qgraph_passes.fold_transpose import ComposeTransposes


class Lora(qg.Rule):
    """What all spellings share: the conditions, and the fused op."""

    through = ("cast",)

    def check(self, m: qg.Match, x: Any, w: Any, a: Any, b: Any, **_: Any) -> None:
        m.require(all(op.dtype.is_float for op in m.all_skipped()), "a cast in the branch is not to a float")
        m.require(w.ndim == 2, f"the base weight has {w.ndim} axes, expected 2", w)
        m.require(a.ndim == 2 and b.ndim == 2, f"the adapters have {a.ndim} and {b.ndim} axes, expected 2", a)
        m.require(a.shape[1] <= min(a.shape[0], b.shape[1]), f"rank {a.shape[1]} is not low", a)

    def rewrite(self, m: qg.Match, x: Any, w: Any, a: Any, b: Any, s: Any = 1.0) -> qg.Array:
        return _fused(m, x, w, a, b, s)


class LoraBranch(Lora):
    """quantized_matmul(x, w) + s * dot(dot(x, a), b)."""

    def pattern(self, x: qg.Array, w: qg.Quantized, a: qg.Array, b: qg.Array, s: qg.Scalar) -> Any:
        return _base(x, w) + s * qg.dot(qg.dot(x, a), b)


class LoraBranchUnscaled(Lora):
    """quantized_matmul(x, w) + dot(dot(x, a), b)."""

    def pattern(self, x: qg.Array, w: qg.Quantized, a: qg.Array, b: qg.Array) -> Any:
        return _base(x, w) + qg.dot(qg.dot(x, a), b)


class LoraBranchBiased(Lora):
    """quantized_matmul(x, w) + c + s * dot(dot(x, a), b)."""

    def pattern(
        self, x: qg.Array, w: qg.Quantized, c: qg.Array, a: qg.Array, b: qg.Array, s: qg.Scalar
    ) -> Any:
        return _base(x, w) + c + s * qg.dot(qg.dot(x, a), b)

    def check(self, m: qg.Match, x: Any, w: Any, a: Any, b: Any, **other: Any) -> None:
        super().check(m, x, w, a, b)
        c = other["c"]
        m.require(c.ndim == 1, f"what is added to the base has {c.ndim} axes, a bias has one", c)
        m.require(c.shape[0] in (1, b.shape[1]), f"what is added to the base widens it to {c.shape[0]}", c)

    def rewrite(
        self, m: qg.Match, x: Any, w: Any, a: Any, b: Any, s: Any = 1.0, *, c: Any = None
    ) -> qg.Array:
        return _fused(m, x, w, a, b, s) + qg.astype(c, m.type.dtype.mlx)


class LoraScaleInA(Lora):
    """quantized_matmul(x, w) + dot(dot(x, s * a), b)."""

    def pattern(self, x: qg.Array, w: qg.Quantized, a: qg.Array, b: qg.Array, s: qg.Scalar) -> Any:
        return _base(x, w) + qg.dot(qg.dot(x, s * a), b)


class LoraMergedWeight(Lora):
    """dot(x, w + s * dot(a, b)), w packed."""

    def pattern(self, x: qg.Array, w: qg.Quantized, a: qg.Array, b: qg.Array, s: qg.Scalar) -> Any:
        return qg.dot(x, w + s * qg.dot(a, b))

    def rewrite(self, m: qg.Match, x: Any, w: Any, a: Any, b: Any, s: Any = 1.0) -> qg.Array:
        return _fused(m, x, w, a, b, s, transpose=w.type.packing.axis == -2)


def _base(x: Any, w: Any) -> Any:
    base: Any = qg.quantized_matmul(x, w)
    return base.named("base")


def _fused(m: qg.Match, x: Any, w: Any, a: Any, b: Any, s: Any, transpose: bool | None = None) -> Any:
    """The fused op, in the wider dtype where base and sum differ, then the sum's dtype and shape.

    A scale of shape (1, 1) gives the sum axes of size 1 that the base does not have.
    """
    if transpose is None:
        base = m.op("base")
        assert isinstance(base, QuantizedMatmul)
        transpose = base.transpose
    elif transpose:
        w = qg.swapaxes(w, -1, -2)
    dtype = m.type.dtype
    wide = qg.astype(x, promote(x.type.dtype, dtype).mlx)
    out = qg.quantized_lora_matmul(wide, w, a, b, s, transpose=transpose)
    return qg.reshape(qg.astype(out, dtype.mlx), m.type.shape)


@dataclass(frozen=True)
class FuseLora(qg.Pass):
    """Compute base and branch together."""

    name = "fuse-lora"
    after = ("quantize-dot",)
    reassociate: bool = False

    def active_rules(self) -> tuple[Rule, ...]:
        """The exact spellings; with `reassociate` those that round elsewhere too."""
        extra = (LoraScaleInA(), LoraMergedWeight()) if self.reassociate else ()
        return (LoraBranch(), LoraBranchBiased(), *extra, LoraBranchUnscaled(), ComposeTransposes())
