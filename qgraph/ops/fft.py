"""Discrete Fourier transforms, named as in `mlx.core.fft`; the inverse ones divide by the sizes.

    y = qg.fft.rfft(x)

Results are complex64, or float32 for the inverse of a real transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from qgraph._errors import ShapeError
from qgraph.ir.types import normalize_axis
from qgraph.ops.arrange import pad
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend_of, operand, shape_of
from qgraph.ops.elementwise import astype
from qgraph.ops.shape import slice_ranges
from qgraph.ops.transforms import Fft

__all__ = ["fft", "fftn", "ifft", "ifftn", "irfft", "irfftn", "rfft", "rfftn"]

Sizes = Sequence[int] | None


def _transform(a: ArrayLike, sizes: Sizes, axes: Sizes, inverse: bool, is_real: bool) -> Array:
    x = operand(a)
    shape = shape_of(x)
    given = range(len(shape))[-len(sizes) :] if sizes is not None and axes is None else axes
    along = [normalize_axis(i, len(shape)) for i in (range(len(shape)) if given is None else given)]
    lengths = [shape[i] for i in along] if sizes is None else list(sizes)
    if len(lengths) != len(along) or not along:
        raise ShapeError(f"fft: {len(lengths)} sizes for axes {along}", fix="give one size for each axis")
    last = 0
    if inverse and is_real:
        last = lengths[-1] if sizes is not None else 2 * (shape[along[-1]] - 1)
        lengths[-1] = last // 2 + 1
    x = _sized(x, dict(zip(along, lengths, strict=True)))
    x = astype(x, mx.float32 if is_real and not inverse else mx.complex64)
    return apply(Fft(tuple(along), inverse, is_real, last), x)


def _sized(x: Any, sizes: dict[int, int]) -> Any:
    """`x` cut, or filled with zeros, to sizes along axes."""
    shape = shape_of(x)
    wanted = [sizes.get(i, n) for i, n in enumerate(shape)]
    cut = slice_ranges(x, [(0, min(n, w), 1) for n, w in zip(shape, wanted, strict=True)])
    return pad(cut, [(0, max(0, w - n)) for n, w in zip(shape, wanted, strict=True)])


def _one(n: int | None, axis: int) -> tuple[Sizes, Sizes]:
    return None if n is None else [n], [axis]


@frontend_of("fft")
def fft(a: ArrayLike, n: int | None = None, axis: int = -1) -> Array:
    """The transform along `axis`, of its first `n` elements.  Source: mlx.core.fft.fft."""
    return _transform(a, *_one(n, axis), False, False)


@frontend_of("fft")
def ifft(a: ArrayLike, n: int | None = None, axis: int = -1) -> Array:
    """The inverse of `fft`.  Source: mlx.core.fft.ifft."""
    return _transform(a, *_one(n, axis), True, False)


@frontend_of("fft")
def rfft(a: ArrayLike, n: int | None = None, axis: int = -1) -> Array:
    """The transform of real numbers: n // 2 + 1 terms.  Source: mlx.core.fft.rfft.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.fft.rfft(mx.ones(4)).tolist()
    [(4+0j), 0j, 0j]
    """
    return _transform(a, *_one(n, axis), False, True)


@frontend_of("fft")
def irfft(a: ArrayLike, n: int | None = None, axis: int = -1) -> Array:
    """The inverse of `rfft`: `n` real numbers (None: an even number).  Source: mlx.core.fft.irfft."""
    return _transform(a, *_one(n, axis), True, True)


@frontend_of("fft")
def fftn(a: ArrayLike, s: Sizes = None, axes: Sizes = None) -> Array:
    """The transform along several axes (None: all).  Source: mlx.core.fft.fftn."""
    return _transform(a, s, axes, False, False)


@frontend_of("fft")
def ifftn(a: ArrayLike, s: Sizes = None, axes: Sizes = None) -> Array:
    """The inverse of `fftn`.  Source: mlx.core.fft.ifftn."""
    return _transform(a, s, axes, True, False)


@frontend_of("fft")
def rfftn(a: ArrayLike, s: Sizes = None, axes: Sizes = None) -> Array:
    """`rfft` along the last of the axes, `fft` along the others.  Source: mlx.core.fft.rfftn."""
    return _transform(a, s, axes, False, True)


@frontend_of("fft")
def irfftn(a: ArrayLike, s: Sizes = None, axes: Sizes = None) -> Array:
    """The inverse of `rfftn`.  Source: mlx.core.fft.irfftn."""
    return _transform(a, s, axes, True, True)
