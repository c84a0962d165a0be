"""The matcher: backtracking over commuted operands and skipped ops, with the reason of every failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.op import Constant
from qgraph.ir.text import names_of, print_node
from qgraph.ops.dispatch import interpreting
from qgraph.rewrite.pattern import AnyOf, Call, Number, Pattern, Variable
from qgraph.trace.tracer import Trace, Tracer


class NoMatch(Exception):
    """Raised by `Match.require`; carries the reason and the value that it speaks of."""

    def __init__(self, reason: str, at: Value | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at


@dataclass
class Found:
    """What a pattern matched: values by variable or name, and the nodes inside."""

    values: dict[str, Value] = field(default_factory=dict[str, Value])
    nodes: dict[Node, None] = field(default_factory=dict[Node, None])
    skipped: dict[str, tuple[Node, ...]] = field(default_factory=dict[str, tuple[Node, ...]])

    def copy(self) -> Found:
        """A state to try another way from."""
        return Found(dict(self.values), dict(self.nodes), dict(self.skipped))


@dataclass
class Miss:
    """The nearest miss of a rule at a node: how far the pattern went, and what stopped it."""

    rule: str
    root: Node
    reason: str
    at: Value | None
    matched: int
    total: int

    def text(self, graph: Graph) -> str:
        """One sentence with the node, and the user's line where known."""
        names = names_of(graph)
        where = self.at.node if self.at is not None and self.at in names else self.root
        source = where.origin.source
        line = f" ({source})" if source.known else ""
        shown = print_node(where, names) if where.outputs[0] in names else str(where.op)
        return f"{self.reason}, at {shown}{line}"


Continue = Callable[[Found], Found | None]


class Matcher:
    """Matches one pattern at one node of a graph; `miss` tells the furthest failure."""

    def __init__(self, graph: Graph, pattern: Pattern, through: tuple[str, ...]) -> None:
        self.graph = graph
        self.pattern = pattern
        self.through = through
        self.miss: tuple[int, Callable[[], str], Value | None] = (-1, lambda: "", None)

    def at(self, value: Value) -> Found | None:
        """The match rooted at `value`, or None."""
        return self._match(self.pattern, value, Found(), lambda found: found)

    def fail(self, found: Found, reason: Callable[[], str], at: Value | None) -> None:
        """Remember a failure if the pattern went further than at any before. Text is made on demand."""
        if len(found.nodes) > self.miss[0]:
            self.miss = (len(found.nodes), reason, at)

    def _match(self, pattern: Pattern, value: Value, found: Found, then: Continue) -> Found | None:
        if isinstance(pattern, AnyOf):
            for alternative in pattern.alternatives:
                result = self._match(alternative, value, found.copy(), then)
                if result is not None:
                    return result
            return None
        if isinstance(pattern, Call):
            return self._call(pattern, value, found, then)
        if isinstance(pattern, Number):
            return self._number(pattern, value, found, then)
        assert isinstance(pattern, Variable)
        return self._variable(pattern, value, found, then)

    def _call(self, pattern: Call, value: Value, found: Found, then: Continue) -> Found | None:
        node = value.node
        if node.op.name != pattern.op:
            skipped = self._skip(pattern, value, found, then)
            if skipped is None:
                self.fail(found, lambda: f"expected {pattern.op}, found {node.op}", value)
            return skipped
        if len(node.inputs) != len(pattern.args) or not self._keywords(pattern, node):
            self.fail(found, lambda: f"expected {pattern} with {pattern.keywords}, found {node.op}", value)
            return None
        orders = [node.inputs]
        if node.op.commutes and len(node.inputs) == 2 and node.inputs[0] is not node.inputs[1]:
            orders.append(node.inputs[::-1])
        for inputs in orders:
            state = found.copy()
            state.nodes[node] = None
            if pattern.name:
                state.values[pattern.name] = value
            result = self._operands(pattern.args, inputs, state, then)
            if result is not None:
                return result
        return None

    def _operands(
        self, patterns: tuple[Pattern, ...], values: tuple[Value, ...], found: Found, then: Continue
    ) -> Found | None:
        if not patterns:
            return then(found)
        return self._match(
            patterns[0], values[0], found, lambda f: self._operands(patterns[1:], values[1:], f, then)
        )

    def _skip(self, pattern: Pattern, value: Value, found: Found, then: Continue) -> Found | None:
        """Look through one op that the rule allows; what was skipped is kept under the pattern's name."""
        node = value.node
        if node.op.name not in self.through or len(node.inputs) != 1:
            return None
        state = found.copy()
        state.nodes[node] = None
        state.skipped[pattern.name] = (*state.skipped.get(pattern.name, ()), node)
        return self._match(pattern, node.inputs[0], state, then)

    def _keywords(self, pattern: Call, node: Node) -> bool:
        """Whether calling the function with the pattern's keywords on these operands gives this op."""
        if not pattern.keywords:
            return True
        trace = Trace(self.graph.builder, origin=lambda: node.origin)
        with interpreting(trace):
            made = pattern.function(*(Tracer(trace, v) for v in node.inputs), **pattern.keywords)
        results: list[Any] = list(made) if isinstance(made, (tuple, list)) else [made]  # pyright: ignore[reportUnknownArgumentType]
        return isinstance(results[0], Tracer) and results[0].value.op == node.op

    def _number(self, pattern: Number, value: Value, found: Found, then: Continue) -> Found | None:
        op = value.op
        if isinstance(op, Constant) and set(op.data) == {pattern.value}:
            return then(found)
        self.fail(found, lambda: f"expected the number {pattern.value}, found {op}", value)
        return None

    def _variable(self, pattern: Variable, value: Value, found: Found, then: Continue) -> Found | None:
        bound = found.values.get(pattern.name)
        if bound is value:
            return then(found)
        if bound is not None:
            skipped = self._skip(pattern, value, found, then)
            if skipped is None:
                source = bound.node.origin.source
                self.fail(found, lambda: f"{pattern.name} is already another value (of {source})", value)
            return skipped
        refusal = pattern.refuses(value.type)
        if refusal is not None:
            skipped = self._skip(pattern, value, found, then)
            if skipped is None:
                self.fail(found, lambda: refusal, value)
            return skipped
        state = found.copy()
        state.values[pattern.name] = value
        result = then(state)
        # The value as it is comes first; a rule that looks through casts may need what is under one.
        return result if result is not None else self._skip(pattern, value, found, then)


def foreign_user(graph: Graph, root: Node, found: Found) -> tuple[Value, Node | None] | None:
    """An interior value that something outside the match reads too: the value and its user.

    Views are free to keep and to recompute, so they may be shared; compute may not.
    """
    for node in found.nodes:
        if node is root or node.op.view:
            continue
        for value in node.outputs:
            if graph.is_output(value):
                return value, None
            for user in graph.users(value):
                if user not in found.nodes:
                    return value, user
    return None


def pattern_size(pattern: Pattern) -> int:
    """How many ops a pattern has, for "matched 5 of 7"."""
    if isinstance(pattern, Call):
        return 1 + sum(pattern_size(a) for a in pattern.args)
    if isinstance(pattern, AnyOf):
        return max(map(pattern_size, pattern.alternatives))
    return 0
