"""The text form of a graph: printed by `print_graph`, read back by `parse_graph`.

    graph(%x: f32[1,64], %w: f32[32,64]:affine4g64) {
      %w.T = transpose{axes=(1, 0)}(%w) : f32[64,32]:affine4g64@-2  // model.py:3
      %dot = dot(%x, %w.T) : f32[1,32]  // model.py:3 in layers.0
      return %dot
    }

Names come from scope, op and ordinal, so that two dumps align in a diff. After ``//`` nothing counts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

from qgraph._errors import QGraphError
from qgraph.ir.dtypes import DType
from qgraph.ir.graph import Builder, Graph, Node, Value
from qgraph.ir.op import Input, Op
from qgraph.ir.origin import Origin, Source
from qgraph.ir.types import parse_type
from qgraph.quant.scheme import Quantization

_UNREADABLE = re.compile(r"[^\w.\-]")  # what a name of the text form cannot hold
_PARSE_FIX = "see qgraph.ir.text for the form"


def names_of(graph: Graph) -> dict[Value, str]:
    """A readable name for every value, unique in the graph: scope.op, with an ordinal from the second on."""
    names: dict[Value, str] = {}
    used: dict[str, int] = {}

    def unique(label: str) -> str:
        name = _UNREADABLE.sub("_", label) or "_"
        count = used.get(name, 0)
        used[name] = count + 1
        return unique(f"{name}.{count}") if count else name

    for value in graph.inputs:
        assert isinstance(value.op, Input)
        names[value] = unique(value.op.label)
    for node in graph.nodes:
        if isinstance(node.op, Input):
            continue
        base = _base_name(node, names)
        for value in node.outputs:
            names[value] = unique(base)
    return names


def _base_name(node: Node, names: dict[Value, str]) -> str:
    if node.op.name == "transpose" and isinstance(node.inputs[0].op, Input):
        return f"{names[node.inputs[0]]}.T"
    scope = node.origin.scope
    return f"{scope}.{node.op.name}" if scope else node.op.name


def print_node(node: Node, names: dict[Value, str]) -> str:
    """One line: results, op, operands, types, and the user's line as a comment."""
    results = ", ".join(f"%{names[v]}" for v in node.outputs)
    operands = ", ".join(f"%{names[v]}" for v in node.inputs)
    types = ", ".join(str(v.type) for v in node.outputs)
    return f"{results} = {op_text(node.op)}({operands}) : {types}"


def op_text(op: Op) -> str:
    """The op with its parameters, as the text form has it."""
    return str(op)


def call_text(op: Op, operands: Sequence[Value], scope: str = "") -> str:
    """An op on operands that have no node (yet), for messages: inputs by name, all with their types."""
    shown = ", ".join(f"{_short_name(v)}{v.type}" for v in operands)
    return f"{scope}.{op}({shown})" if scope else f"{op}({shown})"


def _short_name(v: Value) -> str:
    if isinstance(v.op, Input):
        return f"%{v.op.label}: "
    if v.op.name == "transpose" and isinstance(v.node.inputs[0].op, Input):
        return f"%{v.node.inputs[0].op.label}.T: "
    return ""


def comment(node: Node) -> str:
    """The user's line and module path of a node."""
    source, scope = node.origin.source, node.origin.scope
    where = [str(source)] if source.known else []
    text = " in ".join(where + ([scope] if scope else []))
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def print_graph(graph: Graph) -> str:
    """The text form of `graph`."""
    names = names_of(graph)
    inputs = ", ".join(f"%{names[v]}: {v.type}" for v in graph.inputs)
    lines = [f"graph({inputs}) {{"]
    for node in graph.nodes:
        if isinstance(node.op, Input):
            continue
        note = comment(node)
        lines.append(f"  {print_node(node, names)}" + (f"  // {note}" if note else ""))
    lines.append(f"  return {', '.join(f'%{names[v]}' for v in graph.outputs)}".rstrip())
    return "\n".join([*lines, "}"])


_NAME = r"%[\w.\-]+"
_HEAD = re.compile(r"graph\((?P<inputs>.*)\) \{")
_INPUT = re.compile(rf"(?P<name>{_NAME}): (?P<type>\w+\[[\d,]*\](?::[\w@\-/*]+)?)")
_NODE = re.compile(
    rf"(?P<results>{_NAME}(?:, {_NAME})*) = (?P<op>\w+)(?P<params>\{{.*?\}})?"
    rf"\((?P<operands>(?:{_NAME}(?:, {_NAME})*)?)\) : (?P<types>.*?)(?:  // .*)?"
)


