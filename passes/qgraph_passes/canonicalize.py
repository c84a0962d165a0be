"""One form for one meaning.

op(constants)            → constant           small results only
x * 1, x / 1             → x
reshape(reshape(x))      → reshape(x)         and x when that is its shape
cast(cast(x))            → cast(x)            when the first loses nothing
dequantize(w)            → w                  every op means itself on the numbers; `legalize` unpacks

Equal nodes are one node and dead ones vanish by construction, so there is no pass for either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import qgraph as qg
from qgraph.ir import Graph, Node, Value
from qgraph.ir.dtypes import promote
from qgraph.ir.op import Constant
from qgraph.ir.origin import Step, merge_origins
from qgraph.ops.elementwise import Cast
from qgraph.ops.quantized import Dequantize
from qgraph.ops.shape import Reshape
from qgraph.rewrite import Context

LARGEST = 64  # elements of a folded constant: it is printed and emitted in full


@dataclass(frozen=True)
class Canonicalize(qg.Pass):
    """Fold constants and drop what changes nothing."""

    name = "canonicalize"

    def run(self, graph: Graph, context: Context) -> Graph:
        """One sweep from the inputs to the outputs."""

        def rebuild(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
            simpler = _simplify(graph, node, inputs)
            if simpler is not None and (simpler in inputs or context.burn()):
                return (simpler,)
            same = all(a is b for a, b in zip(inputs, node.inputs, strict=True))
            return node.outputs if same else graph.builder.add(node.op, inputs, node.origin).outputs

        return _with_dense_outputs(graph, graph.rewritten(rebuild))


def _simplify(graph: Graph, node: Node, inputs: tuple[Value, ...]) -> Value | None:
    op = node.op
    if not inputs or len(node.outputs) != 1:
        return None
    if isinstance(op, Dequantize):
        return inputs[0]
    first = inputs[0].node
    if isinstance(op, Reshape):
        return _reshape(graph, node, inputs[0])
    if isinstance(op, Cast) and isinstance(first.op, Cast):
        return _cast(graph, node, first)
    if op.name in ("multiply", "divide") and _is_one(inputs[1]) and inputs[0].type == node.outputs[0].type:
        return inputs[0]
    if op.name == "multiply" and _is_one(inputs[0]) and inputs[1].type == node.outputs[0].type:
        return inputs[1]
    if all(isinstance(v.op, Constant) for v in inputs) and op.elementwise:
        return _fold(graph, node, inputs)
    return None


def _reshape(graph: Graph, node: Node, x: Value) -> Value | None:
    assert isinstance(node.op, Reshape)
    source = x.node.inputs[0] if isinstance(x.op, Reshape) else x
    if source.type.shape == node.op.shape:
        return source
    if source is x or (source.type.packing and not x.type.packing):
        return None
    return graph.builder.add(node.op, (source,), _origin(node, x.node)).outputs[0]


def _cast(graph: Graph, node: Node, first: Node) -> Value | None:
    source = first.inputs[0]
    exact = promote(source.type.dtype, first.outputs[0].type.dtype) is first.outputs[0].type.dtype
    if not exact or source.type.packing:
        return None
    if source.type.dtype is node.outputs[0].type.dtype:
        return source
    return graph.builder.add(node.op, (source,), _origin(node, first)).outputs[0]


def _is_one(value: Value) -> bool:
    return isinstance(value.op, Constant) and set(value.op.data) == {1}


def _fold(graph: Graph, node: Node, inputs: tuple[Value, ...]) -> Value | None:
    t = node.outputs[0].type
    if t.size > LARGEST or t.dtype.is_complex:
        return None
    with np.errstate(all="ignore"):
        result: Any = node.op.reference(*(v.op.reference() for v in inputs))
    data = tuple(np.asarray(result).reshape(-1).tolist())
    constant = Constant(data, t.shape, t.dtype)
    return graph.builder.add(constant, (), _origin(node)).outputs[0]


def _origin(*nodes: Node) -> Any:
    return merge_origins([n.origin for n in nodes], Step("canonicalize", "canonicalize", 0))


def _with_dense_outputs(before: Graph, after: Graph) -> Graph:
    """An output that was dense stays dense."""
    outputs = [
        new
        if bool(new.type.packing) == bool(old.type.packing)
        else after.builder.add(Dequantize(), (new,), old.node.origin).outputs[0]
        for old, new in zip(before.outputs, after.outputs, strict=True)
    ]
    return after.with_outputs(outputs)
