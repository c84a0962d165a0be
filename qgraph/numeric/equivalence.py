"""Compare two graphs of one interface in the float64 reference, on random inputs of order 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qgraph._errors import VerifyError
from qgraph.execute.reference import evaluate
from qgraph.ir.dtypes import F32, F64
from qgraph.ir.graph import Graph
from qgraph.ir.types import TensorType
from qgraph.numeric.tolerance import tolerance
from qgraph.rewrite.pipeline import install_numeric_check, verify_level

SMALL = 10**8  # FLOPs up to which level 2 runs the reference
# Of the largest element: reordered sums differ by a few ulp, and what a wrong rewrite does is far larger.
SAME = tolerance(F64, path="reference").terms
# Where a pass takes constants of float32 for what they are rounded from: an angle may be thousands of such.
ROUNDED = tolerance(F32, path="model").terms


@dataclass(frozen=True)
class Mismatch:
    """The first output in which two graphs differ, and by how much relative to its largest value."""

    output: int
    error: float


def random_inputs(graph: Graph, seed: int = 0) -> list[Any]:
    """Inputs for the reference: normal floats, integers from 0 and 1, both booleans."""
    rng = np.random.default_rng(seed)
    return [_random(v.type, rng) for v in graph.inputs]


def _random(t: TensorType, rng: np.random.Generator) -> Any:
    if t.dtype.is_float:
        return rng.standard_normal(t.shape)
    if t.dtype.name == "bool":
        return rng.random(t.shape) < 0.5
    if t.dtype.is_complex:
        return rng.standard_normal(t.shape) + 1j * rng.standard_normal(t.shape)
    return rng.integers(0, 2, t.shape).astype(t.dtype.mlx_name)


def compare(before: Graph, after: Graph, seed: int = 0, limit: float = SAME) -> Mismatch | None:
    """The first mismatch of two graphs on random inputs, None when they agree within `limit`."""
    inputs = random_inputs(before, seed)
    for i, (a, b) in enumerate(zip(evaluate(before, inputs), evaluate(after, inputs), strict=True)):
        error = relative_error(np.asarray(a), np.asarray(b))
        if error > limit:
            return Mismatch(i, error)
    return None


def relative_error(expected: Any, found: Any) -> float:
    """Largest difference over the largest expected magnitude; inf where shapes or NaNs differ."""
    if expected.shape != found.shape:
        return float("inf")
    if expected.size == 0:
        return 0.0
    if expected.dtype.kind not in "fc":
        return 0.0 if np.array_equal(expected, found) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return float("inf")
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True):
        return float("inf")
    scale = np.max(np.abs(expected[finite]), initial=0.0)
    difference = np.max(np.abs(expected[finite] - found[finite]), initial=0.0)
    return float(difference / scale) if scale else float(difference)


def _check_pass(before: Graph, after: Graph, name: str, exact: bool) -> None:
    """What ``QGRAPH_VERIFY`` 2 (small graphs) and 3 (all graphs) do after every pass."""
    flops = sum(n.op.flops(tuple(v.type for v in n.inputs), n.types) for n in before.nodes)
    if verify_level() < 3 and flops > SMALL:
        return
    found = compare(before, after, limit=SAME if exact else ROUNDED)
    if found is not None:
        raise VerifyError(
            f"pass {name} changed what output {found.output} computes: relative error {found.error:.3g}",
            fix="QGRAPH_FUEL=n finds the rewrite that did it",
        )


install_numeric_check(_check_pass)
