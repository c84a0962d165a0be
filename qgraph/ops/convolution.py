"""Convolutions, channels last: one op with all parameters, which the functions of MLX are cases of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import promote
from qgraph.ir.op import Op, Operand, Types, literal
from qgraph.ir.types import Shape, TensorType
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of

__all__ = ["conv1d", "conv2d", "conv3d", "conv_general"]
__all__ += ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]

Sizes = int | Sequence[int]


@dataclass(frozen=True)
class Convolution(Op):
    """Sums over windows of x (batch, …, channels) with weights (out, …, channels / groups).

    x is spread by `input_dilation`, then padded by `low` and `high`; the weights are spread by
    `kernel_dilation`, and with `flip` their order is reversed. One value for each spatial axis.
    """

    name = "conv_general"
    stride: tuple[int, ...] = ()
    low: tuple[int, ...] = ()
    high: tuple[int, ...] = ()
    kernel_dilation: tuple[int, ...] = ()
    input_dilation: tuple[int, ...] = ()
    groups: int = 1
    flip: bool = False

    def infer(self, x: TensorType, w: TensorType) -> TensorType:
        """(batch, windows of each axis, out), in the promoted dtype, which must be a float."""
        dtype = promote(x.dtype, w.dtype)
        if not dtype.is_float:
            raise DTypeError(f"{self.name}: {x.dtype} by {w.dtype}", fix="cast both to a float dtype")
        self._check(x.shape, w.shape)
        return TensorType((x.shape[0], *self._windows(x.shape, w.shape), w.shape[0]), dtype)

    def _check(self, x: Shape, w: Shape) -> None:
        axes = len(x) - 2
        given = (self.stride, self.low, self.high, self.kernel_dilation, self.input_dilation)
        if axes < 1 or len(w) != len(x) or any(len(p) != axes for p in given):
            raise ShapeError(
                f"{self.name}: x {x} and weights {w} with {len(self.stride)} strides",
                fix="give (batch, ..., channels), (out, ..., channels) and a number for each axis between",
            )
        if self.groups < 1 or w[0] % self.groups or x[-1] != w[-1] * self.groups:
            raise ShapeError(
                f"{self.name}: {x[-1]} channels, weights {w} and {self.groups} groups do not fit",
                fix="the channels are weights.shape[-1] * groups; the groups divide weights.shape[0]",
            )
        if self.groups > 1 and axes > 2:
            raise ShapeError(
                f"{self.name}: groups with {axes} axes", fix="MLX has groups for one or two axes"
            )
        if any(n < 1 for n in (*self.stride, *self.kernel_dilation, *self.input_dilation)):
            raise ShapeError(f"{self.name}: a stride or a dilation below 1")
        if any(n < 0 for n in (*self.low, *self.high)):
            raise ShapeError(f"{self.name}: padding {self.low}, {self.high} below 0", fix="slice x instead")

    def _windows(self, x: Shape, w: Shape) -> Shape:
        sizes: list[int] = []
        for i, by in enumerate(self.stride):
            whole = spread(x[i + 1], self.input_dilation[i]) + self.low[i] + self.high[i]
            window = spread(w[i + 1], self.kernel_dilation[i])
            if window > whole or window < 1:
                raise ShapeError(
                    f"{self.name}: a window of {window} on axis {i + 1} of {x}, with padding {whole}",
                    fix="pad more, or use a smaller kernel",
                )
            sizes.append((whole - window) // by + 1)
        return tuple(sizes)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.conv_general`; without channels the sums are 0."""
        out = outputs[0]
        if inputs[0].size == 0 or inputs[1].size == 0:
            return f"mx.zeros({out.shape}, {literal(out.dtype)})"
        x, w = operands
        return (
            f"mx.conv_general({x}, {w}, stride={list(self.stride)}, "
            f"padding=({list(self.low)}, {list(self.high)}), "
            f"kernel_dilation={list(self.kernel_dilation)}, input_dilation={list(self.input_dilation)}, "
            f"groups={self.groups}, flip={self.flip})"
        )

    def reference(self, x: Any, w: Any) -> Any:
        """One product of matrices for every place of the kernel."""
        n = np.shape(w)[0]
        windows = self._windows(np.shape(x), np.shape(w))
        spatial = tuple(range(1, np.ndim(w) - 1))
        w = np.flip(w, spatial) if self.flip else w
        x = self._spread(np.asarray(x))
        out: Any = np.zeros((x.shape[0], *windows, n))
        for place in product(*(range(np.shape(w)[i]) for i in spatial)):
            starts = [k * d for k, d in zip(place, self.kernel_dilation, strict=True)]
            cut = tuple(
                slice(s, s + (m - 1) * by + 1, by)
                for s, m, by in zip(starts, windows, self.stride, strict=True)
            )
            out = out + self._grouped(x[(slice(None), *cut)], w[(slice(None), *place)])
        return out

    def _grouped(self, x: Any, w: Any) -> Any:
        """(…, channels) by (out, channels / groups): every group of results sees its own channels."""
        n, channels = w.shape
        x = x.reshape(*x.shape[:-1], self.groups, channels)
        w = w.reshape(self.groups, n // self.groups, channels)
        return np.einsum("...gc,goc->...go", x, w).reshape(*x.shape[:-2], n)

    def _spread(self, x: Any) -> Any:
        sizes = [spread(n, d) for n, d in zip(x.shape[1:-1], self.input_dilation, strict=True)]
        out = np.zeros((x.shape[0], *sizes, x.shape[-1]))
        out[(slice(None), *(slice(None, None, d) for d in self.input_dilation))] = x
        return np.pad(out, [(0, 0), *zip(self.low, self.high, strict=True), (0, 0)])

    def flops(self, inputs: Types, outputs: Types) -> int:
        """One multiplication and one addition per term."""
        return 2 * outputs[0].size * prod(inputs[1].shape[1:])


def spread(n: int, dilation: int) -> int:
    """The size of `n` elements with `dilation` - 1 places between them."""
    return (n - 1) * dilation + 1 if n else 0


def _each(name: str, value: Sizes, axes: int) -> tuple[int, ...]:
    out = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(out) != axes:
        raise ShapeError(f"{name} {out} for {axes} axes", fix="give one number, or one for each axis")
    return out


@frontend
def conv_general(
    input: ArrayLike,
    weight: ArrayLike,
    /,
    stride: Sizes = 1,
    padding: Sizes | tuple[Sequence[int], Sequence[int]] = 0,
    kernel_dilation: Sizes = 1,
    input_dilation: Sizes = 1,
    groups: int = 1,
    flip: bool = False,
) -> Array:
    """A convolution over any number of axes, channels last.

    `padding` is one number, one for each axis, or a pair of such lists: before and after. `flip` reverses
    the kernel.  Shape: (batch, ..., channels) by (out, ..., channels / groups) is (batch, ..., out).
    Errors: ShapeError where shapes do not fit.  Source: mlx.core.conv_general.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.conv_general(mx.ones((1, 5, 2)), mx.ones((3, 2, 2)), stride=2).shape
    (1, 2, 3)
    """
    x, w = operand(input), operand(weight)
    axes = len(shape_of(x)) - 2
    given: Any = padding
    pair = isinstance(padding, tuple) and len(padding) == 2 and not isinstance(padding[0], int)
    low, high = given if pair else (given, given)
    op = Convolution(
        _each("stride", stride, axes),
        _each("padding", low, axes),
        _each("padding", high, axes),
        _each("dilation", kernel_dilation, axes),
        _each("dilation", input_dilation, axes),
        groups,
        flip,
    )
    return apply(op, x, w)


def _plain(name: str, axes: int, x: ArrayLike, w: ArrayLike, *given: Any) -> Array:
    stride, padding, dilation, groups = given
    _check_rank(name, axes, x)
    return conv_general(x, w, stride, _each("padding", padding, axes), dilation, 1, groups)


def _transposed(name: str, axes: int, x: ArrayLike, w: ArrayLike, *given: Any) -> Array:
    """The derivative of a convolution by its input: x spread by the stride, the kernel reversed."""
    stride, padding, dilation, more, groups = given
    _check_rank(name, axes, x)
    by, spread_by = _each("stride", stride, axes), _each("dilation", dilation, axes)
    pads, further = _each("padding", padding, axes), _each("output_padding", more, axes)
    kernel = shape_of(w)[1:-1]
    if any(p > spread(k, d) - 1 for k, d, p in zip(kernel, spread_by, pads, strict=True)):
        raise ShapeError(f"{name}: padding {pads} for a kernel of {kernel}", fix="pad less than the kernel")
    low = [spread(k, d) - 1 - p for k, d, p in zip(kernel, spread_by, pads, strict=True)]
    high = [p + extra for p, extra in zip(low, further, strict=True)]
    return conv_general(x, w, 1, (low, high), spread_by, by, groups, True)


def _check_rank(name: str, axes: int, x: ArrayLike) -> None:
    if len(shape_of(x)) != axes + 2:
        raise ShapeError(f"{name}: x has shape {shape_of(x)}", fix=f"give (batch, {axes} axes, channels)")


def conv1d(
    input: ArrayLike,
    weight: ArrayLike,
    /,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Array:
    """A convolution over one axis.  Shape: (batch, length, channels).  Source: mlx.core.conv1d."""
    return _plain("conv1d", 1, operand(input), operand(weight), stride, padding, dilation, groups)


def conv2d(
    input: ArrayLike,
    weight: ArrayLike,
    /,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Array:
    """A convolution over two axes.  Shape: (batch, height, width, channels).  Source: mlx.core.conv2d."""
    return _plain("conv2d", 2, operand(input), operand(weight), stride, padding, dilation, groups)


def conv3d(
    input: ArrayLike,
    weight: ArrayLike,
    /,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Array:
    """A convolution over three axes.  Source: mlx.core.conv3d."""
    return _plain("conv3d", 3, operand(input), operand(weight), stride, padding, dilation, groups)


def conv_transpose1d(
    input: ArrayLike,
    weight: ArrayLike,
    /,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    output_padding: int = 0,
    groups: int = 1,
) -> Array:
    """A transposed convolution over one axis.  Source: mlx.core.conv_transpose1d."""
    given = (stride, padding, dilation, output_padding, groups)
    return _transposed("conv_transpose1d", 1, operand(input), operand(weight), *given)


def conv_transpose2d(
    input: ArrayLike,
    weight: ArrayLike,
    /,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    output_padding: Sizes = 0,
    groups: int = 1,
) -> Array:
    """A transposed convolution over two axes.  Source: mlx.core.conv_transpose2d."""
    given = (stride, padding, dilation, output_padding, groups)
    return _transposed("conv_transpose2d", 2, operand(input), operand(weight), *given)


def conv_transpose3d(
    input: ArrayLike,
    weight: ArrayLike,
    /,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    output_padding: Sizes = 0,
    groups: int = 1,
) -> Array:
    """A transposed convolution over three axes.  Source: mlx.core.conv_transpose3d."""
    given = (stride, padding, dilation, output_padding, groups)
    return _transposed("conv_transpose3d", 3, operand(input), operand(weight), *given)
