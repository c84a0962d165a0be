"""Decode and prefill against mlx-lm on the same checkpoint, in one run.

    python bench/decode.py [--dtype float32] [--compile]

A random 4-bit Qwen3 (8 layers, hidden 512, vocab 8192) written by mlx-lm; greedy steps on both sides, with
mlx-lm's own cache there and the fixed-capacity cache here. Medians of interleaved rounds; budget: ≥ 1.0 ×.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import click
import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model, save_model

import qgraph as qg
from qgraph_examples.qwen3 import Config, forward, make_cache

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
PROMPT, STEPS, ROUNDS = 64, 16, 5


def checkpoint(folder, dtype):
    import json

    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG))
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    model, config = quantize_model(model, dict(CONFIG), 64, 4)
    save_model(folder, model)
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return model


def run_mlx_lm(model, prompt):
    cache = make_prompt_cache(model)
    start = perf_counter()
    token = mx.argmax(model(prompt, cache=cache)[:, -1:], -1)
    mx.eval(token)
    middle = perf_counter()
    for _ in range(STEPS):
        token = mx.argmax(model(token, cache=cache)[:, -1:], -1)
        mx.eval(token)
    return middle - start, (perf_counter() - middle) / STEPS


def run_qgraph(step, params, config, prompt, dtype):
    cache = make_cache(config, 1, PROMPT + STEPS, dtype)
    start = perf_counter()
    logits, cache = step(params, prompt, cache, mx.array(0), config)
    token = mx.argmax(logits[:, -1:], -1)
    mx.eval(token, cache)
    middle = perf_counter()
    for i in range(STEPS):
        logits, cache = step(params, token, cache, mx.array(PROMPT + i), config)
        token = mx.argmax(logits[:, -1:], -1)
        mx.eval(token, cache)
    return middle - start, (perf_counter() - middle) / STEPS


@click.command()
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--compile", "compiled", is_flag=True, help="Run qgraph's programs through mx.compile.")
def main(dtype, compiled):
    if compiled:
        os.environ["QGRAPH_COMPILE"] = "1"
    dtype = getattr(mx, dtype)
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(folder, dtype)
        mx.eval(model.parameters())
        params = qg.load(folder)
    config = Config.from_dict(CONFIG)
    step = qg.jit(forward)
    prompt = mx.random.randint(0, CONFIG["vocab_size"], (1, PROMPT), key=mx.random.key(1))
    run_qgraph(step, params, config, prompt, dtype)
    run_mlx_lm(model, prompt)
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(run_qgraph(step, params, config, prompt, dtype))
        theirs.append(run_mlx_lm(model, prompt))
    for i, name in enumerate((f"prefill {PROMPT}", "decode, per token")):
        a, b = (statistics.median(t[i] for t in times) for times in (ours, theirs))
        print(f"{name:20} qgraph {a * 1e3:8.2f} ms   mlx-lm {b * 1e3:8.2f} ms   {b / a:.2f} × (1.0)")


if __name__ == "__main__":
    main()
