"""One form for one meaning.

op(constants)            → constant           small results only
x * 1, x / 1             → x
reshape(reshape(x))      → reshape(x)         and x when that is its shape
cast(cast(x))            → cast(x)            when the first loses nothing of any number
dequantize(w)            → w                  every op means itself on the numbers; `legalize` unpacks

Equal nodes are one node and dead ones vanish by construction, so there is no pass for either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import qgraph as qg
from qgraph.ir import Graph, Node, Op, Value
from qgraph.ir.dtypes import BOOL, DType, promote
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
            simpler = _Simpler(graph, node, context.ordinal + 1).value(inputs)
            if simpler is not None and context.burn():
                return (simpler,)
            same = inputs == node.inputs  # values compare by identity
            return node.outputs if same else graph.builder.add(node.op, inputs, node.origin).outputs

        return _with_dense_outputs(graph, graph.rewritten(rebuild))


class _Simpler:
    """The simpler form of one node, under the ordinal of the rewrite."""

    def __init__(self, graph: Graph, node: Node, ordinal: int) -> None:
        self.builder = graph.builder
        self.node = node
        self.step = Step("canonicalize", "canonicalize", ordinal)

    def value(self, inputs: tuple[Value, ...]) -> Value | None:
        """What the node's one result is, more simply; None when it is simple."""
        op, out = self.node.op, self.node.outputs[0]
        if not inputs or len(self.node.outputs) != 1:
            return None
        x = inputs[0]
        if isinstance(op, Dequantize):
            return x
        if isinstance(op, Reshape):
            return self.reshape(op, x)
        if isinstance(op, Cast) and isinstance(x.op, Cast):
            return self.cast(x.node)
        if op.name in ("multiply", "divide") and _is_one(inputs[1]) and x.type == out.type:
            return x
        if op.name == "multiply" and _is_one(x) and inputs[1].type == out.type:
            return inputs[1]
        return self.fold(inputs)

    def reshape(self, op: Reshape, x: Value) -> Value | None:
        """The reshape of what `x` is a reshape of."""
        source = x.node.inputs[0] if isinstance(x.op, Reshape) else x
        if source.type.shape == op.shape:
            return source
        if source is x or (source.type.packing and not x.type.packing):
            return None
        return self.add(op, (source,), x.node)

    def cast(self, first: Node) -> Value | None:
        """The cast of what the first cast took, if that one lost nothing."""
        source, between = first.inputs[0], first.outputs[0].type.dtype
        if source.type.packing or not _holds(between, source.type.dtype):
            return None
        if source.type.dtype is self.node.outputs[0].type.dtype:
            return source
        return self.add(self.node.op, (source,), first)

    def fold(self, inputs: tuple[Value, ...]) -> Value | None:
        """The constant that the node gives for constants. In 16 bit each op rounds: that stays."""
        t = self.node.outputs[0].type
        dtypes = [t.dtype, *(v.type.dtype for v in inputs)]
        if not self.node.op.elementwise or not all(isinstance(v.op, Constant) for v in inputs):
            return None
        if t.size > LARGEST or any(d.is_complex or (d.is_float and d.size == 2) for d in dtypes):
            return None
        with np.errstate(all="ignore"):
            result: Any = self.node.op.reference(*(v.op.reference() for v in inputs))
        data = tuple(np.asarray(result).reshape(-1).tolist())
        return self.add(Constant(data, t.shape, t.dtype), ())

    def add(self, op: Op, inputs: tuple[Value, ...], *also: Node) -> Value:
        """A node in place of this one (and of `also`)."""
        origin = merge_origins([n.origin for n in (self.node, *also)], self.step)
        return self.builder.add(op, inputs, origin).outputs[0]


def _holds(dtype: DType, other: DType) -> bool:
    """Whether every number of the `other` dtype is one of `dtype`.

    MLX's promotion does not say so: for it i32 and bf16 make bf16, which has whole numbers to 256 only.
    """
    if other is dtype or other is BOOL:
        return True
    if not other.is_int or not dtype.is_float:
        return promote(other, dtype) is dtype and not dtype.is_complex
    bits = 8 * other.size - (other.name[0] == "i")
    return 2.0**bits * dtype.unit_roundoff <= 1


def _is_one(value: Value) -> bool:
    return isinstance(value.op, Constant) and set(value.op.data) == {1}


def _with_dense_outputs(before: Graph, after: Graph) -> Graph:
    """An output that was dense stays dense."""
    outputs = [
        new
        if bool(new.type.packing) == bool(old.type.packing)
        else after.builder.add(Dequantize(), (new,), old.node.origin).outputs[0]
        for old, new in zip(before.outputs, after.outputs, strict=True)
    ]
    return after.with_outputs(outputs)
