"""Walking in a graph from a node: users, numbers, what lies under casts and views, what is known now."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from qgraph.ir import Graph, Node, Value
from qgraph.ir.dtypes import promote
from qgraph.ir.op import Constant, Input
from qgraph.ops.elementwise import Cast
from qgraph.ops.reduce import Reduction
from qgraph.ops.shape import Broadcast, Reshape, Slice

LARGEST = 1 << 20  # elements of a value that is worked out at compile time, a causal mask for instance
DEEPEST = 64  # nodes that it may take
KERNELS = ("f32", "f16", "bf16")  # MLX's fused ops compute in float32 at most
MADE = ("arange", "linspace", "eye", "tri", "concatenate", "pad")  # what tables and masks begin with
Shape = tuple[int, ...]


class Walk:
    """Questions about values of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._known: dict[Value, Any] = {}

    def users(self, v: Value) -> tuple[Node, ...]:
        """The nodes that read `v`."""
        return self.graph.users(v)

    def user(self, v: Value) -> Node | None:
        """The one node that reads `v`; None where there are several, or `v` is an output."""
        users = self.graph.users(v)
        return users[0] if len(users) == 1 and not self.graph.is_output(v) else None

    def known(self, v: Value) -> Any:
        """The numbers (float64) of a value that depends on no input; None for one that does, or is large."""
        if v not in self._known:
            self._known[v] = self._work_out(v)
        return self._known[v]

    def _work_out(self, v: Value) -> Any:
        order = _ancestors(v.node)
        if order is None:
            return None
        values: dict[Value, Any] = {}
        with np.errstate(all="ignore"):
            for node in order:
                made = node.op.reference(*(values[x] for x in node.inputs))
                values.update(zip(node.outputs, made if len(node.outputs) > 1 else (made,), strict=True))
        return values[v]


def _ancestors(node: Node) -> list[Node] | None:
    """All that `node` is made of, operands first; None if that is much, large, no table, or an input."""
    done: dict[Node, None] = {}
    stack = [node]
    while stack:
        top = stack[-1]
        if top in done:
            stack.pop()
            continue
        simple = top.op.elementwise or top.op.view or top.op.name in MADE
        if isinstance(top.op, Input) or not simple or len(done) > DEEPEST or len(stack) > DEEPEST:
            return None
        if any(v.type.size > LARGEST or v.type.packing for v in top.outputs):
            return None
        waiting = [v.node for v in top.inputs if v.node not in done]
        if waiting:
            stack.extend(waiting)
        else:
            done[stack.pop()] = None
    return list(done)


def number(v: Value) -> float | None:
    """The number that `v` holds everywhere, behind casts and views; None if it is no such constant.

    A cast to integers would change it, and none is looked through.
    """
    while not isinstance(v.op, Constant):
        if not (isinstance(v.op, (Broadcast, Reshape)) or (isinstance(v.op, Cast) and v.op.dtype.is_float)):
            return None
        v = v.node.inputs[0]
    if v.type.dtype.is_complex or len(set(v.op.data)) != 1:
        return None
    return float(v.op.data[0])


def scaled(v: Value) -> tuple[Value, float] | None:
    """``(x, c)`` for x * c, c * x and x / c with a number c."""
    if v.op.name not in ("multiply", "divide"):
        return None
    a, b = v.node.inputs
    c = number(b)
    if c is not None and (c or v.op.name == "multiply"):
        return a, (c if v.op.name == "multiply" else 1 / c)
    c = number(a)
    return (b, c) if c is not None and v.op.name == "multiply" else None


def added(v: Value) -> tuple[Value, float] | None:
    """``(x, c)`` for x + c and c + x with a number c."""
    if v.op.name != "add":
        return None
    for a, b in (v.node.inputs, v.node.inputs[::-1]):
        c = number(b)
        if c is not None:
            return a, c
    return None


