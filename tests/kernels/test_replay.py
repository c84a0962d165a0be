"""Programs that are called again with what lies where it lay: the same calls, and the same numbers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.agree import normal

WIDTH, ROWS = 128, 24


@pytest.fixture(autouse=True)
def kernels(native):
    """All tests here need the kernels."""


@qg.jit
def step(x, cache, w, at):
    """A step like a model's, all of whose ops have kernels, but for those of the position."""
    y = qg.rms_norm(x, None, 1e-5)
    for _ in range(2):
        y = qg.silu(y @ w.T) + y
        y = qg.rms_norm(y, None, 1e-5)
    cache = qg.slice_update(cache, qg.reshape(y, (1, 1, WIDTH)), qg.reshape(at + 1, (1,)), axes=(1,))
    rows = qg.reshape(cache, (ROWS, WIDTH))
    return qg.softmax(y @ rows.T, -1) @ rows, cache


def weights(seed=2, dtype=mx.float32):
    return qg.quantize((normal(WIDTH, WIDTH, seed=seed) * WIDTH**-0.5).astype(dtype))


def arguments(seed=0, dtype=mx.float32):
    return normal(1, WIDTH, seed=seed).astype(dtype), mx.array(seed % (ROWS - 1))


def run(f, steps, w, dtype=mx.float32, before=lambda i, cache: cache):
    """The results of steps that hand on a cache, as they were at the end."""
    cache, found = normal(1, ROWS, WIDTH, seed=1).astype(dtype), []
    mx.eval(cache)
    for i in range(steps):
        x, at = arguments(i, dtype)
        cache = before(i, cache)
        y, cache = f(x, cache, w(i), at)
        mx.eval(y, cache)
        found.append(y)
    return [np.array(y.astype(mx.float32)) for y in (*found, cache)]


def the_same(found, wanted):
    return all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def unrecorded(*args, **keywords):
    """The results with every program new, so that nothing is called twice."""

    def new(*arguments):
        return qg.jit(step.__wrapped__)(*arguments)

    return run(new, *args, **keywords)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_steps_that_follow_each_other_are_replayed_to_the_bit(native, dtype):
    w = weights(dtype=dtype)
    wanted = unrecorded(12, lambda _: w, dtype)
    before = native.replays()
    assert the_same(run(step, 12, lambda _: w, dtype), wanted)
    assert native.replays() - before >= 9  # but for the first two or three


def test_a_cache_that_moves_and_one_that_is_kept(native):
    w, kept = weights(), []

    def before(i, cache):
        if i % 5 == 3:
            cache = cache + 0  # elsewhere
        if i % 7 == 5:
            kept.append((cache, np.array(cache)))
        return cache

    wanted = unrecorded(40, lambda _: w, before=before)
    assert all(np.array_equal(np.array(cache), was) for cache, was in kept)
    kept.clear()
    assert the_same(run(step, 40, lambda _: w, before=before), wanted)
    assert len(kept) == 5
    assert all(np.array_equal(np.array(cache), was) for cache, was in kept)


