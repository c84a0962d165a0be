"""Forms: shapes of plain code that one op stands for. A form starts at a rare op and walks from there.

The pattern language has no optional casts, broadcasts and reshapes, and the op to replace is a common one
(the last multiply of a norm), so that a pattern would be tried at every node. Here a form is tried only where
its anchor stands, and follows operands and users by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import qgraph as qg
from qgraph.ir import Graph, Node, Value
from qgraph.ir.origin import Origin, Step, merge_origins
from qgraph.ops.dispatch import run_under
from qgraph.ops.quantized import Dequantize
from qgraph.rewrite import Context, NoMatch
from qgraph.rewrite.match import Found, Miss, foreign_user
from qgraph.rewrite.rule import Match
from qgraph.trace.tracer import Trace, Tracer
from qgraph_passes.raise_fast.walk import Walk

Now = Callable[[Value], Any]


@dataclass(frozen=True)
class Raised:
    """What a form found: the value to replace, and how to make the new one from values of the old graph."""

    root: Value
    make: Callable[[Now], Any]


class Search:
    """One attempt of a form at one anchor. `inside` are the nodes that the raised op computes again."""

    require = staticmethod(Match.require)

    def __init__(self, walk: Walk, node: Node) -> None:
        self.walk = walk
        self.graph = walk.graph
        self.node = node
        self.inside: dict[Node, None] = {node: None}

    def inner(self, *values: Value) -> None:
        """Count the makers of `values` in."""
        self.inside.update((v.node, None) for v in values)

    def private(self, root: Value) -> None:
        """Refuse when something outside reads what would be computed twice; views may be shared."""
        found = Found(nodes=self.inside | {root.node: None})
        foreign = foreign_user(self.graph, root.node, found)
        if foreign is not None:
            value, user = foreign
            who = "it is an output of the graph" if user is None else f"{user.op.name} ({user.origin.source})"
            raise NoMatch(f"{value.op.name} has a foreign user: {who}", value)


class Form(qg.Rule):
    """A rule with a search of its own in place of a pattern."""

    anchors: ClassVar[tuple[str, ...]] = ()
    size: ClassVar[int] = 1  # nodes of the usual spelling, for the report of a near miss

    def find(self, s: Search) -> Raised | None:
        """What is to be replaced; None where this is something else. Errors: NoMatch for a near miss."""
        raise NotImplementedError


def apply_forms(graph: Graph, forms: Sequence[Form], pass_name: str, context: Context) -> Graph:
    """The graph with every form raised that is found in it; forms of one sweep do not see each other's."""
    table: dict[str, list[Form]] = {}
    for form in forms:
        for anchor in form.anchors:
            table.setdefault(anchor, []).append(form)
    walk = Walk(graph)
    found: dict[Value, tuple[Form, Raised, Search]] = {}
    for node in graph.nodes:
        for form in table.get(node.op.name, ()):
            search = Search(walk, node)
            raised = _attempt(form, search, context)
            if raised is not None and raised.root not in found:
                found[raised.root] = (form, raised, search)
                break
    return _Sweep(graph, found, pass_name, context).run() if found else graph


def _attempt(form: Form, search: Search, context: Context) -> Raised | None:
    statistics = context.of(form.name)
    statistics.candidates += 1
    try:
        raised = form.find(search)
    except NoMatch as no:
        statistics.refused += 1
        miss = Miss(form.name, search.node, no.reason, no.at, len(search.inside), form.size)
        context.misses[form.name, search.node] = miss
        return None
    if raised is None:
        statistics.structure += 1
    return raised


class _Sweep:
    """The rebuilding of a graph around what was found."""

    def __init__(
        self,
        graph: Graph,
        found: dict[Value, tuple[Form, Raised, Search]],
        pass_name: str,
        context: Context,
    ) -> None:
        self.graph = graph
        self.found = found
        self.pass_name = pass_name
        self.context = context
        self.now: dict[Value, Value] = {}
        self.made_by: Origin | None = None
        self.trace = Trace(graph.builder, pass_name, origin=self.origin)

    def run(self) -> Graph:
        """The graph with everything found replaced; an output that became packed is unpacked."""
        after = run_under(self.trace, lambda: self.graph.rewritten(self.rebuild))
        outputs = [
            new if old.type.packing or not new.type.packing else self.unpacked(new)
            for old, new in zip(self.graph.outputs, after.outputs, strict=True)
        ]
        return after.with_outputs(outputs)

    def unpacked(self, v: Value) -> Value:
        """`v` as numbers."""
        return self.graph.builder.add(Dequantize(), (v,), v.node.origin).outputs[0]

    def origin(self) -> Origin:
        """The origin of the nodes that are being made."""
        assert self.made_by is not None
        return self.made_by

    def rebuild(self, node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
        """The raised value in place of a root; the node itself elsewhere."""
        entry = self.found.get(node.outputs[0])
        results: Sequence[Value] | None = None
        if entry is not None and self.context.burn():
            results = (self.raised(*entry),)
        if results is None:
            same = inputs == node.inputs  # values compare by identity
            results = node.outputs if same else self.graph.builder.add(node.op, inputs, node.origin).outputs
        self.now.update(zip(node.outputs, results, strict=True))
        return results

    def raised(self, form: Form, raised: Raised, search: Search) -> Value:
        """The new value, of the old one's shape and dtype."""
        step = Step(self.pass_name, form.name, self.context.ordinal)
        nodes = dict.fromkeys([raised.root.node, *search.inside])
        self.made_by = merge_origins([n.origin for n in nodes], step)
        made: Any = raised.make(lambda v: Tracer(self.trace, self.now[v]))
        old = raised.root.type
        if not isinstance(made, Tracer) or made.value.type.dense() != old.dense():
            raise qg.RuleError(
                f"form {form.name} replaces a {old} by {made!r}",
                where=raised.root.node.origin.source.sentence(),
            )
        self.context.of(form.name).applied += 1
        self.context.misses.pop((form.name, search.node), None)
        return made.value
