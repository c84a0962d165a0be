"""The checklist of a jit's correctness, items 26, 27. Forks and Ctrl-C (28, 29) stand beside."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph import TraceError
from qgraph.ir import Graph
from qgraph.rewrite.pipeline import DEFAULT
from tests.agree import close
from tests.jit.data import normal, together, weight

X = mx.array([[1.0, 2.0, 3.0, 4.0]])


# 26. Freed functions and ids that come again.


def scaled(n: float) -> Any:
    def f(x: Any) -> Any:
        return x * n

    return f


def test_j26_ids_of_freed_functions_come_again_and_are_not_taken_for_the_old_ones() -> None:
    apply = qg.jit(lambda x, f: f(x))  # a function as a static argument
    inside = qg.jit(lambda x: HELD[0](x))  # and one that is found outside
    apply.warns = inside.warns = False
    ids: list[int] = []
    while len(ids) < 20 or (len(set(ids)) == len(ids) and len(ids) < 500):
        n = len(ids)
        f = scaled(float(n))
        ids.append(id(f))
        HELD[0] = f
        assert apply(X, f).tolist() == inside(X).tolist() == qg.jit(f)(X).tolist() == (X * n).tolist()
        apply.clear_cache()
        inside.clear_cache()
        del f
        HELD[0] = None
        gc.collect()
    assert len(set(ids)) < len(ids)  # it did happen


HELD: list[Any] = [None]


def test_j26_functions_that_are_no_longer_read_are_not_kept() -> None:
    f = qg.jit(maxsize=2)(lambda x: HELD[0](x))
    f.warns = False
    kept: list[Any] = []
    for n in range(6):
        HELD[0] = scaled(float(n))
        kept.append(weakref.ref(HELD[0]))
        assert f(X).tolist() == (X * n).tolist()
    HELD[0] = None
    gc.collect()
    assert [ref() is None for ref in kept[:4]] == [True] * 4  # the other two are in the cache


def test_j26_functions_freed_in_another_thread() -> None:
    for n in range(20):
        box = [qg.jit(scaled(float(n)))]
        assert box[0](X).tolist() == (X * n).tolist()
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        assert qg.jit(scaled(n + 0.5))(X).tolist() == (X * (n + 0.5)).tolist()


def test_j26_a_jitted_function_that_is_dropped_is_freed_with_all_that_it_captured() -> None:
    array = normal(64, 64)
    f = qg.jit(lambda x: x @ array)
    f(normal(1, 64))
    gone = weakref.ref(f), weakref.ref(f.function)
    del f
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


# 27. Threads.


def test_j27_eight_threads_call_first_at_once_and_there_is_one_trace() -> None:
    for _ in range(5):
        traces: list[int] = []
        w = weight()
        mx.eval(w.components())

        @qg.jit
        def f(x: Any, traces: list[int] = traces, w: Any = w) -> Any:
            traces.append(1)
            return qg.silu(x @ w.T)

        expected = np.array(f.eager(mx.full((2, 64), 0.5)))
        traces.clear()
        found = together([lambda f=f: np.array(f(mx.full((2, 64), 0.5)))] * 8)
        assert all(close(y, expected, k=64) for y in found)
        assert len(traces) == 1
        assert f.cache_info()[:2] == (7, 1)


def test_j27_another_thread_than_the_one_that_made_the_weights_and_the_program() -> None:
    w = weight()
    mx.eval(w.components())
    f = qg.jit(lambda x: qg.silu(x @ w.T) + 1.0)  # with a constant, made when the program is
    here = np.array(f(mx.full((1, 64), 0.5)))
    (there,) = together([lambda: np.array(f(mx.full((1, 64), 0.5)))])
    assert there.tolist() == here.tolist()
    g = qg.jit(lambda x: qg.silu(x @ w.T) + 1.0)
    (first,) = together([lambda: np.array(g(mx.full((1, 64), 0.5)))])  # made there, used here
    assert np.array(g(mx.full((1, 64), 0.5))).tolist() == first.tolist() == here.tolist()


def test_j27_a_number_that_another_thread_changes_during_the_trace_is_not_frozen() -> None:
    scale, tracing, changed = 2.0, threading.Event(), threading.Event()

    @qg.jit
    def f(x: Any) -> Any:
        y = x * scale
        tracing.set()
        changed.wait(10)
        return y

    def change() -> None:
        nonlocal scale
        tracing.wait(10)
        scale = 5.0
        changed.set()

    together([lambda: f(X), change])
    assert f(X).tolist() == (X * 5).tolist()
    scale = 2.0
    assert f(X).tolist() == (X * 2).tolist()


def test_j27_an_array_that_another_thread_rebinds_during_the_trace_is_not_frozen() -> None:
    w, tracing, changed = mx.eye(4), threading.Event(), threading.Event()
    mx.eval(w)

    @qg.jit
    def f(x: Any) -> Any:
        y = x @ w
        tracing.set()
        changed.wait(10)
        return y

    def change() -> None:
        nonlocal w
        tracing.wait(10)
        w = mx.eye(4) * 5
        mx.eval(w)
        changed.set()

    together([lambda: f(X), change])
    assert f(X).tolist() == (X * 5).tolist()


class CallsBack(qg.Pass):
    """Calls a jitted function while another, or the same one, is compiled."""

    name = "calls-back"
    target: Any = None

    def run(self, graph: Graph, context: Any) -> Graph:
        type(self).target()
        return graph


def calling_back() -> qg.JitFunction:
    passes = qg.Pipeline((CallsBack(), *qg.Pipeline.parse(DEFAULT).passes))
    return qg.JitFunction(lambda x: x + 1, passes, 256)


def test_j27_a_pass_may_call_another_function_and_the_same_one_for_other_arguments(monkeypatch) -> None:
    f, other = calling_back(), qg.jit(lambda x: x * 2)
    seen: list[Any] = []

    def call() -> None:
        seen.append(other(X).tolist())
        if len(seen) == 1:
            seen.append(f(mx.ones(3)).tolist())

    monkeypatch.setattr(CallsBack, "target", call)
    (found,) = together([lambda: f(mx.array([1.0])).tolist()])
    assert found == [2.0]
    assert seen.count((X * 2).tolist()) == 2
    assert [2.0, 2.0, 2.0] in seen


def test_j27_a_pass_that_needs_the_program_that_it_is_making_is_an_error_and_no_hang(monkeypatch) -> None:
    f = calling_back()
    monkeypatch.setattr(CallsBack, "target", lambda: f(X))
    (found,) = together([lambda: f(X)])
    assert isinstance(found, TraceError)
    assert "for which it is being compiled just now" in str(found)
    monkeypatch.setattr(CallsBack, "target", lambda: None)
    assert f(X).tolist() == (X + 1).tolist()