def test_other_weights(native):
    two = weights(2), weights(3)
    mx.eval([x.packed for x in two])

    def w(i):
        return two[i // 6 % 2]

    wanted = unrecorded(30, w)
    before = native.replays()
    assert the_same(run(step, 30, w), wanted)
    assert native.replays() - before >= 10


def test_weights_that_are_dropped_right_after_the_call():
    plain = np.array(step(*arguments()[:1], normal(1, ROWS, WIDTH), weights(5), mx.array(1))[0])
    for _ in range(30):
        y, _ = step(*arguments()[:1], normal(1, ROWS, WIDTH), weights(5), mx.array(1))
        mx.async_eval(y)
        assert np.array_equal(np.array(y), plain)


def test_small_inputs_of_another_layout(native):
    w = weights()

    def run_both(f):
        found = []
        cache = normal(1, ROWS, WIDTH, seed=1)
        for i in range(36):
            x, at = arguments(i)
            if i // 4 % 3 == 1:
                x = mx.stack([x, x], axis=-1)[..., 0]  # every second number of a buffer
            if i // 4 % 3 == 2:
                x = x[:, ::-1]  # from its end
            mx.eval(x)
            y, cache = f(x, cache, w, at)
            mx.eval(y, cache)
            found.append(np.array(y))
        return found

    assert the_same(run_both(step), run_both(lambda *a: qg.jit(step.__wrapped__)(*a)))


def test_what_goes_in_may_go_into_the_cache_as_it_is(native):
    """The block, the place and the result are arguments, strided ones too; a start too far is moved."""

    def f(cache, block, at, w):
        cache = qg.slice_update(cache, block, at, axes=(1, 0))
        rows = qg.reshape(cache, (-1, WIDTH))
        for _ in range(4):
            rows = qg.rms_norm(rows @ w.T, None, 1e-5)
        return rows, cache, rows[0]

    jitted, w, before = qg.jit(f), weights(), native.replays()
    caches = [normal(ROWS, 3, WIDTH, seed=1) for _ in range(2)]
    for i in range(20):
        block, at = normal(WIDTH, 2, 2, seed=i).T, mx.array([i % 3, i % ROWS + 3 * (i % 5)])
        mx.eval(caches, block, at)
        rows, caches[0], _ = jitted(caches[0], block, at, w)
        want, caches[1], _ = qg.jit(f)(caches[1], block, at, w)
        mx.eval(rows, want, caches)
        assert the_same([np.array(rows), np.array(caches[0])], [np.array(want), np.array(caches[1])])
    assert native.replays() - before >= 15


def test_results_are_the_callers_own():
    w, results = weights(), []
    cache = normal(1, ROWS, WIDTH, seed=1)
    for i in range(20):
        x, at = arguments(i)
        y, cache = step(x, cache, w, at)
        mx.eval(y, cache)
        results.append((y, np.array(y)))
    assert all(np.array_equal(np.array(y), was) for y, was in results)


def test_a_step_is_started_before_the_one_before_it_is_through(native):
    w = weights()
    wanted = unrecorded(30, lambda _: w)
    cache, found = normal(1, ROWS, WIDTH, seed=1), []
    for i in range(30):
        x, at = arguments(i)
        y, cache = step(x, cache, w, at)
        mx.async_eval(y, cache)
        found.append(y)
    assert the_same([np.array(y) for y in (*found, cache)], wanted)


def test_caches_that_are_kept_while_steps_are_queued(native):
    """A run takes the cache over from the one before it in the queue, unless somebody else still reads it."""
    w = weights()
    caches, wanted = [normal(1, ROWS, WIDTH, seed=1)], []
    for i in range(40):
        x, at = arguments(i)
        y, cache = qg.jit(step.__wrapped__)(x, caches[-1], w, at)
        mx.eval(y, cache)
        caches.append(cache)
        wanted.append(np.array(y))
    cache, kept, before = caches[0] + 0, [], native.replays()
    mx.eval(cache)
    for i in range(40):
        x, at = arguments(i)
        if i % 9 == 8:
            kept.append((None, cache, i))
        y, cache = step(x, cache, w, at)
        mx.async_eval(y)
        kept.append((y, None, i))
        if i % 13 == 5:
            kept.append((None, cache[:, :3] * 1, i + 1))
            mx.async_eval(kept[-1][1])  # an op in the queue reads it
    for y, held, i in kept:
        if y is not None:
            assert np.array_equal(np.array(y), wanted[i])
        else:
            assert np.array_equal(np.array(held), np.array(caches[i][:, : held.shape[1]]))
    assert native.replays() - before >= 15


def test_a_long_prompt_keeps_no_buffers_for_a_replay(native):
    @qg.jit
    def f(x, w):
        for _ in range(12):
            x = qg.rms_norm(x @ w.T, None, 1e-5)
        return x

    x, w = normal(4096, WIDTH), weights()
    before = native.replays()
    for _ in range(5):
        mx.eval(f(x, w))
    assert native.replays() == before
