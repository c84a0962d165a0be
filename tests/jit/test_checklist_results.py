"""The checklist of a jit's correctness, items 17 and 25: what comes out of a call, and calls in calls."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph import TraceError, kernels
from tests.agree import close
from tests.jit.data import normal, weight

X = mx.array([[1.0, 2.0, 3.0, 4.0]])


# 17. Outputs.


def test_j17_inputs_constants_and_repeated_values_come_out_as_in_eager_code() -> None:
    w = weight()

    def f(x: Any, w: Any) -> Any:
        y = x * 2
        return {"in": x, "w": w, "twice": [y, y], "none": None, "empty": ([], {}, ()), "number": 3,
                "text": "t", "constant": mx.array([5.0]), "nested": ((x + 1,), {"k": [y - 1]})}  # fmt: skip

    found, expected = qg.jit(f)(X, w), f(X, w)
    assert list(found) == list(expected)
    assert found["w"].packed.tolist() == w.packed.tolist()
    for name in ("in", "constant"):
        assert found[name].tolist() == expected[name].tolist()
    assert [y.tolist() for y in found["twice"]] == [y.tolist() for y in expected["twice"]]
    assert (found["none"], found["empty"], found["number"], found["text"]) == (None, ([], {}, ()), 3, "t")
    assert found["nested"][0][0].tolist() == (X + 1).tolist()
    assert found["nested"][1]["k"][0].tolist() == (X * 2 - 1).tolist()


def test_j17_every_branch_keeps_its_own_structure() -> None:
    f = qg.jit(lambda x, kind: {"a": (x,), "b": [x, x + 1]}.get(kind, x))
    for _ in range(2):
        assert isinstance(f(X, "a"), tuple)
        assert [y.tolist() for y in f(X, "b")] == [X.tolist(), (X + 1).tolist()]
        assert f(X, "c").tolist() == X.tolist()
    assert f.cache_info()[:2] == (3, 3)


def test_j17_the_caller_may_write_into_every_output_without_changing_anything_else() -> None:
    """MLX gives new arrays; a program that returns its input, a constant or one value twice must too."""
    for f in (
        qg.jit(lambda x: (x, x)),
        qg.jit(lambda x: (x * 1, x + 0)),
        qg.jit(lambda x: (x + 1, x + 1)),
        qg.jit(lambda x: (x.astype(mx.float32), x.reshape(2))),
        qg.jit(lambda x: (mx.array([1.0, 2.0]), qg.full((2,), 3.0))),
        lambda x: (qg.reshape(x, (2,)), qg.astype(x, mx.float32)),
    ):
        given = mx.array([1.0, 2.0])
        first = [y.tolist() for y in f(given)]
        for i in (0, 1):
            outputs = f(given)
            outputs[i][0] = 99.0
            assert outputs[1 - i].tolist() == first[1 - i]
            assert given.tolist() == [1.0, 2.0]
        assert [y.tolist() for y in f(given)] == first


# 25. Nesting.


def test_j25_nested_jit_recursion_and_jit_of_jit() -> None:
    w, x = weight(), normal(2, 64)
    inner = qg.jit(lambda x, w: qg.silu(x @ w.T))
    outer = qg.jit(lambda x, w: inner(x, w) * 2)
    twice = qg.jit(qg.jit(lambda x, w: qg.silu(x @ w.T) * 2))
    assert outer(x, w).tolist() == twice(x, w).tolist()
    assert close(outer(x, w), inner.eager(x, w) * 2, k=64)

    @qg.jit
    def power(x: Any, n: int) -> Any:
        return x if n == 1 else x * power(x, n - 1)

    assert power(mx.array(2.0), 6).item() == 64


def test_j25_endless_recursion_is_pythons_error_and_the_function_works_afterwards() -> None:
    deep = [True]

    @qg.jit
    def f(x: Any) -> Any:
        return f(x) if deep[0] else x + 1

    with pytest.raises(RecursionError):
        f(X)
    deep[0] = False
    assert f(X).tolist() == (X + 1).tolist()


def test_j25_a_nested_function_that_changes_gives_another_program() -> None:
    holder = [qg.jit(lambda x: x * 2)]
    outer = qg.jit(lambda x: holder[0](x))
    assert outer(X).tolist() == (X * 2).tolist()
    holder[0] = qg.jit(lambda x: x * 3)
    assert outer(X).tolist() == (X * 3).tolist()


def test_j25_inside_grad_vmap_and_compile() -> None:
    f = qg.jit(lambda x, w: qg.sum(qg.tanh(x @ w)))
    x, w = normal(3, 8), normal(8, 5)
    plain = lambda x, w: mx.sum(mx.tanh(x @ w))  # noqa: E731
    for argument in (0, 1):
        assert close(mx.grad(f, argument)(x, w), mx.grad(plain, argument)(x, w))
    assert close(
        mx.vmap(f, in_axes=(0, None))(normal(4, 3, 8), w),
        mx.vmap(plain, in_axes=(0, None))(normal(4, 3, 8), w),
    )
    assert close(mx.compile(f)(x, w), plain(x, w))
    assert close(
        mx.vmap(mx.grad(f), in_axes=(0, None))(normal(4, 3, 8), w)[1], mx.grad(plain)(normal(4, 3, 8)[1], w)
    )
    packed = weight()
    product, xs = qg.jit(lambda x: x @ packed.T), normal(4, 3, 64)
    if kernels.library():
        assert close(mx.vmap(product)(xs), product(xs), k=64)
    else:
        with pytest.raises(TraceError, match=r"mx\.vmap over a quantized product"):
            mx.vmap(product)(xs)
