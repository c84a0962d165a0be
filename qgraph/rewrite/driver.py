"""Apply rules to a graph until none fires, in sweeps from the inputs to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from qgraph._errors import QGraphError, RuleError
from qgraph.ir.digest import digest
from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.origin import Origin, Step, merge_origins
from qgraph.ops.dispatch import run_under
from qgraph.rewrite.context import Context
from qgraph.rewrite.match import Found, Matcher, Miss, NoMatch, foreign_user, pattern_size
from qgraph.rewrite.pattern import Pattern, root_ops, trace_pattern
from qgraph.rewrite.rule import Match, Rule, replacement
from qgraph.trace.tracer import Trace

REWRITES_PER_NODE = 20  # a pipeline that needs more does not terminate
PATIENCE = 8  # sweeps before graphs are compared to find a cycle: nearly all passes need two or three


class _Compiled:
    """A rule with its traced pattern."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.pattern: Pattern
        self.pattern, self.names = trace_pattern(type(rule).pattern)
        self.size = pattern_size(self.pattern)


def apply_rules(graph: Graph, rules: Sequence[Rule], pass_name: str, context: Context) -> Graph:
    """The graph after applying `rules` wherever they match; earlier rules first.

    Every sweep matches against one graph; a match that overlaps another's waits for the next sweep.
    Errors: RuleError for a rule that cycles, or returns another type than it replaces.
    """
    table: dict[str, list[_Compiled]] = {}
    for rule in rules:
        compiled = _Compiled(rule)
        for op in root_ops(compiled.pattern):
            table.setdefault(op, []).append(compiled)
    budget = REWRITES_PER_NODE * max(len(graph.nodes), 10)
    seen: set[str] = set()
    recent: list[tuple[str, Node]] = []
    sweeps = 0
    while True:
        sweep = _Sweep(graph, table, pass_name, context)
        after = sweep.run()
        if not sweep.applied:
            return graph
        recent = (recent + sweep.log)[-6:]
        budget -= sweep.applied
        sweeps += 1
        mark = digest(after) if sweeps > PATIENCE else str(sweeps)
        if budget < 0 or mark in seen:
            raise RuleError(
                f"pass {pass_name} does not come to an end; its last rewrites: "
                + "; ".join(f"{rule} at {node.op}" for rule, node in recent),
                fix="two rules undo each other, or one matches its own result: narrow a pattern or check",
            )
        seen.add(mark)
        graph = after


class _Sweep:
    def __init__(
        self, graph: Graph, table: dict[str, list[_Compiled]], pass_name: str, context: Context
    ) -> None:
        self.graph = graph
        self.table = table
        self.pass_name = pass_name
        self.context = context
        self.now: dict[Value, Value] = {}
        self.done: set[Node] = set()
        self.rule = ""
        self.origins: list[Origin] = []  # of the nodes that are being replaced
        self.merged: Origin | None = None
        self.trace = Trace(graph.builder, pass_name, origin=self.origin)
        self.applied = 0
        self.log: list[tuple[str, Node]] = []

    def run(self) -> Graph:
        candidates = [n for n in self.graph.nodes if n.op.name in self.table]
        if not candidates:
            return self.graph
        return run_under(self.trace, lambda: self.graph.rewritten(self.rebuild))

    def origin(self) -> Origin:
        """The origin of new nodes: worked out once per rewrite, if it makes any."""
        if self.merged is None:
            step = Step(self.pass_name, self.rule, self.context.ordinal + 1)
            self.merged = merge_origins(self.origins, step)
        return self.merged

    def rebuild(self, node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
        results: Sequence[Value] | None = None
        for compiled in self.table.get(node.op.name, ()):
            made = self.attempt(compiled, node)
            if made is not None:
                results = (made,)
                break
        if results is None:
            same = inputs == node.inputs  # values compare by identity
            results = node.outputs if same else self.graph.builder.add(node.op, inputs, node.origin).outputs
        self.now.update(zip(node.outputs, results, strict=True))
        return results

    def attempt(self, compiled: _Compiled, node: Node) -> Value | None:
        statistics = self.context.of(compiled.rule.name)
        statistics.candidates += 1
        start = perf_counter()
        try:
            return self.match(compiled, node)
        finally:
            statistics.seconds += perf_counter() - start

    def match(self, compiled: _Compiled, node: Node) -> Value | None:
        rule, statistics = compiled.rule, self.context.of(compiled.rule.name)
        matcher = Matcher(self.graph, compiled.pattern, rule.through)
        found = matcher.at(node.outputs[0])
        if found is None:
            statistics.structure += 1
            depth, reason, at = matcher.miss
            if depth > 0:
                self.miss(compiled, node, reason(), at, depth)
            return None
        if not self.done.isdisjoint(found.nodes):
            return None  # overlaps a rewrite of this sweep: the next one sees its result
        return self.rewrite(compiled, node, found)

    def rewrite(self, compiled: _Compiled, node: Node, found: Found) -> Value | None:
        rule = compiled.rule
        match = Match(rule, node, found, self.trace, lambda v: self.now.get(v, v), self.context)
        self.rule, self.origins, self.merged = rule.name, [n.origin for n in found.nodes], None
        try:
            self.refuse_foreign(rule, node, found)
            values = match.arguments(compiled.names)
            rule.check(match, **values)
            made = replacement(match, type(rule).rewrite(rule, match, **values))
        except NoMatch as no:
            self.context.of(rule.name).refused += 1
            self.miss(compiled, node, no.reason, no.at, len(found.nodes))
            return None
        except QGraphError as error:
            error.where = error.where or node.origin.source.sentence()
            raise
        except Exception as error:
            error.add_note(f"in rule {rule.name} at {node!r} from {node.origin.source.sentence()}")
            raise
        if found.skipped:
            match.refuse_unasked()
        if made in (node.outputs[0], self.now.get(node.outputs[0])) or not self.context.burn():
            return None
        self.context.of(rule.name).applied += 1
        self.applied += 1
        self.done.update(found.nodes)
        self.log.append((rule.name, node))
        self.context.misses.pop((rule.name, node), None)
        return made

    def refuse_foreign(self, rule: Rule, node: Node, found: Found) -> None:
        if rule.shared != "refuse":
            return
        foreign = foreign_user(self.graph, node, found)
        if foreign is None:
            return
        value, user = foreign
        name = next((n for n, v in found.values.items() if v is value), value.op.name)
        who = "it is an output of the graph" if user is None else f"{user.op.name} ({user.origin.source})"
        raise NoMatch(f"{name} has a foreign user: {who}", value)

    def miss(self, compiled: _Compiled, node: Node, reason: str, at: Value | None, matched: int) -> None:
        name = compiled.rule.name
        self.context.misses[name, node] = Miss(name, node, reason, at, matched, compiled.size)
