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
from qgraph.ir.dtypes import F16, F32, F64, DType
from qgraph.numeric import tolerance
from tests.fuzz import domains
from tests.fuzz.evaluation import Evaluation

PROBES = (2, 16)  # a difference counts if it stays under many disturbances
SEED = 7
# Which of several right answers these give is MLX's choice.
UNORDERED = {"partition", "argpartition", "topk", "argsort"}
# A product of eight such numbers is still a float32: beyond, an op may overflow on the way.
MARGIN = tolerance(F32, path="graph").terms / tolerance(F32).terms  # of what the disturbances did
LARGE_F16 = float(np.finfo(np.float16).max) ** (1 / 2)  # and here of two: more would be too few to compare
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
    unordered = _depending(drawn, lambda n: n.op.name in UNORDERED)
    large = _depending(drawn, lambda n: any(_is_large(v, exact.values[v]) for v in n.outputs))
    packing = ("quantize", "quantize_parts")
    grids = _depending(drawn, lambda n: n.op.name in packing and _is_coarse(n, exact.values))
    bits = _depending(drawn, lambda n: n.op.name == "view" and _has_free_bits(n, exact.values))
    left_out = {
        "the bits of a zero or of what is no number": bits,
        "order is free": unordered,
        "near the end of the range": large,
        "quantized from 16 bit or from what is no number": grids,
    }
    problem = ""
    for number in PROBES:
        # Each disturbance both ways: one of the two crosses the border that an exact number lies on.
        seeds = [(seed, sign) for seed in range(number) for sign in (-1, 1)]
        probes = [Evaluation(known, noise).outputs(drawn) for noise in seeds]
        seen = Counter[str]()
        problem = _first_problem(drawn, found, expected, probes, left_out, seen)
        if not problem:
            break
    counts.update(seen)
    return problem


def _first_problem(
    drawn: Graph,
    found: list[Any],
    expected: list[Any],
    probes: list[list[Any]],
    left_out: dict[str, set[Value]],
    counts: Counter[str],
) -> str:
    for i, value in enumerate(drawn.outputs):
        why = [reason for reason, values in left_out.items() if value in values]
        if why:
            counts[f"MLX outputs not compared: {why[0]}"] += 1
            continue
        dtype = F32 if value.type.dtype.unit_roundoff == 0.0 else value.type.dtype
        problem = _difference(found[i], np.asarray(expected[i]), [p[i] for p in probes], dtype, counts)
        if problem:
            return f"output {i}: {problem}"
    return ""


def _why_not(graph: Graph) -> str:
    for t in (t for node in graph.nodes for t in node.types):
        if t.dtype is F64:
            return "float64"
    return ""


def _is_large(v: Value, x: Any) -> bool:
    limit = LARGE_F16 if v.type.dtype is F16 else LARGE
    return x.dtype.kind == "f" and bool(np.any(np.abs(x[np.isfinite(x)]) > limit))


def _has_free_bits(node: Node, values: dict[Value, Any]) -> bool:
    """Whether equal numbers may have other bits: the sign of a zero or of NaN."""
    x = values[node.inputs[0]]
    return x.dtype.kind == "f" and bool(np.any(~np.isfinite(x) | (x == 0)))


def _is_coarse(node: Node, values: dict[Value, Any]) -> bool:
    """Whether the grid is no matter of rounding: MLX works it out in 16 bit, or from NaN."""
    x = node.inputs[0]
    return x.type.dtype.size == 2 or not bool(np.all(np.isfinite(values[x])))


def _depending(graph: Graph, of: Callable[[Node], bool]) -> set[Value]:
    """The values of the nodes that `of` names, and all that is computed from them."""
    found: set[Value] = set()
    for node in graph.nodes:
        if of(node) or any(v in found for v in node.inputs):
            found.update(node.outputs)
    return found


def _difference(found: Any, exact: Any, probes: list[Any], dtype: DType, counts: Counter[str]) -> str:
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
        bound = tolerance(dtype, path="graph")
        limit = np.maximum(np.where(clear, spread, 0.0) * MARGIN / bound.terms, size)
        clear &= (bound.terms * limit < size) | (size == 0)  # else the bound would allow anything
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
