"""Batches of graphs: drawn by Hypothesis from a seed, checked, and shrunk where they fail."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from qgraph.ir import Graph, digest
from qgraph.ir.op import Input
from tests.fuzz.check import MANY, RUNS, Failure, check
from tests.fuzz.graphs import REFUSED, graphs
from tests.fuzz.shrink import shrunk, size

FOLDER = Path(__file__).parent / "regressions"
QUIET = settings(
    max_examples=2,
    database=None,
    deadline=None,
    derandomize=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
SHRUNK_PER_KIND = 2  # of one batch: the rest is counted


@dataclass
class Batch:
    """What a batch found."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # kind, detail, shrunk text

    def add(self, other: Batch) -> None:
        self.counts += other.counts
        self.failures += other.failures


@lru_cache(400)  # the tests of planted bugs draw the same ones
def graph_of(number: int) -> Graph:
    """The graph that Hypothesis draws from the seed `number`.

    Its first example is always the simplest, and further ones are variations of each other: so one seed for
    each graph, and the second example.
    """
    drawn: list[Graph] = []

    @seed(number)
    @settings(QUIET)
    @given(graphs())
    def draw(graph: Graph) -> None:
        drawn.append(graph)

    draw()
    return drawn[-1]


def run(first: int, count: int, current: Path | None = None, stop: bool = False) -> Batch:
    """Check the graphs of the seeds from `first` on; `current` holds the one at hand, for a crash.

    With `stop`, the first failure ends the batch.
    """
    batch, kinds, seen = Batch(), Counter[str](), set[str]()
    for number in range(first, first + count):
        graph = graph_of(number)
        seen.add(digest(graph))
        describe(graph, batch.counts)
        if current is not None:
            current.write_text(f"// seed {number}\n{graph}\n")
        try:
            check(graph, batch.counts)
        except Failure as failure:
            kinds[failure.kind] += 1
            batch.counts["failures"] += 1
            if kinds[failure.kind] <= SHRUNK_PER_KIND:
                small = shrunk(graph, partial(fails_alike, kind=failure.kind))
                batch.failures.append((failure.kind, f"seed {number}: {failure.detail}", str(small)))
            if stop:
                break
    batch.counts["distinct graphs"] += len(seen)
    batch.counts.update({f"motif refused: {reason}": n for reason, n in REFUSED.items()})
    REFUSED.clear()
    return batch


def fails_alike(graph: Graph, kind: str) -> bool:
    """Whether `graph` fails in the same way; no more is run than that takes."""
    device = next((d for d, _ in RUNS if kind.startswith(d)), "cpu" if kind.startswith("mlx") else "")
    try:
        check(graph, device=device, mlx=kind.startswith("mlx"), sets=MANY)
    except Failure as failure:
        return failure.kind == kind
    return False


def describe(graph: Graph, counts: Counter[str]) -> None:
    counts["graphs"] += 1
    counts["nodes"] += size(graph)
    packed = lora = False
    for node in graph.nodes:
        if not isinstance(node.op, Input):
            counts[f"op {node.op.name}"] += 1
        packed |= any(v.type.packing is not None for v in node.inputs)
        lora |= node.op.name == "add" and any(map(_is_branch, node.inputs))
    counts["graphs with packed operands"] += packed
    counts["graphs with a LoRA branch"] += packed and lora
    counts["graphs with a value used twice"] += any(
        len(graph.users(v)) > 1 for n in graph.nodes for v in n.outputs
    )
    counts["graphs with a size of 1"] += any(1 in t.shape for n in graph.nodes for t in n.types)
    counts["graphs with a size of 0"] += any(0 in t.shape for n in graph.nodes for t in n.types)
    views = ("transpose", "reshape", "slice", "concatenate", "cast")
    counts["graphs with a packed view"] += any(
        n.op.name in views and n.types[0].packing is not None for n in graph.nodes
    )


def _is_branch(value: Any) -> bool:
    """A product of a product, under scales and casts."""
    node = value.node
    while node.op.name in ("multiply", "cast"):
        node = next((v.node for v in node.inputs if v.node.op.name in ("multiply", "cast", "dot")), None)
        if node is None:
            return False
    return node.op.name == "dot" and _skip_casts(node.inputs[0].node).op.name == "dot"


def _skip_casts(node: Any) -> Any:
    while node.op.name == "cast":
        node = node.inputs[0].node
    return node


def write(failure: tuple[str, str, str], folder: Path = FOLDER) -> Path:
    """Add a failure to the regression tests."""
    from qgraph.ir import parse_graph

    kind, detail, text = failure
    name = re.sub(r"\W+", "-", kind).strip("-").lower()
    path = folder / f"{name}-{digest(parse_graph(text))[:8]}.qg"
    path.write_text(f"// {kind}: {' '.join(detail.split())[:200]}\n{text}\n")
    return path
