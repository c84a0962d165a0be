"""A cached call against the same graph hand-written under `mx.compile`, in one run.

    python bench/cached_call.py

Two graphs: a small MLP with plain arguments (call overhead), and one decode step of a small quantized
Qwen3 (a tree of weights). Both sides go through mx.compile. Budget: 1.15 ×. Medians of interleaved runs.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent))
os.environ["QGRAPH_COMPILE"] = "1"

import mlx.core as mx

import qgraph as qg
from qgraph.execute.eager import stored
from qgraph.execute.emit import emit
from qgraph.execute.program import load
from qgraph.trace.tree import flatten
from qgraph_examples.qwen3 import Config, forward, make_cache
from qwen3_types import parameters

SMALL = Config(
    vocab_size=2048,
    num_hidden_layers=8,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


def compare(name, ours, theirs, rounds=15, calls=20):
    for f in (ours, theirs):
        mx.eval(f())
    times = {ours: [], theirs: []}
    for _ in range(rounds):
        for f in (ours, theirs):
            start = perf_counter()
            for _ in range(calls):
                mx.eval(f())
            times[f].append((perf_counter() - start) / calls)
    a, b = (statistics.median(times[f]) for f in (ours, theirs))
    print(f"{name:32} qgraph {a * 1e6:8.1f} µs   mx.compile {b * 1e6:8.1f} µs   ratio {a / b:.3f} (1.15)")


def mlp():
    x, w, v = mx.random.normal((4, 256)), mx.random.normal((512, 256)), mx.random.normal((256, 512))
    (p, s, b), (q, t, c) = mx.quantize(w), mx.quantize(v)
    wq, vq = (
        qg.from_quantized(p, s, b, bits=4, group_size=64),
        qg.from_quantized(q, t, c, bits=4, group_size=64),
    )
    mx.eval(x, p, s, b, q, t, c)

    @qg.jit
    def ours(x, w, v):
        return qg.silu(x @ w.T) @ v.T

    @mx.compile
    def theirs(x, p, s, b, q, t, c):
        h = mx.quantized_matmul(x, p, s, b)
        return mx.quantized_matmul(h * mx.sigmoid(h), q, t, c)

    compare("MLP 256-512-256, 4 rows", lambda: ours(x, wq, vq), lambda: theirs(x, p, s, b, q, t, c))


def decode():
    params = parameters(SMALL, 256, 4, mx.float32)
    cache = make_cache(SMALL, 1, 256, mx.float32)
    tokens, offset = mx.array([[7]]), mx.array(5)
    step = qg.jit(forward)
    args = (params, tokens, cache, offset, SMALL)
    leaves = []
    flatten(args, leaves, [])
    flat = stored(leaves)
    mx.eval(flat)
    # What a person would write by hand: the flat program, its arrays in a row, under mx.compile.
    by_hand = mx.compile(load(emit(step.optimized(*args))))
    compare("decode step, 8-layer Qwen3", lambda: step(*args), lambda: by_hand(*flat))


if __name__ == "__main__":
    mlp()
    decode()
