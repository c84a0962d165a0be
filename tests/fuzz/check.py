"""One graph through every pipeline: each stage against the one before, the text form, the program."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

import qgraph as qg
from qgraph._errors import QGraphError
from qgraph.execute.emit import emit
from qgraph.ir import Graph, digest, parse_graph, print_graph, verify
from qgraph.ir.dtypes import F32
from qgraph.numeric import relative_error, tolerance
from qgraph.numeric.equivalence import SAME
from qgraph.rewrite import Context
from qgraph.rewrite.pipeline import DEFAULT
from tests.fuzz import domains
from tests.fuzz.counting import Marked
from tests.fuzz.evaluation import Evaluation
from tests.fuzz.program import against_mlx

SETS = 3  # of inputs
MANY = 8  # of inputs, for a graph that is small or becomes so
# Passes that must keep every rounding too. A folded constant of f32 is rounded once in place of every time.
EXACT = ("canonicalize", "fold-transpose", "quantize-dot", "quantize-take", "guard-indices")
FOLDED = tolerance(F32, path="graph").terms
REASSOCIATED = "cpu reassociating fuse-lora"
REASSOCIATING = DEFAULT.replace("fuse-lora", "fuse-lora{reassociate=true}")
# The first run counts what is the same in all of them.
RUNS = [("cpu", DEFAULT), ("metal", DEFAULT), ("cuda", DEFAULT), ("cpu", REASSOCIATING)]


def counted_in(key: str, run: int) -> bool:
    """Whether the run is the one that counts `key`: each rewrite of a graph is counted once."""
    if "lora-scale-in-a" in key or "lora-merged-weight" in key:
        return run == 3
    if " metal " in key or " cuda " in key:
        return run in (1, 2)
    return run == 0 or not key.startswith(("fired", "refused", "near"))


@dataclass
class Failure(Exception):
    """What went wrong: `kind` is the same for one graph and for what it shrinks to."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def check(
    graph: Graph,
    counts: Counter[str] | None = None,
    device: str = "",
    mlx: bool = True,
    sets: int = SETS,
) -> None:
    """Raise Failure unless every pipeline keeps the meaning of `graph`, and what comes out runs.

    `device` limits the pipelines to one device. `counts` collects what was seen.
    """
    counts = Counter() if counts is None else counts
    _guarded("verify", lambda: verify(graph))
    _guarded("round trip", lambda: _same_text(graph))
    evaluations = [Evaluation(domains.numbers(graph, seed)) for seed in range(sets)]
    evaluations.append(Evaluation(domains.numbers(graph, 0), faithful=True))
    for e in evaluations:
        _guarded("reference", lambda e=e: e.outputs(graph))
    for number, (kind, pipeline) in enumerate(RUNS):
        if device in ("", kind):
            seen: Counter[str] = Counter()
            try:
                final = _run(graph, kind, pipeline, evaluations, seen)
            finally:
                counts.update({key: n for key, n in seen.items() if counted_in(key, number)})
            if mlx and number == 0:
                problem = _guarded("mlx", lambda final=final: against_mlx(graph, final, counts))
                if problem:
                    raise Failure("mlx differs", problem)


def _run(graph: Graph, device: str, pipeline: str, evaluations: list[Evaluation], counts: Any) -> Graph:
    name = f"{device}{' reassociating' if pipeline == REASSOCIATING else ''}"
    passes = qg.Pipeline.parse(pipeline).passes
    marked = Marked(passes, device, counts)
    with marked.counting():
        result = _guarded(f"{name} pipeline", lambda: marked.pipeline.run(graph, Context(device=device)))
    before = graph
    for stage in result.history:
        if stage.name in marked.names or not stage.changed:
            continue
        _guarded(f"verify after {stage.name}", lambda g=stage.graph: verify(g))
        for e in evaluations:
            if not e.faithful or stage.name in EXACT:
                _guarded("reference", lambda e=e, b=before, a=stage.graph: (e.outputs(b), e.outputs(a)))
                _same_numbers(f"{name} {stage.name}", before, stage.graph, e, counts)
        before = stage.graph
    _guarded(f"{name} round trip", lambda: _same_text(result.graph))
    _guarded(f"{name} emit", lambda: emit(result.graph))
    _guarded(f"{name} report", lambda: str(result.report))
    return result.graph


def _guarded(kind: str, function: Any) -> Any:
    """The function's answer; whatever it raises is a failure."""
    try:
        return function()
    except Failure:
        raise
    except QGraphError as error:
        raise Failure(f"{kind} {type(error).__name__}", f"{error}") from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise Failure(f"{kind} {type(error).__name__}", f"{error} in {last.name}") from error


def _same_text(graph: Graph) -> None:
    again = parse_graph(print_graph(graph))
    if digest(again) != digest(graph):
        raise Failure("round trip", "the parsed graph has another digest")


def _same_numbers(what: str, before: Graph, after: Graph, e: Evaluation, counts: Counter[str]) -> None:
    limit = FOLDED if e.faithful else SAME
    for i, (v, w) in enumerate(zip(before.outputs, after.outputs, strict=True)):
        if v is w:
            continue  # the pass left it alone
        a, b = np.asarray(e.values[v]), np.asarray(e.values[w])
        counts["outputs compared"] += 1
        if a.dtype.kind in "fc" and not np.all(np.isfinite(a)):
            counts["outputs compared with NaN or infinity"] += 1
        if REASSOCIATED in what and not np.all(np.isfinite(a)):
            counts["outputs not compared: infinities in another order"] += 1
            continue
        error = relative_error(a, b)
        if not error <= limit:
            rounded = " where every op rounds to its dtype" if e.faithful else ""
            raise Failure(f"{what} differs", f"output {i}{rounded}, by {error:.3g}")
