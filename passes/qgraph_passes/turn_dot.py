"""Products with dense weights on a CPU, turned round so that the inner loops run along memory.

dot(x, w.T)        → dot(w, contiguous(x.T)).T           for at least 8 rows of f32
addmm(c, x, w.T)   → dot(w, contiguous(x.T)).T + c

MLX's Linux wheel brings the reference BLAS, which multiplies by a transposed matrix with sums of single
numbers, at less than half of the speed. Here the activations are copied, which are small, and never the
weights; every sum is of the same terms in the same order, so that the bits stay. With another BLAS nothing
is lost but the copy of the activations. The native CPU kernels multiply either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import qgraph as qg
from qgraph.ir import Graph, Node, Value
from qgraph.ir.dtypes import F32
from qgraph.ir.origin import Step, merge_origins
from qgraph.ops.dispatch import apply, run_under
from qgraph.ops.linear import AddMm
from qgraph.ops.shape import Contiguous, Transpose
from qgraph.rewrite import Context
from qgraph.trace.tracer import Trace, Tracer

ROWS = 8  # below, the loops along the rows of x are too short


@dataclass(frozen=True)
class TurnDot(qg.Pass):
    """Multiply weights by activations instead of activations by weights, on a CPU."""

    name = "turn-dot"
    after = ("fold-transpose", "quantize-dot", "fuse-lora")

    def run(self, graph: Graph, context: Context) -> Graph:
        """One sweep."""
        slow_device = context.device == "cpu" and not context.native

        def rebuild(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
            if slow_device and _is_slow(node, inputs) and context.burn():
                return (_turned(graph, node, inputs, context.ordinal),)
            same = all(a is b for a, b in zip(inputs, node.inputs, strict=True))
            return node.outputs if same else graph.builder.add(node.op, inputs, node.origin).outputs

        return graph.rewritten(rebuild)


def _is_slow(node: Node, inputs: tuple[Value, ...]) -> bool:
    """Whether the node multiplies enough rows by a transposed dense matrix, all in f32."""
    if node.op.name not in ("dot", "addmm"):
        return False
    if isinstance(node.op, AddMm) and (node.op.alpha, node.op.beta) != (1.0, 1.0):
        return False
    x, w = inputs[-2:]
    plain = all(v.type.packing is None and v.type.dtype is F32 for v in inputs)
    turned = isinstance(w.op, Transpose) and w.op.axes == (1, 0) and w.node.inputs[0].type.packing is None
    return plain and turned and x.type.ndim >= 2 and x.type.size >= ROWS * x.type.shape[-1] > 0


def _turned(graph: Graph, node: Node, inputs: tuple[Value, ...], ordinal: int) -> Value:
    origin = merge_origins([node.origin], Step("turn-dot", "turn-dot", ordinal))
    trace = Trace(graph.builder, origin=lambda: origin)

    def body() -> Value:
        *c, x, w = (Tracer(trace, v) for v in (*inputs[:-1], inputs[-1].node.inputs[0]))
        rows: Any = qg.reshape(x, (-1, x.shape[-1]))
        columns = apply(Contiguous(), qg.transpose(rows))
        out: Any = qg.reshape(qg.transpose(qg.dot(w, columns)), (*x.shape[:-1], w.shape[0]))
        return (out + c[0] if c else out).value

    return run_under(trace, body)
