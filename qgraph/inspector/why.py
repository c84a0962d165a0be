"""Why and why not: what uses of quantized values became, and where a rule nearly fired."""

from __future__ import annotations

from collections import Counter

from qgraph._errors import RuleError
from qgraph.inspector.layers import collapsed, inside
from qgraph.ir.graph import Node, Value
from qgraph.ir.text import names_of, print_node
from qgraph.rewrite import Result, passes
from qgraph.rewrite.match import Miss

NEAREST = 20  # misses that are shown


def explain(result: Result, rule: str = "", scope: str = "") -> str:
    """Why the quantized uses of a graph became what they are; with `rule`, where that one did not fire.

    `rule` is a rule's name, or a pass's for all of its rules. `scope` keeps to one module: its name, or
    a pattern as in ``layers.*.attn``. Misses alike up to the layer are told once, the nearest first.
    Errors: RuleError for a rule that no pass of the run has tried and that no known pass has.

    >>> import mlx.core as mx, qgraph as qg
    >>> f = qg.jit(lambda x, w: x @ w.T)
    >>> result = f.result(mx.ones((1, 64)), qg.quantize(mx.ones((32, 64))))
    >>> print(explain(result, "quantize-take"))
    take-rows was never tried: no node of the graph is one that it starts from
    """
    if rule:
        return "\n".join(_rule_text(result, name, scope) for name in _rules_of(result, rule))
    return _report_text(result, scope)


def _report_text(result: Result, scope: str) -> str:
    """Every site, those that unpack first; the ones alike up to the layer are one line with a count."""
    sites = [s for s in result.report if inside(s.scope, scope)]
    if not sites:
        return f"no operation {f'in {scope} ' if scope else ''}reads a quantized value"
    became = Counter(s.became for s in sites)
    counts = ", ".join(f"{n} × {name}" for name, n in became.items())
    groups: dict[str, list[str]] = {}
    for site in sorted(sites, key=lambda s: s.quantized):
        groups.setdefault(collapsed(str(site)), []).append(str(site))
    lines = [texts[0] if len(texts) == 1 else f"{len(texts)} × {text}" for text, texts in groups.items()]
    return "\n".join([f"{len(sites)} uses of quantized values: {counts}", *lines])


def _rules_of(result: Result, name: str) -> list[str]:
    tried = result.context.statistics
    if name in tried:
        return [name]
    known = passes()
    if name in known:
        return [r.name for r in known[name]().active_rules()]
    every = {r.name: None for p in known.values() for r in p().active_rules()}
    if name in every:
        return [name]
    listed = ", ".join(sorted({*known, *every, *tried}))
    raise RuleError(f"no rule or pass is named {name!r}", fix=f"use one of: {listed}")


def _rule_text(result: Result, rule: str, scope: str) -> str:
    statistics = result.context.statistics.get(rule)
    if statistics is None:
        return f"{rule} was never tried: no node of the graph is one that it starts from"
    misses = [m for (name, node), m in result.context.misses.items() if name == rule and _within(node, scope)]
    head = (
        f"{rule} fired {statistics.applied} times; tried at {statistics.candidates} nodes, "
        f"of which {statistics.refused} matched and were refused"
    )
    if not misses:
        return f"{head}; nowhere else{f' in {scope}' if scope else ''} did it come near"
    names = _Names(result)
    groups: dict[str, tuple[str, int]] = {}
    for miss in sorted(misses, key=lambda m: -m.matched):
        text = _miss_text(miss, names.around(miss.root))
        first, count = groups.get(collapsed(text), (text, 0))
        groups[collapsed(text)] = (first, count + 1)
    shown = [text + (f"  (and {n - 1} more like it)" if n > 1 else "") for text, n in groups.values()]
    rest = len(shown) - NEAREST
    return "\n".join([head, *shown[:NEAREST], *([f"… and {rest} others"] if rest > 0 else [])])


def _within(node: Node, scope: str) -> bool:
    return inside(node.origin.scope, scope)


class _Names:
    """The names of values in the graphs of a run; a node is named as in the earliest one that has it."""

    def __init__(self, result: Result) -> None:
        graphs = {id(g): g for g in (result.before, *(stage.graph for stage in result.history))}
        self._tables = [names_of(g) for g in graphs.values()]

    def around(self, node: Node) -> dict[Value, str]:
        """The names in a graph that contains `node`; none for one that lived within a pass only."""
        return next((names for names in self._tables if node.outputs[0] in names), dict[Value, str]())


def _miss_text(miss: Miss, names: dict[Value, str]) -> str:
    root = miss.root
    node = f"%{names[root.outputs[0]]}" if names else str(root.op)
    source, scope = root.origin.source, root.origin.scope
    place = ", ".join(filter(None, [str(source) if source.known else "", scope]))
    head = f"{miss.rule} did not fire at {node}" + (f" ({place})" if place else "")
    matched = f"matched {min(miss.matched, miss.total)} of {miss.total} nodes"
    return f"{head} — {matched}: {miss.reason}{_at(miss.at, names)}"


def _at(at: Value | None, names: dict[Value, str]) -> str:
    """Where the match stopped: the node as text, and the user's line."""
    if at is None or at not in names:
        return ""
    source = at.node.origin.source
    shown = f"%{names[at]}: {at.type}" if at.op.name == "input" else print_node(at.node, names)
    return f"\n    at {shown}" + (f"  ({source})" if source.known else "")
