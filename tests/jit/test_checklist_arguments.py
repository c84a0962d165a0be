"""The checklist of a jit's correctness, items 7–11: what of the arguments tells programs apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.agree import close
from tests.jit.data import first, normal, weight

X = mx.array([[1.0, 2.0, 3.0, 4.0]])


# 7, 8. Python scalars.


def test_j07_a_number_is_static_and_right_and_an_array_in_its_place_needs_one_program() -> None:
    f = qg.jit(lambda x, s: x * s)
    for s in (0.5, 1.5, 2.5):
        assert first(f(X, s)) == s
    assert f.cache_info().misses == 3
    for s in (0.5, 1.5, 2.5):
        assert first(f(X, mx.array(s))) == s
    assert f.cache_info().misses == 4  # the documented way: no program for each value


def test_j08_one_true_and_one_point_zero_are_three() -> None:
    f = qg.jit(lambda x, s: x * s)
    ints = mx.array([3])
    for s in (1, 1.0, True, 1, 1.0, True):
        assert f(ints, s).dtype == (ints * s).dtype
        assert f(ints, s).tolist() == (ints * s).tolist()
    assert f.cache_info().misses == 3


def test_j08_zero_and_minus_zero_are_two() -> None:
    f = qg.jit(lambda x, s: x / (x * s))
    for s in (0.0, -0.0, 0.0, -0.0):
        assert f(mx.array([1.0]), s).item() == (float("inf") if str(s) == "0.0" else float("-inf"))
    assert f.cache_info()[:2] == (2, 2)


def test_j08_minus_zero_as_a_constant_under_mx_compile(monkeypatch) -> None:
    monkeypatch.setenv("QGRAPH_COMPILE", "1")
    f = qg.jit(lambda x: 1.0 / (x * -0.0 + -0.0))
    assert f(mx.array([1.0, 2.0])).tolist() == [float("-inf")] * 2


def test_j08_nan_misses_once() -> None:
    f = qg.jit(lambda x, s: x + s)
    for s in (float("nan"), float("nan"), np.float64("nan").item()):
        assert np.isnan(f(mx.array([1.0]), s).item())
    assert f.cache_info()[:2] == (2, 1)


# 9, 10. Structure.


class Pair(NamedTuple):
    a: Any
    b: Any


class Other(NamedTuple):
    a: Any
    b: Any


@dataclass
class Box:
    a: Any
    b: Any


A, B = mx.array(1.0), mx.array(10.0)
STRUCTURES = [
    [A, B], (A, B), [[A], B], [[A, B]], [A, [B]], [[A], [B]], ((A, B),), {"a": A, "b": B}, {"b": A, "a": B},
    {-1: A, -2: B}, {-2: A, -1: B}, {1: A, 2: B}, {1.0: A, 2: B}, {True: A, 2: B}, {"1": A, 2: B},
    Pair(A, B), Other(A, B), Box(A, B), [A, B, None], [None, A, B], [A, B, ()], [A, B, []], [A, {"b": B}],
]  # fmt: skip


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """The arrays with the whole way to them, types and keys."""
    here = f"{path}/{type(tree).__name__}"
    if isinstance(tree, dict):
        return [item for k, v in tree.items() for item in leaves(v, f"{here}.{k!r}")]
    if isinstance(tree, Box):
        return [*leaves(tree.a, here), *leaves(tree.b, here)]
    if isinstance(tree, list | tuple):
        return [item for i, v in enumerate(tree) for item in leaves(v, f"{here}.{i}of{len(tree)}")]
    return [] if tree is None else [(path, tree)]


def test_j09_every_structure_is_another_program_and_a_second_call_none() -> None:
    seen: list[str] = []

    @qg.jit
    def f(tree: Any) -> Any:
        found = leaves(tree)
        seen.append(str([path for path, _ in found]) + repr(type(tree)))
        return found[0][1] - found[1][1]

    f.warns = False
    for tree in (*STRUCTURES, *STRUCTURES):
        a, b = (v for _, v in leaves(tree))
        assert f(tree).item() == (a - b).item()
    assert f.cache_info()[:2] == (len(STRUCTURES), len(STRUCTURES))
    assert len(set(seen)) >= len(STRUCTURES) - 2  # [A, B, ()] and [A, B, []] have one and the same paths


def test_j09_keys_of_equal_hash_do_not_collide() -> None:
    assert hash(-1) == hash(-2)
    f = qg.jit(lambda tree: tree[-1] * 2 if -1 in tree else tree[-2] * 3)
    assert f({-1: A}).item() == 2
    assert f({-2: A}).item() == 3


def test_j10_positional_keyword_and_default_arguments_give_one_answer() -> None:
    @qg.jit
    def f(x: Any, scale: float = 2.0, *, w: Any = None) -> Any:
        return x * scale if w is None else x @ w * scale

    for found in (f(X), f(X, 2.0), f(x=X), f(X, scale=2.0), f(scale=2.0, x=X), f(X, w=None)):
        assert found.tolist() == (X * 2).tolist()
    assert first(f(X, w=mx.eye(4))) == first(f(X, 2.0, w=mx.eye(4))) == 2


# 11. All parts of the type.


@pytest.mark.parametrize(
    "other",
    [normal(3, 64), normal(2, 64, 1), normal(2, 64).astype(mx.float16), normal(2, 64).astype(mx.bfloat16),
     mx.ones((2, 64), mx.int32), mx.ones((2, 64), mx.uint32), weight(shape=(2, 64))],
    ids=lambda x: str(qg.ops.dispatch.type_of(x)) if hasattr(x, "shape") else str(x),
)  # fmt: skip
def test_j11_shape_rank_and_dtype_of_an_array(other: Any) -> None:
    f = qg.jit(lambda x: qg.sum(x.astype(mx.float32)) * x.ndim)
    f(normal(2, 64))
    assert close(f(other), f.eager(other), k=192)
    assert f.cache_info().misses == 2


KINDS = {
    "bits": weight(bits=8),
    "group": weight(group_size=32),
    "mode": weight(mode="mxfp8"),
    "transposed": weight(shape=(64, 32), group_size=32).T,
    "scales": qg.quantize(normal(32, 64).astype(mx.float16)),
}


@pytest.mark.parametrize("name", KINDS)
def test_j11_every_part_of_a_quantized_type(name: str) -> None:
    f = qg.jit(lambda w: qg.sum(w * 1.0, axis=0))
    f(weight())
    for _ in range(2):
        assert close(f(KINDS[name]), f.eager(KINDS[name]), k=64)
    assert f.cache_info()[:2] == (1, 2)


def test_j11_the_device_is_in_the_key(monkeypatch) -> None:
    f = qg.jit(lambda x: x + 1)
    f(X)
    monkeypatch.setattr("qgraph._jit.mx.default_device", lambda: mx.Device(mx.cpu, 1))
    f(X)
    assert f.cache_info().misses == 2


def test_j11_the_key_compares_fully_and_not_by_hash() -> None:
    class Crowded:
        """All are of one hash, and equal to themselves only."""

        def __init__(self, n: int) -> None:
            self.n = n

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Crowded) and other.n == self.n

        def __hash__(self) -> int:
            return 7

    f = qg.jit(lambda x, c: x * c.n)
    assert [first(f(X, Crowded(n))) for n in (2, 3, 2)] == [2, 3, 2]
    assert f.cache_info()[:2] == (1, 2)
