"""Nodes and graphs: sharing, immutability, order, size, and the networkx view."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, settings

from qgraph import QGraphError
from qgraph.ir import Builder, Graph, Op, TensorType, Value, digest, parse_graph, print_graph, verify
from qgraph.ir.dtypes import F32
from tests.fuzz.graphs import graphs

ADD, MULTIPLY, EXP = (Op.registry[n]() for n in ("add", "multiply", "exp"))


def builder_and_inputs(*labels: str) -> tuple[Builder, list[Value]]:
    builder = Builder()
    return builder, [builder.input(n, TensorType((2,), F32)) for n in labels]


def test_equal_nodes_are_one_node() -> None:
    builder, (x, y) = builder_and_inputs("x", "y")
    assert builder.add(ADD, [x, y]) is builder.add(Op.registry["add"](), (x, y))
    assert builder.input("x", TensorType((2,), F32)) is x


def test_one_op_with_other_parameters_is_another_node() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((2, 2), F32))
    rows, columns = (builder.add(Op.registry["sum"]((axis,), False), [x]) for axis in (0, 1))
    assert rows is not columns


def test_commuted_operands_are_two_nodes() -> None:
    """x + y and y + x round alike, but a graph says what the user wrote; patterns try both orders."""
    builder, (x, y) = builder_and_inputs("x", "y")
    assert builder.add(ADD, [x, y]) is not builder.add(ADD, [y, x])


def test_nodes_and_values_cannot_be_changed() -> None:
    builder, (x,) = builder_and_inputs("x")
    node = builder.add(EXP, [x])
    for thing, name in ((node, "op"), (node, "inputs"), (node, "new"), (x, "type"), (x, "node")):
        with pytest.raises(AttributeError):
            setattr(thing, name, None)
    with pytest.raises(AttributeError):
        node.op.name = "sin"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_rewrite_leaves_the_old_graph_as_it_was() -> None:
    graph = parse_graph("graph(%x: f32[2]) {\n %a = exp(%x) : f32[2]\n return %a\n}")
    before = str(graph)
    after = graph.rewritten(
        lambda node, inputs: graph.builder.add(ADD, [*inputs, *inputs]).outputs if inputs else node.outputs
    )
    assert str(graph) == before
    assert [n.op.name for n in after.nodes] == ["input", "add"]
    assert after.builder is graph.builder


def test_dead_nodes_are_not_in_the_graph_but_unused_inputs_are() -> None:
    builder, (x, y) = builder_and_inputs("x", "y")
    builder.add(EXP, [y])
    graph = Graph([x, y], [x], builder)
    assert [n.op.name for n in graph.nodes] == ["input", "input"]
    assert graph.histogram() == {}


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_operands_stand_before_their_users(graph: Graph) -> None:
    seen: set[Value] = set()
    for node in graph.nodes:
        assert seen.issuperset(node.inputs)
        seen.update(node.outputs)
    assert seen.issuperset(graph.outputs)


def test_users_lists_each_user_once_in_order() -> None:
    builder, (x,) = builder_and_inputs("x")
    square = builder.add(MULTIPLY, [x, x])
    total = builder.add(ADD, [x, square.outputs[0]])
    graph = Graph([x], total.outputs, builder)
    assert graph.users(x) == (square, total)
    assert graph.users(total.outputs[0]) == ()
    assert graph.is_output(total.outputs[0])
    assert not graph.is_output(x)


def test_networkx_keeps_both_operands_of_x_times_x_and_their_order() -> None:
    builder, (x, y) = builder_and_inputs("x", "y")
    square = builder.add(MULTIPLY, [x, x]).outputs[0]
    difference = builder.add(Op.registry["subtract"](), [y, square])
    view = Graph([x, y], difference.outputs, builder).to_networkx()
    number = {d["op"] if d["op"] != "input" else d["label"]: n for n, d in view.nodes(data=True)}
    x_node, y_node = (next(n for label, n in number.items() if f"'{c}'" in label) for c in "xy")
    assert view.number_of_edges(x_node, number["multiply"]) == 2
    assert sorted(k for _, _, k in view.in_edges(number["multiply"], keys=True)) == [0, 1]
    assert view.has_edge(y_node, number["subtract"], key=0)
    assert view.has_edge(number["multiply"], number["subtract"], key=1)
    assert view.nodes[number["multiply"]]["types"] == ["f32[2]"]


@given(graphs())
@settings(max_examples=50, deadline=None)
def test_networkx_is_an_acyclic_view_with_one_edge_for_each_operand(graph: Graph) -> None:
    import networkx as nx

    view = graph.to_networkx()
    assert nx.is_directed_acyclic_graph(view)
    assert view.number_of_nodes() == len(graph.nodes)
    assert view.number_of_edges() == sum(len(n.inputs) for n in graph.nodes)


def test_a_graph_is_stored_as_text_and_not_pickled() -> None:
    graph = parse_graph("graph(%x: f32[2]) {\n return %x\n}")
    with pytest.raises(QGraphError, match="not pickled"):
        pickle.dumps(graph)
    with pytest.raises(QGraphError):
        copy.deepcopy(graph)


def chain(length: int) -> Graph:
    builder, (x,) = builder_and_inputs("x")
    value = x
    for i in range(length):
        value = builder.add(ADD if i % 2 else MULTIPLY, [value, x]).outputs[0]
    return Graph([x], [value], builder)


def test_a_chain_of_100_000_nodes_needs_no_recursion() -> None:
    graph = chain(100_000)
    assert len(graph.nodes) == 100_001
    verify(graph)
    text = print_graph(graph)
    assert text.count("\n") == 100_002
    assert digest(parse_graph(text)) == digest(graph)
    rebuilt = graph.rewritten(lambda node, inputs: node.outputs)
    assert rebuilt.outputs == graph.outputs


def test_a_wide_node_and_a_deep_diamond_are_linear_too() -> None:
    builder, (x,) = builder_and_inputs("x")
    value = x
    for _ in range(2000):  # 2^2000 paths
        value = builder.add(ADD, [value, value]).outputs[0]
    wide = builder.add(Op.registry["concatenate"](0), [value] * 5000)
    graph = Graph([x], wide.outputs, builder)
    assert len(graph.nodes) == 2002
    assert digest(graph)
    verify(graph)
