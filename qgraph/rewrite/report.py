"""The report: for every use of a quantized value, what it became, or why it did not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.op import Input
from qgraph.ir.origin import Source
from qgraph.ir.text import names_of, print_node
from qgraph.ops.quantized import KERNELS
from qgraph.rewrite.context import Context

READERS = ("dot", "addmm", "gather_mm", "take")  # ops that have a quantized kernel
UNPACKING = "dequantize"


@dataclass(frozen=True)
class Site:
    """One dot, addmm, take or gather_mm with a quantized operand, or another op that needs its numbers."""

    text: str  # the node as traced
    op: str
    scope: str
    line: str
    became: str  # the op of a quantized kernel, or "dequantize"
    reasons: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether it runs on packed words."""
        return self.became != UNPACKING

    def __str__(self) -> str:
        """One or more lines for a person."""
        place = " in ".join(filter(None, (self.line, self.scope)))
        head = f"{self.op} at {place or 'unknown line'} → {self.became}"
        return "\n".join([head, *(f"    {r}" for r in self.reasons)])


@dataclass(frozen=True)
class Report:
    """What the pipeline did with quantized values.

    >>> import mlx.core as mx, qgraph as qg
    >>> f = qg.jit(lambda x, w: x @ w.T)
    >>> f.report(mx.ones((1, 64)), qg.quantize(mx.ones((32, 64)))).counts()
    {'quantized_matmul': 1}
    """

    sites: tuple[Site, ...]

    def counts(self) -> dict[str, int]:
        """How many sites became what."""
        out: dict[str, int] = {}
        for site in self.sites:
            out[site.became] = out.get(site.became, 0) + 1
        return out

    @property
    def missed(self) -> tuple[Site, ...]:
        """The sites that unpack their weight."""
        return tuple(s for s in self.sites if not s.quantized)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __str__(self) -> str:
        """All sites, those that were missed first."""
        if not self.sites:
            return "no operation reads a quantized value"
        counts = ", ".join(f"{n} × {became}" for became, n in self.counts().items())
        ordered = sorted(self.sites, key=lambda s: s.quantized)
        return "\n".join([f"{len(self.sites)} uses of quantized values: {counts}", *map(str, ordered)])


def make_report(before: Graph, after: Graph, context: Context) -> Report:
    """Find the sites of the traced graph, and in the final one what stands for them."""
    kernels = _kernels_by_source(after)
    names = names_of(before)
    lost = _LostPacking(before)
    sites: list[Site] = []
    for node in before.nodes:
        packed = any(v.type.packing for v in node.inputs)
        if node.op.name not in (*READERS, *KERNELS):
            if unpacks(node) and not lost.only_for_readers(node):
                sites.append(_site(node, names, UNPACKING, (lost.why[node.outputs[0]],)))
            continue
        why_lost = lost.reason(node)
        if not packed and not why_lost:
            continue
        became = kernels.get(id(node.origin.source)) if node.origin.sources else None
        reasons = (
            _notes(node, context) if became else (why_lost,) if why_lost else _reasons(node, before, context)
        )
        sites.append(_site(node, names, became or UNPACKING, reasons))
    return Report(tuple(sites))


def _site(node: Node, names: dict[Value, str], became: str, reasons: tuple[str, ...]) -> Site:
    source = node.origin.source
    line = str(source) if source.known else ""
    return Site(print_node(node, names), node.op.name, node.origin.scope, line, became, reasons)


def _kernels_by_source(graph: Graph) -> dict[int, str]:
    found: dict[int, str] = {}
    for node in graph.nodes:
        if node.op.name in KERNELS:
            for source in node.origin.sources:
                found[id(source)] = node.op.name
    return found


def _notes(node: Node, context: Context) -> tuple[str, ...]:
    """What passes noted about this node, or about what became of it, by its source line."""
    same: list[Source] = list(node.origin.sources)
    notes = context.notes.items()
    return tuple(n for about, n in notes if about is node or any(s in same for s in about.origin.sources))


def _reasons(node: Node, graph: Graph, context: Context) -> tuple[str, ...]:
    """The notes, and why each rule did not fire."""
    same: list[Source] = list(node.origin.sources)
    out: dict[str, None] = dict.fromkeys(_notes(node, context))
    for (rule, about), miss in context.misses.items():
        if about is node or (about.op == node.op and any(s in same for s in about.origin.sources)):
            out[f"{rule}: {miss.text(graph)}"] = None
    return tuple(out) or ("no rule matches this use",)


def unpacks(node: Node) -> bool:
    """Whether an op needs the numbers of a packed operand; `dequantize` is the user's own wish."""
    packed = any(v.type.packing for v in node.inputs)
    return packed and not any(v.type.packing for v in node.outputs) and node.op.name != UNPACKING


class _LostPacking:
    """Operands that were quantized until an op unpacked them, e.g. a reshape that cuts groups."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.why: dict[Value, str] = {}
        for node in graph.nodes:
            if isinstance(node.op, Input) or node.op.name in (*READERS, *KERNELS):
                continue
            reason = self._lost_at(node)
            if reason:
                self.why.update(dict.fromkeys(node.outputs, reason))

    def only_for_readers(self, node: Node) -> bool:
        """Whether all that is made of the node's result is a dot or its like, which tells the reason."""
        waiting = list(node.outputs)
        while waiting:
            value = waiting.pop()
            users = self.graph.users(value)
            if self.graph.is_output(value) or not users:
                return False
            for user in users:
                if user.op.name in (*READERS, *KERNELS):
                    continue
                if not (user.op.view or user.op.name == "cast"):
                    return False
                waiting += user.outputs
        return True

    def _lost_at(self, node: Node) -> str:
        types = tuple(v.type for v in node.inputs)
        if unpacks(node):
            source = node.origin.source
            cause = node.op.carry(*types) if types[0].packing else f"{node.op.name} reads numbers"
            return f"{cause} ({source})" if source.known else str(cause)
        if node.op.view or node.op.name == "cast":
            return next((self.why[v] for v in node.inputs if v in self.why), "")
        return ""

    def reason(self, node: Node) -> str:
        return next((self.why[v] for v in node.inputs if v in self.why), "")