def uncast(v: Value) -> Value:
    """`v` before casts from a float to one that holds all its numbers."""
    while isinstance(v.op, Cast) and v.op.dtype.is_float:
        source = v.node.inputs[0]
        if not source.type.dtype.is_float or promote(source.type.dtype, v.op.dtype) is not v.op.dtype:
            break
        v = source
    return v


def is_squared(v: Value) -> Value | None:
    """X for x * x, square(x) and x ** 2."""
    if v.op.name == "square":
        return v.node.inputs[0]
    if v.op.name == "multiply" and v.node.inputs[0] is v.node.inputs[1]:
        return v.node.inputs[0]
    if v.op.name == "power" and number(v.node.inputs[1]) == 2:
        return v.node.inputs[0]
    return None


class Path:
    """The values between a reduction and its use, outermost first.

    A reduced value must come back aligned with what was reduced: with the axes kept, or put back by a
    reshape. A mean of rows that is broadcast along the rows of a square matrix is something else.
    """

    def __init__(self) -> None:
        self.values: list[Value] = []

    def strip(self, v: Value) -> Value:
        """What lies under float casts, broadcasts and reshapes."""
        while True:
            self.values.append(v)
            is_float_cast = isinstance(v.op, Cast) and v.op.dtype.is_float
            if not (is_float_cast or isinstance(v.op, (Broadcast, Reshape))):
                return v
            v = v.node.inputs[0]

    def aligned(self, shape: Shape, axes: Shape) -> bool:
        """Whether all values are, for operands of `shape` reduced over `axes`, where they belong."""
        kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
        dropped = tuple(n for i, n in enumerate(shape) if i not in axes)
        if prod(dropped) == 1:
            return True
        missing = len(self.values[-1].type.shape) < len(shape)  # from the reduction outwards
        for v in reversed(self.values):
            found = v.type.shape
            if missing and isinstance(v.op, Reshape) and found == kept:
                missing = False
            if found not in ((dropped,) if missing else (kept, shape)):
                return False
        return not missing


def mean_of(v: Value, path: Path) -> tuple[Value, Shape] | None:
    """``(x, axes)`` for the mean of x over axes, however it is spelt; `v` is stripped already."""
    if v.op.name == "mean":
        assert isinstance(v.op, Reduction)
        return v.node.inputs[0], v.op.axes
    pair = scaled(v)
    if pair is None:
        return None
    total = path.strip(pair[0])
    if total.op.name != "sum" or not isinstance(total.op, Reduction):
        return None
    x = total.node.inputs[0]
    count = prod(x.type.shape[i] for i in total.op.axes)
    # 1 / N as the dtype has it: the raised op divides by N itself.
    exact = abs(pair[1] * count - 1) <= 2 * max(v.type.dtype.unit_roundoff, 2.0**-24)
    return (x, total.op.axes) if count and exact else None


def last_axis(v: Value) -> list[tuple[Value, int, int, int]]:
    """``(x, start, stop, step)`` such that `v` is x[..., start:stop:step], for every such x, `v` first.

    Casts that lose nothing are looked through.
    """
    start, step, count = 0, 1, v.type.shape[-1]
    v = uncast(v)
    found = [(v, 0, count, 1)]
    while isinstance(v.op, Slice):
        x, op = v.node.inputs[0], v.op
        if any(r != range(m) for r, m in zip(op.ranges()[:-1], x.type.shape[:-1], strict=True)):
            break
        start, step = op.start[-1] + start * op.step[-1], step * op.step[-1]
        v = uncast(x)
        found.append((v, start, start + step * count, step))
    return found


def ones_dropped(shape: Shape) -> Shape:
    """The sizes that are not 1."""
    return tuple(n for n in shape if n != 1)


def shaped(x: Any, shape: Shape) -> Any:
    """`x` under `shape`: what it is a reshape of where that has it, so that reshapes do not pile up."""
    from qgraph.ops.shape import reshape
    from qgraph.trace.tracer import Tracer

    value = x.value
    while isinstance(value.op, Reshape):
        value = value.node.inputs[0]
        if value.type.shape == tuple(shape):
            return Tracer(x.trace, value)
    return reshape(x, shape)
