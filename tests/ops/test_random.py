"""Random numbers: a key decides them, eagerly, traced, compiled, and in MLX itself."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import DTypeError, QGraphError, ShapeError

LOGITS = mx.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
CALLS = [
    ("uniform", (), {"shape": (3, 2)}),
    ("uniform", (1, mx.array([2.0, 3.0])), {"shape": (4, 2)}),
    ("uniform", (), {"shape": (3,), "dtype": mx.bfloat16}),
    ("normal", ((3, 2),), {}),
    ("normal", ((3,),), {"loc": 1.0, "scale": mx.array([1.0, 2.0, 3.0])}),
    ("normal", ((3,), mx.float16), {"scale": 2.0}),
    ("bernoulli", (), {"shape": (8,)}),
    ("bernoulli", (mx.array([0.1, 0.9]),), {}),
    ("randint", (0, 10), {"shape": (5,)}),
    ("randint", (mx.array([0, 5]), 9), {"shape": (3, 2), "dtype": mx.uint8}),
    ("categorical", (LOGITS,), {}),
    ("categorical", (LOGITS, 0), {}),
    ("categorical", (LOGITS,), {"num_samples": 4}),
    ("categorical", (LOGITS,), {"shape": (5, 2)}),
    ("gumbel", ((3,),), {}),
    ("truncated_normal", (-1, mx.array([1.0, 2.0])), {}),
    ("truncated_normal", (-1, 1), {"shape": (3,)}),
    ("permutation", (6,), {}),
    ("permutation", (LOGITS, 1), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS)
def test_a_key_gives_the_numbers_of_mlx_however_it_is_run(name, args, kwargs):
    call = getattr(qg.random, name)
    key = qg.random.key(7)
    expected = getattr(mx.random, name)(*args, key=mx.random.key(7), **kwargs)
    found = call(*args, key=key, **kwargs)
    traced = qg.jit(lambda k: call(*args, key=k, **kwargs))
    for x in (found, traced(key), mx.compile(traced)(key)):
        assert x.dtype == expected.dtype
        assert mx.array_equal(x, expected)
    other = traced(qg.random.key(8))
    assert name in ("bernoulli", "categorical", "permutation", "randint") or not mx.array_equal(
        other, expected
    )


@pytest.mark.parametrize("name", sorted({c[0] for c in CALLS}))
def test_a_hidden_state_is_refused(name):
    args = next(c[1] for c in CALLS if c[0] == name)
    with pytest.raises(QGraphError, match=f"random.{name}: no key") as caught:
        getattr(qg.random, name)(*args)
    assert "qg.random.key(0)" in str(caught.value)


def test_keys_are_split_into_different_ones():
    def f(key):
        a, b, c = qg.random.split(key, 3)
        return [qg.random.uniform(shape=(4,), key=k) for k in (a, b, c)]

    eager, traced = f(qg.random.key(0)), qg.jit(f)(qg.random.key(0))
    assert all(mx.array_equal(x, y) for x, y in zip(eager, traced, strict=True))
    assert not mx.array_equal(eager[0], eager[1])
    assert mx.array_equal(qg.random.split(qg.random.key(3)), mx.random.split(mx.random.key(3)))


def test_two_draws_with_one_key_are_one_node():
    graph = qg.jit(lambda k: qg.random.normal((2,), key=k) + qg.random.normal((2,), key=k)).graph(
        qg.random.key(0)
    )
    assert graph.histogram()["random_normal"] == 1


def test_what_is_no_key_is_refused():
    for bad in (mx.array([1, 2]), mx.array([1, 2, 3], mx.uint32), qg.random.split(qg.random.key(0))):
        with pytest.raises(DTypeError, match=r"qg\.random\.key"):
            qg.random.uniform(key=bad)
    with pytest.raises(DTypeError, match="seed"):
        qg.random.key(-1)


def test_parameters_must_fit():
    key = qg.random.key(0)
    with pytest.raises(ShapeError, match="shape="):
        qg.random.uniform(0, mx.array([1.0, 2.0]), key=key)
    with pytest.raises(ShapeError, match="not both"):
        qg.random.categorical(LOGITS, shape=(2,), num_samples=3, key=key)
    with pytest.raises(DTypeError, match="float32"):
        qg.random.uniform(shape=(2,), dtype=mx.int32, key=key)


def test_categorical_follows_its_logits():
    drawn = np.array(
        qg.random.categorical(mx.log(mx.array([0.2, 0.5, 0.3])), num_samples=4000, key=qg.random.key(1))
    )
    share = np.bincount(drawn, minlength=3) / 4000
    # four standard deviations of a share of n draws
    assert np.all(np.abs(share - [0.2, 0.5, 0.3]) < 4 * np.sqrt(0.25 / 4000))
