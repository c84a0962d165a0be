"""What a jitted function reads from outside: always the value of the call, never the one of the trace."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from tests.agree import assert_close

X = mx.ones((1, 4))
W = mx.eye(4)
SCALE = 2.0
PARAMS: dict[str, Any] = {"w": mx.eye(4), "scale": 1.0}
LAYERS = [mx.eye(4)]


def value(y: mx.array) -> float:
    return y[0, 0].item()


@pytest.fixture(autouse=True)
def _restore():
    before = {n: globals()[n] for n in ("W", "SCALE", "helper")}
    params, layers = dict(PARAMS), list(LAYERS)
    yield
    globals().update(before)
    PARAMS.clear()
    PARAMS.update(params)
    LAYERS[:] = layers


def helper(x):
    return x @ W


def test_a_global_that_is_bound_anew() -> None:
    f = qg.jit(lambda x: x @ W)
    assert value(f(X)) == 1
    globals()["W"] = mx.eye(4) * 3
    assert value(f(X)) == 3
    assert f.cache_info().misses == 1  # of the same type: no new program
    globals()["W"] = mx.ones((4, 8))
    assert f(X).shape == (1, 8)
    assert f.cache_info().misses == 2


def test_a_quantized_global_that_is_bound_anew_many_times() -> None:
    """Ids of freed objects come again; they must not be taken for the old object."""
    f = qg.jit(lambda x: x @ W.T)
    x = mx.ones((1, 64))
    for i in range(20):
        globals()["W"] = qg.quantize(mx.full((4, 64), float(i)))
        assert_close(f(x), np.full((1, 4), 64.0 * i), k=64)
    assert f.cache_info().misses == 1


def test_an_array_that_is_updated_in_place() -> None:
    w = mx.eye(4)
    f = qg.jit(lambda x: x @ w)
    assert value(f(X)) == 1
    w[:] = 7
    assert value(f(X)) == 28


def test_a_global_that_mlx_itself_transforms_in_the_function() -> None:
    """W.T below is MLX's, not ours: an array that the trace cannot follow back to W."""
    f = qg.jit(lambda x: x @ W.T * mx.array([2.0]))
    for scale in (1.0, 3.0, 3.0, 5.0):
        globals()["W"] = mx.eye(4) * scale
        assert value(f(X)) == 2 * scale
        assert value(f(X)) == 2 * scale
    assert f.cache_info()[:2] == (4, 4)


def test_a_closure_cell_that_changes() -> None:
    w, scale = mx.eye(4), 1.0

    @qg.jit
    def f(x):
        return x @ w * scale

    assert value(f(X)) == 1
    w = mx.eye(4) * 2
    assert value(f(X)) == 2
    scale = 10.0
    assert value(f(X)) == 20


def test_a_global_number_that_changes() -> None:
    f = qg.jit(lambda x: x * SCALE)
    assert value(f(X)) == 2
    globals()["SCALE"] = 5
    assert value(f(X)) == 5
    globals()["SCALE"] = -0.0
    assert str(value(f(X))) == "-0.0"


def test_items_of_containers_that_change() -> None:
    f = qg.jit(lambda x: x @ PARAMS["w"] * PARAMS["scale"] + sum(LAYERS)[0, 0])
    assert value(f(X)) == 2
    PARAMS["w"] = mx.eye(4) * 4
    assert value(f(X)) == 5
    PARAMS["scale"] = 0.5
    assert value(f(X)) == 3
    LAYERS.append(mx.eye(4))
    assert value(f(X)) == 4


def test_what_a_called_function_reads() -> None:
    f = qg.jit(lambda x: helper(x))
    assert value(f(X)) == 1
    globals()["W"] = mx.eye(4) * 3
    assert value(f(X)) == 3


def test_a_called_function_that_is_bound_anew() -> None:
    f = qg.jit(lambda x: helper(x))
    assert value(f(X)) == 1
    globals()["helper"] = lambda x: x @ W * SCALE
    assert value(f(X)) == 2
    globals()["SCALE"] = 3.0  # read by the new one only
    assert value(f(X)) == 3


def test_two_names_of_one_array_that_become_two_arrays() -> None:
    a = b = mx.eye(4)

    @qg.jit
    def f(x):
        return x @ a + x @ b

    assert value(f(X)) == 2
    b = mx.eye(4) * 10
    assert value(f(X)) == 11


