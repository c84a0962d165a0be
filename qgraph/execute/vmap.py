"""What mx.vmap meets in a program with quantized products: a clear refusal.

MLX has no vmap rule for its quantized products, and fails deep inside with "[QuantizedMatmul::vmap] NYI".
An identity with a rule of its own stands before the first product of a program, and speaks first.
Its price: a few microseconds a call where programs run without mx.compile, and mx.export_function, which
cannot write such an identity to a file.
"""

from __future__ import annotations

from typing import Any, Never

import mlx.core as mx

from qgraph._errors import TraceError
from qgraph.ir.graph import Graph, Value
from qgraph.ops.quantized import PRODUCTS


@mx.custom_function
def refuse_vmap(x: mx.array) -> mx.array:
    """`x`, which mx.vmap must not map; gradients and mx.compile pass through."""
    return x


@refuse_vmap.vmap  # pyright: ignore[reportUntypedFunctionDecorator]
def _refuse(inputs: Any, axes: Any) -> Never:
    raise TraceError(
        "mx.vmap over a quantized product: MLX has no rule for it",
        fix="call the function on the whole batch (a product takes leading axes as they are), "
        "or unpack the weight first: qg.dequantize(w)",
    )


def first_activations(graph: Graph) -> list[Value]:
    """The left operands of quantized products that stem from no other quantized product, each once."""
    after: set[Value] = set()
    first: dict[Value, None] = {}
    for node in graph.nodes:
        product = node.op.name in PRODUCTS
        if product and node.inputs[0] not in after:
            first[node.inputs[0]] = None
        if product or any(v in after for v in node.inputs):
            after.update(node.outputs)
    return list(first)
