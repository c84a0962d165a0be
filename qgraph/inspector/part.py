"""One module of a graph, as a graph of its own."""

from __future__ import annotations

from qgraph._errors import QGraphError
from qgraph.inspector.layers import collapsed, inside
from qgraph.ir.graph import Builder, Graph, Node, Value
from qgraph.ir.op import Constant, Input
from qgraph.ir.text import names_of

SHOWN = 12  # modules in the message for one that is not there


def part_of(graph: Graph, scope: str) -> Graph:
    """The nodes inside `scope` (a module, or a pattern as in ``layers.*.attn``); what they read are inputs.

    The outputs are what the rest of the graph reads. Errors: QGraphError where no node is in the scope.

    >>> import mlx.core as mx, qgraph as qg
    >>> def f(x):
    ...     with qg.scope("layers.0"):
    ...         x = qg.exp(x * 2.0)
    ...     return -x
    >>> print(part_of(qg.jit(f).graph(mx.ones(3)), "layers.0").histogram())
    {'exp': 1, 'multiply': 1}
    """
    chosen = {n for n in graph.nodes if not isinstance(n.op, Input) and inside(n.origin.scope, scope)}
    if not chosen:
        raise QGraphError(f"no node is in a module {scope!r}", fix=f"the modules: {_modules(graph)}")
    names, builder = names_of(graph), Builder()
    made: dict[Value, Value] = {}
    inputs: list[Value] = []

    def outer(v: Value) -> Value:
        if v not in made and isinstance(v.op, Constant):
            made[v] = builder.add(v.op, (), v.node.origin).outputs[0]
        elif v not in made:
            made[v] = builder.input(names[v], v.type, v.node.origin)
            inputs.append(made[v])
        return made[v]

    for node in graph.nodes:
        if node in chosen:
            copy = builder.add(
                node.op, [made[v] if v in made else outer(v) for v in node.inputs], node.origin
            )
            made.update(zip(node.outputs, copy.outputs, strict=True))
    results = [v for n in graph.nodes if n in chosen for v in n.outputs if _is_read(graph, v, chosen)]
    return Graph(inputs, [made[v] for v in results], builder)


def _is_read(graph: Graph, value: Value, chosen: set[Node]) -> bool:
    """Whether something that is not chosen reads `value`."""
    return graph.is_output(value) or any(user not in chosen for user in graph.users(value))


def _modules(graph: Graph) -> str:
    found = list(dict.fromkeys(collapsed(n.origin.scope) for n in graph.nodes if n.origin.scope))
    rest = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (", ".join(found[:SHOWN]) + rest) or "none is known"