def parse_graph(text: str) -> Graph:
    """Read a graph from its text form, checking every type against the op's rule.

    >>> print(parse_graph('''graph(%x: f32[2]) {
    ...   %exp = exp(%x) : f32[2]
    ...   return %exp
    ... }'''))
    graph(%x: f32[2]) {
      %exp = exp(%x) : f32[2]
      return %exp
    }
    """
    lines = _lines(text)
    _, first = next(lines, (0, ""))
    head = _HEAD.fullmatch(first)
    if head is None:
        raise QGraphError(f"line 1: expected graph(...) {{, found {first[:60]!r}", fix=_PARSE_FIX)
    builder, values = Builder(), dict[str, Value]()
    inputs: list[Value] = []
    for m in _INPUT.finditer(head["inputs"]):
        inputs.append(builder.input(m["name"][1:], parse_type(m["type"])))
        values[m["name"]] = inputs[-1]
    for number, line in lines:
        if line == "}":
            break
        if line.startswith("return"):
            outputs = [_lookup(values, name, number) for name in re.findall(_NAME, line)]
            if [text for _, text in lines] != ["}"]:
                raise QGraphError(
                    f"line {number}: after return comes one }}, and nothing else", fix=_PARSE_FIX
                )
            return Graph(inputs, outputs, builder)
        _parse_node(line, number, builder, values)
    raise QGraphError("the graph has no return line", fix=_PARSE_FIX)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.strip().startswith("//"):
            yield number, line.strip()


def _lookup(values: dict[str, Value], name: str, number: int) -> Value:
    found = values.get(name)
    if found is None:
        raise QGraphError(f"line {number}: {name} is used before it is defined", fix=_PARSE_FIX)
    return found


def _parse_node(line: str, number: int, builder: Builder, values: dict[str, Value]) -> None:
    m = _NODE.fullmatch(line)
    if m is None:
        raise QGraphError(f"line {number}: not a node: {line[:80]!r}", fix=_PARSE_FIX)
    kind = Op.registry.get(m["op"])
    if kind is None:
        raise QGraphError(f"line {number}: unknown op {m['op']!r}", fix="see qgraph.ir.op.Op.registry")
    operands = [_lookup(values, name, number) for name in re.findall(_NAME, m["operands"])]
    results = re.findall(_NAME, m["results"])
    # Each node gets a source of its own, unknown as it is: reports follow nodes by their sources.
    origin = Origin((Source(None, 0),), _scope_of(results[0][1:], kind.name))
    try:
        op = kind(**_parse_params(m["params"], number)) if m["params"] else kind()
        node = builder.add(op, operands, origin)
    except TypeError as error:  # parameters or operands that the op does not have
        raise QGraphError(f"line {number}: {kind.name}: {error}", fix=_PARSE_FIX) from error
    declared = [t for t in re.split(r", (?=\w+\[)", m["types"]) if t]
    if len(results) != len(node.outputs) or declared != [str(t) for t in node.types]:
        found = ", ".join(map(str, node.types))
        raise QGraphError(f"line {number}: {op} gives {found}, the text says {m['types']}", fix=_PARSE_FIX)
    values.update(zip(results, node.outputs, strict=True))


def _scope_of(name: str, op: str) -> str:
    """The module path in a node's name: ``layers.3`` of ``layers.3.dot.1``.

    >>> _scope_of("layers.3.dot.1", "dot"), _scope_of("dot.1", "dot"), _scope_of("anything", "dot")
    ('layers.3', '', '')
    """
    m = re.fullmatch(rf"(?:(.+)\.)?{op}(?:\.\d+)*", name)
    return m[1] or "" if m else ""


def _parse_params(text: str, number: int) -> dict[str, object]:
    try:
        call = ast.parse(f"f({text[1:-1]})", mode="eval").body
        assert isinstance(call, ast.Call)
        return {k.arg: _value(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, AssertionError, KeyError, ValueError) as error:
        raise QGraphError(f"line {number}: cannot read parameters {text[:60]!r}", fix=_PARSE_FIX) from error


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.Name):
        if node.id in ("inf", "nan"):
            return float(node.id)
        return DType.all[node.id] if node.id in DType.all else Quantization.parse(node.id)
    raise ValueError(ast.dump(node))
