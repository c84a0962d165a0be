"""A quantized model on a CPU: qgraph's native kernels against mlx-lm, in one run.

    python bench/cpu.py [--dtype bfloat16] [--threads 1 --threads 2] [--layers 28] [--peer-prompt 8]

Qwen3-0.6B's geometry with random 4-bit weights in groups of 64. Decode: greedy steps behind a prompt of 16,
the next one started before the token of this one is read, as in mlx-lm's generate; the median of the steps.
Prefill: all tokens of a prompt but the last at once, then the last for its logits, also as there; the median
of three. mlx-lm's prefill is measured on `--peer-prompt` tokens and taken a token: its kernel is linear in
the rows (128 would take ten minutes). Ratios are mlx-lm's time over ours.
"""

from __future__ import annotations

import statistics
from time import perf_counter

import click
import mlx.core as mx
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache

import qgraph as qg
from qgraph import kernels
from qgraph_examples.qwen3 import Config, forward, make_cache

GEOMETRY = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
PROMPT = 16


def random_model(config, dtype):
    """mlx-lm's model with random packed weights of a size that keeps activations O(1)."""
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten

    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    nn.quantize(model, 64, 4)  # lazy: the dense weights are never made
    key, made = mx.random.key(0), {}
    for name, a in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        if a.dtype == mx.uint32:
            made[name] = mx.random.randint(0, 2**32 - 1, a.shape, mx.uint32, key=own)
        elif name.endswith("scales"):
            columns = a.shape[-1] * 64
            made[name] = ((0.5 + mx.random.uniform(shape=a.shape, key=own)) / (4.6 * columns**0.5)).astype(
                dtype
            )
        elif not name.endswith("biases"):
            made[name] = (1 + 0.1 * mx.random.normal(a.shape, key=own)).astype(dtype)
    for name, a in list(made.items()):
        if name.endswith("scales"):
            made[name[:-6] + "biases"] = -7.5 * a
    model.update(tree_unflatten(list(made.items())))
    mx.eval(model.parameters())
    return model


def plain_parameters(model):
    """The same weights as a tree, packed ones as quantized values, for plain code."""
    from mlx.utils import tree_flatten, tree_unflatten

    flat = dict(tree_flatten(model.parameters()))
    out = {}
    for name, a in flat.items():
        if name.endswith((".scales", ".biases")):
            continue
        stem = name.removesuffix(".weight")
        packed = f"{stem}.scales" in flat
        out[name] = (
            qg.from_quantized(a, flat[f"{stem}.scales"], flat[f"{stem}.biases"], bits=4, group_size=64)
            if packed
            else a
        )
    return tree_unflatten(list(out.items()))


class Module:
    """A model of mlx-lm, plain or through qg.optimize."""

    def __init__(self, call, model):
        self.call, self.model = call, model

    def start(self, length):
        self.cache = make_prompt_cache(self.model)

    def step(self, tokens):
        return self.call(tokens, cache=self.cache)

    def state(self):
        return [c.state for c in self.cache]


class Plain:
    """The same forward pass written as plain array code under qg.jit."""

    def __init__(self, model, config, dtype):
        self.config, self.dtype, self.parameters = Config.from_dict(config), dtype, plain_parameters(model)
        self.jitted = qg.jit(forward)

    def start(self, length):
        self.cache, self.offset = make_cache(self.config, 1, length, self.dtype), 0

    def step(self, tokens):
        logits, self.cache = self.jitted(
            self.parameters, tokens, self.cache, mx.array(self.offset), self.config
        )
        self.offset += tokens.shape[1]
        return logits

    def state(self):
        return self.cache


def advance(side, tokens):
    token = mx.argmax(side.step(tokens)[:, -1:], -1)
    mx.eval(token, side.state())
    return token


def prefill(side, length, rounds):
    prompt, taken = ids(length), []
    for _ in range(rounds):
        side.start(length + 8)
        start = perf_counter()
        side.step(prompt[:, :-1])
        mx.eval(side.state())
        advance(side, prompt[:, -1:])
        taken.append(perf_counter() - start)
    return length / statistics.median(taken)


def decode(side, steps, prompt=PROMPT):
    """As mlx-lm's generate: the next step is started before the token of this one is looked at."""
    side.start(prompt + steps + 8)
    token, taken = advance(side, ids(prompt)), []
    start = perf_counter()
    for _ in range(steps):
        following = mx.argmax(side.step(token)[:, -1:], -1)
        mx.async_eval(following)
        token.item()
        now = perf_counter()
        taken.append(now - start)
        token, start = following, now
    return 1 / statistics.median(taken)


def ids(n):
    return mx.random.randint(0, GEOMETRY["vocab_size"], (1, n), key=mx.random.key(n))


def measure(name, side, peer, lengths):
    side.start(64)
    advance(side, advance(side, ids(PROMPT)))  # compiles
    rate = decode(side, 32)
    row = f"{name:34}{rate:8.1f} tok/s {rate / peer['decode']:7.1f} ×"
    for length in lengths:
        prefill(side, length, 1)
        rate = prefill(side, length, 3)
        row += f"   {length:4}: {rate:8.1f} tok/s {rate / peer['prefill']:7.1f} ×"
    print(row, flush=True)


@click.command()
@click.option("--dtype", default="bfloat16", type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--threads", multiple=True, default=[1, 2])
@click.option("--layers", default=GEOMETRY["num_hidden_layers"])
@click.option("--lengths", multiple=True, default=[128, 512])
@click.option("--peer-prompt", default=8, help="0: do not measure mlx-lm.")
def main(dtype, threads, layers, lengths, peer_prompt):
    library = kernels.library()
    if library is None:
        raise click.ClickException("there are no native kernels: see `qgraph doctor`")
    config, dtype = {**GEOMETRY, "num_hidden_layers": layers}, getattr(mx, dtype)
    model = random_model(config, dtype)
    print(f"{dtype}, {layers} layers, {library.instruction_set()}; decode, then prefill of {lengths}")
    peer = {"decode": float("nan"), "prefill": float("nan")}
    if peer_prompt:
        side = Module(model, model)
        peer["prefill"] = prefill(side, peer_prompt, 1)
        peer["decode"] = decode(side, 4, prompt=1)
        row = f"{'mlx-lm':34}{peer['decode']:8.2f} tok/s" + " " * 13
        print(f"{row}{peer_prompt:4}: {peer['prefill']:8.2f} tok/s", flush=True)
    for n in threads:
        library.set_threads(n)
        for mode in ("", "int8"):
            label = f"{mode or 'exact'}, {n} thread{'s' if n > 1 else ''}"
            fast = qg.optimize(model, activations=mode)
            measure(f"qg.optimize, {label}", Module(fast, model), peer, lengths)
        measure(f"plain code, exact, {n} threads", Plain(model, config, dtype), peer, lengths)


if __name__ == "__main__":
    main()
