"""Pass: a graph in, a graph out. Its fields are its options, here and in the pipeline text."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from qgraph.ir.graph import Graph
from qgraph.rewrite.context import Context
from qgraph.rewrite.driver import apply_rules
from qgraph.rewrite.rule import Rule


@dataclass(frozen=True)
class Pass:
    """A step of the pipeline. Subclass, freeze, name it; then list `rules`, or write `run`.

    The graph is valid before and after `run`, which must not change what the graph computes. `after` and
    `before` name passes that must not stand on the wrong side of this one. `exact` is False for a pass that
    takes constants for what they are rounded from: 0.33333334 for 1 / 3.

    >>> import qgraph as qg
    >>> class Identity(qg.Pass):
    ...     name = "identity"
    ...     def run(self, graph, context): return graph
    """

    name: ClassVar[str] = ""
    after: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True
    rules: ClassVar[tuple[type[Rule], ...]] = ()

    def active_rules(self) -> tuple[Rule, ...]:
        """The rules to apply, in order; override it when an option chooses among them."""
        return tuple(rule() for rule in self.rules)

    def run(self, graph: Graph, context: Context) -> Graph:
        """The graph after this pass: its rules applied until none fires."""
        return apply_rules(graph, self.active_rules(), self.name, context)

    def __str__(self) -> str:
        """``name{option=value}``, options at their defaults left out."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        text = ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in shown.items())
        return f"{self.name}{{{text}}}" if text else self.name
