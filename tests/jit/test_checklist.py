"""The checklist of a jit's correctness, items 1–6: what a call depends on. Items 7–32 stand beside it."""

from __future__ import annotations

import ast
import functools
import re
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
from qgraph import TraceError
from tests.jit.data import first

X = mx.array([[1.0, 2.0, 3.0, 4.0]])
SCALE = 2.0
W = mx.eye(4)
TABLE: dict[str, Any] = {"scale": 2.0, "rows": [1.0, 2.0]}
MODULE = types.ModuleType("a_module_of_the_users")


class Settings:
    scale = 2.0

    @property
    def doubled(self) -> float:
        return 2 * self.scale

    @staticmethod
    def apply(x: Any) -> Any:
        return x * SCALE

    def method(self, x: Any) -> Any:
        return x * self.scale * SCALE


SETTINGS = Settings()


@pytest.fixture(autouse=True)
def _globals(monkeypatch):
    """Every test starts with these and may change them."""
    for name, value in {"SCALE": 2.0, "W": mx.eye(4), "TABLE": {"scale": 2.0, "rows": [1.0, 2.0]}}.items():
        monkeypatch.setitem(globals(), name, value)
    monkeypatch.setattr(Settings, "scale", 2.0)
    monkeypatch.setitem(globals(), "SETTINGS", Settings())
    MODULE.scale = 2.0


def test_numbering() -> None:
    found: set[int] = set()
    for file in Path(__file__).parent.glob("test_checklist*.py"):
        functions = [
            n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)
        ]
        found |= {int(m[1]) for f in functions if (m := re.match(r"test_j(\d\d)_", f.name))}
    assert found == set(range(1, 33))


# 1. A global number.


def test_j01_a_global_number_that_changes_gives_another_program() -> None:
    f = qg.jit(lambda x: x * SCALE)
    assert first(f(X)) == 2
    globals()["SCALE"] = 5.0
    assert first(f(X)) == 5
    globals()["SCALE"] = 2.0
    assert first(f(X)) == 2
    assert f.cache_info()[:2] == (1, 2)


def _set_settings(value: float) -> None:
    SETTINGS.scale = value


def _set_class(value: float) -> None:
    Settings.scale = value


def _set_module(value: float) -> None:
    MODULE.scale = value


def _set_table(value: float) -> None:
    TABLE["scale"] = value


def _set_scale(value: float) -> None:
    globals()["SCALE"] = value


class Callable:
    def __call__(self, x: Any) -> Any:
        return x * SCALE


CALL = Callable()


@pytest.mark.parametrize(
    ("body", "change"),
    [
        (lambda x: x * SETTINGS.scale, _set_settings),
        (lambda x: x * SETTINGS.scale, _set_class),
        (lambda x: x * SETTINGS.doubled / 2, _set_class),
        (lambda x: x * Settings.scale, _set_class),
        (lambda x: SETTINGS.method(x) / 2, _set_scale),
        (lambda x: Settings.apply(x), _set_scale),
        (lambda x: CALL(x), _set_scale),
        (lambda x: x * MODULE.scale, _set_module),
        (lambda x: x * TABLE["scale"], _set_table),
        (lambda x: functools.reduce(lambda a, b: a * b, [x, SCALE]), _set_scale),
    ],
    ids=["attribute", "of the class", "property", "class", "method", "static method", "callable", "module",
         "item", "inner function"],
)  # fmt: skip
def test_j01_a_number_that_is_reached_through_another_object(body: Any, change: Any) -> None:
    f = qg.jit(body)
    assert first(f(X)) == 2
    change(5.0)
    assert first(f(X)) == 5
    assert f.cache_info()[:2] == (0, 2)


# 2, 3. Global arrays.


def test_j02_a_global_array_that_is_rebound_needs_no_new_program() -> None:
    f = qg.jit(lambda x: x @ W)
    assert first(f(X)) == 1
    globals()["W"] = mx.eye(4) * 3
    assert first(f(X)) == 3
    assert f.cache_info()[:2] == (1, 1)


def test_j02_an_array_in_an_object_a_class_or_a_module_that_is_rebound() -> None:
    SETTINGS.w, MODULE.w = mx.eye(4), mx.eye(4)
    f = qg.jit(lambda x: x @ SETTINGS.w @ MODULE.w)
    assert first(f(X)) == 1
    SETTINGS.w = mx.eye(4) * 3
    assert first(f(X)) == 3
    MODULE.w = mx.eye(4) * 5
    assert first(f(X)) == 15
    assert f.cache_info()[:2] == (2, 1)


def test_j02_an_array_that_mlx_transformed_in_the_trace_is_keyed_by_identity() -> None:
    f = qg.jit(lambda x: x @ W.T)
    assert first(f(X)) == 1
    globals()["W"] = mx.eye(4) * 3
    assert first(f(X)) == 3


def test_j03_a_captured_array_that_is_updated_in_place() -> None:
    w = mx.eye(4)
    f = qg.jit(lambda x: x @ w)
    assert first(f(X)) == 1
    w[:] = 7
    assert first(f(X)) == 70
    w += 1
    assert first(f(X)) == 80


def test_j03_an_array_that_mlx_made_a_constant_of_is_updated_in_place() -> None:
    """``W.T`` is MLX's here: the trace sees a constant, and W is written into later."""
    w, v = mx.eye(4), mx.ones((4, 4))
    f = qg.jit(lambda x: x @ w.T + x @ (v * 2))
    for value in (1.0, 7.0, 7.0, 3.0):
        w[:] = value
        for _ in range(2):
            assert first(f(X)) == 10 * value + 20
    v[0] = 5.0
    assert first(f(X)) == 10 * 3 + 28
    assert f.cache_info().misses == 5  # every write is another constant
    mx.eval(w, v)
    assert first(f(X)) == 10 * 3 + 28
    assert f.cache_info().misses == 5


