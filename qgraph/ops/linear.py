"""Contractions. `dot` is the one op (NumPy's matmul); the rest is normalized to views around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from string import ascii_letters
from typing import Any

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import promote
from qgraph.ir.op import NATIVE, Op, Operand, Types, literal
from qgraph.ir.types import Shape, TensorType, broadcast_shapes, normalize_axis
from qgraph.ops import native
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of
from qgraph.ops.elementwise import multiply
from qgraph.ops.packed import check_inner
from qgraph.ops.shape import reshape, slice_ranges, swapaxes, transpose

_STORED = "make both inner axes equal; for a weight stored (out, in), pass its .T"


def matmul_shape(a: Shape, b: Shape) -> Shape:
    """The shape of NumPy's matmul; ShapeError where the operands do not fit.

    >>> matmul_shape((5, 1, 64), (3, 64, 8))
    Traceback (most recent call last):
    ...
    qgraph._errors.ShapeError: dot: batch axes (5,) and (3,) do not broadcast
      fix: make the axes before the last two equal or 1
    """
    if not a or not b:
        raise ShapeError(
            f"dot: operands of shape {a} and {b}; a scalar cannot be contracted", fix="use qg.multiply"
        )
    row, column = a[-1], b[-2:][0]
    if row != column:
        raise ShapeError(_inner(row, column, len(b)), fix=_STORED)
    try:
        batch = broadcast_shapes(a[:-2], b[:-2]) if len(a) > 2 or len(b) > 2 else ()
    except ShapeError:
        raise ShapeError(
            f"dot: batch axes {a[:-2]} and {b[:-2]} do not broadcast",
            fix="make the axes before the last two equal or 1",
        ) from None
    return (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


def _inner(row: int, column: int, rank: int) -> str:
    at = "-2" if rank > 1 else "-1"
    return f"dot: inner sizes differ, {row} (lhs axis -1) and {column} (rhs axis {at})"


@dataclass(frozen=True)
class Dot(Op):
    """Matrix product with NumPy's matmul meaning: contracts lhs axis -1 with rhs axis -2."""

    name = "dot"
    mlx = "mx.matmul({0}, {1})"
    kernel: str = ""

    def infer(self, a: TensorType, b: TensorType) -> TensorType:
        """Matmul's shape; the promoted dtype, which must be a float."""
        dtype = promote(a.dtype, b.dtype)
        if not (dtype.is_float or dtype.is_complex):
            raise DTypeError(f"dot: {a.dtype} by {b.dtype} has no float operand", fix="cast one with .astype")
        if a.packing or b.packing:
            self._check_packed(a, b)
        return TensorType(matmul_shape(a.shape, b.shape), dtype)

    def _check_packed(self, a: TensorType, b: TensorType) -> None:
        if a.shape and b.shape:
            row, column = a.shape[-1], b.shape[-2:][0]
            message = _inner(row, column, b.ndim)
            check_inner(message, row, b, max(-2, -b.ndim))
            check_inner(message, column, a, -1)

    reference = staticmethod(np.matmul)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.matmul`, or the native kernel."""
        return native.call("matmul", *operands) if self.kernel else super().emit(operands, inputs, outputs)

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """For the float types; an empty sum is left to MLX."""
        return replace(self, kernel=NATIVE) if native.floats(*inputs) and inputs[0].size else None

    def flops(self, inputs: Types, outputs: Types) -> int:
        """One multiplication and one addition per term."""
        return 2 * prod(outputs[0].shape) * inputs[0].shape[-1]


@frontend
def dot(a: ArrayLike, b: ArrayLike) -> Array:
    """``a @ b`` for arrays of any rank, either of them quantized.

    Shape: NumPy's matmul.  Dtype: the promoted one.  Errors: ShapeError when inner sizes differ.
    Source: mlx.core.matmul, mlx.core.quantized_matmul.
    """
    return apply(Dot(), operand(a), operand(b))


matmul = dot


def inner(a: ArrayLike, b: ArrayLike) -> Array:
    """Contract the last axes of `a` and `b`.  Source: mlx.core.inner."""
    a, b = operand(a), operand(b)
    if not shape_of(a) or not shape_of(b):
        return multiply(a, b)
    return tensordot(a, b, [[-1], [-1]])


def outer(a: ArrayLike, b: ArrayLike) -> Array:
    """All products of elements of `a` and `b`, flattened.  Source: mlx.core.outer."""
    return multiply(reshape(a, (-1, 1)), reshape(b, (1, -1)))


def vecdot(a: ArrayLike, b: ArrayLike, axis: int = -1) -> Array:
    """The dot products of vectors along `axis`, broadcast.  Source: mlx.core.vecdot."""
    from qgraph.ops.shape import moveaxis

    a, b = moveaxis(a, axis, -1), moveaxis(b, axis, -1)
    *lead, k = shape_of(a)
    rows, columns = reshape(a, (*lead, 1, k)), reshape(b, (*shape_of(b), 1))
    out = dot(rows, columns)
    return reshape(out, shape_of(out)[:-2])


@dataclass(frozen=True)
class AddMm(Op):
    """alpha * (a @ b) + beta * c; operands c, a, b.

    In 16 bit the parts may be rounded before they are added: a quantized product is an op of its own.
    """

    name = "addmm"
    mlx = "mx.addmm({0}, {1}, {2}, alpha={alpha}, beta={beta})"
    alpha: float = 1.0
    beta: float = 1.0
    kernel: str = ""

    def infer(self, c: TensorType, a: TensorType, b: TensorType) -> TensorType:
        """Matmul's shape, to which c broadcasts; the promoted dtype, which must be a float."""
        product = Dot().infer(a, b)
        if broadcast_shapes(product.shape, c.shape) != product.shape:
            raise ShapeError(
                f"addmm: c {c.shape} does not broadcast to the product {product.shape}",
                fix="use qg.add to broadcast the product",
            )
        return TensorType(product.shape, promote(c.dtype, product.dtype))

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.addmm`; without terms the sum is c alone."""
        if self.kernel:
            return f"mx.add({native.call('matmul', *operands[1:])}, {operands[0]})"
        if inputs[1].shape[-1]:
            return super().emit(operands, inputs, outputs)
        out = outputs[0]
        return f"mx.broadcast_to({self.beta!r} * {operands[0]}.astype({literal(out.dtype)}), {out.shape})"

    def reference(self, c: Any, a: Any, b: Any) -> Any:
        """The formula."""
        product: Any = np.matmul(a, b)
        return self.alpha * product + self.beta * c

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """A native product and a sum."""
        plain = (self.alpha, self.beta) == (1.0, 1.0) and inputs[1].size > 0
        return replace(self, kernel=NATIVE) if plain and native.floats(*inputs) else None

    def flops(self, inputs: Types, outputs: Types) -> int:
        """One multiplication and one addition per term, and those of c."""
        return 2 * prod(outputs[0].shape) * (inputs[1].shape[-1] + 1)


@frontend
def addmm(c: ArrayLike, a: ArrayLike, b: ArrayLike, /, alpha: float = 1.0, beta: float = 1.0) -> Array:
    """``alpha * (a @ b) + beta * c``, either of a and b quantized.

    Shape: NumPy's matmul, to which c broadcasts.  Dtype: the promoted one.  Errors: ShapeError where the
    shapes do not fit.  Source: mlx.core.addmm.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.addmm(mx.ones(2), mx.ones((1, 3)), mx.ones((3, 2)), beta=2.0).tolist()
    [[5.0, 5.0]]
    """
    return apply(AddMm(float(alpha), float(beta)), operand(c), operand(a), operand(b))


def tensordot(a: ArrayLike, b: ArrayLike, axes: int | Sequence[Sequence[int]] = 2) -> Array:
    """Contract the listed axes of `a` with those of `b`.  Source: mlx.core.tensordot."""
    a, b = operand(a), operand(b)
    sa, sb = shape_of(a), shape_of(b)
    if isinstance(axes, int):
        if not 0 <= axes <= min(len(sa), len(sb)):
            raise ShapeError(f"tensordot: {axes} axes of {sa} and {sb}", fix="contract fewer axes")
        ia, ib = list(range(len(sa) - axes, len(sa))), list(range(axes))
    else:
        ia, ib = ([normalize_axis(x, len(s)) for x in ax] for ax, s in zip(axes, (sa, sb), strict=True))
    if len(ia) != len(ib) or [sa[i] for i in ia] != [sb[i] for i in ib]:
        raise ShapeError(
            f"tensordot: axes {ia} of {sa} do not pair with axes {ib} of {sb}",
            fix="name as many axes of each, of equal sizes",
        )
    return _contract(a, b, [], [], ia, ib)


def _contract(
    a: ArrayLike, b: ArrayLike, ba: list[int], bb: list[int], ia: list[int], ib: list[int]
) -> Array:
    """Contract ia with ib, ba and bb being batch axes; result: batch, free of a, free of b."""
    sa, sb = shape_of(a), shape_of(b)
    fa = [i for i in range(len(sa)) if i not in (*ba, *ia)]
    fb = [i for i in range(len(sb)) if i not in (*bb, *ib)]
    batch, inner_size = [sa[i] for i in ba], prod(sa[i] for i in ia)
    free_a, free_b = [sa[i] for i in fa], [sb[i] for i in fb]
    lhs = reshape(transpose(a, [*ba, *fa, *ia]), [*batch, prod(free_a), inner_size])
    rhs = _right(b, bb, ib, fb, batch, inner_size)
    return reshape(dot(lhs, rhs), [*batch, *free_a, *free_b])


def _right(b: ArrayLike, bb: list[int], ib: list[int], fb: list[int], batch: list[int], k: int) -> Array:
    """The right operand as (batch, k, free): by way of (batch, free, k) when it is stored that way."""
    sb = shape_of(b)
    n = prod(sb[i] for i in fb)
    if ib and fb and ib[-1] > fb[-1]:
        return swapaxes(reshape(transpose(b, [*bb, *fb, *ib]), [*batch, n, k]), -1, -2)
    return reshape(transpose(b, [*bb, *ib, *fb]), [*batch, k, n])


def einsum(subscripts: str, *operands: ArrayLike) -> Array:
    """Einstein summation, contracted from left to right.

    ``...`` stands for further axes. Those broadcast, and so do axes of size 1; an index that stands twice
    in one operand takes its diagonal.  Source: mlx.core.einsum.
    """
    from qgraph.ops.reduce import sum as reduce_sum

    arrays = [operand(x) for x in operands]
    terms, out = _parse_einsum(subscripts, [len(shape_of(x)) for x in arrays])
    pairs = _broadcast([_diagonal(x, term) for x, term in zip(arrays, terms, strict=True)])
    current, labels = pairs[0]
    for i in range(1, len(pairs)):
        later = set("".join(term for _, term in pairs[i + 1 :])) | set(out)
        current, labels = _einsum_pair(current, labels, *pairs[i], later)
    drop = tuple(i for i, c in enumerate(labels) if c not in out)
    if drop:
        current, labels = reduce_sum(current, drop), "".join(c for c in labels if c in out)
    return transpose(current, [labels.index(c) for c in out])


def _parse_einsum(subscripts: str, ranks: list[int]) -> tuple[list[str], str]:
    """One letter per axis for every operand and for the result, without ``...``."""
    text = subscripts.replace(" ", "")
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise ShapeError(
            f"einsum: {subscripts!r} does not fit {len(ranks)} operands", fix="write one term per operand"
        )
    unused = "".join(c for c in ascii_letters if c not in text)
    further = [_further(term, rank, subscripts) for term, rank in zip(terms, ranks, strict=True)]
    axes = unused[: max(further)]
    terms = [t.replace("...", axes[len(axes) - n :]) for t, n in zip(terms, further, strict=True)]
    if not arrow:
        out = "..." + "".join(sorted(c for c in set(left) - set(",.") if left.count(c) == 1))
    if axes and "..." not in out:
        raise ShapeError(
            f"einsum: the right of {subscripts!r} lacks the ... of its left",
            fix="write ... on the right, or letters that are summed in its place",
        )
    out = out.replace("...", axes)
    if not set(out) <= set("".join(terms)) or len(set(out)) != len(out):
        raise ShapeError(
            f"einsum: the right of {subscripts!r} does not fit its left",
            fix="write letters of the left there, each once",
        )
    return terms, out


def _further(term: str, rank: int, subscripts: str) -> int:
    """How many axes the ``...`` of a term stands for."""
    letters = term.replace("...", "", 1)
    if letters and not (letters.isascii() and letters.isalpha()):
        raise ShapeError(
            f"einsum: cannot read {term!r} in {subscripts!r}", fix="write one letter per axis, or ... once"
        )
    if len(letters) != rank and (letters == term or len(letters) > rank):
        raise ShapeError(
            f"einsum: {term!r} names {len(letters)} axes of an operand of rank {rank}",
            fix="one letter per axis, or ... for further ones",
        )
    return rank - len(letters)


def _diagonal(a: Array, labels: str) -> tuple[Array, str]:
    """`a` with every letter once: the diagonal of the axes that share one, which goes last."""
    for c in dict.fromkeys(labels):
        while labels.count(c) > 1:
            shape, i = shape_of(a), labels.index(c)
            j = labels.index(c, i + 1)
            if shape[i] != shape[j]:
                raise ShapeError(
                    f"einsum: index {c!r} has sizes {shape[i]} and {shape[j]}", fix="rename one of them"
                )
            rest, n = [k for k in range(len(shape)) if k not in (i, j)], shape[i]
            a = reshape(transpose(a, [*rest, i, j]), [*(shape[k] for k in rest), n * n])
            a = slice_ranges(a, [*((0, shape[k], 1) for k in rest), (0, n * n, n + 1)])
            labels = "".join(labels[k] for k in rest) + c
    return a, labels


def _broadcast(pairs: list[tuple[Array, str]]) -> list[tuple[Array, str]]:
    """Without the axes of size 1 that meet a larger one under the same letter."""
    sizes: dict[str, int] = {}
    for a, labels in pairs:
        sizes |= {c: n for c, n in zip(labels, shape_of(a), strict=True) if n != 1 or c not in sizes}
    out: list[tuple[Array, str]] = []
    for a, labels in pairs:
        kept = [i for i, c in enumerate(labels) if shape_of(a)[i] == sizes[c] or shape_of(a)[i] != 1]
        shape = [shape_of(a)[i] for i in kept]
        out.append((reshape(a, shape), "".join(labels[i] for i in kept)))
    return out


def _einsum_pair(a: ArrayLike, la: str, b: ArrayLike, lb: str, later: set[str]) -> tuple[Array, str]:
    from qgraph.ops.reduce import sum as reduce_sum

    alone = tuple(i for i, c in enumerate(lb) if c not in later and c not in la)
    if alone:
        b, lb = reduce_sum(b, alone), "".join(c for i, c in enumerate(lb) if i not in alone)
    alone = tuple(i for i, c in enumerate(la) if c not in later and c not in lb)
    if alone:
        a, la = reduce_sum(a, alone), "".join(c for i, c in enumerate(la) if i not in alone)
    shared = [c for c in la if c in lb]
    for c in shared:
        sizes = shape_of(a)[la.index(c)], shape_of(b)[lb.index(c)]
        if sizes[0] != sizes[1]:
            raise ShapeError(
                f"einsum: index {c!r} has sizes {sizes[0]} and {sizes[1]}",
                fix="make them equal, or rename one",
            )
    batch, inner_axes = [c for c in shared if c in later], [c for c in shared if c not in later]
    out = _contract(
        a,
        b,
        [la.index(c) for c in batch],
        [lb.index(c) for c in batch],
        [la.index(c) for c in inner_axes],
        [lb.index(c) for c in inner_axes],
    )
    rest = [c for c in la if c not in shared] + [c for c in lb if c not in shared]
    return out, "".join(batch + rest)
