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
    """What a pattern matched: values by variable or name, and the nodes inside.

    Those `outside` were looked through to find a variable: the match does not read them, so others may.
    """

    values: dict[str, Value] = field(default_factory=dict[str, Value])
    nodes: dict[Node, None] = field(default_factory=dict[Node, None])
    skipped: dict[str, tuple[Node, ...]] = field(default_factory=dict[str, tuple[Node, ...]])
    outside: dict[Node, None] = field(default_factory=dict[Node, None])


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


Continue = Callable[[], bool]


class Matcher:
    """Matches one pattern at one node of a graph; `miss` tells the furthest failure.

    The state is one `Found`, undone on the way back: every choice (an order of operands, an op to skip)
    is tried with the rest of the pattern as a continuation.
    """

    def __init__(self, graph: Graph, pattern: Pattern, through: tuple[str, ...]) -> None:
        self.graph = graph
        self.pattern = pattern
        self.through = through
        self.found = Found()
        self.miss: tuple[int, Callable[[], str], Value | None] = (-1, lambda: "", None)

    def at(self, value: Value) -> Found | None:
        """The match rooted at `value`, or None."""
        return self.found if self._match(self.pattern, value, _done) else None

    def fail(self, reason: Callable[[], str], at: Value | None) -> bool:
        """Remember a failure if the pattern went further than at any before. Text is made on demand."""
        if len(self.found.nodes) > self.miss[0]:
            self.miss = (len(self.found.nodes), reason, at)
        return False

    def _match(self, pattern: Pattern, value: Value, then: Continue) -> bool:
        if isinstance(pattern, Call):
            return self._call(pattern, value, then)
        if isinstance(pattern, Variable):
            return self._variable(pattern, value, then)
        if isinstance(pattern, AnyOf):
            return any(self._match(alternative, value, then) for alternative in pattern.alternatives)
        assert isinstance(pattern, Number)
        if isinstance(value.op, Constant) and set(value.op.data) == {pattern.value}:
            return then()
        return self.fail(lambda: f"expected the number {pattern.value}, found {value.op}", value)

    def _call(self, pattern: Call, value: Value, then: Continue) -> bool:
        node = value.node
        if node.op.name != pattern.op:
            if self._skip(pattern, value, then):
                return True
            return self.fail(lambda: f"expected {pattern.op}, found {node.op}", value)
        if len(node.inputs) != len(pattern.args) or not self._keywords(pattern, node):
            return self.fail(lambda: f"expected {pattern} with {pattern.keywords}, found {node.op}", value)
        fresh = node not in self.found.nodes
        self.found.nodes[node] = None
        if pattern.name:
            self.found.values[pattern.name] = value
        if self._operands(pattern.args, node.inputs, 0, then):
            return True
        commutes = node.op.commutes and len(node.inputs) == 2 and node.inputs[0] is not node.inputs[1]
        if commutes and self._operands(pattern.args, node.inputs[::-1], 0, then):
            return True
        if fresh:
            del self.found.nodes[node]
        self.found.values.pop(pattern.name, None)
        return False

    def _operands(
        self, patterns: tuple[Pattern, ...], values: tuple[Value, ...], i: int, then: Continue
    ) -> bool:
        if i == len(patterns) - 1:
            return self._match(patterns[i], values[i], then)
        return self._match(patterns[i], values[i], lambda: self._operands(patterns, values, i + 1, then))

    def _skip(self, pattern: Pattern, value: Value, then: Continue) -> bool:
        """Look through one op that the rule allows; what was skipped is kept under the pattern's name."""
        node, found = value.node, self.found
        if node.op.name not in self.through or len(node.inputs) != 1 or node in found.nodes:
            return False
        before = found.skipped.get(pattern.name, ())
        found.nodes[node] = None
        found.skipped[pattern.name] = (*before, node)
        if isinstance(pattern, Variable):
            found.outside[node] = None
        if self._match(pattern, node.inputs[0], then):
            return True
        del found.nodes[node]
        found.outside.pop(node, None)
        if before:
            found.skipped[pattern.name] = before
        else:
            del found.skipped[pattern.name]
        return False

    def _keywords(self, pattern: Call, node: Node) -> bool:
        """Whether calling the function with the pattern's keywords on these operands gives this op."""
        if not pattern.keywords:
            return True
        trace = Trace(self.graph.builder, origin=lambda: node.origin)
        with interpreting(trace):
            made = pattern.function(*(Tracer(trace, v) for v in node.inputs), **pattern.keywords)
        results: list[Any] = list(made) if isinstance(made, (tuple, list)) else [made]  # pyright: ignore[reportUnknownArgumentType]
        return isinstance(results[0], Tracer) and results[0].value.op == node.op

    def _variable(self, pattern: Variable, value: Value, then: Continue) -> bool:
        bound = self.found.values.get(pattern.name)
        if bound is value:
            return then()
        if bound is not None:
            source = bound.node.origin.source
            return self._skip(pattern, value, then) or self.fail(
                lambda: f"{pattern.name} is already another value (of {source})", value
            )
        refusal = pattern.refuses(value.type)
        if refusal is not None:
            return self._skip(pattern, value, then) or self.fail(lambda: refusal, value)
        self.found.values[pattern.name] = value
        if then():
            return True
        del self.found.values[pattern.name]
        # The value as it is came first; a rule that looks through casts may need what is under one.
        return self._skip(pattern, value, then)


def _done() -> bool:
    return True


def foreign_user(graph: Graph, root: Node, found: Found) -> tuple[Value, Node | None] | None:
    """An interior value that something outside the match reads too: the value and its user.

    Views are free to keep and to recompute, so they may be shared; compute may not, but for a cast between
    the match and a variable, which stays as it is for the others.
    """
    for node in found.nodes:
        if node is root or node.op.view or node in found.outside:
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
