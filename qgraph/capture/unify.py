"""One form for a quantized weight, whichever way the model came in.

A model that keeps words, scales and biases as three arrays is made to look as one that was given a
QuantizedTensor, so that every pass meets one quantized input.
"""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.ir import Graph, Node, Value
from qgraph.ir.op import Input
from qgraph.ops.indexing import Take
from qgraph.ops.quantized import Dequantize
from qgraph.ops.storage import Pack


def unify(graph: Graph) -> Graph:
    """The graph with one quantized input in the place of consecutive inputs that are only used together.

    Used together means: packed as they are, or the same rows of each taken, packed and unpacked. The flat
    arrays that the inputs stand for stay the same, in the same order.
    """
    places = {v: i for i, v in enumerate(graph.inputs)}
    new: dict[Value, Value] = {}
    gone: set[Value] = set()
    for node in graph.nodes:
        parts = node.inputs
        if isinstance(node.op, Pack) and _consecutive(parts, places) and parts[0] not in new:
            rows = _used_together(graph, node)
            if rows is None:
                continue
            op = parts[0].op
            assert isinstance(op, Input)
            whole = graph.builder.input(op.label, node.types[0], parts[0].node.origin)
            new[parts[0]] = whole
            gone.update(parts)
            new[node.outputs[0]] = whole
            for taken, unpacked in rows:
                made = graph.builder.add(taken.op, (whole, taken.inputs[1]), unpacked.origin)
                new[unpacked.outputs[0]] = made.outputs[0]
    if not new:
        return graph
    inputs = [new.get(v, v) for v in graph.inputs if v not in gone or v in new]
    done = dict(new)
    for node in graph.nodes:
        if isinstance(node.op, Input) or node.outputs[0] in done:
            continue
        done.update(zip(node.outputs, _rebuilt(graph, node, done), strict=True))
    return Graph(inputs, [done.get(v, v) for v in graph.outputs], graph.builder)


def _rebuilt(graph: Graph, node: Node, done: dict[Value, Value]) -> Sequence[Value]:
    inputs = [done.get(v, v) for v in node.inputs]
    if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
        return node.outputs
    return graph.builder.add(node.op, inputs, node.origin).outputs


def _consecutive(parts: Sequence[Value], places: dict[Value, int]) -> bool:
    first = places.get(parts[0])
    return first is not None and all(places.get(v) == first + i for i, v in enumerate(parts))


def _used_together(graph: Graph, pack: Node) -> list[tuple[Node, Node]] | None:
    """The (take of the first part, unpacking of the taken rows) beside `pack`; None for any other use."""
    rows: list[tuple[Node, Node]] = []
    for user in graph.users(pack.inputs[0]):
        if user is pack:
            continue
        found = _unpacked_rows(graph, pack, user)
        if found is None:
            return None
        rows.append((user, found))
    expected = 1 + len(rows)
    used = [graph.users(v) for v in pack.inputs]
    if any(len(users) != expected or graph.is_output(v) for v, users in zip(pack.inputs, used, strict=True)):
        return None
    return rows


def _unpacked_rows(graph: Graph, pack: Node, take: Node) -> Node | None:
    """The dequantize node of the rows that `take` and its like on the other parts give."""
    if not isinstance(take.op, Take) or take.inputs[0] is not pack.inputs[0]:
        return None
    users = graph.users(take.outputs[0])
    if len(users) != 1 or users[0].op != pack.op:
        return None
    packed = users[0]
    for part, taken in zip(pack.inputs, packed.inputs, strict=True):
        same = taken.op == take.op and taken.node.inputs == (part, take.inputs[1])
        if not same or graph.users(taken) != (packed,):
            return None
    unpackings = graph.users(packed.outputs[0])
    if len(unpackings) == 1 and isinstance(unpackings[0].op, Dequantize):
        return unpackings[0]
    return None
