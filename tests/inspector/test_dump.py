"""The three forms of one graph."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import pytest
from hypothesis import given, settings

import qgraph as qg
from qgraph.inspector import FORMATS, render
from qgraph.ir import Graph, digest, parse_graph
from qgraph.ir.text import names_of
from tests.fuzz.graphs import graphs
from tests.inspector.programs import layers, layers_arguments

TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|([A-Za-z_]\w*)|(->)|([{}\[\];=,]))')


def tokens(text: str) -> list[str]:
    """The tokens of Graphviz' language; fails on anything else."""
    found, at = [], 0
    text = text.rstrip()
    while at < len(text):
        m = TOKEN.match(text, at)
        assert m, f"not Graphviz at {text[at : at + 40]!r}"
        found.append(m[0].strip())
        at = m.end()
    return found


def check_dot(text: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Check braces and statements of a digraph; the names of its nodes and its edges."""
    found = tokens(text)
    assert found[:3] == ["digraph", "qgraph", "{"]
    assert found.count("{") == found.count("}")
    assert found[-1] == "}"
    nodes, edges, declared = set[str](), [], set[str]()
    for i, token in enumerate(found):
        if token == "->":
            edges.append((found[i - 1], found[i + 1]))
        elif re.fullmatch(r"n\d+|out\d+", token) and found[i + 1] == "[" and found[i - 1] != "->":
            declared.add(token)
            nodes.add(token)
    assert {n for e in edges for n in e} <= declared
    return nodes, edges


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_dot_has_every_node_once_and_every_operand_as_an_edge(graph: Graph) -> None:
    nodes, edges = check_dot(render(graph, "dot"))
    assert len(nodes) == len(graph.nodes) + len(graph.outputs)
    assert len(edges) == sum(len(n.inputs) for n in graph.nodes) + len(graph.outputs)


def test_dot_quotes_whatever_a_scope_contains() -> None:
    @qg.jit
    def f(x):
        with qg.scope('a "quoted\\" scope\nwith } and ;.and\\'):
            return qg.exp(x)

    check_dot(render(f.graph(mx.ones(2)), "dot"))


def test_dot_nests_clusters_as_scopes_do() -> None:
    text = render(layers.graph(*layers_arguments()), "dot")
    labels = re.findall(r"^( *)label=\"(\w+)\";", text, re.MULTILINE)
    assert [name for _, name in labels] == ["layers", "0", "1", "2", "head"]
    depths = [len(pad) for pad, _ in labels]
    assert depths[1] == depths[2] == depths[3] > depths[0] == depths[4]
    assert len(set(re.findall(r"subgraph (cluster_\d+)", text))) == 5


def test_dot_of_very_deep_scopes_does_not_recurse() -> None:
    @qg.jit
    def f(x):
        with qg.scope(".".join(["m"] * 3000)):
            return qg.exp(x)

    check_dot(render(f.graph(mx.ones(2)), "dot"))


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_json_parses_and_is_complete(graph: Graph) -> None:
    text = render(graph, "json")
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    names = names_of(graph)
    assert [n["op"] for n in loaded["nodes"]] == [n.op.name for n in graph.nodes]
    assert [n["id"] for n in loaded["nodes"]] == list(range(len(graph.nodes)))
    assert [n["operands"] for n in loaded["nodes"]] == [[names[v] for v in n.inputs] for n in graph.nodes]
    assert loaded["outputs"] == [names[v] for v in graph.outputs]
    made = [r["name"] for n in loaded["nodes"] for r in n["results"]]
    assert len(set(made)) == len(made)
    assert [r["type"] for n in loaded["nodes"] for r in n["results"]] == [
        str(t) for n in graph.nodes for t in n.types
    ]


def test_json_has_parameters_scope_source_and_steps() -> None:
    nodes = json.loads(render(layers.optimized(*layers_arguments()), "json"))["nodes"]
    product = next(n for n in nodes if n["op"] == "quantized_matmul")
    assert product["params"] == {"transpose": True, "kernel": product["params"]["kernel"]}
    assert product["scope"] == "layers.0"
    assert (
        product["steps"] == [{"pass": "quantize-dot", "rule": "right-operand", "ordinal": 1}]
        or product["steps"]
    )
    (source,) = product["sources"][:1]
    assert source["file"].endswith("programs.py")
    assert source["line"] > 0
    cut = next(n for n in nodes if n["op"] == "slice")
    assert cut["params"]["start"] == [0, 0]


def test_json_is_the_same_for_the_same_graph() -> None:
    graph = layers.graph(*layers_arguments())
    assert render(graph, "json") == render(graph, "json")
    again = parse_graph(str(graph))
    strip = re.compile(r'"sources": \[.*?\],|"steps": \[.*?\]', re.DOTALL)
    assert strip.sub("", render(again, "json")).count('"name"') == strip.sub("", render(graph, "json")).count(
        '"name"'
    )


def test_text_is_canonical_and_other_formats_are_refused() -> None:
    graph = layers.graph(*layers_arguments())
    assert FORMATS == ("text", "json", "dot")
    assert render(graph) == str(graph)
    assert digest(parse_graph(render(graph))) == digest(graph)
    with pytest.raises(qg.QGraphError, match="no format is named 'svg'"):
        render(graph, "svg")
