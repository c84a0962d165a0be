"""Capture of a decode step of an 8B model by `qg.optimize`: time and memory, the weights never evaluated.

    python bench/capture_time.py

mlx-lm's own dense Qwen3 with the sizes of Qwen3-8B, and lazy QuantizedTensors in place of its weights.
Budget: capture + passes + emission ≤ 1 s, and ≤ 50 MiB of resident memory above the model's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time

sys.path.insert(0, str(Path(__file__).parent))

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache

import qgraph as qg
from qwen3_types import packed

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
RUNS = 5


def resident():
    """Bytes in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def lazy_model():
    """The dense model with 4-bit weights of lazy zeros."""
    model = qwen3.Model(qwen3.ModelArgs.from_dict(QWEN3_8B))
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module["weight"] = packed(*module.weight.shape, mx.bfloat16)
        elif "weight" in module:
            module["weight"] = mx.ones(module.weight.shape, mx.bfloat16)
    model.eval()
    return model


def decode_arguments(model):
    """A token, and caches with some positions filled, of lazy zeros."""
    cache = make_prompt_cache(model)
    for c in cache:
        c.keys = c.values = mx.zeros((1, 8, 256, 128), mx.bfloat16)
        c.offset = 7
    return mx.array([[1]]), cache


def once():
    """In a process of its own: `once` seconds and MiB; then the median of more captures."""
    mx.eval(mx.random.state)
    start = perf_counter()
    model = lazy_model()
    built = perf_counter() - start
    token, cache = decode_arguments(model)
    before = resident()
    start, busy = perf_counter(), process_time()
    fast = qg.optimize(model)
    result = fast.qgraph.result(token, cache=cache)
    first, cpu = perf_counter() - start, process_time() - busy
    grown = (resident() - before) / 2**20
    import resource

    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20
    times = []
    for _ in range(RUNS):
        fast.qgraph.clear_cache()
        start = perf_counter()
        fast.qgraph.result(token, cache=cache)
        times.append(perf_counter() - start)
    print(f"Qwen3-8B built lazily in {built:.2f} s; MLX holds {mx.get_active_memory() / 2**20:.1f} MiB")
    print(f"{len(result.before.nodes)} nodes captured, {len(result.graph.nodes)} after the passes")
    print(f"capture + passes + emission   first {first:.3f} s, then {statistics.median(times):.3f} s   (1.0)")
    print(f"  of the processor            first {cpu:.3f} s, which other work disturbs less")
    print(f"resident memory               +{grown:.1f} MiB, at the peak +{peak:.1f} MiB   (50)")
    for stage in result.history:
        print(f"    {stage.name:28}  {stage.seconds * 1e3:7.1f} ms")
    print("uses of quantized weights:", result.report.counts())


if __name__ == "__main__":
    if "--once" in sys.argv:
        once()
    else:  # so that nothing that ran before counts
        subprocess.run([sys.executable, __file__, "--once"], check=True)
