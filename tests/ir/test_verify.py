"""The verifier: every planted fault is found, and named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

import qgraph as qg
from qgraph import VerifyError
from qgraph.ir import Builder, Graph, Node, Op, TensorType, Value, verify
from qgraph.ir.dtypes import F16, F32
from qgraph.ir.origin import NOWHERE
from tests.fuzz.graphs import graphs

EXP, ADD = Op.registry["exp"](), Op.registry["add"]()
T = TensorType((2,), F32)


def node(op: Op, inputs: list[Value], *types: TensorType) -> Node:
    """A node as a broken pass could make it, without the builder's inference."""
    return Node(op, tuple(inputs), types, NOWHERE)


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_what_a_builder_makes_is_valid(graph: Graph) -> None:
    verify(graph)


def test_a_wrong_type_is_found() -> None:
    builder = Builder()
    x = builder.input("x", T)
    for wrong in (TensorType((3,), F32), TensorType((2,), F16)):
        bad = node(EXP, [x], wrong)
        with pytest.raises(VerifyError, match=r"exp has type .*, its rule gives f32\[2\]") as info:
            verify(Graph([x], bad.outputs, builder))
        assert "exp(%x)" in str(info.value)


def test_a_fault_behind_good_nodes_is_found() -> None:
    builder = Builder()
    x = builder.input("x", T)
    bad = node(EXP, [x], TensorType((2,), F16))
    top = builder.add(Op.registry["cast"](F32), bad.outputs)
    with pytest.raises(VerifyError, match="exp has type"):
        verify(Graph([x], top.outputs, builder))


def test_nodes_that_were_checked_before_are_not_checked_again() -> None:
    builder = Builder()
    x = builder.input("x", T)
    bad = node(EXP, [x], TensorType((3,), F32))
    verify(Graph([x], bad.outputs, builder), known={bad})


def test_a_wrong_number_of_results_or_operands_is_found() -> None:
    builder = Builder()
    x = builder.input("x", T)
    for bad in (node(EXP, [x], T, T), node(EXP, [x, x], T), node(ADD, [x], T), node(EXP, [], T)):
        with pytest.raises(VerifyError):
            verify(Graph([x], bad.outputs, builder))


def test_operands_that_the_op_refuses_are_found() -> None:
    builder = Builder()
    x, y = builder.input("x", T), builder.input("y", TensorType((3,), F32))
    bad = node(ADD, [x, y], T)
    with pytest.raises(
        VerifyError, match=r"add refuses its operands: shapes \(2,\) and \(3,\) do not broadcast"
    ):
        verify(Graph([x, y], bad.outputs, builder))


def test_an_input_that_the_graph_does_not_list_is_found() -> None:
    builder = Builder()
    x, y = builder.input("x", T), builder.input("y", T)
    with pytest.raises(VerifyError, match="'y' is read but is not an input"):
        verify(Graph([x], builder.add(ADD, [x, y]).outputs, builder))


def test_two_inputs_of_one_name_are_found() -> None:
    builder = Builder()
    x, other = builder.input("x", T), builder.input("x", TensorType((3,), F32))
    for inputs in ([x, other], [x, x]):
        with pytest.raises(VerifyError, match="two inputs are named 'x'"):
            verify(Graph(inputs, [x], builder))


def test_an_input_that_is_no_input_is_found() -> None:
    builder = Builder()
    made = builder.add(EXP, [builder.input("x", T)]).outputs[0]
    with pytest.raises(VerifyError, match="is made by exp"):
        verify(Graph([made], [made], builder))


def test_a_use_before_the_definition_is_found() -> None:
    builder = Builder()
    x = builder.input("x", T)
    a = builder.add(EXP, [x])
    graph = Graph([x], builder.add(ADD, [a.outputs[0], x]).outputs, builder)
    graph._nodes = graph.nodes[::-1]  # the order is derived, so only a corrupted cache can have it wrong
    with pytest.raises(VerifyError, match="not defined before its use"):
        verify(graph)


def test_the_message_has_the_users_line() -> None:
    @qg.jit
    def f(x):
        return qg.exp(x) + 1

    import mlx.core as mx

    good = f.graph(mx.ones(2))
    exp = good.find("exp")[0]
    bad = Node(exp.op, exp.inputs, (TensorType((2,), F16),), exp.origin)
    with pytest.raises(VerifyError, match=r"from test_verify\.py:\d+ in .*return qg\.exp\(x\) \+ 1"):
        verify(Graph(good.inputs, bad.outputs, good.builder))
