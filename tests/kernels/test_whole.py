"""Programs whose steps are run as a whole: what is asked for is right, whatever is not asked for."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.agree import agree, assert_close, normal

WIDTH, ROWS = 512, 64


@pytest.fixture(autouse=True)
def kernels(native):
    """All tests here need the kernels."""


def step(x, cache, w, at):
    """A step like a model's: several results need the same work, one alone needs the end of it."""
    y = qg.rms_norm(x, None, 1e-5)
    for _ in range(3):
        y = qg.silu(y @ w.T) + y
        y = qg.rms_norm(y, None, 1e-5)
    cache = qg.slice_update(cache, y, at, axes=(0,))
    read = qg.softmax(y @ cache.T, -1) @ cache
    return read @ w.T, cache, qg.sum(cache, 0)


def arguments(seed=0):
    x, cache, w = normal(1, WIDTH, seed=seed), normal(ROWS, WIDTH, seed=1), normal(WIDTH, WIDTH, seed=2)
    return x, cache, w * WIDTH**-0.5, mx.array([3])


def test_results_are_right():
    agree(qg.jit(step), *arguments())


def test_results_in_any_order_and_some_never():
    f, plain = qg.jit(step), [np.array(y) for y in step_in_mlx()]
    for order in ([2], [1, 0], [0, 2, 1], [1], [2, 1]):
        for _ in range(20):
            found = f(*arguments())
            kept = {i: found[i] for i in order}
            del found
            gc.collect(0)
            for i in order:
                mx.async_eval(kept[i])
            for i in order:
                assert_close(kept[i], plain[i], k=WIDTH, about=str(order))


def step_in_mlx():
    return qg.jit(step).eager(*arguments())


def test_a_dropped_result_is_not_written_into_freed_memory():
    """Steps that were started go on writing when nobody waits for them any more."""
    f = qg.jit(step)
    mx.eval(f(*arguments()))
    for seed in range(100):
        logits, cache, total = f(*arguments(seed))
        mx.async_eval(total)
        del logits, cache, total
        blocks = [np.full(WIDTH * ROWS, 7.0, np.float32) for _ in range(4)]
        assert all((b == 7).all() for b in blocks)
    mx.synchronize()


def address(a):
    return np.asarray(a).ctypes.data


def test_a_cache_that_goes_from_step_to_step_is_written_in_place():
    f, (x, cache, w, at) = qg.jit(step), arguments()
    places = set()
    _, cache, _ = f(x, cache, w, at)
    for _ in range(6):
        logits, cache, _ = f(x, cache, w, at)
        mx.async_eval(logits, cache)  # the next step is made before this one is through
    mx.eval(cache)
    for _ in range(6):
        logits, cache, _ = f(x, cache, w, at)
        mx.eval(logits, cache)
        places.add(address(cache))
    assert len(places) == 1


def test_an_array_that_the_caller_keeps_is_not_written_into():
    f, (x, cache, w, at) = qg.jit(step), arguments()
    before = np.array(cache)
    for _ in range(3):
        out = f(x, cache, w, at)
        mx.eval(out)
        assert np.array_equal(np.array(cache), before)
        assert not np.array_equal(np.array(out[1]), before)


def test_two_results_may_be_one_and_an_argument_may_be_a_result():
    def twice(x, w):
        y = x
        for _ in range(6):
            y = qg.silu(y @ w.T)
        return y, y, x, y + 1

    agree(qg.jit(twice), *arguments()[:3:2])


def test_transformations_see_the_ops():
    f, (x, cache, w, at) = qg.jit(step), arguments()
    mx.eval(f(x, cache, w, at))

    def loss(function):
        return lambda x: mx.sum(function(x, cache, w, at)[0] ** 2)

    assert_close(mx.grad(loss(f))(x), mx.grad(loss(f.eager))(x), k=WIDTH)
    xs = mx.stack([x, 2 * x, x - 1])
    found = mx.vmap(lambda x: f(x, cache, w, at)[0])(xs)
    for x, y in zip(xs, found, strict=True):
        assert_close(y, f(x, cache, w, at)[0], k=WIDTH)


def test_a_program_runs_on_the_stream_of_its_call():
    f, plain = qg.jit(step), step_in_mlx()
    stream = mx.new_stream(mx.cpu)
    for _ in range(5):
        with mx.stream(stream):
            found = f(*arguments())
        again = f(*arguments())
        for y, z, want in zip(found, again, plain, strict=True):
            assert np.array_equal(np.array(y), np.array(z))
            assert_close(y, np.array(want), k=WIDTH)


def test_many_temporaries_are_let_go_on_the_way():
    """A long chain on large arrays: memory stays at a few of them, not at one for every step."""

    def chain(x, w):
        for _ in range(60):
            x = qg.rms_norm(x @ w.T, None, 1e-5)
        return x, qg.sum(x)

    f, x, w = qg.jit(chain), normal(4096, 512), normal(512, 512) * 512**-0.5
    mx.eval(f(x, w))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(f(x, w))
    assert mx.get_peak_memory() - before < 40 * x.nbytes


def test_every_way_to_lay_out_what_must_be_copied():
    """A reshape of what lies in no order copies it, on the stream of its result's primitive."""

    def f(x):
        y = qg.broadcast_to(x[:, None], (4, 3, 6))
        for _ in range(3):
            y = qg.reshape(y, (-1, 6)).T + 1.0
            y = qg.reshape(y, (6, 3, 4))
            y = qg.concatenate(qg.split(qg.transpose(y, (2, 1, 0)), 2, axis=-1)[::-1], axis=-1)
        return y

    agree(qg.jit(f), normal(4, 6))
