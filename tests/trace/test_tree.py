"""Argument trees: flattened and rebuilt exactly, with tokens that tell any two trees apart."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph as qg
from qgraph import TraceError
from qgraph.trace.tree import flatten, paths, unflatten

A, B = mx.zeros(2), mx.ones(3)


class Pair(NamedTuple):
    first: Any
    second: Any


class Other(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Config:
    width: Any
    name: str = "c"


@dataclass
class Mutable:
    width: Any
    name: str = "c"


class Color(enum.IntEnum):
    RED = 1


class Colour(enum.IntEnum):
    RED = 1


STATIC = [None, True, False, 0, 1, -1, -2, 0.0, -0.0, 1.0, float("nan"), float("inf"), "", "leaf",
          b"x", 1j, complex(0, -0.0), mx.float32, Color.RED, Colour.RED, len, int, frozenset()]  # fmt: skip

trees = st.recursive(
    st.sampled_from([A, B, *STATIC]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["a", "b", 1, 1.0, True, -1, -2]), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Other, inner, inner),
        st.builds(Config, inner),
        st.builds(Mutable, inner),
    ),
    max_leaves=8,
)


def flat(tree: Any) -> tuple[list[Any], list[Any]]:
    leaves: list[Any] = []
    spec: list[Any] = []
    flatten(tree, leaves, spec)
    return leaves, spec


def shown(tree: Any) -> str:
    """The whole structure as text: types, keys and statics to the last bit, arrays as holes."""
    if isinstance(tree, mx.array):
        return "array"
    if isinstance(tree, dict):
        return f"{{{', '.join(f'{type(k)} {k!r}: {shown(v)}' for k, v in tree.items())}}}"
    if isinstance(tree, (list, tuple)):
        return f"{type(tree)}({', '.join(map(shown, tree))})"
    if isinstance(tree, (Config, Mutable)):
        return f"{type(tree)}({shown(tree.width)}, {tree.name})"
    return f"{type(tree)} {tree!r}"


@given(trees)
@settings(max_examples=300, deadline=None)
def test_a_tree_is_rebuilt_exactly(tree: Any) -> None:
    leaves, spec = flat(tree)
    again = unflatten(spec, leaves)
    assert shown(again) == shown(tree)
    assert all(a is b for a, b in zip(flat(again)[0], leaves, strict=True))


@given(trees, trees)
@settings(max_examples=300, deadline=None)
def test_tokens_are_equal_exactly_for_equal_structures(a: Any, b: Any) -> None:
    one, two = tuple(flat(a)[1]), tuple(flat(b)[1])
    assert (one == two) == (shown(a) == shown(b))
    hash(one)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([A, B], (A, B)),
        ([[A], B], [[A, B]]),
        ([A, [B]], [[A], B]),
        ([A, []], [A]),
        ((A,), A),
        ({"a": A}, {"b": A}),
        ({"a": A, "b": B}, {"b": A, "a": B}),
        ({1: A}, {True: A}),
        ({1: A}, {1.0: A}),
        ({-1: A}, {-2: A}),
        ({0.0: A}, {-0.0: A}),
        (Pair(A, B), (A, B)),
        (Pair(A, B), Other(A, B)),
        (Config(A), Mutable(A)),
        (Config(A), Config(A, "d")),
        (None, A),
        ([None, A], [A, None]),
        (1, 1.0),
        (1, True),
        (1.0, True),
        (0.0, -0.0),
        ("1", 1),
        (Color.RED, 1),
        (Color.RED, Colour.RED),
        (0j, complex(0, -0.0)),
        ("leaf", A),
        (("list", 0), []),
    ],
)
def test_trees_that_differ_have_other_tokens(a: Any, b: Any) -> None:
    assert flat(a)[1] != flat(b)[1]


def test_nan_is_equal_to_itself() -> None:
    assert flat(float("nan"))[1] == flat(float("nan"))[1]


def test_a_quantized_tensor_and_a_numpy_array_are_leaves() -> None:
    w = qg.quantize(mx.ones((2, 64)))
    leaves, spec = flat({"w": w, "n": np.ones(2, np.float32)})
    assert leaves[0] is w
    assert isinstance(leaves[1], mx.array)
    assert leaves[1].tolist() == [1.0, 1.0]
    assert spec.count("leaf") == 2


def test_what_is_neither_array_nor_hashable_is_refused() -> None:
    for bad in ({1, 2}, bytearray(b"x"), [{1}]):
        with pytest.raises(TraceError, match="neither an array nor hashable") as info:
            flat(bad)
        assert "fix:" in str(info.value)


def test_a_dataclass_is_rebuilt_without_running_its_constructor() -> None:
    @dataclass
    class Checked:
        w: Any

        def __post_init__(self) -> None:
            assert isinstance(self.w, mx.array)

    leaves, spec = flat(Checked(A))
    assert unflatten(spec, ["a traced value"]).w == "a traced value"


def test_paths_name_the_leaves_in_order() -> None:
    found: list[str] = []
    paths({"layers": [{"w": A}, Pair(A, 3)], "c": Config(B)}, "p", found.append)
    assert found == ["p.layers.0.w", "p.layers.1.first", "p.c.width"]
