"""The graph: immutable, hash-consed nodes in SSA form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qgraph._errors import QGraphError
from qgraph.ir.op import Input, Op
from qgraph.ir.origin import NOWHERE, Origin
from qgraph.ir.types import TensorType

if TYPE_CHECKING:
    import networkx as nx


class Value:
    """One result of a node. Compared by identity: equal nodes are the same node."""

    __slots__ = ("index", "node", "type")
    node: Node
    index: int
    type: TensorType

    def __init__(self, node: Node, index: int, type: TensorType) -> None:
        _set(self, "node", node)
        _set(self, "index", index)
        _set(self, "type", type)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Value is immutable; cannot set {name!r}")

    def __repr__(self) -> str:
        return f"<{self.node.op}:{self.index} {self.type}>"

    @property
    def op(self) -> Op:
        """The op that made it."""
        return self.node.op


class Node:
    """An op on values. Made by a `Builder` only, which shares equal ones."""

    __slots__ = ("__weakref__", "_digest", "inputs", "op", "origin", "outputs")
    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    origin: Origin
    _digest: bytes | None

    def __init__(
        self, op: Op, inputs: tuple[Value, ...], types: tuple[TensorType, ...], origin: Origin
    ) -> None:
        _set(self, "op", op)
        _set(self, "inputs", inputs)
        _set(self, "origin", origin)
        _set(self, "_digest", None)
        _set(self, "outputs", tuple([Value(self, i, t) for i, t in enumerate(types)]))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Node is immutable; cannot set {name!r}")

    def __repr__(self) -> str:
        return f"<{self.op} : {', '.join(str(v.type) for v in self.outputs)}>"

    @property
    def types(self) -> tuple[TensorType, ...]:
        """The types of the results."""
        return tuple(v.type for v in self.outputs)


_set: Callable[[object, str, object], None] = object.__setattr__


class Builder:
    """Makes nodes, sharing equal ones, and infers their types. Graphs derived from one share it."""

    __slots__ = ("_inferred", "_nodes")

    def __init__(self) -> None:
        self._nodes: dict[tuple[object, ...], Node] = {}
        self._inferred: dict[tuple[object, ...], tuple[TensorType, ...]] = {}

    def add(self, op: Op, inputs: Sequence[Value] = (), origin: Origin = NOWHERE) -> Node:
        """The node of `op` on `inputs`; the first one's origin is kept when it exists already."""
        key = (op, *inputs)
        found = self._nodes.get(key)
        if found is not None:
            return found
        signature = (op, *[v.type for v in inputs])
        types = self._inferred.get(signature)
        if types is None:
            inferred = op.infer(*signature[1:])
            types = self._inferred[signature] = inferred if isinstance(inferred, tuple) else (inferred,)
        return self._nodes.setdefault(key, Node(op, tuple(inputs), types, origin))

    def input(self, label: str, type: TensorType, origin: Origin = NOWHERE) -> Value:
        """A named input."""
        return self.add(Input(label, type), (), origin).outputs[0]


class Graph:
    """Inputs and outputs; the nodes between them, operands first. A value: passes return new ones."""

    __slots__ = ("_nodes", "_users", "builder", "inputs", "outputs")

    def __init__(self, inputs: Iterable[Value], outputs: Iterable[Value], builder: Builder) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.builder = builder
        self._nodes: tuple[Node, ...] | None = None
        self._users: dict[Value, tuple[Node, ...]] | None = None

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("inputs", "outputs", "builder") and hasattr(self, name):
            raise AttributeError(f"a Graph is immutable; cannot set {name!r}: make a new one")
        _set(self, name, value)

    def with_outputs(self, outputs: Iterable[Value]) -> Graph:
        """The same inputs, other outputs."""
        return Graph(self.inputs, outputs, self.builder)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every input and every node that an output needs, in topological order."""
        if self._nodes is None:
            self._nodes = _topological(self.inputs, self.outputs)
        return self._nodes

    def users(self, value: Value) -> tuple[Node, ...]:
        """The nodes that read `value`, in order, each once."""
        if self._users is None:
            table: dict[Value, dict[Node, None]] = {}
            for node in self.nodes:
                for v in node.inputs:
                    table.setdefault(v, {})[node] = None
            self._users = {v: tuple(nodes) for v, nodes in table.items()}
        return self._users.get(value, ())

    def is_output(self, value: Value) -> bool:
        """Whether the graph returns `value`."""
        return value in self.outputs

    def find(self, *names: str) -> list[Node]:
        """The nodes of the named ops."""
        return [n for n in self.nodes if n.op.name in names]

    def histogram(self) -> dict[str, int]:
        """How many nodes of each op there are, inputs and constants left out, most frequent first."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            if node.op.name not in ("input", "constant"):
                counts[node.op.name] = counts.get(node.op.name, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def rewritten(self, rebuild: Callable[[Node, tuple[Value, ...]], Sequence[Value]]) -> Graph:
        """Apply `rebuild(node, new inputs)` to every node, operands first."""
        new: dict[Value, Value] = {}
        for node in self.nodes:
            results = rebuild(node, tuple([new[v] for v in node.inputs]))
            if len(results) == 1:
                new[node.outputs[0]] = results[0]
            else:
                new.update(zip(node.outputs, results, strict=True))
        return self.with_outputs(new[v] for v in self.outputs)

    def to_networkx(self) -> nx.MultiDiGraph[Any]:
        """A view for analyses and layouts: nodes by number, one edge per operand, keyed by its index."""
        import networkx as nx

        out: nx.MultiDiGraph[Any] = nx.MultiDiGraph()
        number = {node: i for i, node in enumerate(self.nodes)}
        for node, i in number.items():
            out.add_node(i, op=node.op.name, label=str(node.op), types=[str(t) for t in node.types])
        for node, i in number.items():
            for k, v in enumerate(node.inputs):
                out.add_edge(number[v.node], i, key=k, index=v.index)
        return out

    def __str__(self) -> str:
        """The text form; `qgraph.ir.text` prints and parses it."""
        from qgraph.ir.text import print_graph

        return print_graph(self)

    def __reduce__(self) -> Any:
        raise QGraphError(
            "a graph is not pickled", fix="store str(graph); qgraph.ir.text.parse_graph reads it"
        )


def _topological(inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> tuple[Node, ...]:
    done: dict[Node, None] = dict.fromkeys(v.node for v in inputs)
    for output in outputs:
        stack = [output.node]
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                continue
            waiting = [v.node for v in node.inputs if v.node not in done]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                done[node] = None
                stack.pop()
    return tuple(done)
