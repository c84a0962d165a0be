"""Rotary positions that turn by the same angles → the angles, their cosines and sines computed once.

rope(x, offset) → x * [cos, cos] + [b, a] * [-sin, sin]    a, b the halves of x; the angles serve several x

On a CPU MLX makes the tables anew in every call of rope: twice in each layer of a model. The GPUs' kernels
make none, and the native CPU kernel makes them once for all heads. The numbers are the same to the last bit:
MLX computes a * cos - b * sin and a * sin + b * cos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import qgraph as qg
from qgraph.ir import Graph, Node, Value
from qgraph.ir.origin import Origin, Step, merge_origins
from qgraph.ops.dispatch import apply, interpreting
from qgraph.ops.nn import Rope, RopeAngles
from qgraph.rewrite import Context
from qgraph.trace.tracer import Trace, Tracer

Key = tuple[RopeAngles, tuple[Value, ...], str]


@dataclass(frozen=True)
class ShareRope(qg.Pass):
    """Compute the tables of rotary positions once for all layers, on a CPU."""

    name = "share-rope"
    after = ("canonicalize",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """One sweep."""
        groups: dict[Key, list[Node]] = {}
        for node in graph.find("rope") if context.device == "cpu" and not context.native else ():
            if node.inputs[0].type.ndim == 4:
                groups.setdefault(_key(node), []).append(node)

        tables: dict[Key, list[Value]] = {}

        def rebuild(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
            key = _key(node) if node.op.name == "rope" else None
            group = groups.get(key, []) if key else []
            if key and node in group and len(group) > 1 and context.burn():
                if key not in tables:
                    tables[key] = _tables(graph, node, inputs, group, context.ordinal)
                return (_turned(graph, node, inputs[0], tables[key], context.ordinal),)
            same = all(a is b for a, b in zip(inputs, node.inputs, strict=True))
            return node.outputs if same else graph.builder.add(node.op, inputs, node.origin).outputs

        return graph.rewritten(rebuild)


def _key(node: Node) -> Key:
    """What the tables depend on."""
    x, *rest = node.inputs
    assert isinstance(node.op, Rope)
    return node.op.angles(x.type.shape[2]), tuple(rest), x.type.dtype.name


def _tables(
    graph: Graph, node: Node, inputs: tuple[Value, ...], group: list[Node], ordinal: int
) -> list[Value]:
    """[cos, cos] and [-sin, sin], which come from the lines of the whole group."""
    op = node.op
    assert isinstance(op, Rope)

    def made(*rest: Any) -> list[Any]:
        angles: Any = apply(op.angles(node.inputs[0].type.shape[2]), *rest)
        dtype = node.outputs[0].type.dtype.mlx
        cos, sin = qg.cos(angles).astype(dtype), qg.sin(angles).astype(dtype)
        return [_joined(op, cos, cos), _joined(op, -sin, sin)]

    origin = merge_origins([n.origin for n in group], Step("share-rope", "share-rope", ordinal))
    return _under(graph, origin, made, *inputs[1:])


def _turned(graph: Graph, node: Node, x: Value, tables: list[Value], ordinal: int) -> Value:
    """The node by its parts."""
    assert isinstance(node.op, Rope)
    origin = merge_origins([node.origin], Step("share-rope", "share-rope", ordinal))
    return _under(graph, origin, partial(_turn, node.op), x, *tables)[0]


def _under(graph: Graph, origin: Origin, function: Any, *values: Value) -> list[Value]:
    trace = Trace(graph.builder, origin=lambda: origin)
    with interpreting(trace):
        made: list[Tracer] = function(*(Tracer(trace, v) for v in values))
    return [t.value for t in made]


def _turn(op: Rope, x: Any, cos: Any, sin: Any) -> list[Any]:
    """The first `dims` features turned; those beyond stay."""
    whole = op.dims == x.shape[-1]
    inner = x if whole else x[..., : op.dims]
    half = op.dims // 2
    first = inner[..., 0::2] if op.traditional else inner[..., :half]
    second = inner[..., 1::2] if op.traditional else inner[..., half:]
    turned = inner * cos + _joined(op, second, first) * sin
    return [turned if whole else qg.concatenate([turned, x[..., op.dims :]], -1)]


def _joined(op: Rope, first: Any, second: Any) -> Any:
    """Neighbours for the traditional order, or one half after the other."""
    if op.traditional:
        return qg.reshape(qg.stack([first, second], -1), (*first.shape[:-1], op.dims))
    return qg.concatenate([first, second], -1)
