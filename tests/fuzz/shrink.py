"""Makes a failing graph small: fewer outputs, inputs in place of what computes them, nodes left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import numpy as np

from qgraph._errors import QGraphError
from qgraph.ir import Builder, Graph, Node, Value
from qgraph.ir.op import Constant, Input
from tests.fuzz import domains
from tests.fuzz.evaluation import Evaluation

Fails = Callable[[Graph], bool]
TRIES = 600


def size(graph: Graph) -> int:
    """The nodes that compute something: neither inputs nor constants."""
    return sum(not isinstance(n.op, (Input, Constant)) for n in graph.nodes)


def shrunk(graph: Graph, fails: Fails, tries: int = TRIES) -> Graph:
    """The smallest graph found for which `fails` still holds."""
    best = _without_unused(graph)
    best = best if fails(best) else graph
    seen: set[str] = set()
    again = True
    while again:
        again = False
        for candidate in _smaller(best):
            text = str(candidate)
            if text in seen:
                continue
            if tries <= 0:
                return best
            seen.add(text)
            tries -= 1
            if fails(candidate):
                best, again = candidate, True
                break
    return best


def _smaller(graph: Graph) -> Iterator[Graph]:
    """Graphs with less in them, those with much less first."""
    for outputs in _fewer(graph.outputs):
        yield _without_unused(graph.with_outputs(outputs))
    known = _values(graph)
    taken = {v.op.label.split(".")[0] for v in graph.inputs}
    inner = [n for n in reversed(graph.nodes) if not isinstance(n.op, Input)]
    for node in inner:
        made = _replaced(graph, node, lambda v, builder: _as_input(v, builder, known.get(v, 0), taken))
        if made is not None:
            yield made
    for node in inner:
        for operand in node.inputs:
            if len(node.outputs) == 1 and operand.type == node.outputs[0].type:
                made = _bypassed(graph, node, operand)
                if made is not None:
                    yield made


def _values(graph: Graph) -> dict[Value, Any]:
    """What the reference gives, as far as it comes: where it raises, the rest is unknown."""
    evaluation = Evaluation(domains.numbers(graph, 0))
    with suppress(Exception):
        evaluation.outputs(graph)
    return evaluation.values


def _fewer(outputs: tuple[Value, ...]) -> Iterator[list[Value]]:
    """One output, all but one, or what the only one is made of."""
    if len(outputs) == 1:
        yield from ([v] for v in outputs[0].node.inputs)
        return
    yield from ([v] for v in outputs)
    yield from ([*outputs[:i], *outputs[i + 1 :]] for i in range(len(outputs)))


def _as_input(v: Value, builder: Builder, x: object, taken: set[str]) -> Value:
    """An input in place of `v`, of numbers from the same range."""
    label = next(name for n in count() if (name := f"y{n}") not in taken)
    x = np.asarray(x)
    if v.type.dtype.is_int:
        label = domains.within(label, int(np.min(x, initial=0)), int(np.max(x, initial=0)))
    return builder.input(label, v.type)


def _replaced(graph: Graph, node: Node, make: Callable[[Value, Builder], Value]) -> Graph | None:
    """The graph with inputs for the results of `node`; a constant is small as it is."""
    if isinstance(node.op, Constant):
        return None
    return _rebuilt(graph, {node: lambda builder, _: [make(v, builder) for v in node.outputs]})


def _bypassed(graph: Graph, node: Node, operand: Value) -> Graph | None:
    return _rebuilt(graph, {node: lambda _, new: [new[operand]]})


def _rebuilt(graph: Graph, instead: dict[Node, Callable[..., list[Value]]]) -> Graph | None:
    builder, new = Builder(), dict[Value, Value]()
    try:
        for node in graph.nodes:
            if node in instead:
                results = instead[node](builder, new)
            else:
                results = builder.add(node.op, [new[v] for v in node.inputs], node.origin).outputs
            new.update(zip(node.outputs, results, strict=True))
    except QGraphError:
        return None
    made = [n.outputs[0] for n in builder._nodes.values() if isinstance(n.op, Input)]
    return _without_unused(Graph(made, [new[v] for v in graph.outputs], builder))


def _without_unused(graph: Graph) -> Graph:
    """The inputs that something reads or that are returned."""
    used = [v for v in graph.inputs if graph.users(v) or graph.is_output(v)]
    return Graph(used, graph.outputs, graph.builder)
