"""The text form: printed graphs parse back to the same graph."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest
from hypothesis import given, settings

import qgraph as qg
from qgraph.ir import Builder, Graph, Op, TensorType, digest, parse_graph, verify
from qgraph.ir.dtypes import F32
from qgraph.ir.op import Constant
from tests.fuzz.graphs import graphs


def without_comments(text: str) -> str:
    return re.sub(r"  // .*", "", text)


@given(graphs())
@settings(max_examples=300, deadline=None)
def test_a_printed_graph_parses_back(graph: Graph) -> None:
    text = str(graph)
    again = parse_graph(text)
    verify(again)
    assert digest(again) == digest(graph)
    assert without_comments(str(again)) == without_comments(text)
    assert [v.type for v in again.outputs] == [v.type for v in graph.outputs]


def test_a_traced_graph_prints_names_types_and_lines() -> None:
    @qg.jit
    def layer(x, w):
        with qg.scope("layers.3"):
            return qg.silu(x @ w["q"].T) * 0.5

    text = str(layer.graph(mx.ones((1, 64)), {"q": qg.quantize(mx.ones((32, 64)))}))
    assert without_comments(text) == "\n".join(
        [
            "graph(%x: f32[1,64], %w.q: f32[32,64]:affine4g64) {",
            "  %w.q.T = transpose{axes=(1, 0)}(%w.q) : f32[64,32]:affine4g64@-2",
            "  %layers.3.dot = dot(%x, %w.q.T) : f32[1,32]",
            "  %layers.3.silu = silu(%layers.3.dot) : f32[1,32]",
            "  %layers.3.constant = constant{data=(0.5,), shape=(), dtype=f32}() : f32[]",
            "  %layers.3.multiply = multiply(%layers.3.silu, %layers.3.constant) : f32[1,32]",
            "  return %layers.3.multiply",
            "}",
        ]
    )
    assert len(re.findall(r"// test_text\.py:\d+ in layers\.3", text)) == 5


def test_names_do_not_move_when_an_unrelated_node_comes_in() -> None:
    def f(x, extra):
        y = qg.exp(x)
        y = qg.sin(y) if extra else y
        with qg.scope("head"):
            return qg.cos(y)

    before, after = (str(qg.jit(f).graph(mx.ones(2), e)) for e in (False, True))
    assert "%head.cos = cos(%exp)" in before
    assert "%head.cos = cos(%sin)" in after


@pytest.mark.parametrize("scope", ["a b", 'say "x"', "line\nbreak", "100%", "(", "//", "ünï", "a..b", "."])
def test_any_scope_prints_as_something_that_parses(scope: str) -> None:
    @qg.jit
    def f(x):
        with qg.scope(scope):
            return qg.exp(x) + qg.sin(x)

    graph = f.graph(mx.ones(2))
    assert digest(parse_graph(str(graph))) == digest(graph)
    assert f(mx.zeros(2)).tolist() == [1.0, 1.0]  # the emitted program has the scope in its comments


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("%a = exp(%b) : f32[2]\n return %a", "line 2: %b is used before it is defined"),
        ("%a = exp(%x) : f32[3]\n return %a", "gives f32[2], the text says f32[3]"),
        ("%a = nosuch(%x) : f32[2]\n return %a", "unknown op 'nosuch'"),
        ("%a = exp{q=1}(%x) : f32[2]\n return %a", "line 2: exp: "),
        ("%a = exp(%x, %x) : f32[2]\n return %a", "exp takes 1 operands, found 2"),
        ("%a = transpose{axes=__import__('os')}(%x) : f32[2]\n return %a", "cannot read parameters"),
        ("%a = exp %x\n return %a", "not a node"),
        ("%a = exp(%x) : f32[2]", "no return line"),
        ("return %a", "%a is used before"),
        ("return %x\n %a = exp(%x) : f32[2]", "after return comes one }"),
        ("return %x\n}\ngraph() {\n return", "after return comes one }"),
    ],
)
def test_what_is_no_graph_is_refused_with_its_line(body: str, message: str) -> None:
    with pytest.raises(qg.QGraphError, match=re.escape(message)):
        parse_graph(f"graph(%x: f32[2]) {{\n {body}\n}}")


def test_a_text_that_does_not_start_with_a_graph_is_refused() -> None:
    for text in ("", "hello", "graph(%x: f32[2])"):
        with pytest.raises(qg.QGraphError):
            parse_graph(text)


def test_comments_and_blank_lines_do_not_count() -> None:
    plain = "graph(%x: f32[2]) {\n %a = exp(%x) : f32[2]\n return %a\n}"
    noisy = "// a graph\n\n" + plain.replace("\n return", "  // = sin(%x) : f32[3]\n\n // end\n return")
    assert digest(parse_graph(plain)) == digest(parse_graph(noisy))


def test_graphs_without_inputs_or_outputs_print() -> None:
    builder = Builder()
    constant = builder.add(Constant((1.0,), (), F32)).outputs[0]
    for graph in (
        Graph([], [constant], builder),
        Graph([builder.input("x", TensorType((), F32))], [], builder),
    ):
        assert digest(parse_graph(str(graph))) == digest(graph)


def test_every_op_is_in_the_registry_under_its_name() -> None:
    assert all(kind.name == name for name, kind in Op.registry.items())
    with pytest.raises(qg.QGraphError, match="two ops are named 'exp'"):
        type("Other", (Op,), {"name": "exp"})
