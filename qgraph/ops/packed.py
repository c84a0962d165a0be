"""Views of packed storage: how transpose, reshape, slice and concatenate act on words and scales.

The storage of a quantized value has the packed axis last (`TensorType.storage_axes`). A view that keeps
whole groups together acts on packed words, scales and biases alike, each with its own last size.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from qgraph._errors import ShapeError
from qgraph.ir.op import Storage
from qgraph.ir.types import Packing, Shape, TensorType


def group_of(t: TensorType) -> int:
    """How many logical numbers stand behind one scale; 1 for a dense value."""
    return t.packing.quantization.group_size if t.packing else 1


def units(t: TensorType) -> tuple[int, ...]:
    """The packed axis' size, counted in each component's elements, per group of numbers.

    E.g. affine 4 bit, group 64: 8 words, 1 scale, 1 bias.
    """
    assert t.packing is not None
    q = t.packing.quantization
    words = q.group_size * q.bits // 32
    return (words, 1, 1) if q.has_biases else (words, 1)


def map_storage(operand: Storage, t: TensorType, view: Callable[[str, int], str]) -> Storage:
    """Apply ``view(expression, elements per group)`` to every component that has the value's axes."""
    parts = zip(operand.parts(), units(t), strict=False)  # a global scale, the last part, has no axes
    return storage_of(*(view(part, unit) for part, unit in parts))._replace(global_scale=operand.global_scale)


def storage_of(packed: str, scales: str, biases: str | None = None) -> Storage:
    """Components in order, without a global scale."""
    return Storage(packed, scales, biases)


def check_inner(message: str, k: int, w: TensorType, axis: int) -> None:
    """Refuse a product that contracts `k` numbers with another number of them along the packed `axis` of w.

    The arrays of a packed weight do not tell its number of columns: (bits, group, K) and (2 bits, group / 2,
    K / 2) look alike, so a config.json that is wrong there passes every check of shapes.
    """
    found = w.shape[axis]
    if found == k or w.packing is None or w.packing.axis != axis:
        return
    q = w.packing.quantization
    read_as = [(other, found // q.group_size * other.group_size) for other in q.lookalikes()]
    others = " or ".join(f"{other} with K = {size}" for other, size in read_as)
    fix = "make the inner sizes equal: the weight is stored as (out, in), so the product is x @ w.T"
    if others:
        fix = f"the same arrays could be {others}: check bits and group_size in config.json, then the shapes"
    if any(size == k for _, size in read_as):
        fits = next(other for other, size in read_as if size == k)
        fix = f"the same arrays read as {fits} have K = {k}: check bits and group_size in config.json"
    raise ShapeError(
        f"{message}; the weight is packed as {q}: K = {found}, bits = {q.bits}, group_size = {q.group_size}",
        fix=fix,
    )


def carry_transpose(t: TensorType, axes: Shape) -> Packing | str:
    """A permutation moves the packed axis; the words stay where they are."""
    assert t.packing is not None
    if t.ndim < 2:
        return "a packed value needs two axes or more"
    moved = axes.index(t.ndim + t.packing.axis)
    return t.packing.at(moved - len(axes))


def storage_permutation(t: TensorType, out: TensorType, axes: Shape) -> Shape:
    """The permutation of storage axes that a logical permutation means; identity for a plain ``.T``."""
    before = {axis: i for i, axis in enumerate(t.storage_axes)}
    return tuple(before[axes[a]] for a in out.storage_axes)


def blocks(a: Shape, b: Shape) -> list[tuple[range, range]]:
    """Split a reshape a → b into the smallest runs of axes with equal products.

    >>> [(list(i), list(j)) for i, j in blocks((2, 3, 4), (6, 2, 2))]
    [([0, 1], [0]), ([2], [1, 2])]
    """
    out: list[tuple[range, range]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        i0, j0 = i, j
        i, j = min(i + 1, len(a)), min(j + 1, len(b))
        while prod(a[i0:i]) != prod(b[j0:j]):
            if prod(a[i0:i]) < prod(b[j0:j]) and i < len(a):
                i += 1
            elif j < len(b):
                j += 1
            else:
                i += 1
        out.append((range(i0, i), range(j0, j)))
    return out


def carry_reshape(t: TensorType, shape: Shape) -> Packing | str:
    """Sizes may merge into or split from the packed axis as long as no group is cut."""
    assert t.packing is not None
    if len(shape) < 2 or prod(shape) == 0:
        return "a packed value needs two axes or more and no empty one"
    packed = t.ndim + t.packing.axis
    for before, after in blocks(t.shape, shape):
        if packed not in before:
            continue
        # Axes of size 1 behind the packed one change nothing.
        last = max((i for i in before if t.shape[i] != 1), default=packed)
        if packed < last:
            return f"the reshape {t.shape} → {shape} mixes the packed axis {packed} with the axes after it"
        target = max((j for j in after if shape[j] != 1), default=None)
        if target is None or shape[target] % group_of(t):
            return f"the reshape {t.shape} → {shape} cuts groups of {group_of(t)}"
        return t.packing.at(target - len(shape))
    return f"the reshape {t.shape} → {shape} loses the packed axis"


def reshape_storage(expression: str, unit: int, t: TensorType, out: TensorType) -> str:
    """Source of one component of a reshaped packed value."""
    group = group_of(t)
    assert out.packing is not None
    target = out.ndim + out.packing.axis
    after = [s // group * unit if i == target else s for i, s in enumerate(out.shape)]
    order, back = t.storage_axes, out.storage_axes
    logical = _permute(expression, tuple(order.index(i) for i in range(t.ndim)))
    return _permute(f"mx.reshape({logical}, {tuple(after)})", back)


def _permute(expression: str, axes: Shape) -> str:
    if axes == tuple(range(len(axes))):
        return expression
    return f"mx.transpose({expression}, {axes})"


def carry_slice(t: TensorType, axis_range: tuple[int, int, int]) -> Packing | str:
    """Any slice of the other axes; whole groups of the packed one."""
    assert t.packing is not None
    start, stop, step = axis_range
    size, group = t.shape[t.packing.axis], group_of(t)
    if (start, stop, step) == (0, size, 1):
        return t.packing
    if step != 1 or start % group or stop % group or start >= stop:
        shown = f"{start}:{stop}" + (f":{step}" if step != 1 else "")
        return f"the slice {shown} of the packed axis cuts groups of {group}"
    return t.packing


def carry_concatenate(types: tuple[TensorType, ...], axis: int) -> Packing | str:
    """Values of one packing may be joined along any axis: every one holds whole groups."""
    del axis
    packings = {t.packing for t in types}
    if any(p and p.global_scale for p in packings):
        return "each part has a global scale of its own"
    if len(packings) > 1:
        shown = ", ".join(sorted("dense" if p is None else str(p.quantization) for p in packings))
        return f"the parts are packed differently ({shown})"
    packing = types[0].packing
    return packing if packing is not None else "the parts are dense"
