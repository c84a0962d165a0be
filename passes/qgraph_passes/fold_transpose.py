"""Compose transposes, and bring those of packed weights together.

transpose(transpose(x))              → transpose(x), or x
slice(transpose(w))                  → transpose(slice(w))         w packed
cast(transpose(w))                   → transpose(cast(w))          w packed
concatenate(transpose(w1), …)        → transpose(concatenate(w1, …))
reshape(transpose(w))                → transpose(reshape(w))       w packed; sizes 1 come and go

A transpose that reaches its dot is folded there by `quantize-dot`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import qgraph as qg
from qgraph.ir import Graph, Node, Value
from qgraph.ir.origin import Step, merge_origins
from qgraph.ops.elementwise import Cast
from qgraph.ops.shape import Concatenate, Reshape, Slice, Transpose
from qgraph.rewrite import Context


class ComposeTransposes(qg.Rule):
    """transpose(transpose(x)) → transpose(x)."""

    def pattern(self, x: qg.Array) -> Any:
        inner: Any = qg.transpose(x)
        return qg.transpose(inner.named("inner"))

    def rewrite(self, m: qg.Match, x: qg.Array) -> qg.Array:
        outer, inner = m.root.op, m.op("inner")
        assert isinstance(outer, Transpose)
        assert isinstance(inner, Transpose)
        return qg.transpose(x, [inner.axes[a] for a in outer.axes])


@dataclass(frozen=True)
class FoldTranspose(qg.Pass):
    """Move transposes of packed weights towards the dots, and compose all transposes."""

    name = "fold-transpose"
    after = ("canonicalize", "raise-fast")
    rules = (ComposeTransposes,)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Sink first, so that the rule sees what met."""
        if any(n.op.name == "transpose" and n.outputs[0].type.packing for n in graph.nodes):
            graph = _sink(graph, context)
        return super().run(graph, context)


def _sink(graph: Graph, context: Context) -> Graph:
    def rebuild(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        step = Step("fold-transpose", "sink", context.ordinal + 1)
        moved = _beyond(graph, node, inputs, step)
        if moved is not None and context.burn():
            return (moved,)
        return graph.builder.add(node.op, inputs, node.origin).outputs if inputs else node.outputs

    return graph.rewritten(rebuild)


def _beyond(graph: Graph, node: Node, inputs: tuple[Value, ...], step: Step) -> Value | None:
    """``op(transpose(w))`` as ``transpose(op'(w))``, where the result stays packed."""
    if not isinstance(node.op, (Slice, Cast, Concatenate, Reshape)) or not node.outputs[0].type.packing:
        return None
    if not all(isinstance(v.op, Transpose) for v in inputs):
        return None
    perms = {v.op.axes for v in inputs if isinstance(v.op, Transpose)}
    if len(perms) > 1:
        return None
    axes = perms.pop()
    moved = _inner_op(node.op, axes, inputs)
    if moved is None:
        return None
    op, outer = moved
    origin = merge_origins([node.origin, *(v.node.origin for v in inputs)], step)
    inner = graph.builder.add(op, [v.node.inputs[0] for v in inputs], origin).outputs[0]
    out = graph.builder.add(Transpose(outer), (inner,), origin).outputs[0]
    return out if out.type == node.outputs[0].type else None


def _inner_op(
    op: Slice | Cast | Concatenate | Reshape, axes: tuple[int, ...], inputs: tuple[Value, ...]
) -> tuple[qg.ir.Op, tuple[int, ...]] | None:
    if isinstance(op, Cast):
        return op, axes
    if isinstance(op, Concatenate):
        return Concatenate(axes[op.axis]), axes
    if isinstance(op, Slice):
        back = [axes.index(i) for i in range(len(axes))]
        parts = ([values[i] for i in back] for values in (op.start, op.stop, op.step))
        return Slice(*map(tuple, parts)), axes
    return _inner_reshape(op, axes, inputs[0].type.shape)


def _inner_reshape(
    op: Reshape, axes: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Reshape, tuple[int, ...]] | None:
    """A reshape that only adds or drops axes of size 1: those axes go to the front of the storage."""
    kept = [i for i, s in enumerate(shape) if s != 1]
    new = [j for j, s in enumerate(op.shape) if s != 1]
    if [shape[i] for i in kept] != [op.shape[j] for j in new]:
        return None
    ones = [j for j, s in enumerate(op.shape) if s == 1]
    # Storage order of the kept axes, by where transpose took them from.
    stored = sorted(range(len(kept)), key=lambda k: axes[kept[k]])
    inner = [1] * len(ones) + [op.shape[new[k]] for k in stored]
    position = {new[k]: len(ones) + rank for rank, k in enumerate(stored)}
    position.update({j: i for i, j in enumerate(ones)})
    return Reshape(tuple(inner)), tuple(position[j] for j in range(len(op.shape)))
