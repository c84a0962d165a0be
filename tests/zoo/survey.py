"""What the zoo is asked: does an architecture run dense, quantized by rewrite, with its caches, and raised?

Every part is one function from the name of an architecture to an `Answer`; exceptions are answers too.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from tests.agree import difference
from tests.zoo.build import PROMPT, build, generate
from tests.zoo.quantize import NO_PEER, by_layers, by_numbers, by_weights, weights_of

NO_PASSES = " "  # a pipeline of none: the captured graph runs as it is


@dataclass(frozen=True)
class Answer:
    """What one part found: empty `problem` if all is well, and figures to print."""

    problem: str
    note: str = ""
    seconds: float = 0.0


def part(function: Callable[[str], Answer]) -> Callable[[str], Answer]:
    """A part whose exceptions are problems, and whose time is taken."""

    def run(name: str) -> Answer:
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", qg.RecompileWarning)
                found = function(name)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
            text = " | ".join(str(error).splitlines())
            found = Answer(f"{type(error).__name__} at {where}: {text}")
        return Answer(found.problem, found.note, time.perf_counter() - start)

    return run


@part
def dense(name: str) -> Answer:
    """The captured graph computes the very numbers of the model, before passes; after them nearly."""
    model = build(name)
    x = mx.array([PROMPT])
    expected = model(x)
    found = qg.optimize(model, pipeline=NO_PASSES)(x)
    if not same(found, expected):
        return Answer(f"before passes: largest error {largest(found, expected):.3g}")
    fast = qg.optimize(model)
    problem = difference(fast(x), expected, path="model")
    return Answer(problem and f"after passes: {problem}", f"{len(fast.qgraph.result(x).before.nodes)} nodes")


@part
def decode(name: str) -> Answer:
    """A prefill and 8 steps with the model's caches give its tokens; its very logits, before passes."""
    model = build(name)
    tokens, logits = generate(model)
    plain = generate(qg.optimize(model, pipeline=NO_PASSES))
    if not all(map(same, plain[1], logits)):
        errors = [f"{largest(a, b):.2g}" for a, b in zip(plain[1], logits, strict=True)]
        return Answer(f"before passes: largest errors {' '.join(errors)}")
    fast = qg.optimize(model)
    return Answer(
        _generation(generate(fast), (tokens, logits)), f"{fast.qgraph.cache_info().misses} programs"
    )


@part
def quantized(name: str) -> Answer:
    """With quantized weights in the dense model: the logits and tokens of mlx-lm's quantized model."""
    peer = None if name in NO_PEER else by_layers(name)
    weights = weights_of(name, peer)
    expected = generate(by_numbers(name, weights) if peer is None else peer)
    fast = qg.optimize(by_weights(name, weights))
    problem = _generation(generate(fast), expected)
    x = mx.array([PROMPT])
    left = unexplained(fast.qgraph.result(x))
    report = fast.qgraph.report(x)
    kinds = " ".join(f"{n} {kind}" for kind, n in sorted(report.counts().items()))
    return Answer(problem or left, f"{len(weights)} weights: {kinds}; {reasons(report)}")


PARTS: dict[str, Callable[[str], Answer]] = {"dense": dense, "decode": decode, "quantized": quantized}


def unexplained(result: Any) -> str:
    """Why the final graph unpacks a weight though the report gives no reason; empty if it does not."""
    silent = [str(site) for site in result.report.missed if not site.reasons]
    if silent:
        return f"unpacked without a reason: {silent[0]}"
    unpacked = result.graph.histogram().get("dequantize", 0)
    if unpacked and not result.report.missed:
        return f"{unpacked} dequantize left that the report does not know of"
    return ""


def reasons(report: Any) -> str:
    """Why weights are unpacked, each reason once, with the number of its sites."""
    found = Counter(f"{site.op}: {r.split(' (')[0]}" for site in report.missed for r in site.reasons)
    return "; ".join(f"{n} x {reason}" for reason, n in found.most_common())


def same(found: mx.array, expected: mx.array) -> bool:
    """Whether every number is the same."""
    return bool(mx.array_equal(found, expected, equal_nan=True).item())


def largest(found: mx.array, expected: mx.array) -> float:
    """The largest absolute error."""
    return float(mx.max(mx.abs(found - expected)).item())


def relative(found: list[mx.array], expected: list[mx.array]) -> float:
    """The worst norm of the error of a call's logits, relative to their own."""
    pairs = [[np.array(x, np.float64) for x in pair] for pair in zip(found, expected, strict=True)]
    kept = [(a[np.isfinite(b)], b[np.isfinite(b)]) for a, b in pairs]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in kept)


def _generation(found: tuple[list[int], list[mx.array]], expected: tuple[list[int], list[mx.array]]) -> str:
    for n, (a, b) in enumerate(zip(found[1], expected[1], strict=True)):
        problem = difference(a, b, path="model")
        if problem:
            return f"call {n}: relative error {relative(found[1], expected[1]):.2g}; {problem}"
    return "" if found[0] == expected[0] else f"tokens {found[0]}, expected {expected[0]}"
