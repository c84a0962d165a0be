"""What a table of angles says: position times speed, with the offset, the scale and the base behind it.

The speeds depend on no input, or are one over frequencies that do. They are worked out and compared with
powers of a base, however they were computed. Positions count from an offset, known or an array.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np

from qgraph.ir import Value
from qgraph.ir.dtypes import promote
from qgraph.ops.elementwise import Cast
from qgraph.ops.shape import Broadcast, Reshape
from qgraph.rewrite import NoMatch
from qgraph_passes.raise_fast.form import Now
from qgraph_passes.raise_fast.walk import Shape, Walk, number, ones_dropped, scaled, shaped

# Of speeds that were computed in float32 from a base: a logarithm, a quotient, a product and an exponential.
ROUNDED = 32 * 2.0**-24
ANY_BASE = 10000.0


@dataclass(frozen=True)
class Angles:
    """The arguments of `rope` that a table stands for."""

    half: int
    axis: int  # of the positions, in the table's shape padded to that of x
    length: int
    scale: float
    offset: int | Value  # where positions begin: a number, or integers
    base: float | None
    freqs: Value | None = None  # wavelengths, or if `inverted` the speeds
    inverted: bool = False

    def offset_now(self, now: Now, batch: int) -> Any:
        """The offset as `rope` takes it."""
        if isinstance(self.offset, int):
            return self.offset
        offset = now(self.offset)
        return shaped(offset, () if offset.size == 1 else (batch,))

    def freqs_now(self, now: Now) -> Any:
        """The wavelengths as `rope` takes them, None beside a base."""
        import qgraph as qg

        if self.freqs is None:
            return None
        freqs = shaped(now(self.freqs), (self.half,))
        return qg.reciprocal(freqs) if self.inverted else freqs


def read_angles(walk: Walk, table: Value, placed: Shape, shape: Shape) -> Angles:
    """The meaning of `table`, whose cosines of shape `placed` meet the pairs of x, which are of `shape`.

    Errors: NoMatch, with what is not as it has to be.
    """
    half = shape[-1]
    if len(placed) > len(shape) or placed[-1] != half:
        raise NoMatch(f"a table {placed} for {half} pairs", table)
    total = 1.0
    while (pair := scaled(table)) is not None:
        table, total = pair[0], total * pair[1]
    placed = (1,) * (len(shape) - len(placed)) + placed
    if half == 1 and table.op.name not in ("multiply", "dot"):  # the power 0 of any base
        axis, length = _axis_of(walk, _Factor(table, placed), shape)
        scale, offset = _positions(walk, table, length)
        return Angles(half, axis, length, total * scale, offset, ANY_BASE)
    u, v = _factors(table, placed)
    pairs = [(p, s) for p, s in ((u, v), (v, u)) if s.shape[-1] == half and p.shape[-1] == 1]
    pairs = [(p, s) for p, s in pairs if not ones_dropped(s.shape[:-1])]
    if len(pairs) > 1:  # one position, or one pair: what depends on no input are the speeds
        pairs = [(p, s) for p, s in pairs if walk.known(s.value) is not None]
    if len(pairs) != 1:
        raise NoMatch("the angles are not positions times speeds", table)
    positions, speeds = pairs[0]
    axis, length = _axis_of(walk, positions, shape)
    scale, offset = _positions(walk, positions.value, length)
    if not isinstance(offset, int) and offset.type.size not in (1, shape[0]):
        raise NoMatch(f"there are {offset.type.size} offsets for a batch of {shape[0]}", offset)
    base, freqs, inverted = _speeds(walk, speeds.value, half)
    return Angles(half, axis, length, total * scale, offset, base, freqs, inverted)


@dataclass(frozen=True)
class _Factor:
    """A factor of the angles, and the shape with which it enters the product."""

    value: Value
    shape: Shape


def _factors(table: Value, placed: Shape) -> tuple[_Factor, _Factor]:
    """The two values whose outer product the table is."""
    v = table
    if v.op.name == "dot":  # an outer product as a product of matrices
        a, b = v.node.inputs
        if a.type.ndim < 2 or b.type.ndim < 2 or a.type.shape[-1] != 1:
            raise NoMatch("the angles are a product of matrices over more than one term", v)
    elif v.op.name != "multiply":
        raise NoMatch(f"the angles are made by {v.op.name}, not as positions times speeds", v)
    if ones_dropped(v.type.shape) != ones_dropped(placed):
        raise NoMatch(f"a table {v.type.shape} is used as {placed}", v)
    a, b = (_placed(x, v, placed) for x in v.node.inputs)
    return a, b


def _placed(x: Value, product: Value, placed: Shape) -> _Factor:
    """A factor with its sizes on the axes that they take in the end: only axes of 1 come and go."""
    whole = product.type.shape
    shape = (1,) * (len(whole) - x.type.ndim) + x.type.shape
    sizes = iter([s for s, n in zip(shape, whole, strict=True) if n != 1])
    return _Factor(x, tuple(next(sizes) if n != 1 else 1 for n in placed))


def _axis_of(walk: Walk, positions: _Factor, shape: Shape) -> tuple[int, int]:
    """The axis along which positions count, and how many there are."""
    sizes = positions.shape
    wide = [i for i, n in enumerate(sizes) if n != 1]
    if (
        wide
        and wide[0] == 0
        and len(shape) > 2
        and sizes[0] == shape[0]
        and walk.known(positions.value) is None
    ):
        if wide == [0] and shape[-2] == 1:
            return len(shape) - 2, 1  # one position for each of the batch
        wide = wide[1:] or wide
    if len(wide) > 1:
        raise NoMatch("the angles differ along several axes", positions.value)
    if wide:
        if sizes[wide[0]] != shape[wide[0]]:
            raise NoMatch("the positions do not lie along an axis of what is turned", positions.value)
        return wide[0], sizes[wide[0]]
    single = [i for i in range(len(shape) - 2, -1, -1) if shape[i] == 1]
    if not single:
        raise NoMatch("one angle turns all positions", positions.value)
    return single[0], 1


def _positions(walk: Walk, v: Value, length: int) -> tuple[float, int | Value]:
    """(scale, offset) for positions (offset + 0, 1, 2, …) * scale."""
    scale = 1.0
    while True:
        pair = scaled(v) if v.type.dtype.is_float else None
        if pair is not None:
            v, scale = pair[0], scale * pair[1]
        elif isinstance(v.op, (Broadcast, Reshape, Cast)) and v.type.dtype.is_float:
            v = v.node.inputs[0]
        else:
            break
    known = walk.known(v)
    if known is None:
        return scale, _offset(walk, v, length)
    step, start = _progression(np.asarray(known, np.float64).reshape(-1), length, v)
    return scale * step, start


def _progression(p: Any, length: int, v: Value) -> tuple[float, int]:
    """(step, first / step) of numbers at equal distances."""
    step = float(p[1] - p[0]) if len(p) > 1 else 1.0
    start = float(p[0]) / step if step else 0.5
    even = np.allclose(p, p[0] + step * np.arange(len(p)), rtol=ROUNDED, atol=0)
    if len(p) != length or start != round(start) or not even:
        raise NoMatch("the positions do not count up from a whole number", v)
    return step, round(start)


def _offset(walk: Walk, v: Value, length: int) -> Value:
    """The array of integers from which positions count."""
    v = _bare(v)
    for a, b in (v.node.inputs, v.node.inputs[::-1]) if v.op.name == "add" else ():
        known = walk.known(_bare(a))
        offset = _bare(b)
        if known is None or not offset.type.dtype.is_int:
            continue
        if np.array_equal(np.asarray(known).reshape(-1), np.arange(length)) and offset.type.size in (
            1,
            v.type.size // length,
        ):
            return offset
    if length == 1 and v.type.dtype.is_int:
        return v
    raise NoMatch("the positions are not an integer offset plus 0, 1, 2, …", v)


def _bare(v: Value) -> Value:
    """`v` before broadcasts, reshapes, and casts to floats or between integers that lose nothing."""
    while isinstance(v.op, (Broadcast, Reshape, Cast)):
        x = v.node.inputs[0]
        if (
            isinstance(v.op, Cast)
            and not v.op.dtype.is_float
            and promote(x.type.dtype, v.op.dtype) is not v.op.dtype
        ):
            break
        v = x
    return v


def _speeds(walk: Walk, v: Value, half: int) -> tuple[float | None, Value | None, bool]:
    """(base, None), or (None, wavelengths or speeds)."""
    while isinstance(v.op, (Broadcast, Reshape)) and v.node.inputs[0].type.size == half:
        v = v.node.inputs[0]
    known = walk.known(v)
    if known is not None:
        base = base_of(np.asarray(known, np.float64).reshape(-1))
        if base is not None:
            return base, None, False
    if v.op.name == "divide" and number(v.node.inputs[0]) == 1 and v.node.inputs[1].type.size == half:
        return None, v.node.inputs[1], False
    if v.op.name == "reciprocal":
        return None, v.node.inputs[0], False
    if v.type.size != half:
        raise NoMatch(f"there are {v.type.size} speeds for {half} pairs", v)
    return None, v, True


def base_of(speeds: Any) -> float | None:
    """The base of which `speeds` are the powers 0, -1 / n, -2 / n, …; None if they are others.

    >>> import numpy as np
    >>> base_of(np.float32(500000.0) ** (-np.arange(32, dtype=np.float32) / 32))
    500000.0
    """
    half = len(speeds)
    if abs(speeds[0] - 1) > ROUNDED or np.any(speeds <= 0):
        return None
    if half == 1:
        return ANY_BASE
    exact = exp(-log(speeds[1]) * half)
    for digits in range(1, 5):
        base = float(f"{exact:.{digits - 1}e}")
        if base > 0 and np.allclose(speeds, base ** (-np.arange(half) / half), rtol=ROUNDED, atol=0):
            return base
    return None
