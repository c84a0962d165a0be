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
from mlx.utils import tree_flatten

import qgraph as qg
from tests.agree import difference
from tests.zoo.build import PROMPT, build, caches, generate
from tests.zoo.configs import VOCAB
from tests.zoo.plain import plain
from tests.zoo.quantize import NO_PEER, by_layers, by_numbers, by_weights, weights_of

NO_PASSES = ""  # a pipeline of none: the captured graph runs as it is


@dataclass(frozen=True)
class Answer:
    """What one part found: an empty `problem` if all is well, and figures to print."""

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
    graph = fast.qgraph.graph(x)
    labels = {v.op.label for v in graph.inputs}
    layers = packed_layers(model)  # of which words, scales and biases are one input
    paths = {path for path, _ in tree_flatten(model.parameters()) if path.rpartition(".")[0] not in layers}
    unnamed = (paths | {f"{path}.weight" for path in layers}) - labels
    if unnamed:
        return Answer(f"parameters that are no inputs: {sorted(unnamed)[:5]}")
    return Answer(problem and f"after passes: {problem}", f"{len(graph.nodes)} nodes")


@part
def decode(name: str) -> Answer:
    """A prefill and 8 steps with the model's caches give its tokens and logits, before passes and after.

    A step attends to a window of the cache's buffer, whose empty end is masked: sums may be in another order.
    """
    model = build(name)
    expected = generate(model)
    plain = generate(qg.optimize(model, pipeline=NO_PASSES))
    exact = "exact" if all(map(same, plain[1], expected[1])) else f"{relative(plain[1], expected[1]):.1g}"
    problem = _generation(plain, expected)
    fast = qg.optimize(model)
    after = _generation(generate(fast), expected)
    return Answer(
        f"before passes: {problem}" if problem else after,
        f"{fast.qgraph.cache_info().misses} programs, before passes {exact}",
    )


@part
def quantized(name: str) -> Answer:
    """With quantized weights in the dense model: the logits and tokens of mlx-lm's quantized model."""
    peer = None if name in NO_PEER else by_layers(name)
    weights = weights_of(name, peer)
    expected = generate(by_numbers(name, weights) if peer is None else peer)
    fast = qg.optimize(by_weights(name, weights))
    problem = _generation(generate(fast), expected)
    result = fast.qgraph.result(mx.array([PROMPT]))
    counts = " ".join(f"{n} {kind}" for kind, n in sorted(result.report.counts().items()))
    return Answer(
        problem or unpacked(result, len(weights) + len(packed_layers(build(name)))),
        f"{len(weights)} weights: {counts}",
    )


@part
def layers(name: str) -> Answer:
    """mlx-lm's quantized model itself: its very logits before passes, the ops of the dense one after them."""
    x = mx.array([PROMPT])
    expected = by_layers(name)(x)
    peer = by_layers(name)  # one that has not run: models keep what they computed from their weights
    found = qg.optimize(peer, pipeline=NO_PASSES)(x)
    if not same(found, expected):
        return Answer(f"before passes: largest error {largest(found, expected):.3g}")
    fast = qg.optimize(peer)
    problem = difference(fast(x), expected, path="model")
    dense = qg.optimize(by_weights(name, weights_of(name, peer)))
    ways = [one.qgraph.optimized(x).histogram() for one in (fast, dense)]
    apart = {kind: [w.get(kind, 0) for w in ways] for way in ways for kind in way}
    apart = {kind: n for kind, n in apart.items() if n[0] != n[1]}
    return Answer(problem or (f"from layers and from weights: {apart}" if apart else ""))


@part
def chunks(name: str) -> Answer:
    """Two packed sequences of 40 tokens in two chunks, then 3 steps: past windows, experts sorted."""
    peer = None if name in NO_PEER else by_layers(name)
    weights = weights_of(name, peer)
    judge = by_numbers(name, weights) if peer is None else peer
    fast = qg.optimize(by_weights(name, weights))
    return Answer(_generation(fed(fast), fed(judge)), f"{fast.qgraph.cache_info().misses} programs")


def fed(model: Any) -> tuple[list[int], list[mx.array]]:
    """The logits of every call, for tokens that are given; and what would come next."""
    generator = np.random.default_rng(1)
    cache, logits = caches(model), []
    for length in (24, 16, 1, 1, 1):
        logits.append(model(mx.array(generator.integers(0, VOCAB, (2, length))), cache=cache))
        mx.eval(logits[-1])
    return [int(n) for n in mx.argmax(logits[-1][:, -1], axis=-1).tolist()], logits


@part
def raised(name: str) -> Answer:
    """What MLX wrote out is raised again, and computes what the capture computes that kept it whole."""
    model = build(name)
    x = mx.array([PROMPT])
    fast = qg.optimize(model)
    expected = fast(x)
    result, found = plain(model, x)
    whole = fast.qgraph.optimized(x).histogram()
    again = result.graph.histogram()
    kept = " ".join(f"{kind} {again.get(kind, 0)}/{whole[kind]}" for kind in WHOLE if kind in whole)
    return Answer(difference(found, expected, path="model"), kept)


WHOLE = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")

# What cannot be done, and why.
LISTED: dict[tuple[str, str], str] = {
    ("dbrx", part): "it reads the indices of experts as numbers (.tolist()), so that no graph holds for all"
    for part in ("dense", "decode", "quantized", "chunks", "raised")
}
LISTED["deepseek_v41", "raised"] = "MLX cannot export mx.to_fp8; kept whole it is captured"
LISTED |= {(name, "layers"): f"fails in mlx-lm itself: {reason}" for name, reason in NO_PEER.items()}
LISTED["dbrx", "layers"] = LISTED["dbrx", "dense"]
PARTS: dict[str, Callable[[str], Answer]] = {
    "dense": dense,
    "decode": decode,
    "quantized": quantized,
    "layers": layers,
    "chunks": chunks,
    "raised": raised,
}


def packed_layers(model: Any) -> set[str]:
    """The paths of the layers that an architecture has packed by itself."""
    return {path for path, layer in model.named_modules() if "scales" in layer}


def unpacked(result: Any, weights: int) -> str:
    """Which weights are not used as they are packed, or kept twice; empty if there is none.

    A tied head and its embedding are one weight, and one input.
    """
    if result.report.missed:
        found = Counter(f"{site.op}: {'; '.join(site.reasons)}" for site in result.report.missed)
        return "unpacked: " + "; ".join(f"{n} x {reason}" for reason, n in found.most_common(3))
    left = result.graph.histogram().get("dequantize", 0)
    if left:
        return f"{left} dequantize left that the report does not know of"
    inputs = sum(1 for v in result.graph.inputs if v.type.packing)
    return "" if inputs == weights else f"{inputs} packed inputs for {weights} packed weights"


def same(found: mx.array, expected: mx.array) -> bool:
    """Whether every number is the same."""
    return bool(mx.array_equal(found, expected, equal_nan=True).item())


def largest(found: mx.array, expected: mx.array) -> float:
    """The largest absolute error."""
    error = mx.abs(found - expected)
    return float(mx.max(mx.where(found == expected, 0.0, error)).item())


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
