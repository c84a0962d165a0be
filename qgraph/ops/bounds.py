"""Which numbers an integer value can hold, as far as the graph tells without running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qgraph.ir.dtypes import BOOL, DType, int_range
from qgraph.ir.graph import Node, Value
from qgraph.ir.op import Constant
from qgraph.ops.indexed import Indexed, missing

Interval = tuple[int, int]  # the smallest and the largest number, both included

# Ops whose results are elements of their first operand.
SELECTIONS = (
    *("slice", "reshape", "transpose", "broadcast_to", "contiguous", "dynamic_slice"),
    *("sort", "partition", "topk", "max", "min", "cummax", "cummin"),
)
# Ops whose results are elements of some operands, from this one to before that one.
CHOICES: dict[str, tuple[int, int | None]] = {
    "concatenate": (0, None),
    "where": (1, 3),
    "slice_update": (0, 2),
}
READS = ("take", "take_along_axis", "gather")
POSITIONS = ("argmax", "argmin", "argsort", "argpartition")


class Bounds:
    """The intervals of values, each worked out once: ask for them from the inputs on."""

    def __init__(self) -> None:
        self._known: dict[Value, Interval] = {}

    def of(self, value: Value) -> Interval:
        """The numbers that `value`, of an integer dtype or bool, can hold."""
        found = self._known.get(value)
        if found is None:
            widest = _whole(value.type.dtype)
            low, high = self._of(value.node) or widest
            # What leaves the dtype wraps around.
            inside = widest[0] <= low <= high <= widest[1]
            found = self._known[value] = (low, high) if inside else widest
        return found

    def _of(self, node: Node) -> Interval | None:
        op, types = node.op, [v.type for v in node.inputs]
        if isinstance(op, Constant):
            return (int(min(op.data)), int(max(op.data))) if op.data else None
        name = op.name
        if name in SELECTIONS:
            return self.of(node.inputs[0])
        if name in READS:
            return self._read(node)
        if name in CHOICES:
            first, last = CHOICES[name]
            return _union([self.of(v) for v in node.inputs[first:last]])
        if name in POSITIONS:
            axis: int | None = getattr(op, "axis", None)
            return 0, (types[0].size if axis is None else types[0].shape[axis]) - 1
        if name == "cast":
            source = types[0].dtype
            return self.of(node.inputs[0]) if source.is_int or source is BOOL else None
        if name in _ARITHMETIC:
            operands = [self.of(v) for v in node.inputs]
            widest = _whole(node.outputs[0].type.dtype)
            if all(widest[0] <= low and high <= widest[1] for low, high in operands):
                return _ARITHMETIC[name](*operands)
        return _DRAWN[name](node) if name in _DRAWN else None

    def _read(self, node: Node) -> Interval:
        """Elements of the first operand, and `missing` where an index may be out of range."""
        a, op = node.inputs[0], node.op
        assert isinstance(op, Indexed)
        sizes = op.indexed(tuple(v.type for v in node.inputs))
        intervals = [(self.of(node.inputs[i]), size) for i, (_, size) in sizes.items()]
        if all(-size <= low and high < size for (low, high), size in intervals):
            return self.of(a)
        none = int(missing(a.type.dtype))
        return _union([self.of(a), (none, none)])


def _whole(dtype: DType) -> Interval:
    return int_range(dtype) if dtype.is_int else (0, 1)


def _union(intervals: Sequence[Interval]) -> Interval:
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _corners(function: Callable[[int, int], int]) -> Callable[[Interval, Interval], Interval]:
    """The interval of a function whose extremes lie at the ends of its operands' intervals."""

    def of(a: Interval, b: Interval) -> Interval:
        found = [function(x, y) for x in a for y in b]
        return min(found), max(found)

    return of


def _quotient(a: Interval, b: Interval) -> Interval | None:
    return _corners(lambda x, y: x // y)(a, b) if a[0] >= 0 and b[0] > 0 else None


def _remainder(a: Interval, b: Interval) -> Interval | None:
    if b[0] <= 0:
        return None
    return a if a[0] >= 0 and a[1] < b[0] else (0, b[1] - 1)


def _bits_of_both(a: Interval, b: Interval) -> Interval | None:
    limits = [high for low, high in (a, b) if low >= 0]
    return (0, min(limits)) if limits else None


_ARITHMETIC: dict[str, Callable[[Interval, Interval], Interval | None]] = {
    "add": _corners(lambda x, y: x + y),
    "subtract": _corners(lambda x, y: x - y),
    "multiply": _corners(lambda x, y: x * y),
    "maximum": _corners(max),
    "minimum": _corners(min),
    "floor_divide": _quotient,
    "remainder": _remainder,
    "bitwise_and": _bits_of_both,
}


def _arange(node: Node) -> Interval | None:
    op: Any = node.op
    (n,) = node.outputs[0].type.shape
    numbers = (op.start, op.step)
    if not n or any(x != int(x) for x in numbers):
        return None
    ends = int(op.start), int(op.start) + (n - 1) * int(op.step)
    return min(ends), max(ends)


def _categorical(node: Node) -> Interval:
    op: Any = node.op
    axis: int = op.axis
    return 0, node.inputs[1].type.shape[axis] - 1


def _permutation(node: Node) -> Interval | None:
    op: Any = node.op
    return (0, op.n - 1) if op.n else None


_DRAWN: dict[str, Callable[[Node], Interval | None]] = {
    "arange": _arange,
    "random_categorical": _categorical,
    "random_permutation": _permutation,
}
