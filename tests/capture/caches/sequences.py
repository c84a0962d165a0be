"""Random sequences of calls on every kind of cache.

    python -m tests.capture.caches.sequences --seconds 60 --seed 0

Chunks, tokens, trims, copies, eager mlx-lm and literal holding in between; the logits must be those of
mlx-lm's own caches at every step.
"""

from __future__ import annotations

import copy
from time import perf_counter
from typing import Any

import click
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from tests.agree import difference
from tests.capture.caches.eager import step
from tests.capture.caches.test_stand_ins import CASES, LITERAL, tokens_of
from tests.zoo.build import build

STEPS = 14
OPS = ["token", "token", "tokens", "chunk", "eager", "literal", "copy", "trim", "long chunk"]
NAMES = [case for case in CASES if case not in LITERAL]
_MODELS: dict[str, Any] = {}


def run(seed: int) -> str:
    """One sequence; what went wrong, with the calls up to there, or nothing."""
    generator = np.random.default_rng(seed)
    case = NAMES[seed % len(NAMES)]
    name, make, rows = CASES[case]
    if name not in _MODELS:
        _MODELS[name] = build(name)
    model = _MODELS[name]
    expected, found = make(model), make(model)
    # Beyond the padding of a batch's rows: rows of padding alone are an average of whatever there is.
    done: list[str] = ["chunk of 8"]
    problem = compare(model, tokens_of(rows, 8, generator), expected, found, "chunk")
    while not problem and len(done) < STEPS:
        op = str(generator.choice(OPS))
        done.append(op)
        if op == "copy":
            found = copy.deepcopy(found)
        elif op == "trim":
            # mlx-lm's chunked cache has dropped what a trim goes back to.
            if "Chunked" not in case and can_trim_prompt_cache(expected):
                n = int(generator.integers(1, 4))
                trim_prompt_cache(expected, n)
                trim_prompt_cache(found, n)
                # Back beyond the padding it would be as at the start.
                problem = compare(model, tokens_of(rows, 4, generator), expected, found, "eager")
        else:
            length = {"token": 1, "tokens": 1, "long chunk": int(generator.integers(20, 70))}.get(op)
            length = length or int(generator.integers(2, 9))
            for _ in range(5 if op == "tokens" else 1):
                problem = problem or compare(model, tokens_of(rows, length, generator), expected, found, op)
    return problem and f"seed {seed}, {case}: {problem} after {', '.join(done)}"


def compare(model: Any, tokens: mx.array, expected: list[Any], found: list[Any], op: str) -> str:
    """Why the logits of one call differ."""
    logits = model(tokens, cache=expected)
    mine = (
        model(tokens, cache=found) if op == "eager" else step(model, tokens, found, dynamic=op != "literal")
    )
    mx.eval(logits, mine, [c.state for c in (*expected, *found)])
    return difference(mine, logits, path="model")


@click.command(help=__doc__)
@click.option("--seconds", default=60.0)
@click.option("--seed", default=0)
def main(seconds: float, seed: int) -> None:
    start, count, failed = perf_counter(), 0, 0
    while perf_counter() - start < seconds:
        problem = run(seed + count)
        count += 1
        if problem:
            failed += 1
            print(problem, flush=True)
    print(f"{count} sequences, {failed} failed")


if __name__ == "__main__":
    main()
