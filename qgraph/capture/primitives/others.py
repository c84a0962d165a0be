"""Convolutions, transforms, random words, complex numbers: what models emit rarely."""

from __future__ import annotations

from collections.abc import Sequence

from qgraph._errors import DTypeError
from qgraph.capture.primitives.elementwise import broadcasting, op
from qgraph.capture.primitives.reductions import of_family
from qgraph.capture.primitives.shapes import reshaped, sliced
from qgraph.capture.primitives.table import Primitive, primitive
from qgraph.ir import Value
from qgraph.ir.dtypes import BOOL, I32, U32
from qgraph.ir.op import Constant, Op
from qgraph.ops.bits import AsStrided, Bitcast
from qgraph.ops.convolution import Convolution
from qgraph.ops.elementwise import Cast
from qgraph.ops.indexing import TakeAlongAxis
from qgraph.ops.linear import Dot
from qgraph.ops.random_bits import RandomBits
from qgraph.ops.shape import Broadcast, Reshape
from qgraph.ops.sorting import SearchSorted
from qgraph.ops.transforms import Fft, Hadamard


@primitive("DivMod")
def divmod_(p: Primitive) -> Sequence[Value]:
    """Quotient and remainder, each rounded as the ops of those names do."""
    return broadcasting(p, "floor_divide"), broadcasting(p, "remainder")


@primitive("ErfInv")
def erfinv(p: Primitive) -> Value:
    """The inverse of the error function."""
    return p.add(op("erfinv"), *p.inputs)


@primitive("Real", "Imag", "Conjugate")
def complex_part(p: Primitive) -> Value:
    """Of complex numbers; for real ones MLX reports nothing."""
    return p.add(op(p.name.lower()), *p.inputs)


@primitive("View")
def view(p: Primitive) -> Value:
    """[dtype]."""
    x, dtype = p.inputs[0], p.outputs[0].dtype
    return x if x.type.dtype is dtype else p.add(Bitcast(dtype, x.type.dtype), x)


@primitive("AsStrided")
def as_strided(p: Primitive) -> Value:
    """[shape, strides, offset]."""
    shape, strides, offset = p.arguments
    return p.add(AsStrided(tuple(shape), tuple(strides), offset), *p.inputs)


@primitive("Convolution")
def convolution(p: Primitive) -> Value:
    """[stride, padding before, after, kernel dilation, input dilation, groups, flip]."""
    stride, low, high, kernel, spread, groups, flip = p.arguments
    made = Convolution(
        tuple(stride), tuple(low), tuple(high), tuple(kernel), tuple(spread), int(groups), bool(flip)
    )
    return p.add(made, *p.inputs)


@primitive("Hadamard")
def hadamard(p: Primitive) -> Value:
    """[scale]."""
    return p.add(Hadamard(float(p.arguments[0])), *p.inputs)


@primitive("FFT")
def fft(p: Primitive) -> Value:
    """[axes, inverse, real, whether the last axis of a real result is odd]."""
    axes: list[int] = p.arguments[0]
    inverse, real = bool(p.arguments[1]), bool(p.arguments[2])
    size = p.outputs[0].shape[axes[-1]] if real and inverse else 0
    return p.add(Fft(tuple(axes), inverse, real, size), *p.inputs)


@primitive("SearchSorted")
def searchsorted(p: Primitive) -> Value:
    """[whether behind equal elements]."""
    return p.add(SearchSorted(bool(p.arguments[0])), *p.inputs)


@primitive("RandomBits")
def random_bits(p: Primitive) -> Value:
    """[shape, bytes of a word]: MLX's functions draw words of four."""
    _, width = p.arguments
    if width != U32.size:
        raise DTypeError(f"RandomBits of {width} bytes", fix="draw float32 or uint32, then cast")
    return p.add(RandomBits(p.outputs[0].shape), *p.inputs)


@primitive("MaskedScatter")
def masked_scatter(p: Primitive) -> Value:
    """Operands a, mask, values: in every row, the next value wherever the mask holds."""
    a, mask, values = p.inputs
    rows = a.type.shape[0]
    if not values.type.size or not a.type.size:
        return a
    flat = reshaped(p, mask, (rows, mask.type.size // rows))
    number = p.add(_cumsum(1), p.add(Cast(I32), flat))
    before = p.add(op("maximum"), p.add(op("subtract"), number, _number(p, 1)), _number(p, 0))
    values = reshaped(p, values, (rows, values.type.size // rows))
    chosen = reshaped(p, p.add(TakeAlongAxis(1), values, before), a.type.shape)
    return p.add(op("where"), mask, chosen, a)


def _cumsum(axis: int) -> Op:
    return of_family("cumsum", axis, False, True)


def _number(p: Primitive, n: int) -> Value:
    return p.add(Constant((n,), (), I32))


@primitive("BlockMaskedMM")
def block_masked_mm(p: Primitive) -> Value:
    """[block size]; operands a, b, then the mask of the result, those of a and b, or all three in order."""
    a, b, *masks = p.inputs
    (block,) = p.arguments
    out = [masks.pop(0)] if len(masks) % 2 else []
    if masks:
        a, b = _masked(p, a, masks[0], block), _masked(p, b, masks[1], block)
    product = p.add(Dot(), a, b)
    return _masked(p, product, out[0], block) if out else product


def _masked(p: Primitive, x: Value, mask: Value, block: int) -> Value:
    """The blocks of `x` where the mask holds, or times its number there."""
    *batch, rows, columns = mask.type.shape
    wide = (*batch, rows, block, columns, block)
    spread = p.add(Broadcast(wide), reshaped(p, mask, (*batch, rows, 1, columns, 1)))
    full = p.add(Reshape((*batch, rows * block, columns * block)), spread)
    cut = [(0, n, 1) for n in (*batch, *x.type.shape[-2:])]
    full = sliced(p, full, cut)
    if mask.type.dtype is BOOL:
        zero = p.add(Constant((0.0,), (), x.type.dtype))
        return p.add(op("where"), full, x, zero)
    return p.add(op("multiply"), x, full)
