"""A graph as text, as JSON, and as Graphviz source; all from the same names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from math import isfinite
from typing import Any, cast

from qgraph._errors import QGraphError
from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.op import Input
from qgraph.ir.origin import Source
from qgraph.ir.text import names_of


def render(graph: Graph, format: str = "text") -> str:
    r"""`graph` in one of `FORMATS`. The text is canonical, and `qgraph.ir.parse_graph` reads it back.

    Errors: QGraphError for an unknown format.

    >>> from qgraph.ir import parse_graph
    >>> lines = ["graph(%x: f32[2]) {", "%exp = exp(%x) : f32[2]", "return %exp", "}"]
    >>> json.loads(render(parse_graph(chr(10).join(lines)), "json"))["outputs"]
    ['exp']
    """
    write = _WRITERS.get(format)
    if write is None:
        raise QGraphError(f"no format is named {format!r}", fix=f"use one of {', '.join(FORMATS)}")
    return write(graph)


def _json(graph: Graph) -> str:
    names = names_of(graph)
    nodes = [_node(i, node, names) for i, node in enumerate(graph.nodes)]
    whole = {
        "inputs": [names[v] for v in graph.inputs],
        "outputs": [names[v] for v in graph.outputs],
        "nodes": nodes,
    }
    return json.dumps(whole, indent=1, allow_nan=False)


def _node(number: int, node: Node, names: dict[Value, str]) -> dict[str, Any]:
    origin = node.origin
    return {
        "id": number,
        "name": names[node.outputs[0]],
        "op": node.op.name,
        "params": {f.name: _plain(getattr(node.op, f.name)) for f in fields(node.op)},
        "operands": [names[v] for v in node.inputs],
        "results": [{"name": names[v], "type": str(v.type)} for v in node.outputs],
        "scope": origin.scope,
        "sources": [_source(s) for s in origin.sources if s.known],
        "steps": [{"pass": s.pass_name, "rule": s.rule, "ordinal": s.ordinal} for s in origin.steps],
    }


def _source(source: Source) -> dict[str, Any]:
    return {"file": source.file, "line": source.line, "function": source.function}


def _plain(value: object) -> Any:
    """A parameter as JSON has it: numbers, lists and text. JSON has no infinity, so that is text."""
    if isinstance(value, tuple):
        return [_plain(item) for item in cast("tuple[object, ...]", value)]
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


class _Scope:
    """A module of the model: the nodes in it, and the modules inside."""

    def __init__(self) -> None:
        self.nodes: list[int] = []
        self.inner: dict[str, _Scope] = {}


def _dot(graph: Graph) -> str:
    number = {node: i for i, node in enumerate(graph.nodes)}
    root = _Scope()
    for node, i in number.items():
        scope = root
        for part in filter(None, node.origin.scope.split(".")):
            scope = scope.inner.setdefault(part, _Scope())
        scope.nodes.append(i)
    labels = [_label(node) for node in graph.nodes]
    lines = ["digraph qgraph {", '  node [shape=box, fontname="monospace"];', *_clusters(root, labels)]
    for node, i in number.items():
        lines += (_edge(number[v.node], i, v, k, node) for k, v in enumerate(node.inputs))
    for k, v in enumerate(graph.outputs):
        lines += [f"  out{k} [shape=ellipse, label={_quoted(f'output {k}')}];"]
        lines += [f"  n{number[v.node]} -> out{k} [label={_quoted(str(v.type))}];"]
    return "\n".join([*lines, "}"])


def _clusters(root: _Scope, labels: list[str]) -> list[str]:
    """The nodes inside nested boxes; a loop, since scopes may nest as deep as a user likes."""
    lines: list[str] = []
    count = 0
    todo: list[tuple[str, _Scope | None, int]] = [("", root, 1)]
    while todo:
        name, scope, depth = todo.pop()
        pad = "  " * depth
        if scope is None:
            lines.append(f"{'  ' * (depth - 1)}}}")
            continue
        if name:
            lines += [f"{'  ' * (depth - 1)}subgraph cluster_{count} {{", f"{pad}label={_quoted(name)};"]
            count += 1
        lines += [f"{pad}n{i} [label={_quoted(labels[i])}];" for i in scope.nodes]
        todo += [("", None, depth)] if name else []
        todo += [(inner, child, depth + 1) for inner, child in reversed(scope.inner.items())]
    return lines


def _label(node: Node) -> str:
    types = ", ".join(map(str, node.types))
    if isinstance(node.op, Input):
        return f"{node.op.label}\n{types}"
    source = node.origin.source
    return "\n".join([str(node.op), types, *([str(source)] if source.known else [])])


def _edge(start: int, end: int, value: Value, operand: int, node: Node) -> str:
    parts = [str(operand)] if len(node.inputs) > 1 else []
    parts += [f"result {value.index}"] if len(value.node.outputs) > 1 else []
    return f"  n{start} -> n{end}" + (f" [label={_quoted(', '.join(parts))}];" if parts else ";")


def _quoted(text: str) -> str:
    r"""A Graphviz string: quotes and backslashes escaped, lines ended by ``\n``."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "\\n".join(escaped.splitlines()) + '"'


_WRITERS: dict[str, Callable[[Graph], str]] = {"text": str, "json": _json, "dot": _dot}
FORMATS = tuple(_WRITERS)
