"""The table that the long run prints, and the targets that it must meet."""

from __future__ import annotations

from qgraph.ir import Op
from tests.fuzz.batch import Batch
from tests.fuzz.counting import RULES, UNCHECKED, fired, refused
from tests.fuzz.graphs import DECOMPOSITIONS

OFTEN = 50  # how often every rewrite must fire and be refused in the long run
OPS = sorted(set(Op.registry) - {"input", *DECOMPOSITIONS})


def text(batch: Batch) -> str:
    c = batch.counts
    head = f"{c['graphs']} graphs, {c['distinct graphs']} distinct; {c['nodes']} nodes"
    lines = [f"{head}, {c['failures']} failures"]
    for key in sorted(k for k in c if k.startswith("graphs with")):
        lines.append(f"  {key}: {c[key]} ({c[key] / max(1, c['graphs']):.0%})")
    for start in ("outputs", "run", "not run", "MLX", "motif"):
        lines += [f"  {key}: {n}" for key, n in sorted(c.items()) if key.startswith(start)]
    reached = [op for op in OPS if c[f"op {op}"]]
    rarest = min(reached, key=lambda op: c[f"op {op}"], default="")
    lines.append(f"ops reached: {len(reached)} of {len(OPS)}; rarest: {rarest} ({c[f'op {rarest}']})")
    lines += [f"  not reached: {op}" for op in OPS if not c[f"op {op}"]]
    lines.append(f"{'rewrite':52}{'fired':>8}{'refused':>9}")
    for rule in RULES:
        mark = "  (near misses: it has no conditions)" if rule in UNCHECKED else ""
        lines.append(f"  {rule:50}{fired(c, rule):8}{refused(c, rule):9}{mark}")
    for kind, detail, graph in batch.failures:
        lines += [f"FAILURE {kind}: {detail}", graph]
    return "\n".join(lines)


def targets(batch: Batch) -> list[str]:
    """The targets that a long run missed."""
    c = batch.counts
    missed = [f"{rule} fired {fired(c, rule)} times" for rule in RULES if fired(c, rule) < OFTEN]
    missed += [f"{rule} was refused {refused(c, rule)} times" for rule in RULES if refused(c, rule) < OFTEN]
    missed += [f"op {op} was not reached" for op in OPS if not c[f"op {op}"]]
    if 3 * c["graphs with packed operands"] < c["graphs"]:
        missed.append("less than a third of the graphs have packed operands")
    if c["failures"]:
        missed.append(f"{c['failures']} failures")
    return missed
