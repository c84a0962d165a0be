"""The zoo's models: tiny, in float32, with random data in every parameter."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from tests.zoo.configs import config, module

PROMPT = [3, 1, 41, 59, 26, 53, 58]
STEPS = 8


def build(name: str, seed: int = 0) -> Any:
    """A tiny model of one architecture: the same weights for the same seed."""
    holder = module(name)
    mx.random.seed(seed)
    model = holder.Model(holder.ModelArgs.from_dict(copy.deepcopy(config(name))))
    generator = np.random.default_rng(seed)
    if name == "phi3small":  # it masks ids beyond 100,000 with a write that MLX does not check
        model._dummy_tokenizer_ids = mx.array([5, 9, 300, 301])
    filled = [(path, filled_in(value, generator)) for path, value in tree_flatten(model.parameters())]
    model.update(tree_unflatten(filled))
    model.eval()
    mx.eval(model.parameters(), mx.random.state)
    return model


def filled_in(value: mx.array, generator: np.random.Generator) -> mx.array:
    """A parameter in float32; what its model starts as one number (a bias, a norm) becomes random around it.

    Zeros would hide a term that is dropped, and ones a factor.
    """
    if value.dtype == mx.uint8 or value.dtype == mx.uint32:  # packed
        words = generator.integers(0, 2 ** (8 * value.dtype.size), value.shape)
        return mx.array(words.astype(f"uint{8 * value.dtype.size}"))
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    value = value.astype(mx.float32)
    if value.size > 1 and mx.all(value == value.reshape(-1)[0]).item():
        spread = 0.3 if value.ndim == 1 else 0.3 if value.shape[-1] == 1 else value.shape[-1] ** -0.5
        return value + mx.array(generator.normal(0, spread, value.shape).astype(np.float32))
    bound = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.0
    if (
        mx.max(mx.abs(value)).item() <= bound
    ):  # as `nn.Linear` starts: its outputs have a third of the variance
        return value * 3**0.5
    return value


def caches(model: Any) -> list[Any]:
    """Fresh caches of the model's own kinds."""
    return make_prompt_cache(model)


def generate(
    model: Any, holder: Any = None, prompt: list[int] = PROMPT, steps: int = STEPS
) -> tuple[list[int], list[mx.array]]:
    """Greedy tokens, and the logits of every call: a prefill, then one token at a time, with its own caches.

    `holder` gives the caches, if `model` does not.
    """
    cache = caches(holder or model)
    tokens: list[int] = []
    rows: list[mx.array] = []
    step = mx.array([prompt])
    for _ in range(steps + 1):
        rows.append(model(step, cache=cache))
        mx.eval(rows[-1])
        tokens.append(int(mx.argmax(rows[-1][0, -1]).item()))
        step = mx.array([[tokens[-1]]])
    return tokens, rows
