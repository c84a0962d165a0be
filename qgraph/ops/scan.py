"""Cumulative ops: running sums, products and extremes along an axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from qgraph.ir.dtypes import BOOL, I32, DType, floating
from qgraph.ir.op import Op, Operand, Types, literal
from qgraph.ir.types import TensorType, normalize_axis
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of
from qgraph.ops.elementwise import Rule, same
from qgraph.ops.reduce import widens
from qgraph.ops.shape import flatten

__all__ = ["cummax", "cummin", "cumprod", "cumsum", "logcumsumexp"]


_np: Any = np  # for expressions of Any, whose types NumPy's stubs do not know


@dataclass(frozen=True)
class Cumulative(Op):
    """Running results along `axis`; not `inclusive`: of the elements before each one."""

    axis: int = 0
    reverse: bool = False
    inclusive: bool = True
    rule: ClassVar[Rule] = staticmethod(same)

    def infer(self, x: TensorType) -> TensorType:
        """The shape of x."""
        normalize_axis(self.axis, x.ndim)
        return TensorType(x.shape, type(self).rule(x.dtype))

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """The template; 16-bit operands run in float32, since MLX would keep the running result in 16 bit."""
        if not widens(inputs[0].dtype):
            return super().emit(operands, inputs, outputs)
        wide = super().emit((f"{operands[0]}.astype(mx.float32)",), inputs, outputs)
        return f"{wide}.astype({literal(outputs[0].dtype)})"

    def run(self, x: Any, accumulate: Callable[..., Any], start: Any) -> Any:
        """`accumulate` along the axis, from the other end and shifted by one as the parameters say."""
        x = np.moveaxis(np.asarray(x), self.axis, 0)
        x = x[::-1] if self.reverse else x
        out = accumulate(x)
        if not self.inclusive:
            out = np.concatenate([np.full_like(out[:1], start), out[:-1]])
        return np.moveaxis(out[::-1] if self.reverse else out, 0, self.axis)


def _cumulative(
    name: str, meaning: str, reference: Callable[[Any], Any], start: Callable[[Any], Any], rule: Rule = same
) -> Callable[..., Array]:
    def meaning_in_numpy(self: Cumulative, x: Any) -> Any:
        return self.run(x, reference, start(np.asarray(x).dtype))

    body = {
        "name": name,
        "reference": meaning_in_numpy,
        "rule": staticmethod(rule),
        "mlx": f"mx.{name}({{0}}, axis={{axis}}, reverse={{reverse}}, inclusive={{inclusive}})",
        "__module__": __name__,
    }
    kind = cast(type[Cumulative], type(name.title(), (Cumulative,), body))

    def function(
        a: ArrayLike, /, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True
    ) -> Array:
        a = flatten(a) if axis is None else operand(a)
        return apply(kind(normalize_axis(axis or 0, len(shape_of(a))), reverse, inclusive), a)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{meaning} along `axis` (None: of a flattened).\n\n    `reverse` starts at the end; without "
        f"`inclusive` an element does not count for itself.\n    Source: mlx.core.{name}.\n    "
    )
    return frontend(function)


def _summing(dtype: DType) -> DType:
    return I32 if dtype is BOOL else dtype


def _lowest(kind: Any) -> Any:
    return -np.inf if kind.kind == "f" else False if kind == np.bool_ else np.iinfo(kind).min


def _highest(kind: Any) -> Any:
    return np.inf if kind.kind == "f" else True if kind == np.bool_ else np.iinfo(kind).max


def _product(x: Any) -> Any:
    return _np.cumprod(x, 0, x.dtype)


cumsum = _cumulative(
    "cumsum",
    "Running sums",
    lambda x: np.cumsum(x, 0, np.int32 if x.dtype == np.bool_ else x.dtype),
    lambda kind: 0,
    _summing,
)
cumprod = _cumulative("cumprod", "Running products", _product, lambda kind: 1)
cummax = _cumulative("cummax", "Running maxima", lambda x: np.maximum.accumulate(x, 0), _lowest)
cummin = _cumulative("cummin", "Running minima", lambda x: np.minimum.accumulate(x, 0), _highest)
logcumsumexp = _cumulative(
    "logcumsumexp",
    "Running logsumexp",
    lambda x: np.logaddexp.accumulate(np.asarray(x, np.float64), 0),
    lambda kind: -np.inf,
    floating,
)
