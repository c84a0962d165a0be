"""Every class of cache, eagerly: stand-ins compute and leave behind what mlx-lm's caches do."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from tests.agree import assert_close
from tests.capture.caches.eager import step, step_and_keys
from tests.zoo.build import build

LAYERS = 4


def own(model):
    return make_prompt_cache(model)


def all_of(kind, *args, **kwargs):
    return lambda model: [kind(*args, **kwargs) for _ in range(LAYERS)]


PADDING = [2, 0, 1]
# (model, its caches, rows of a batch)
CASES = {
    "KVCache": ("qwen3", own, 1),
    "KVCache of three rows": ("qwen3", own, 3),
    "KVCache of a model with attention of its own": ("deepseek_v3", own, 2),
    "KVCache, positions counted in Python": ("ministral3", own, 1),
    "KVCache, positions by NumPy": ("gpt_bigcode", own, 1),
    "KVCache, positions by the length of the keys": ("afm7", own, 1),
    "RotatingKVCache": ("gemma3_text", own, 1),
    "RotatingKVCache of two rows": ("llama", own, 2),
    "RotatingKVCache that keeps the first tokens": ("qwen3", all_of(mlx_lm.RotatingKVCache, 10, keep=3), 1),
    "RotatingKVCache larger than the model's window": ("gemma3_text", all_of(mlx_lm.RotatingKVCache, 12), 1),
    "RotatingKVCache as long as the text": ("qwen3", all_of(mlx_lm.RotatingKVCache, 100), 1),
    "ChunkedKVCache": ("llama4", own, 1),
    "ArraysCache": ("mamba2", own, 2),
    "ArraysCache and KVCache": ("jamba", own, 1),
    "CacheList": ("falcon_h1", own, 1),
    "CacheList of an index": ("minimax_m3_vl", own, 1),
    "CacheList of an index that picks keys": ("deepseek_v32", own, 2),
    "QuantizedKVCache": ("qwen3", all_of(mlx_lm.QuantizedKVCache, 32, 8), 2),
    "ConcatenateKVCache": ("qwen3", all_of(mlx_lm.ConcatenateKVCache), 1),
    "BatchKVCache": ("qwen3", all_of(mlx_lm.BatchKVCache, PADDING), 3),
    "BatchRotatingKVCache": ("gemma3_text", all_of(mlx_lm.BatchRotatingKVCache, 8, PADDING), 3),
    "BatchRotatingKVCache larger than the window": (
        "gemma3_text",
        all_of(mlx_lm.BatchRotatingKVCache, 12, PADDING),
        3,
    ),
    "a cache of the model's own class": ("deepseek_v41", own, 1),
}
PLAN = [5, 3, 1, 1, 1, 1, 4, 1, 1, "trim", 1, 1, 11, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]


def tokens_of(rows, n, generator):
    return mx.array(generator.integers(1, 300, (rows, n)))


def state_of(cache):
    """What a cache holds, without the room that it has left, which may differ."""
    if isinstance(cache, mlx_lm.CacheList):
        return [x for c in cache.caches for x in state_of(c)]
    counters = [
        (name, value)
        for name, value in sorted(vars(cache).items())
        if isinstance(value, (bool, int)) or name in ("offset", "left_padding")
    ]
    if hasattr(cache, "keys_and_values"):
        if isinstance(cache, mlx_lm.ChunkedKVCache):  # it may drop its front later than mlx-lm's does
            return [("offset", cache.offset), ("last", [x[..., -1:, :] for x in cache.keys_and_values()])]
        return [*counters, ("keys", cache.keys_and_values())]
    return [*counters, ("state", cache.state)]


def assert_same_state(found, expected):
    for a, b in zip(found, expected, strict=True):
        flat = (dict(tree_flatten(dict(state_of(c)))) if state_of(c) else {} for c in (a, b))
        mine, theirs = flat
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, mx.array):
                if mx.issubdtype(value.dtype, mx.floating) and value.size:
                    assert_close(mine[name], value, path="model", about=name)
                else:
                    assert mx.array_equal(mine[name], value).item(), name
            else:
                assert mine[name] == value, name


# Held literally only: it counts in Python, and grows.
LITERAL = {"a cache of the model's own class"}


@pytest.mark.parametrize("case", [case for case in CASES if case not in LITERAL])
def test_stand_ins_give_the_logits_and_leave_the_state_of_the_caches_themselves(case):
    name, make, rows = CASES[case]
    model = build(name)
    expected, found = make(model), make(model)
    generator = np.random.default_rng(1)
    for n in PLAN:
        if n == "trim":
            if can_trim_prompt_cache(expected) and case != "ChunkedKVCache":
                assert trim_prompt_cache(found, 3) == trim_prompt_cache(expected, 3)
            continue
        tokens = tokens_of(rows, n, generator)
        logits = model(tokens, cache=expected)
        assert_close(step(model, tokens, found), logits, path="model", about=n)
        assert_same_state(found, expected)


@pytest.mark.parametrize("case", [case for case in CASES if case not in LITERAL])
def test_eager_mlx_lm_and_stand_ins_take_turns_on_one_cache(case):
    name, make, rows = CASES[case]
    model = build(name)
    expected, found = make(model), make(model)
    generator = np.random.default_rng(2)
    for i, n in enumerate([6, 1, 1, 1, 5, 1, 1, 1, 1, 1, 1, 1, 3, 1]):
        tokens = tokens_of(rows, n, generator)
        logits = model(tokens, cache=expected)
        mine = model(tokens, cache=found) if i % 3 == 2 else step(model, tokens, found)
        assert_close(mine, logits, path="model", about=i)


@pytest.mark.parametrize("case", CASES)
def test_the_literal_way_is_exact_for_every_class(case):
    name, make, rows = CASES[case]
    model = build(name)
    expected, found = make(model), make(model)
    generator = np.random.default_rng(3)
    for n in (4, 1, 1, 3, 9, 1):
        tokens = tokens_of(rows, n, generator)
        logits = model(tokens, cache=expected)
        assert mx.array_equal(step(model, tokens, found, dynamic=False), logits, equal_nan=True).item()
        assert_same_state(found, expected)


# A model that counts what its cache holds, and one that appends, have a program for every length.
COUNTED = {"ConcatenateKVCache", *LITERAL}


@pytest.mark.parametrize("case", sorted(CASES.keys() - COUNTED))
def test_a_hundred_tokens_are_one_program_for_a_window_and_one_before_it_is_full(case):
    name, make, rows = CASES[case]
    model = build(name)
    caches = make(model)
    generator = np.random.default_rng(4)
    step(model, tokens_of(rows, 4, generator), caches)
    seen: dict = {}
    for i in range(100):
        _, key = step_and_keys(model, tokens_of(rows, 1, generator), caches)
        seen.setdefault(key, []).append(i)
    assert len(seen) <= 3, list(seen)  # windows of 64 and 128, or growing and full
    assert all(runs == list(range(runs[0], runs[-1] + 1)) for runs in seen.values())  # none comes back


@pytest.mark.parametrize("case", sorted(CASES.keys() - COUNTED))
def test_chunks_of_a_long_prompt_are_few_programs(case):
    name, make, rows = CASES[case]
    model = build(name)
    caches = make(model)
    generator = np.random.default_rng(5)
    seen = {step_and_keys(model, tokens_of(rows, 16, generator), caches)[1] for _ in range(12)}
    assert len(seen) <= 5, list(seen)  # the first, 64, 128, across the end of the window, beyond it


def test_trimming_does_not_lose_a_chunk_that_mlx_lm_has_dropped_too_early():
    """It drops the front for the next token alone, so that a trim back into the chunk before lacks keys."""
    model = build("llama4")
    generator = np.random.default_rng(7)
    tokens = tokens_of(1, 30, generator)
    caches, fresh = own(model), own(model)
    for start in range(0, 30, 5):
        step(model, tokens[:, start : start + 5], caches)
    trim_prompt_cache(caches, 4)
    expected = step(model, tokens[:, :27], fresh)
    assert_close(step(model, tokens[:, 26:27], caches)[:, -1], expected[:, -1], path="model")


class Recurrent:
    """A model that keeps in an ArraysCache what nobody else does: trees, and an attribute of its own."""

    def __call__(self, tokens, cache):
        (c,) = cache
        total = tokens.sum(axis=1) + (0 if c[0] is None else c[0])
        pair = [total, (total * 2, "kept")] if c[1] is None else [c[1][0] + 1, c[1][1]]
        c[0], c[1] = total, pair
        c.mood = "calm"
        return total + pair[0] + pair[1][0]


def test_an_arrays_cache_may_hold_trees_and_have_other_attributes():
    model, mine, plain = Recurrent(), [mlx_lm.ArraysCache(2)], [mlx_lm.ArraysCache(2)]
    generator = np.random.default_rng(8)
    for n in (3, 1, 1, 2):
        tokens = tokens_of(2, n, generator)
        assert mx.array_equal(step(model, tokens, mine), model(tokens, cache=plain)).item()
    assert mine[0].mood == plain[0].mood
    assert mine[0][1][1][1] == "kept"
    assert mx.array_equal(mine[0][1][1][0], plain[0][1][1][0]).item()


def test_padding_and_lengths_of_an_arrays_cache_go_in_and_come_out():
    model = build("mamba2")
    mine, plain = own(model), own(model)
    generator = np.random.default_rng(9)
    for c in (*mine, *plain):
        c.prepare(lengths=[5, 3])
    tokens = tokens_of(2, 5, generator)
    assert_close(step(model, tokens, mine), model(tokens, cache=plain), path="model")
    assert mine[0].lengths.tolist() == plain[0].lengths.tolist() == [0, -2]
    for c in (*mine, *plain):
        c.finalize()
    tokens = tokens_of(2, 1, generator)
    assert_close(step(model, tokens, mine), model(tokens, cache=plain), path="model")


def test_a_cache_that_was_copied_is_not_changed_by_the_original():
    model = build("qwen3")
    caches = own(model)
    generator = np.random.default_rng(6)
    step(model, tokens_of(1, 5, generator), caches)
    kept = copy.deepcopy(caches)
    before = [np.array(x) for c in kept for x in c.keys_and_values()]
    for _ in range(3):
        step(model, tokens_of(1, 1, generator), caches)
    after = [np.array(x) for c in kept for x in c.keys_and_values()]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
