"""The summary: what the passes changed, in one screen."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from qgraph.inspector.layers import collapsed, layer_of, ranges
from qgraph.ir.graph import Graph, Node
from qgraph.ops.chain import Chain
from qgraph.rewrite import Result, Site

WIDTH = 110  # of the text


@dataclass(frozen=True)
class OpCount:
    """How many nodes of one op there are before and after the passes."""

    op: str
    before: int
    after: int

    @property
    def change(self) -> int:
        """After less before."""
        return self.after - self.before


@dataclass(frozen=True)
class Missed:
    """Uses of quantized values that unpack them, alike up to the layer they stand in."""

    count: int
    where: str  # e.g. "dot at model.py:88 in layers.*.attn"
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Modules:
    """Modules that run the same ops, views and constants left out: e.g. all layers of a model.

    Element-wise ops that one kernel computes are counted one by one.
    """

    where: str  # e.g. "model.layers.0–35"
    count: int
    ops: tuple[tuple[str, int], ...]  # after the passes, in each of them


@dataclass(frozen=True)
class PassTime:
    """What one pass cost, and whether it changed the graph."""

    name: str
    milliseconds: float
    changed: bool


@dataclass(frozen=True)
class Summary:
    """What a pipeline did to a graph; ``str()`` is for a person, `to_json` for a program.

    Pairs are (before, after). `weight_bytes` counts the inputs that are quantized or have two axes or
    more, as they are stored; `unpacked_bytes` the same inputs, were they all dense; `state_bytes` those that
    are written into, a model's caches, and not among them. `activation_bytes` counts the results of every op
    that makes new data. Unused rules are (name, times tried).
    """

    nodes: tuple[int, int]
    ops: tuple[OpCount, ...]
    weight_bytes: int
    unpacked_bytes: int
    activation_bytes: tuple[int, int]
    flops: tuple[int, int]
    casts: tuple[int, int]
    sites: tuple[tuple[str, int], ...]  # what uses of quantized values became, and how many
    missed: tuple[Missed, ...]
    unused_rules: tuple[tuple[str, int], ...]
    passes: tuple[PassTime, ...]
    state_bytes: int = 0
    modules: tuple[Modules, ...] = ()  # none where the graph knows of no modules

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        """Aligned plain text."""
        modules = ["", *_module_lines(self)] if self.modules else []
        return "\n".join([*_op_lines(self), *modules, "", *_fact_lines(self)])


def summarize(result: Result) -> Summary:
    """Sum up a pipeline run.

    >>> import mlx.core as mx, qgraph as qg
    >>> f = qg.jit(lambda x, w: x @ w.T)
    >>> s = summarize(f.result(mx.ones((1, 64)), qg.quantize(mx.ones((32, 64)))))
    >>> [(c.op, c.change) for c in s.ops]
    [('quantized_matmul', 1), ('dot', -1), ('transpose', -1)]
    >>> s.flops, s.sites
    ((4096, 4096), (('quantized_matmul', 1),))
    """
    before, after = result.before, result.graph
    state = {n.inputs[0] for n in before.find("slice_update", "index_update") if n.inputs[0] in before.inputs}
    weights = [v.type for v in before.inputs if v not in state and (v.type.packing or v.type.ndim >= 2)]
    statistics = result.context.statistics.items()
    return Summary(
        nodes=(_size(before), _size(after)),
        ops=_op_counts(before, after),
        weight_bytes=sum(t.nbytes for t in weights),
        unpacked_bytes=sum(t.dense().nbytes for t in weights),
        activation_bytes=(_activations(before), _activations(after)),
        flops=(_flops(before), _flops(after)),
        casts=(len(before.find("cast")), len(after.find("cast"))),
        sites=tuple(result.report.counts().items()),
        missed=tuple(_missed(result.report.missed)),
        unused_rules=tuple((name, s.candidates) for name, s in statistics if s.applied == 0),
        passes=tuple(PassTime(s.name, s.seconds * 1e3, s.changed) for s in result.history),
        state_bytes=sum(v.type.nbytes for v in state),
        modules=tuple(_modules(after)),
    )


def _size(graph: Graph) -> int:
    return sum(graph.histogram().values())


def _op_counts(before: Graph, after: Graph) -> tuple[OpCount, ...]:
    """The ops that changed first, most first; then the others."""
    old, new = before.histogram(), after.histogram()
    counts = [OpCount(op, old.get(op, 0), new.get(op, 0)) for op in {**new, **old}]
    return tuple(sorted(counts, key=lambda c: (c.change == 0, -c.change, -c.after, c.op)))


def _makes_data(node: Node) -> bool:
    return not (node.op.view or node.op.name in ("input", "constant"))


def _activations(graph: Graph) -> int:
    return sum(t.nbytes for node in graph.nodes if _makes_data(node) for t in node.types)


def _flops(graph: Graph) -> int:
    nodes = (n for n in graph.nodes if n.op.name not in ("input", "constant"))
    return sum(n.op.flops(tuple(v.type for v in n.inputs), n.types) for n in nodes)


def _missed(sites: Iterable[Site]) -> list[Missed]:
    groups = Counter((_place(s), tuple(map(collapsed, s.reasons))) for s in sites)
    return [Missed(n, where, reasons) for (where, reasons), n in groups.items()]


def _modules(graph: Graph) -> list[Modules]:
    """The layers of a model and what stands beside them, those that run the same ops as one."""
    ops: dict[str, Counter[str]] = {}
    for node in graph.nodes:
        if _makes_data(node):
            ops.setdefault(layer_of(node.origin.scope), Counter()).update(_names(node))
    alike: dict[tuple[str, tuple[tuple[str, int], ...]], list[str]] = {}
    for scope, counts in ops.items():
        listed = tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        alike.setdefault((collapsed(scope), listed), []).append(scope)
    if not any(ops):
        return []
    return [Modules(ranges(scopes), len(scopes), listed) for (_, listed), scopes in alike.items()]


def _names(node: Node) -> list[str]:
    """The op of a node, or those of a chain."""
    return node.op.names() if isinstance(node.op, Chain) else [node.op.name]


def _place(site: Site) -> str:
    line = site.line or "an unknown line"
    return f"{site.op} at {line}" + (f" in {collapsed(site.scope)}" if site.scope else "")


def _op_lines(s: Summary) -> list[str]:
    width = max([len("all ops"), *(len(c.op) for c in s.ops)])
    rows = [OpCount("all ops", *s.nodes), *s.ops]
    body = [f"{c.op:<{width}}  {c.before:>7}  {c.after:>7}  {_signed(c.change):>7}" for c in rows]
    return [f"{'op':<{width}}  {'before':>7}  {'after':>7}  {'change':>7}", *body]


def _module_lines(s: Summary) -> list[str]:
    names = [f"{m.where or 'no module'}" + (f" ({m.count} alike)" if m.count > 1 else "") for m in s.modules]
    width = max(map(len, ["module", *names])) + 2
    lines = [f"{'module':<{width}}ops after the passes, views left out"]
    for name, m in zip(names, s.modules, strict=True):
        ops = ", ".join(op if n == 1 else f"{n}~×~{op}" for op, n in m.ops)
        wrapped = textwrap.wrap(
            ops,
            WIDTH,
            initial_indent=f"{name:<{width}}",
            subsequent_indent=" " * width,
            break_long_words=False,
        )
        lines += [line.replace("~", " ") for line in wrapped]
    return lines


def _fact_lines(s: Summary) -> list[str]:
    packed = "" if s.unpacked_bytes == s.weight_bytes else f" ({_human(s.unpacked_bytes, 'B')} unpacked)"
    sites = ", ".join(f"{n} × {became}" for became, n in s.sites) or "none"
    unused = ", ".join(f"{name} (tried {n} times)" for name, n in s.unused_rules) or "none"
    times = ", ".join(
        f"{p.name} {p.milliseconds:.1f} ms" + ("" if p.changed else " (no change)") for p in s.passes
    )
    lines = [
        f"weights            {_human(s.weight_bytes, 'B')}{packed}",
        *([f"caches             {_human(s.state_bytes, 'B')}"] if s.state_bytes else []),
        f"activations        {_arrow(s.activation_bytes, 'B')}",
        f"FLOPs              {_arrow(s.flops)}",
        f"casts              {s.casts[0]} → {s.casts[1]}",
        f"quantized uses     {sites}",
        f"left unquantized   {sum(m.count for m in s.missed) or 'none'}",
    ]
    for m in s.missed:
        lines += [f"  {m.count} × {m.where}", *(f"      {r}" for r in m.reasons)]
    return [*lines, f"rules not fired    {unused}", f"passes             {times}"]


def _signed(n: int) -> str:
    return f"{n:+d}" if n else "·"


def _arrow(pair: tuple[int, int], unit: str = "") -> str:
    return f"{_human(pair[0], unit)} → {_human(pair[1], unit)}"


def _human(n: int, unit: str = "") -> str:
    """A count in units of thousands: 12.3 MB, 4.1 G."""
    size, prefix = float(n), ""
    for larger in ("k", "M", "G", "T"):
        if size < 1000:
            break
        size, prefix = size / 1000, larger
    return (f"{size:.1f} {prefix}{unit}" if prefix else f"{n} {unit}").rstrip()
