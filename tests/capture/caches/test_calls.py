"""What a call does to a cache: written in place, all or nothing at an interrupt, from any thread."""

from __future__ import annotations

import gc
import inspect
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

import qgraph as qg
from qgraph.capture.caches import growing, rotating
from qgraph.capture.state import Step, commit_all
from tests.agree import assert_close
from tests.zoo.build import build

PROMPT = mx.array([3, 1, 41, 59, 26, 53, 58, 97, 93])


def address(a):
    return np.array(a, copy=False).__array_interface__["data"][0]


def keys_of(cache):
    return cache.keys[0] if isinstance(cache, QuantizedKVCache) else cache.keys


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


KINDS = {
    "KVCache": KVCache,
    "QuantizedKVCache": lambda: QuantizedKVCache(32, 8),
    "a ring": lambda: RotatingKVCache(4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_collector")
def test_a_token_is_written_into_the_buffer_and_the_buffer_is_not_copied(kind):
    fast = qg.optimize(build("qwen3"))
    caches = [KINDS[kind]() for _ in fast.layers]
    mx.eval(fast(PROMPT[None], cache=caches))
    places: set[tuple[int, ...]] = set()
    for i in range(8):
        mx.eval(fast(mx.array([[i]]), cache=caches))
        mx.eval([c.state for c in caches])
        if i > 0:  # the first makes room
            places.add(tuple(address(keys_of(c)) for c in caches))
    assert len(places) == 1


@pytest.mark.usefixtures("no_collector")
def test_a_token_needs_no_memory_of_the_size_of_the_cache():
    fast = qg.optimize(build("qwen3"))
    caches = make_prompt_cache(fast)
    for c in caches:
        c.step = 1 << 16  # so that a copy of one buffer is far more than all else
    mx.eval(fast(PROMPT[None], cache=caches))
    for c in caches:
        c.keys, c.values = (mx.repeat(x, 256, axis=2) for x in (c.keys, c.values))
    mx.eval([c.state for c in caches])
    buffer = caches[0].keys.nbytes
    mx.eval(fast(mx.array([[1]]), cache=caches))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for i in range(3):
        mx.eval(fast(mx.array([[i]]), cache=caches))
        mx.eval([c.state for c in caches])
    assert mx.get_peak_memory() - before < buffer / 4
    assert mx.get_active_memory() - before < buffer / 4


def test_a_buffer_that_someone_else_holds_is_left_as_it_is():
    fast = qg.optimize(build("qwen3"))
    caches = make_prompt_cache(fast)
    mx.eval(fast(PROMPT[None], cache=caches))
    kept = [x for c in caches for x in (c.keys, c.values)]
    before = [np.array(x) for x in kept]
    for i in range(3):
        mx.eval(fast(mx.array([[i]]), cache=caches))
    assert all((a == np.array(b)).all() for a, b in zip(before, kept, strict=True))


def state(caches):
    return [(c.offset, np.array(c.keys), np.array(c.values)) for c in caches]


def same(a, b):
    return all(
        x[0] == y[0] and (x[1] == y[1]).all() and (x[2] == y[2]).all() for x, y in zip(a, b, strict=True)
    )


def test_an_interrupt_in_the_middle_of_storing_stores_the_rest(monkeypatch):
    fast = qg.optimize(build("qwen3"))
    caches = make_prompt_cache(fast)
    fast(PROMPT[None], cache=caches)
    real, calls = growing.Keys.commit, []

    def commit(self, arrays, after):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, arrays, after)

    monkeypatch.setattr(growing.Keys, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        fast(mx.array([[5]]), cache=caches)
    assert {c.offset for c in caches} == {len(PROMPT) + 1}


def interrupted(call, n):
    """Run `call` with a KeyboardInterrupt at its n-th Python call; whether there was one."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if event != "call" or frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # raised in a generator that is closed, an error goes nowhere
        seen += 1
        if seen == n:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("captured", [True, False], ids=["a cached call", "a call that captures"])
def test_an_interrupt_anywhere_leaves_all_caches_before_the_token_or_all_after_it(captured):
    model = build("qwen3")
    fast = qg.optimize(model)
    token = mx.array([[7]])
    plain = make_prompt_cache(model)
    model(PROMPT[None], cache=plain)
    model(token, cache=plain)
    following = model(token, cache=plain)

    def caches():
        made = make_prompt_cache(model)
        fast(PROMPT[None], cache=made)
        return made

    if captured:
        fast(token, cache=caches())
    n, stride = 1, 1 if captured else 9973
    while True:
        if not captured:
            fast.qgraph.clear_cache()
        mine = caches()
        hit = interrupted(lambda mine=mine: fast(token, cache=mine), n)
        offsets = {c.offset for c in mine}
        assert offsets in ({len(PROMPT)}, {len(PROMPT) + 1}), n
        if offsets == {len(PROMPT)}:
            fast(token, cache=mine)
        if n % 7 == 1 or not captured:
            assert_close(fast(token, cache=mine), following, path="model", about=n)
        if not hit:
            break
        n += stride
    assert n > (20 if captured else 3 * stride)


def test_an_error_of_the_model_leaves_the_caches_as_they_were():
    fast = qg.optimize(build("qwen3"))
    caches = make_prompt_cache(fast)
    fast(PROMPT[None], cache=caches)
    before = state(caches)
    with pytest.raises((qg.QGraphError, ValueError)):
        fast(mx.zeros((1, 1, 2, 2, 2)), cache=caches)
    assert same(state(caches), before)


def test_threads_that_generate_at_once_do_not_mix_their_caches():
    model = build("qwen3")
    fast = qg.optimize(model)
    prompts = [mx.array([i, 2 * i + 1, 3 * i + 2] * (i + 1)) for i in range(1, 5)]

    def tokens(one, prompt):
        return [token for token, _ in generate_step(prompt, one, max_tokens=24)]

    expected = [tokens(model, p) for p in prompts]
    found: list = [None] * len(prompts)

    def work(i):
        try:
            for _ in range(3):
                found[i] = tokens(fast, prompts[i])
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == expected


def test_a_cache_given_twice_is_one_cache():
    """As a model whose layers share one: what the second does comes after the first."""
    model = build("qwen3")
    fast = qg.optimize(model)
    one, other = KVCache(), KVCache()
    n = len(model.layers)
    tokens = mx.array([[1, 2]])
    assert_close(fast(tokens, cache=[one] * n), model(tokens, cache=[other] * n), path="model")
    with pytest.warns(qg.RecompileWarning, match="positions added to a cache in a call of 1 token"):
        found = fast(mx.array([[1]]), cache=[one] * n)
    assert_close(found, model(mx.array([[1]]), cache=[other] * n), path="model")
    assert one.offset == other.offset == 3 * n


def test_holding_and_storing_reads_only_what_it_must():
    """The cost of a call beside the program: no array is made but the counter, which all layers share."""
    caches = [KVCache() for _ in range(36)]
    for c in caches:
        c.update_and_fetch(mx.ones((1, 2, 5, 8)), mx.ones((1, 2, 5, 8)))
    now = Step(1)
    held = [growing.hold_keys(c, now) for c in caches]
    assert all(h.arrays[0] is c.keys and h.arrays[1] is c.values for h, c in zip(held, caches, strict=True))
    assert len({id(h.arrays[2]) for h in held}) == 1
    assert len({h.key for h in held}) == 1
    arrays = [x for c in caches for x in (c.keys, c.values)]
    for _ in range(2):  # the same again changes nothing
        commit_all(held, arrays, [(2, 1)] * len(held))
        assert {c.offset for c in caches} == {6}


def test_numbers_that_are_equal_by_chance_are_not_one_input():
    """Were they, the next call, where they differ, would be another program."""
    now = Step(1)
    assert now.number(4) is now.number(4)
    assert now.number(4) is not now.number(4, "ring")
    cache = RotatingKVCache(4)
    for _ in range(9):
        cache.update_and_fetch(mx.ones((1, 2, 1, 8)), mx.ones((1, 2, 1, 8)))
    cache.offset = cache._idx = 1
    numbers = rotating.Ring(cache, Step(1)).arrays[2:]
    assert [x.item() for x in numbers] == [1, 1, 1]
    assert len({id(x) for x in numbers}) == 3


def test_the_arrays_of_caches_have_names_in_the_graph():
    for name, expected in {
        "gemma3_text": {"cache.0.keys", "cache.0.offset"},
        "falcon_h1": {"cache.0.1.values"},
        "llama4": {"cache.0.start", "cache.0.filled"},
    }.items():
        fast = qg.optimize(build(name))
        caches = make_prompt_cache(fast)
        fast(PROMPT[None, :4], cache=caches)
        labels = {v.op.label for v in fast.qgraph.graph(mx.array([[1]]), cache=caches).inputs}
        assert expected <= labels, name
