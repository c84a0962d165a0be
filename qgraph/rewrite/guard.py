"""Indices that may be out of range: their meaning, made explicit by ordinary ops.

take(a, i)            → where(clip(i) == i, take(a, clip(i)), NaN)
index_update(a, v, i) → index_update(pad(a), v, i or the row that pad added)[the rows of a]

An index that `qgraph.ops.bounds` shows to be in range, such as a router's top k, stays as it is. The pass
`guard-indices` does this where it can be seen; emission does it for what no pass has done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from qgraph.ir.dtypes import I64, U64, DType
from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.op import Constant, Op
from qgraph.ir.origin import Origin, Step
from qgraph.ops.arrange import Pad
from qgraph.ops.bounds import Bounds
from qgraph.ops.elementwise import Cast
from qgraph.ops.indexed import Indexed, missing
from qgraph.ops.shape import Reshape, Slice

PASS = "guard-indices"


def guard_indices(graph: Graph, ordinal: int = 0) -> Graph:
    """`graph` with every index in range by construction; itself when they all are."""
    if not any(isinstance(node.op, Indexed) for node in graph.nodes):
        return graph
    bounds, changed = Bounds(), False

    def rebuild(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
        nonlocal changed
        same = inputs == node.inputs  # values compare by identity
        results = node.outputs if same else graph.builder.add(node.op, inputs, node.origin).outputs
        if isinstance(node.op, Indexed) and results[0].type.size:
            guarded = _Guarded(graph, results[0].node, bounds, ordinal).result()
            changed = changed or guarded is not results[0]
            results = (guarded,)
        for value in results:
            if value.type.dtype.is_int:
                bounds.of(value)  # so that no question goes deep
        return results

    after = graph.rewritten(rebuild)
    return after if changed else graph


class _Guarded:
    """The guarded form of one node."""

    def __init__(self, graph: Graph, node: Node, bounds: Bounds, ordinal: int) -> None:
        self.builder = graph.builder
        self.bounds = bounds
        self.node = node
        self.op: Any = node.op
        self.types = tuple(v.type for v in node.inputs)
        origin, step = node.origin, Step(PASS, node.op.name, ordinal)
        self.origin = Origin(origin.sources, origin.scope, (*origin.steps, step))

    def add(self, op: Op, *inputs: Value) -> Value:
        """A node that stands for (a part of) the one at hand."""
        return self.builder.add(op, inputs, self.origin).outputs[0]

    def apply(self, name: str, *inputs: Value) -> Value:
        """An op without parameters, by name."""
        return self.add(Op.registry[name](), *inputs)

    def number(self, x: float | int | bool, dtype: DType) -> Value:
        """A constant."""
        return self.add(Constant((x,), (), dtype))

    def result(self) -> Value:
        """The value that replaces the node's."""
        indices = {i: v for i, v in enumerate(self.node.inputs) if i in self.op.indexed(self.types)}
        sizes = self.op.indexed(self.types)
        pairs = {i: self.clipped(v, sizes[i][1]) for i, v in indices.items() if v.type.size}
        masks = {i: mask for i, (_, mask) in pairs.items() if mask is not None}
        if all(v is indices[i] for i, (v, _) in pairs.items()):
            return self.node.outputs[0]
        return self.written(pairs, masks) if self.op.writes and masks else self.taken(pairs, masks)

    def clipped(self, index: Value, size: int) -> tuple[Value, Value | None]:
        """The index limited to what MLX may see; and where it was in range, None for everywhere."""
        low, high = self.bounds.of(index)
        dtype, limited = index.type.dtype, index
        if high >= size:
            limited = self.apply("minimum", limited, self.number(size - 1, dtype))
        if low < -size:
            limited = self.apply("maximum", limited, self.number(-size, dtype))
        mask = None if limited is index else self.apply("equal", limited, index)
        if dtype is U64:  # MLX makes a float of it next to a signed one, and refuses that as an index
            limited = self.add(Cast(I64), limited)
        if low < 0 and not (self.op.from_the_end and (mask is None or not self.op.writes)):
            limited = self.apply("remainder", limited, self.number(size, dtype))
        return limited, mask

    def taken(self, pairs: dict[int, tuple[Value, Value | None]], masks: dict[int, Value]) -> Value:
        """The op on limited indices, and `missing` where one was out of range."""
        operands = [pairs[i][0] if i in pairs else v for i, v in enumerate(self.node.inputs)]
        op = self.op
        moved = any(pairs[i][0].op.name == "remainder" for i in pairs)
        if moved and any(f.name == "sorted_indices" for f in fields(op)):
            op = replace(op, sorted_indices=False)  # counting from the end changes the order
        found = self.add(op, *operands)
        if not masks:
            return found
        valid = [self.beside(mask) for mask in masks.values()]
        where = valid[0]
        for other in valid[1:]:
            where = self.apply("logical_and", where, other)
        dtype = found.type.dtype
        return self.apply("where", where, found, self.number(missing(dtype), dtype))

    def beside(self, mask: Value) -> Value:
        """The mask with as many axes behind it as the result has behind the indices'."""
        behind = self.op.behind(self.types)
        return self.add(Reshape((*mask.type.shape, *[1] * behind)), mask) if behind else mask

    def written(self, pairs: dict[int, tuple[Value, Value | None]], masks: dict[int, Value]) -> Value:
        """The op on an array with one more row on the axes in question, which takes what is out of range."""
        a, sizes = self.node.inputs[0], self.op.indexed(self.types)
        operands = list(self.node.inputs)
        for i, (limited, _) in pairs.items():
            if i in masks:
                past = self.number(sizes[i][1], limited.type.dtype)
                limited = self.apply("where", masks[i], limited, past)
            operands[i] = limited
        grown = {sizes[i][0] for i in masks}
        width = tuple((0, int(axis in grown)) for axis in range(a.type.ndim))
        operands[0] = self.add(Pad(width), a, self.number(0, a.type.dtype))
        shape = a.type.shape
        start, step = (0,) * len(shape), (1,) * len(shape)
        return self.add(Slice(start, shape, step), self.add(self.op, *operands))
