"""The emitted program on MLX's CPU against the reference of the graph as it was drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.execute.eager import collect, stored
from qgraph.execute.emit import emit
from qgraph.execute.program import load
from qgraph.execute.reference import to_numpy
from qgraph.ir import Graph, Node, Value
from qgraph.ir.dtypes import BF16, F16, F32, F64
from qgraph.numeric import tolerance
from tests.fuzz import domains
from tests.fuzz.evaluation import NOISE, Evaluation

PROBES = range(2)
SEED = 7
# Which of several right answers these give is MLX's choice.
UNORDERED = {"partition", "argpartition", "topk", "argsort"}
# A product of eight such numbers is still a float32: beyond, an op may overflow on the way.
LARGE = float(np.finfo(np.float32).max) ** (1 / 8)


def against_mlx(drawn: Graph, final: Graph, counts: Counter[str]) -> str:
    """How the program of `final` differs from the meaning of `drawn`; empty if it does not."""
    reason = _why_not(drawn)
    if reason:
        counts[f"not run: {reason}"] += 1
        return ""
    inputs = domains.arrays(drawn, SEED)
    known = domains.as_numbers(inputs)
    exact = Evaluation(known)
    expected = exact.outputs(drawn)
    if exact.undefined:
        counts["not run: a float beyond the integers it is cast to"] += 1
        return ""
    arrays = load(emit(final))(*stored(inputs[v] for v in final.inputs))
    mx.eval(*arrays)
    counts["run through MLX"] += 1
    found = [to_numpy(x) for x in collect([v.type for v in final.outputs], list(arrays))]
    # Each disturbance both ways: one of the two crosses the border that an exact number lies on.
    probes = [Evaluation(known, (seed, sign)).outputs(drawn) for seed in PROBES for sign in (-1, 1)]
    unordered = _depending(drawn, lambda n: n.op.name in UNORDERED)
    large = _depending(drawn, lambda n: any(_is_large(exact.values[v]) for v in n.outputs))
    for i, value in enumerate(drawn.outputs):
        if value in unordered or value in large:
            why = "order is free" if value in unordered else "near the end of f32's range"
            counts[f"MLX outputs not compared: {why}"] += 1
            continue
        problem = _difference(found[i], np.asarray(expected[i]), [p[i] for p in probes], counts)
        if problem:
            return f"output {i}: {problem}"
    return ""


def _why_not(graph: Graph) -> str:
    for t in (t for node in graph.nodes for t in node.types):
        if t.dtype in (F16, BF16, F64) or (t.packing and t.packing.scales in (F16, BF16)):
            return "floats that are not f32"
    return ""


def _is_large(x: Any) -> bool:
    return x.dtype.kind == "f" and bool(np.any(np.abs(x[np.isfinite(x)]) > LARGE))


def _depending(graph: Graph, of: Callable[[Node], bool]) -> set[Value]:
    """The values of the nodes that `of` names, and all that is computed from them."""
    found: set[Value] = set()
    for node in graph.nodes:
        if of(node) or any(v in found for v in node.inputs):
            found.update(node.outputs)
    return found


def _difference(found: Any, exact: Any, probes: list[Any], counts: Counter[str]) -> str:
    if found.shape != exact.shape:
        return f"the shape is {found.shape}, expected {exact.shape}"
    with np.errstate(all="ignore"):
        spread = np.max([_distance(p, exact) for p in probes], axis=0)
    clear = np.isfinite(spread)
    if exact.dtype.kind not in "fc":
        clear = spread == 0
        near = np.asarray(found == exact)
    else:
        size = np.max(np.abs(exact), initial=0.0, where=np.isfinite(exact))
        limit = np.maximum(np.where(clear, spread, 0.0) / NOISE, size)
        bound = tolerance(F32, path="graph")
        if exact.dtype.kind == "c":
            near = bound.allows(found.real, exact.real, limit) & bound.allows(found.imag, exact.imag, limit)
        else:
            near = bound.allows(found, exact, limit)
    counts["MLX elements compared"] += int(np.sum(clear))
    counts["MLX elements not compared: ill conditioned"] += int(np.sum(~clear))
    wrong = clear & ~near
    if not np.any(wrong):
        return ""
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"element {at}: found {found[at]!r}, expected {exact[at]!r} ({np.sum(wrong)} of {exact.size})"


def _distance(probe: Any, exact: Any) -> Any:
    """How far a disturbed result is from the exact one; infinite where only one of them is a number."""
    probe = np.asarray(probe)
    if exact.dtype.kind not in "fc":
        return (probe != exact).astype(float)
    same = (probe == exact) | (np.isnan(probe) & np.isnan(exact))
    distance = np.abs(probe - exact)
    return np.where(same, 0.0, np.where(np.isnan(distance), np.inf, distance))