# 4. Closures.


def test_j04_a_closure_cell_and_a_nonlocal_that_change() -> None:
    scale, w = 2.0, mx.eye(4)

    def change(number: float, array: mx.array) -> None:
        nonlocal scale, w
        scale, w = number, array

    f = qg.jit(lambda x: x @ w * scale)
    assert first(f(X)) == 2
    change(3.0, mx.eye(4))
    assert first(f(X)) == 3
    change(3.0, mx.eye(4) * 2)
    assert first(f(X)) == 6
    assert f.cache_info()[:2] == (1, 2)


def test_j04_what_the_function_itself_wrote_and_others_change_later() -> None:
    state: dict[str, Any] = {"scale": 1.0}

    @qg.jit
    def f(x: Any) -> Any:
        state.setdefault("traced", True)
        return x * state["scale"]

    assert first(f(X)) == 1
    assert first(f(X)) == 1
    assert f.cache_info()[:2] == (1, 1)
    state["scale"] = 3.0
    assert first(f(X)) == 3
    state["scale"] = 4.0
    assert first(f(X)) == 4


# 5. Defaults, partials, bound methods.


def test_j05_a_mutable_default_argument() -> None:
    @qg.jit
    def f(x: Any, items: Any = [2.0, mx.eye(4)], *, more: Any = {"k": 1.0}) -> Any:  # noqa: B006, B008
        return x @ items[1] * items[0] * more["k"]

    assert first(f(X)) == 2
    f.function.__defaults__[0][0] = 3.0
    assert first(f(X)) == 3
    f.function.__defaults__[0][1] = mx.eye(4) * 2
    assert first(f(X)) == 6
    f.function.__kwdefaults__["more"]["k"] = 10.0
    assert first(f(X)) == 60


def test_j05_a_partial_and_what_it_holds() -> None:
    held = [2.0]
    f = qg.jit(functools.partial(lambda items, x, *, w: x @ w * items[0], held, w=mx.eye(4)))
    assert first(f(X)) == 2
    held[0] = 3.0
    assert first(f(X)) == 3


class Layer:
    def __init__(self, k: float) -> None:
        self.k = k
        self.inner = types.SimpleNamespace(shift=0.0)
        self.config = Settings()

    def plain(self, x: Any) -> Any:
        return x * self.k * self.config.scale

    @qg.jit
    def jitted(self, x: Any) -> Any:
        return x * self.k * self.config.scale


@pytest.mark.parametrize("kind", ["jit of a bound method", "jitted method"])
def test_j05_attributes_of_a_bound_method(kind: str) -> None:
    layer = Layer(1.0)
    f = qg.jit(layer.plain) if kind == "jit of a bound method" else layer.jitted
    assert first(f(X)) == 2
    layer.k = 3.0
    assert first(f(X)) == 6
    layer.config.scale = 5.0  # of an object in the object
    assert first(f(X)) == 15


def scaled_by_global(x: Any) -> Any:
    return x * SCALE


@pytest.mark.parametrize("how", ["positional", "keyword", "in a list"])
def test_j05_functions_and_objects_that_are_arguments_have_surroundings_too(how: str) -> None:
    layer = Layer(1.0)

    def call(f: Any, by: Any) -> float:
        return first(f(X, by) if how == "positional" else f(X, by=by) if how == "keyword" else f(X, [by]))

    f = qg.jit(lambda x, by: (by[0] if how == "in a list" else by)(x))
    g = qg.jit(lambda x, by: x * (by[0] if how == "in a list" else by).k)
    assert (call(f, scaled_by_global), call(f, layer.plain), call(g, layer)) == (2, 2, 1)
    globals()["SCALE"] = 5.0
    layer.k = 3.0
    assert (call(f, scaled_by_global), call(f, layer.plain), call(g, layer)) == (5, 6, 3)


def test_j05_a_module_of_mlx_nn_holds_numbers_as_attributes() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0
            self.weight = mx.eye(4)

    layer = Scaled()
    f = qg.jit(lambda x: x @ layer.weight * layer.scale)
    assert first(f(X)) == 2
    layer.scale = 3.0
    assert first(f(X)) == 3
    layer.weight = mx.eye(4) * 2
    assert first(f(X)) == 6


# 6. Instances, and arguments that are written.


def test_j06_two_instances_of_one_class_have_their_own_results() -> None:
    one, two = Layer(1.0), Layer(10.0)
    assert [first(one.jitted(X)), first(two.jitted(X)), first(one.jitted(X))] == [2, 20, 2]


def test_j06_an_argument_that_is_written_is_refused_at_its_line() -> None:
    def f(x: Any) -> Any:
        x[0] = 9
        return x

    with pytest.raises(TraceError, match=r"test_checklist\.py:\d+ in .*x\[0\] = 9"):
        qg.jit(f)(X)
    assert first(qg.jit(lambda x: x.at[0].add(9.0))(X)) == 10
    assert first(X) == 1  # the caller's array is as it was


def test_j06_an_assignment_with_an_operator_changes_the_name_and_not_the_callers_array() -> None:
    def f(x: Any) -> Any:
        x += 9
        return x

    assert first(qg.jit(f)(X)) == 10
    assert first(X) == 1


def test_j06_a_container_that_is_written_in_the_trace_does_not_reach_the_caller() -> None:
    @qg.jit
    def f(tree: Any) -> Any:
        tree["y"] = tree["x"] * 2
        return tree

    given = {"x": X}
    assert first(f(given)["y"]) == 2
    assert list(given) == ["x"]
