"""Attention as one op, which becomes MLX's fused kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import promote
from qgraph.ir.op import NATIVE, Op, Operand, Types
from qgraph.ir.types import TensorType
from qgraph.ops import native
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand
from qgraph.ops.nn import check_float

__all__ = ["scaled_dot_product_attention"]


_np: Any = np  # for expressions of Any, whose types NumPy's stubs do not know


@dataclass(frozen=True)
class Attention(Op):
    """softmax(scale * q @ k.T + mask) @ v, every head of k and v serving several of q.

    Operands: q, k, v, then the mask where `mask` is "array", then the sinks: one score per head that
    takes part in the softmax and has no value.
    """

    name = "scaled_dot_product_attention"
    scale: float = 1.0
    mask: str | None = None
    sinks: bool = False
    kernel: str = ""

    def infer(self, q: TensorType, k: TensorType, v: TensorType, *rest: TensorType) -> TensorType:
        """(batch, heads, length of q, features of v), in the promoted dtype."""
        self._check_shapes(q, k, v)
        dtype = promote(q.dtype, k.dtype, v.dtype)
        if len(rest) != (self.mask == "array") + self.sinks:
            raise ShapeError(f"{self.name}: {len(rest)} operands beside q, k, v")
        if self.mask == "array":
            self._check_mask(rest[0], (*q.shape[:3], k.shape[2]))
        for t in rest:
            if promote(t.dtype, dtype) is not dtype:
                raise DTypeError(
                    f"{self.name}: a mask or sinks of {t.dtype} with {dtype}", fix=f"cast to {dtype}"
                )
        if self.sinks and rest[-1].shape != q.shape[1:2]:
            raise ShapeError(
                f"{self.name}: sinks {rest[-1].shape}", fix=f"give one for each of {q.shape[1]} heads"
            )
        return TensorType((*q.shape[:3], v.shape[3]), dtype)

    def _check_shapes(self, q: TensorType, k: TensorType, v: TensorType) -> None:
        for t in (q, k, v):
            check_float(self.name, t)
            if t.ndim != 4 or t.shape[0] != q.shape[0]:
                raise ShapeError(
                    f"{self.name}: q {q.shape}, k {k.shape}, v {v.shape}",
                    fix="give (batch, heads, length, features)",
                )
        if q.shape[3] != k.shape[3] or k.shape[1:3] != v.shape[1:3]:
            raise ShapeError(f"{self.name}: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
        if not k.shape[1] or q.shape[1] % k.shape[1]:
            raise ShapeError(f"{self.name}: {q.shape[1]} heads are no multiple of {k.shape[1]} key heads")
        if not k.shape[2]:
            raise ShapeError(
                f"{self.name}: there are no keys, {k.shape}", fix="attend to at least one position"
            )

    def _check_mask(self, mask: TensorType, scores: tuple[int, ...]) -> None:
        sizes = zip(mask.shape[::-1], scores[::-1], strict=False)
        if mask.ndim > 4 or any(m not in (1, s) for m, s in sizes):
            raise ShapeError(
                f"{self.name}: a mask {mask.shape} does not broadcast to {scores}",
                fix="make it (batch, heads, length of q, length of k), or 1 on some axes",
            )

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.fast.scaled_dot_product_attention`."""
        q, k, v, *rest = operands
        mask = rest.pop(0) if self.mask == "array" else repr(self.mask)
        sinks = f", sinks={rest[0]}" if rest else ""
        arguments = f"{q}, {k}, {v}, scale={self.scale!r}, mask={mask}{sinks}"
        return f"{NATIVE if self.kernel else 'mx.fast'}.scaled_dot_product_attention({arguments})"

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """For the float types, masks of them or of booleans."""
        known = all(t.dtype in native.DTYPES or t.dtype.name == "bool" for t in inputs)
        return replace(self, kernel=NATIVE) if known else None

    def reference(self, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        """The formula. A row whose keys are all masked attends to all equally, as on MLX's CPU path."""
        left = list(rest)
        groups = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
        scores = self._masked(self.scale * (q @ np.swapaxes(k, -1, -2)), left)
        top = np.max(scores, -1, keepdims=True)
        extra = np.reshape(left[0], (1, -1, 1, 1)) if left else None
        top = top if extra is None else np.maximum(top, extra)
        with np.errstate(invalid="ignore"):
            e = np.exp(scores - top)
            total = np.sum(e, -1, keepdims=True)
            return (e / (total if extra is None else total + np.exp(extra - top))) @ v

    def _masked(self, scores: Any, rest: list[Any]) -> Any:
        mask: Any
        if self.mask is None:
            return scores
        if self.mask == "causal":
            length, keys = scores.shape[-2:]
            mask = _np.arange(keys) <= _np.arange(length)[:, None] + keys - length
        else:
            mask = rest.pop(0)
        if mask.dtype == np.bool_:
            return np.where(mask, scores, np.float64(np.finfo(np.float32).min))
        return scores + mask

    def flops(self, inputs: Types, outputs: Types) -> int:
        """Two products of matrices, and the softmax between them."""
        q, k, v = inputs[:3]
        scores = prod(q.shape[:3]) * k.shape[2]
        return scores * (2 * q.shape[3] + 2 * v.shape[3] + 12)


@frontend
def scaled_dot_product_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float,
    mask: str | ArrayLike | None = None,
    sinks: ArrayLike | None = None,
) -> Array:
    """``softmax(scale * q @ k.T + mask) @ v`` for q (batch, heads, length, features).

    k and v may have fewer heads, which then serve several of q's. `mask`: None, "causal" (the last query
    sees all keys), a boolean array (True: attend) or one that is added. `sinks`: one score for each head.
    Shape: (batch, heads, length of q, features of v).  Source: mlx.core.fast.scaled_dot_product_attention.
    """
    if isinstance(mask, str) and mask != "causal":
        raise ShapeError(
            f"scaled_dot_product_attention: no mask {mask!r}", fix='use None, "causal" or an array'
        )
    kind = mask if mask is None or isinstance(mask, str) else "array"
    rest = ([operand(mask)] if kind == "array" else []) + ([] if sinks is None else [operand(sinks)])
    op = Attention(float(scale), kind, sinks is not None)
    return apply(op, operand(q), operand(k), operand(v), *rest)
