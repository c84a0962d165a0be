"""`mlx_lm.stream_generate` with `qg.optimize(model)` against the plain model, in one run.

    python bench/optimize.py [ARCHITECTURE …] [--prompt 32] [--tokens 32] [--rounds 5] [--dtype float32]

Five architectures of mlx-lm with random weights, dense and with 4 bits; greedy, the same prompt, in turns.
The texts must be identical. Medians; budget: ≥ 1.0 × in float32 on a CPU for every row.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from random import Random
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent))

import click
import mlx.core as mx
from mlx_lm import stream_generate

import qgraph as qg
from zoo_models import ARCHITECTURES, VOCAB, quantized_model, random_model, tokenizer

KINDS = {"dense": random_model, "4 bit": quantized_model}


def run(model, words, prompt, tokens):
    """The text, the seconds of the prompt, and of every token after the first."""
    mx.clear_cache()
    start = middle = perf_counter()
    text = ""
    for n, piece in enumerate(stream_generate(model, words, prompt, max_tokens=tokens)):
        middle = middle if n else perf_counter()
        text += piece.text
    return text, middle - start, (perf_counter() - middle) / (tokens - 1)


def compare(name, kind, dtype, prompt, tokens, rounds):
    model, words = KINDS[kind](name, dtype), tokenizer()
    fast = qg.optimize(model)
    times = {"plain": [], "fast": []}
    for n in range(rounds + 1):
        texts = set()
        for which in ("plain", "fast") if n % 2 else ("fast", "plain"):
            text, *seconds = run({"plain": model, "fast": fast}[which], words, prompt, tokens)
            texts.add(text)
            if n:  # the first round compiles
                times[which].append(seconds)
        assert len(texts) == 1, f"{name}, {kind}: the texts differ:\n" + "\n".join(texts)
    assert len(set(text.split())) > tokens // 4, f"{name}: a text that repeats itself proves little: {text}"
    ratios = []
    for i in range(2):
        a, b = (statistics.median(t[i] for t in times[which]) for which in ("fast", "plain"))
        ratios += [b / a, a * 1e3, b * 1e3]
    return ratios


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ARCHITECTURES)))
@click.option("--kind", "kinds", multiple=True, default=list(KINDS), type=click.Choice(list(KINDS)))
@click.option("--prompt", default=32)
@click.option("--tokens", default=32)
@click.option("--rounds", default=5)
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--compile", "compiled", is_flag=True, help="Run qgraph's programs through mx.compile.")
def main(names, kinds, prompt, tokens, rounds, dtype, compiled):
    os.environ["QGRAPH_COMPILE"] = "1" if compiled else "0"
    draw = Random(0)
    ids = [draw.randrange(VOCAB) for _ in range(prompt)]
    print(f"{mx.default_device()}, {dtype}, prompt {prompt}, {tokens} tokens, {rounds} rounds; 1.0 × wanted")
    print(
        f"{'':20}{'decode: qgraph':>16}{'mlx-lm':>10}{'ratio':>8}"
        f"{'prefill: qgraph':>19}{'mlx-lm':>10}{'ratio':>8}"
    )
    worst = []
    for name in names or ARCHITECTURES:
        for kind in kinds:
            p, p_ours, p_theirs, d, d_ours, d_theirs = compare(
                name, kind, getattr(mx, dtype), ids, tokens, rounds
            )
            print(
                f"{name + ', ' + kind:20}{d_ours:>13.2f} ms{d_theirs:>7.2f} ms{d:>7.2f}×"
                f"{p_ours:>16.1f} ms{p_theirs:>7.1f} ms{p:>7.2f}×",
                flush=True,
            )
            worst += [d, p]
    print(f"the texts are identical; the lowest ratio is {min(worst):.2f}×")


if __name__ == "__main__":
    main()
