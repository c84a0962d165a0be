"""`mlx_lm.stream_generate` with `qg.optimize(model)` against the plain model, in one run.

    python bench/optimize.py [ARCHITECTURE …] [--prompt 32] [--tokens 32] [--rounds 5] [--dtype float32]

Five architectures of mlx-lm with random weights, dense and with 4 bits; greedy, the same prompt, in turns.
The texts must be identical. Ratios of medians, above 1 where qgraph is faster: of the time that passed, and
in brackets of the processor's time, which other work on the machine disturbs less. Budget: ≥ 1.0 × in float32
on a CPU for every row.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from random import Random
from time import perf_counter, process_time

sys.path.insert(0, str(Path(__file__).parent))

import click
import mlx.core as mx
from mlx_lm import stream_generate

import qgraph as qg
from zoo_models import ARCHITECTURES, VOCAB, quantized_model, random_model, tokenizer

KINDS = {"dense": random_model, "4 bit": quantized_model}


def clocks():
    return perf_counter(), process_time()


def run(model, words, prompt, tokens):
    """The text; the seconds (passed, of the processor) of the prompt, and of every token after the first."""
    mx.clear_cache()
    start = middle = clocks()
    text = ""
    for n, piece in enumerate(stream_generate(model, words, prompt, max_tokens=tokens)):
        middle = middle if n else clocks()
        text += piece.text
    end = clocks()
    return text, differences(start, middle), [x / (tokens - 1) for x in differences(middle, end)]


def differences(start, end):
    return [b - a for a, b in zip(start, end, strict=True)]


def compare(name, kind, dtype, prompt, tokens, rounds):
    """For the prompt and for the tokens: the medians of both sides, and the two ratios."""
    model, words = KINDS[kind](name, dtype), tokenizer()
    sides = {"plain": model, "fast": qg.optimize(model)}
    times = {which: [] for which in sides}
    for n in range(rounds + 1):
        texts = set()
        for which in sides if n % 2 else reversed(sides):
            text, *seconds = run(sides[which], words, prompt, tokens)
            texts.add(text)
            if n:  # the first round compiles
                times[which].append(seconds)
        assert len(texts) == 1, f"{name}, {kind}: the texts differ:\n" + "\n".join(texts)
    assert len(set(text.split())) > tokens // 4, f"{name}: a text that repeats itself proves little: {text}"
    out = []
    for part in range(2):
        (a, cpu_a), (b, cpu_b) = (
            [statistics.median(t[part][clock] for t in times[which]) for clock in range(2)]
            for which in ("fast", "plain")
        )
        out.append((a * 1e3, b * 1e3, b / a, cpu_b / cpu_a))
    return out


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ARCHITECTURES)))
@click.option("--kind", "kinds", multiple=True, default=list(KINDS), type=click.Choice(list(KINDS)))
@click.option("--prompt", default=32)
@click.option("--tokens", default=32)
@click.option("--rounds", default=5)
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--compile", "compiled", is_flag=True, help="Run qgraph's programs through mx.compile.")
def main(names, kinds, prompt, tokens, rounds, dtype, compiled):
    if compiled:
        os.environ["QGRAPH_COMPILE"] = "1"
    draw = Random(0)
    ids = [draw.randrange(VOCAB) for _ in range(prompt)]
    print(f"{mx.default_device()}, {dtype}, prompt {prompt}, {tokens} tokens, {rounds} rounds; 1.0 × wanted")
    head = f"{'qgraph':>9}{'mlx-lm':>9}{'ratio':>8}{'(cpu)':>8}"
    print(f"{'ms':20}  decode {head}  prefill {head}")
    lowest = []
    for name in names or ARCHITECTURES:
        for kind in kinds:
            prefill, decode = compare(name, kind, getattr(mx, dtype), ids, tokens, rounds)
            row = [f"{a:>9.1f}{b:>9.1f}{r:>7.2f}×{f'({c:.2f})':>8}" for a, b, r, c in (decode, prefill)]
            print(f"{name + ', ' + kind:20}         {row[0]}          {row[1]}", flush=True)
            lowest += [decode[2:], prefill[2:]]
    wall, cpu = (min(column) for column in zip(*lowest, strict=True))
    print(f"the texts are identical; the lowest ratio is {wall:.2f} ({cpu:.2f})")


if __name__ == "__main__":
    main()
