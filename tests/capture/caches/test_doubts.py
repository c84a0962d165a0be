"""Models that do with a cache what mlx-lm's own do not: always right, one program where it can be shown."""

from __future__ import annotations

import threading
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

import qgraph as qg
from qgraph.capture.caches.attention import attending
from qgraph.capture.caches.positions import Position, Span, arange
from qgraph.capture.state import DOUBTS, NotDynamic
from tests.agree import assert_close
from tests.capture.caches.eager import step
from tests.zoo.build import build

D, HEADS = 16, 2


class Attention(nn.Module):
    """One layer that attends in a way of its own."""

    def __init__(self, attend):
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.attend = attend

    def __call__(self, tokens, cache=None):
        x = self.embed(tokens)
        q, k, v = (
            f(x).reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3) for f in (self.q, self.k, self.v)
        )
        mask = getattr(self.attend, "mask", lambda x, c: None)(x, cache[0])
        k, v = cache[0].update_and_fetch(k, v)
        return self.attend(q, k, v, mask, cache[0]).transpose(0, 2, 1, 3).flatten(-2)


def scores_of(q, k):
    return q @ k.swapaxes(-1, -2)


def fast(q, k, v, mask, cache):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask=mask)


def asked(how):
    how.mask = create_attention_mask
    return how


@asked
def with_the_mask(q, k, v, mask, cache):
    return fast(q, k, v, mask, cache)


def without_a_mask(q, k, v, mask, cache):
    return fast(q, k, v, None, cache)


def causal(q, k, v, mask, cache):
    return fast(q, k, v, "causal", cache)


@asked
def with_one_added(q, k, v, mask, cache):
    """A mask of numbers, over all keys."""
    return fast(q, k, v, mx.zeros((q.shape[2], int(k.shape[2]))), cache)


@asked
def with_a_second_mask(q, k, v, mask, cache):
    mine = mx.ones((q.shape[2], int(k.shape[2])), mx.bool_)
    if isinstance(mask, mx.array):
        mine = mine & mask
    return fast(q, k, v, mine, cache)


def with_a_mask_of_its_own(q, k, v, mask, cache):
    return fast(q, k, v, mx.ones((q.shape[2], int(k.shape[2])), mx.bool_), cache)


@asked
def by_hand(q, k, v, mask, cache):
    scores = scores_of(q, k)
    if isinstance(mask, mx.array):
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return mx.softmax(scores, axis=-1) @ v


@asked
def by_hand_with_no_mask(q, k, v, mask, cache):
    return mx.softmax(scores_of(q, k), axis=-1) @ v


def by_hand_and_never_asking(q, k, v, mask, cache):
    return mx.softmax(scores_of(q, k), axis=-1) @ v


@asked
def by_the_length_of_the_keys(q, k, v, mask, cache):
    n = k.shape[2]
    back = mx.arange(n - q.shape[2], n)[:, None] - mx.arange(n)[None]
    return fast(q, k + 0, v, (back >= 0) & (back < 3), cache)


@asked
def by_a_share_of_the_length(q, k, v, mask, cache):
    return fast(q, k, v, mask, cache) * (1.0 / k.shape[2])


def of_all_keys(q, k, v, mask, cache):
    return mx.broadcast_to(mx.mean(v, axis=2, keepdims=True), q.shape)


# How often the same length is captured again after the first: 0 is one program for all.
CASES = {
    with_the_mask: True,
    without_a_mask: True,
    causal: True,
    with_one_added: True,
    with_a_second_mask: True,
    with_a_mask_of_its_own: True,
    by_hand: True,
    by_the_length_of_the_keys: True,
    by_hand_with_no_mask: False,
    by_hand_and_never_asking: False,
    by_a_share_of_the_length: False,
    of_all_keys: False,
}


