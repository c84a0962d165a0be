"""Rule: before → after, with the reasons why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from qgraph._errors import RuleError
from qgraph.ir.graph import Node, Value
from qgraph.ir.op import Op
from qgraph.rewrite.context import Context
from qgraph.rewrite.match import Found, NoMatch
from qgraph.trace.tracer import Trace, Tracer


def _accept(rule: Rule, m: Match, **values: Any) -> None:
    """Every match is wanted."""


class Rule:
    """A local rewrite. Write `pattern`, and `rewrite`; `check` when not every match is wanted.

    `pattern(self, x, w, …)` is traced like user code: its parameters match any value (hint them
    `qg.Quantized` or `qg.Scalar` to match less), a parameter that stands twice matches one value,
    numbers match constants, commutative ops match in both orders. `check(self, m, x, w, …)` refuses with
    ``m.require(condition, "reason", w)``. `rewrite(self, m, x, w, …)` is traced too and returns the
    replacement, of exactly the type of what it replaces.

    `through` names ops of one operand that may stand between the pattern's ops; the rewrite must ask for
    them (``m.skipped(name)``), otherwise the match is an error: nothing is dropped silently. `shared`
    says what to do when a value inside the match has users outside: "refuse" it, with their line as the
    reason, or "recompute" it. Views may always be shared.

    >>> import qgraph as qg
    >>> class DoubleNegation(qg.Rule):
    ...     def pattern(self, x): return -(-x)
    ...     def rewrite(self, m, x): return x
    """

    name: ClassVar[str] = ""
    through: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[Literal["refuse", "recompute"]] = "refuse"

    pattern: ClassVar[Callable[..., Any]]
    check: ClassVar[Callable[..., None]] = _accept
    rewrite: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        """A rule's name is its class name in words, unless it has one."""
        if not cls.__dict__.get("name"):
            cls.name = "".join(f"-{c.lower()}" if c.isupper() else c for c in cls.__name__).strip("-")


class Match:
    """A match, as `check` and `rewrite` see it."""

    def __init__(
        self,
        rule: Rule,
        root: Node,
        found: Found,
        trace: Trace,
        now: Callable[[Value], Value],
        context: Context,
    ) -> None:
        self.rule = rule
        self.root = root
        self.found = found
        self._trace = trace
        self._now = now
        self._context = context
        self._asked: set[str] = set()

    @staticmethod
    def require(condition: object, reason: str, at: Any = None) -> None:
        """Refuse the match for `reason` unless `condition` holds; `at` is the value to point at."""
        if not condition:
            raise NoMatch(reason, at.value if isinstance(at, Tracer) else at)

    def __getitem__(self, name: str) -> Tracer:
        """The value of a variable or of a ``.named(...)`` interior value."""
        return Tracer(self._trace, self._now(self.found.values[name]))

    def op(self, name: str) -> Op:
        """The op of a ``.named(...)`` interior value, as it was matched."""
        return self.found.values[name].op

    def note(self, text: str) -> None:
        """Leave a sentence about this node for the report."""
        self._context.notes[self.root] = text

    @property
    def type(self) -> Any:
        """The TensorType of what is replaced."""
        return self.root.outputs[0].type

    def skipped(self, name: str = "") -> tuple[Any, ...]:
        """The ops that were looked through before the named value, outermost first."""
        self._asked.add(name)
        return tuple(node.op for node in self.found.skipped.get(name, ()))

    def all_skipped(self) -> tuple[Any, ...]:
        """All ops that were looked through, wherever they stood."""
        self._asked.update(self.found.skipped)
        return tuple(node.op for nodes in self.found.skipped.values() for node in nodes)

    def arguments(self, names: tuple[str, ...]) -> dict[str, Tracer]:
        """The variables for `check` and `rewrite`."""
        return {n: self[n] for n in names}

    def refuse_unasked(self) -> None:
        """An op that was skipped but never asked for would be lost."""
        lost = set(self.found.skipped) - self._asked
        if lost:
            ops = ", ".join(str(node.op) for name in lost for node in self.found.skipped[name])
            raise RuleError(
                f"rule {self.rule.name} looked through {ops} and did not use it",
                fix="apply it again in rewrite (m.skipped(name), m.all_skipped()), or m.require its absence",
            )


def replacement(match: Match, made: Any) -> Value:
    """The value that a rewrite returned, checked against what it replaces."""
    old = match.root.outputs[0]
    if not isinstance(made, Tracer):
        raise RuleError(f"rule {match.rule.name} returned {made!r}", fix="rewrite returns one traced value")
    if made.value.type != old.type:
        raise RuleError(
            f"rule {match.rule.name} replaces a {old.type} by a {made.value.type}",
            node=str(match.root.op),
            where=match.root.origin.source.sentence(),
            fix="cast or reshape in rewrite, or m.require the case away in check",
        )
    return made.value
