"""Programs with native kernels, called from many threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.agree import agree, normal

THREADS = 8


@pytest.fixture(autouse=True)
def kernels(native):
    """All tests here need the kernels."""


def layer(x, w, v):
    return qg.rms_norm(qg.silu(x @ w.T) * (x @ v.T), None, 1e-5)


def test_eight_threads_get_their_own_results():
    f = qg.jit(layer)
    w, v = (qg.quantize(normal(192, 256, seed=i)) for i in (1, 2))
    xs = [normal(1 + i % 3, 256, seed=10 + i) for i in range(THREADS)]
    mx.eval(xs, [[p for p in (q.packed, q.scales, q.biases)] for q in (w, v)])
    expected = [np.array(f(x, w, v)) for x in xs]
    start = Barrier(THREADS)

    def work(i):
        start.wait()
        return [np.array(f(xs[i], w, v)) for _ in range(25)]

    with ThreadPoolExecutor(THREADS) as pool:
        for i, found in enumerate(pool.map(work, range(THREADS))):
            assert all(np.array_equal(y, expected[i]) for y in found), i


def test_threads_that_make_the_program_at_once():
    for seed in range(5):
        f = qg.jit(layer)
        w, v = (qg.quantize(normal(64, 128, seed=seed + i)) for i in (1, 2))
        x = normal(2, 128, seed=seed)
        mx.eval(x, w.packed, w.scales, w.biases, v.packed, v.scales, v.biases)
        start = Barrier(THREADS)

        def work(_, f=f, x=x, w=w, v=v, start=start):
            start.wait()
            return np.array(f(x, w, v))

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(work, range(THREADS)))
        assert all(np.array_equal(found[0], y) for y in found)
        agree(f, x, w, v)


def test_the_number_of_threads_changes_no_bit(native):
    before = native.threads()
    x, w = normal(40, 512).astype(mx.bfloat16), qg.quantize(normal(700, 512).astype(mx.bfloat16))
    f, found = qg.jit(lambda x, w: qg.softmax(x @ w.T, -1)), []
    try:
        for n in (1, 2, 3, 7):
            native.set_threads(n)
            found.append(np.array(f(x, w).astype(mx.float32)))
    finally:
        native.set_threads(before)
    assert all(np.array_equal(found[0], y) for y in found)


def test_threads_that_come_and_go_leave_nothing_behind():
    """Each has a stream of its own, and ops belong to a stream."""
    import gc
    from threading import Thread

    f, (x, w) = qg.jit(lambda x, w: qg.softmax(x @ w.T, -1)), (normal(2, 64), qg.quantize(normal(32, 64)))
    expected, sizes = np.array(f(x, w)), []
    for n in range(60):
        found = []
        thread = Thread(target=lambda found=found: found.append(np.array(f(x, w))))
        thread.start()
        thread.join()
        assert np.array_equal(found[0], expected)
        if n % 20 == 19:
            gc.collect()
            sizes.append(mx.get_active_memory())
    assert sizes[-1] <= sizes[0]  # less: what an earlier test left is freed at any time
    assert np.array_equal(np.array(f(x, w)), expected)