@pytest.mark.parametrize("attend", CASES, ids=lambda f: f.__name__)
def test_the_result_is_right_whatever_the_model_does_with_its_cache(attend):
    mx.random.seed(0)
    model = Attention(attend)
    mx.eval(model.parameters())
    optimized = qg.optimize(model)
    expected, found = [KVCache()], [KVCache()]
    generator = np.random.default_rng(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for n in (1, *[1] * 9):
            tokens = mx.array(generator.integers(0, 50, (2, n)))
            logits = model(tokens, cache=expected)
            assert_close(optimized(tokens, cache=found), logits, path="model")
    one_program = CASES[attend]
    assert [w.category for w in said] == ([] if one_program else [qg.RecompileWarning])
    if one_program:
        # The empty cache, the window; and where the model's own code was in doubt, the literal capture.
        assert optimized.qgraph.cache_info().misses <= 3
    else:
        assert "captured again" in str(said[0].message)
        assert optimized.qgraph.cache_info().misses >= 9


@pytest.mark.parametrize("attend", [without_a_mask, with_the_mask, causal], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [KVCache, lambda: RotatingKVCache(6, keep=1)], ids=["growing", "rotating"])
def test_attention_leaves_out_the_room_in_every_kind_of_cache(attend, kind):
    model = Attention(attend)
    mx.eval(model.parameters())
    expected, found = [kind()], [kind()]
    generator = np.random.default_rng(0)
    for n in (4, 1, 1, 1, 1, 1):
        tokens = mx.array(generator.integers(0, 50, (1, n)))
        assert_close(step(model, tokens, found), model(tokens, cache=expected), path="model")


def test_a_model_that_never_asks_and_attends_by_hand_is_refused_at_capture():
    model = Attention(by_hand_and_never_asking)
    caches = [KVCache()]
    step(model, mx.array([[1, 2]]), caches)
    with pytest.raises(NotDynamic, match="code of its own") as error:
        step(model, mx.array([[3]]), caches)
    assert "create_attention_mask" in error.value.fix
    assert caches[0].offset == 2  # nothing was stored


def test_a_model_that_adds_other_positions_than_it_was_given_is_refused():
    def twice(model):
        def call(tokens, cache):
            return model(mx.concatenate([tokens, tokens], axis=1), cache=cache)

        return call

    model, caches = Attention(with_the_mask), [KVCache()]
    step(model, mx.array([[1, 2]]), caches)
    with pytest.raises(NotDynamic, match="2 positions added to a cache in a call of 1 tokens"):
        step(twice(model), mx.array([[3]]), caches)


def test_doubts_are_those_of_the_last_capture():
    model, caches = Attention(by_hand), [KVCache()]
    step(model, mx.array([[1, 2]]), caches)
    step(model, mx.array([[1]]), caches)
    assert list(DOUBTS) == ["the model attends to its cache by code of its own"]
    step(Attention(by_a_share_of_the_length), mx.array([[1]]), caches)
    assert list(DOUBTS) == ["the model reads the length of its cache"]
    step(Attention(with_the_mask), mx.array([[1]]), caches)
    assert list(DOUBTS) == []


def test_mlx_lms_attention_to_a_quantized_cache_is_no_doubt():
    model = build("qwen3")
    caches = [QuantizedKVCache(32, 8) for _ in model.layers]
    for n in (3, 1, 2):
        step(model, mx.ones((1, n), mx.int32), caches)
        assert not list(DOUBTS)


def test_doubts_belong_to_the_thread_that_captures():
    caches = [KVCache()]
    step(Attention(by_hand), mx.array([[1, 2]]), caches)
    step(Attention(by_hand), mx.array([[1]]), caches)
    other = threading.Thread(target=lambda: step(Attention(with_the_mask), mx.array([[1, 2]]), [KVCache()]))
    other.start()
    other.join()
    assert list(DOUBTS)


def test_what_is_patched_is_put_back_also_after_an_error():
    before = mx.fast.scaled_dot_product_attention, mx.arange, np.arange
    with attending():
        assert before[1] is not mx.arange
    with pytest.raises(ZeroDivisionError), attending():
        raise ZeroDivisionError
    assert before == (mx.fast.scaled_dot_product_attention, mx.arange, np.arange)


# Positions.


def position(n, span=None):
    return Position.counted(mx.array(n, mx.int32), 0, span)


def test_a_range_between_positions_has_the_length_of_their_difference():
    p = position(7)
    for made in (arange(p, p + 4), arange(start := p + 0, start + 4), arange(p - 1, p + 3) + 1):
        assert made.tolist() == [7, 8, 9, 10]
    assert arange(p, p + 2, dtype=mx.float32).dtype == mx.float32
    assert (p + 5) - (p + 2) == 3
    assert (mx.array(1) + p).item() == 8
    assert (1 + p).item() == 8
    assert arange(2, 4).tolist() == [2, 3]


def test_a_range_over_all_positions_is_as_long_as_the_window():
    p = position(7, span=64)
    assert arange(p + 1).tolist() == list(range(64))
    assert arange(0, p + 1).tolist() == list(range(64))


@pytest.mark.parametrize("ends", [lambda p: (3, p), lambda p: (p, 3), lambda p: (p, p + 4, 2)])
def test_a_range_whose_length_changes_from_call_to_call_is_refused(ends):
    with pytest.raises(NotDynamic):
        arange(*ends(position(7)))


def test_the_length_of_a_window_less_the_new_tokens_is_where_they_begin():
    n = Span.of(64, position(9))
    assert (n - 2).item() == 7
    assert arange(n - 2, n).tolist() == [7, 8]
    assert arange(n).shape == (64,)
    assert mx.zeros((n, 2)).shape == (64, 2)
    assert (n // 2, n - 0.5, n + 1) == (32, 63.5, 65)


@pytest.mark.parametrize("attend", [by_hand_with_no_mask, by_hand_and_never_asking], ids=lambda f: f.__name__)
def test_with_fallback_such_a_model_runs_as_it_is(attend):
    model = Attention(attend)
    mx.eval(model.parameters())
    optimized = qg.optimize(model, fallback=True)
    expected, found = [KVCache()], [KVCache()]
    tokens = [mx.ones((1, n), mx.int32) for n in (3, 1, 1, 1)]
    with pytest.warns(UserWarning, match="runs without qgraph: every call would be captured again") as said:
        results = [optimized(x, cache=found) for x in tokens]
    for x, result in zip(tokens, results, strict=True):
        assert_close(result, model(x, cache=expected), path="model")
    assert len(said) == 1
    assert found[0].offset == 6


class Counting(KVCache):
    """A cache of the user's own."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def update_and_fetch(self, keys, values):
        self.calls += 1
        return super().update_and_fetch(keys, values)


def test_a_cache_of_an_unknown_class_is_exact_and_said_to_be_slow():
    model = Attention(with_the_mask)
    mx.eval(model.parameters())
    fast, caches, plain = qg.optimize(model), [Counting()], [Counting()]
    with pytest.warns(qg.RecompileWarning, match="Counting is a cache of the model's own"):
        found = fast(mx.array([[1, 2]]), cache=caches)
    assert_close(found, model(mx.array([[1, 2]]), cache=plain), path="model")
    for i in range(3):
        expected = model(mx.array([[i]]), cache=plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", qg.RecompileWarning)
            assert_close(fast(mx.array([[i]]), cache=caches), expected, path="model")
    assert (caches[0].calls, caches[0].offset) == (plain[0].calls, plain[0].offset) == (4, 5)


class Duck:
    """A cache that derives from nothing."""

    def __init__(self):
        self.all = {"keys": None, "values": None}
        self.offset = 0

    def update_and_fetch(self, *new):
        for name, x in zip(("keys", "values"), new, strict=True):
            old = self.all[name]
            self.all[name] = x if old is None else mx.concatenate([old, x], axis=2)
        self.offset += new[0].shape[2]
        return self.all["keys"], self.all["values"]


def test_a_cache_that_only_looks_like_one_is_held_as_well():
    model = Attention(without_a_mask)
    mx.eval(model.parameters())
    fast, mine, plain = qg.optimize(model), [Duck()], [Duck()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qg.RecompileWarning)
        for n in (3, 1, 1):
            tokens = mx.ones((1, n), mx.int32)
            assert_close(fast(tokens, cache=mine), model(tokens, cache=plain), path="model")
    assert mine[0].offset == plain[0].offset == 5
    assert_close(mine[0].all["keys"], plain[0].all["keys"], path="model")


def test_a_cache_with_slots_is_refused():
    class Bare:
        __slots__ = ("offset",)

        def update_and_fetch(self, k, v):
            return k, v

    model = Attention(without_a_mask)
    with pytest.raises(qg.QGraphError, match="a Bare keeps what it holds in __slots__"):
        qg.optimize(model)(mx.ones((1, 2), mx.int32), cache=[Bare()])


def test_a_cache_that_holds_something_else_is_an_error_that_says_what():
    model = Attention(with_the_mask)
    cache = Counting()
    cache.log = open
    with pytest.raises(qg.QGraphError, match="holds a builtin_function_or_method"):
        qg.optimize(model)(mx.array([[1, 2]]), cache=[cache])
    assert cache.offset == 0
