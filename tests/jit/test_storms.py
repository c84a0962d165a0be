"""Recompile storms: the warning names the argument that changed, and the fix, once."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph import RecompileWarning
from tests.jit.data import weight

X = mx.ones((2, 4))


def said(calls: Any) -> list[warnings.WarningMessage]:
    """The warnings of `calls`, of every kind."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        calls()
    return found


def lengths(f: Any, up_to: int) -> None:
    for n in range(1, up_to + 1):
        f(mx.ones((2, n)))


def scales(f: Any, count: int) -> None:
    for i in range(count):
        f(X, scale=0.5 + i)


def changes(f: Any, count: int) -> None:
    for i in range(count):
        globals()["SCALE"] = float(i)
        f(X)


def rebound(f: Any, count: int) -> None:
    for _ in range(count):
        globals()["W"] = mx.ones((4, 4))
        f(X)


def trees(f: Any, count: int) -> None:
    for n in range(1, count + 1):
        f([X] * n)


def pairs(f: Any, count: int) -> None:
    for n in range(1, count + 1):
        f(X, {"mask": mx.ones((n, n)), "kv": mx.ones((n, 4))})


def widths(f: Any, count: int) -> None:
    for n in range(1, count + 1):
        f(X, weight(shape=(n, 64)))


SCALE = 1.0
W = mx.ones((4, 4))

STORMS = {
    "number": (lambda x, scale: x * scale, scales, "argument 'scale': 0.5, 1.5, 2.5", "as an mx.array"),
    "length": (lambda x: x + 1, lengths, "'x' axis 1: 1, 2, 3, 4, …", "pad it, or round the lengths up"),
    "global": (lambda x: x * SCALE, changes, "'SCALE': 0.0, 1.0, 2.0, 3.0, …", "pass it as an argument"),
    "constant": (lambda x: x @ W.T, rebound, "'W' identity: another object", "mx functions make constants"),
    "structure": (lambda t: t[0], trees, "argument 't' structure: list of 1, list of 2", "same structure"),
    "item": (lambda x, t: (x, t["mask"] + 1), pairs, "'t.mask' axis 0: 1, 2, 3", "pad it"),
    "packed": (lambda x, w: (x, w), widths, "'w' axis 0: 1, 2, 3, 4, …", "pad it"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _globals(monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    monkeypatch.setitem(globals(), "W", mx.ones((4, 4)))


@pytest.mark.parametrize("name", STORMS)
def test_the_eighth_program_names_what_changed_and_the_fix_once(name: str) -> None:
    body, calls, what, fix = STORMS[name]
    f = qg.jit(body)
    assert said(lambda: calls(f, 7)) == []
    f = qg.jit(body)
    (warning,) = said(lambda: calls(f, 30))
    text = str(warning.message)
    assert warning.category is RecompileWarning
    assert text.startswith("<lambda> was compiled 8 times because of ")
    assert what in text
    assert fix in text.partition("fix: ")[2]
    assert warning.filename.endswith("test_storms.py")  # the user's line


def test_a_second_argument_is_told_too() -> None:
    f = qg.jit(lambda x, scale=1.0: x * scale)
    both = said(lambda: (scales(f, 12), lengths(f, 12), scales(f, 30)))
    assert ["'scale'" in str(w.message) for w in both] == [True, False]


def test_programs_that_differ_in_different_ways_are_no_storm() -> None:
    f = qg.jit(lambda x, n=1: x * n)
    dtypes = [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint32]
    assert said(lambda: [f(mx.ones((n, 2), d), k) for d in dtypes for n in (1, 2) for k in (1, 2)]) == []


def test_a_storm_in_two_modes_is_still_one() -> None:
    f = qg.jit(lambda x, training: x * 2 if training else x)
    (warning,) = said(lambda: [f(mx.ones((2, n)), mode) for n in range(1, 12) for mode in (True, False)])
    assert "'x' axis 1" in str(warning.message)


def test_hits_say_nothing_and_what_the_function_itself_counts_is_no_storm() -> None:
    traces: list[int] = []

    @qg.jit
    def f(x: Any) -> Any:
        traces.append(1)
        return x + 1

    (warning,) = said(lambda: lengths(f, 12))
    assert "'x' axis 1" in str(warning.message)
    assert "traces" not in str(warning.message)
    assert said(lambda: lengths(f, 12)) == []


def test_a_warning_that_is_an_error_leaves_the_program_in_the_cache() -> None:
    f = qg.jit(lambda x: x + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecompileWarning)
        with pytest.raises(RecompileWarning):
            lengths(f, 8)
        assert f.cache_info().currsize == 8
        assert f(mx.ones((2, 8))).tolist() == [[2.0] * 8] * 2
