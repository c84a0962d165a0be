"""The verifier: is this a well-formed, well-typed graph?"""

from __future__ import annotations

from collections.abc import Container

from qgraph._errors import QGraphError, VerifyError
from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.op import Input
from qgraph.ir.text import names_of, print_node


def verify(graph: Graph, known: Container[Node] = ()) -> None:
    """Raise `VerifyError` unless `graph` is valid; nodes in `known` were checked before.

    Checked: inputs are inputs, each listed once and under one name; operands stand before their users;
    every node's types are what its op's rule gives, and the storage of quantized values can exist.
    """
    _verify_inputs(graph)
    seen: set[Node] = set()
    for node in graph.nodes:
        if node not in known:
            _verify_node(graph, node, seen)
        seen.add(node)
    for value in graph.outputs:
        if value.node not in seen:
            raise VerifyError(f"output {value!r} is not a value of the graph")


def _verify_inputs(graph: Graph) -> None:
    labels: set[str] = set()
    for value in graph.inputs:
        if not isinstance(value.op, Input):
            raise VerifyError(f"graph input {value!r} is made by {value.op}", fix="inputs are Input nodes")
        if value.op.label in labels:
            raise VerifyError(f"two inputs are named {value.op.label!r}", fix="give every input its own name")
        labels.add(value.op.label)
        declared = value.op.type
        if declared != value.type:
            raise VerifyError(f"input {value.op.label!r} is declared {declared}, its value is {value.type}")
        try:
            value.type.check()
        except QGraphError as error:
            raise VerifyError(f"input {value.op.label!r}: {error.message}", fix=error.fix) from error


def _verify_node(graph: Graph, node: Node, seen: set[Node]) -> None:
    for v in node.inputs:
        if v.node not in seen:
            raise _error(graph, node, f"operand {v!r} is not defined before its use")
    if isinstance(node.op, Input):
        if node.outputs[0] not in graph.inputs:
            raise VerifyError(f"input {node.op.label!r} is read but is not an input of the graph")
        return
    try:
        inferred = node.op.infer(*(v.type for v in node.inputs))
    except QGraphError as error:
        raise _error(graph, node, f"{node.op.name} refuses its operands: {error.message}") from error
    types = inferred if isinstance(inferred, tuple) else (inferred,)
    if types != node.types:
        found, declared = ", ".join(map(str, types)), ", ".join(map(str, node.types))
        raise _error(graph, node, f"{node.op.name} has type {declared}, its rule gives {found}")
    for t in types:
        try:
            t.check()
        except QGraphError as error:
            raise _error(graph, node, f"{node.op.name} gives {error.message}") from error


def describe(graph: Graph, value: Value) -> str:
    """The node of `value` as a line, for messages."""
    names = names_of(graph)
    return print_node(value.node, names) if value in names else repr(value.node)


def _error(graph: Graph, node: Node, message: str) -> VerifyError:
    source = node.origin.source
    where = source.sentence() if source.known else None
    fix = "a pass or a hand-written graph made this node; compare the graph before it"
    return VerifyError(message, node=describe(graph, node.outputs[0]), where=where, fix=fix)