def test_modules_and_dataclasses_are_looked_into() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = mx.eye(4)

    @dataclass
    class Holder:
        w: mx.array

    holder = Holder(mx.eye(4))

    @qg.jit
    def f(x):
        return x @ layer.weight.T + x @ holder.w

    assert value(f(X)) == 2
    layer.weight = mx.eye(4) * 2
    assert value(f(X)) == 3
    holder.w = mx.eye(4) * 5
    assert value(f(X)) == 7


class Model:
    def __init__(self, scale: float) -> None:
        self.w = mx.eye(4)
        self.scale = scale

    @qg.jit
    def forward(self, x):
        return x @ self.w * self.scale

    def plain(self, x):
        return x @ self.w * self.scale


def test_attributes_of_the_self_of_a_jitted_method() -> None:
    one, two = Model(1.0), Model(2.0)
    assert (value(one.forward(X)), value(two.forward(X))) == (1, 2)
    one.w = mx.eye(4) * 3
    one.scale = 10.0
    assert (value(one.forward(X)), value(two.forward(X))) == (30, 2)


def test_attributes_behind_a_jitted_bound_method() -> None:
    model = Model(1.0)
    f = qg.jit(model.plain)
    assert value(f(X)) == 1
    model.w = mx.eye(4) * 3
    assert value(f(X)) == 3


def test_arguments_of_a_partial_and_defaults() -> None:
    f = qg.jit(functools.partial(lambda w, x: x @ w, mx.eye(4) * 2))
    assert value(f(X)) == 2
    keep = [mx.eye(4)]

    @qg.jit
    def g(x, items=keep):
        return x @ items[0]

    assert value(g(X)) == 1
    keep[0] = mx.eye(4) * 6
    assert value(g(X)) == 6


def test_a_nested_jitted_function_reads_its_own_surroundings() -> None:
    inner = qg.jit(lambda x: x @ W)
    outer = qg.jit(lambda x: inner(x) * 2)
    assert value(outer(X)) == 2
    globals()["W"] = mx.eye(4) * 3
    assert value(outer(X)) == 6


def test_numpy_arrays_outside_count_by_identity() -> None:
    table = np.eye(4, dtype=np.float32)
    f = qg.jit(lambda x: x @ mx.array(table) if False else qg.dot(x, table))
    assert value(f(X)) == 1
    table = table * 2
    assert value(f(X)) == 2


def test_a_function_that_counts_its_traces_is_traced_once() -> None:
    traces: list[int] = []

    @qg.jit
    def f(x):
        traces.append(1)
        return x + len(traces)

    assert [value(f(X)) for _ in range(3)] == [2, 2, 2]
    assert [f(mx.ones((n, 4))).shape[0] for n in (1, 2, 3, 2, 1)] == [1, 2, 3, 2, 1]
    assert len(traces) == 3


def test_a_function_that_adds_arrays_to_what_it_reads() -> None:
    cache: dict[str, mx.array] = {"w": mx.eye(4)}

    @qg.jit
    def f(x):
        if "first" not in cache:
            old = cache.pop("w")
            cache["first"] = mx.ones((4, 4)) * 5
            cache["w"] = old
        return x @ cache["w"]

    assert [value(f(X)) for _ in range(3)] == [1, 1, 1]
    cache["w"] = mx.eye(4) * 2
    assert value(f(X)) == 2


def test_an_undefined_global_is_the_users_error_and_may_be_defined_later() -> None:
    f = qg.jit(lambda x: x + defined_later)  # noqa: F821
    with pytest.raises(NameError):
        f(X)
    globals()["defined_later"] = 4
    try:
        assert value(f(X)) == 5
    finally:
        del globals()["defined_later"]


def test_a_cyclic_container_does_not_hang() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    f = qg.jit(lambda x: x * ring[0])
    assert value(f(X)) == 1
    ring[0] = 3
    assert value(f(X)) == 3


def test_a_huge_container_counts_by_identity() -> None:
    vocabulary = dict.fromkeys(range(100_000), 1.0)
    f = qg.jit(lambda x: x * vocabulary[3])
    assert value(f(X)) == 1
    vocabulary = dict.fromkeys(range(100_000), 2.0)
    assert value(f(X)) == 2


def test_captured_arrays_are_not_shared_between_two_functions_of_one_code() -> None:
    def make(w):
        return qg.jit(lambda x: x @ w)

    one, two = make(mx.eye(4)), make(mx.eye(4) * 2)
    assert (value(one(X)), value(two(X)), value(one(X))) == (1, 2, 1)
