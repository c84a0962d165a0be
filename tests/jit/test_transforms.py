"""`qg.jit` under MLX's transformations, its laziness, and threads."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import TraceError, kernels
from qgraph.execute.reference import to_numpy
from qgraph.ir.dtypes import F32
from tests.agree import close
from tests.jit.data import normal, weight

# MLX's transformations.


def test_gradients_are_those_of_eager_mlx() -> None:
    f = qg.jit(lambda x, w: qg.mean(qg.silu(x @ w) ** 2))
    x, w = normal(3, 4), normal(4, 5, seed=1)

    def eager(x: mx.array, w: mx.array) -> mx.array:
        y = x @ w
        return mx.mean((y * mx.sigmoid(y)) ** 2)

    for argument in (0, 1):
        assert close(mx.grad(f, argument)(x, w), mx.grad(eager, argument)(x, w))
    value, gradient = mx.value_and_grad(f)(x, w)
    expected, gradient_expected = mx.value_and_grad(eager)(x, w)
    assert close(value, expected)
    assert close(gradient, gradient_expected)
    assert f.cache_info().misses == 1


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_the_gradient_through_a_quantized_product_is_the_one_of_the_unpacked_weight(mode: str) -> None:
    w, x = weight(mode=mode), normal(3, 64)
    f = qg.jit(lambda x, w: qg.sum(qg.tanh(x @ w.T)))
    assert f.optimized(x, w).find("quantized_matmul")
    dense = qg.dequantize(w).astype(mx.float32)
    got = mx.grad(lambda x: f(x, w))(x)
    assert close(got, mx.grad(lambda x: mx.sum(mx.tanh(x @ dense.T)))(x))


def test_gradients_of_adapters_beside_a_quantized_weight() -> None:
    w, x = weight(), normal(3, 64)
    a, b = normal(64, 4, seed=2), normal(4, 32, seed=3)
    f = qg.jit(lambda a, b: qg.sum(qg.tanh(qg.dot(x, w.T) + 2.0 * qg.dot(x, a) @ b)))
    xn, wn, an, bn = map(to_numpy, (x, w, a, b))
    slope = 1 - np.tanh(xn @ wn.T + 2 * (xn @ an) @ bn) ** 2
    for argument, exact in enumerate((2 * xn.T @ slope @ bn.T, 2 * (xn @ an).T @ slope)):
        assert close(mx.grad(f, argument)(a, b), exact)


def test_second_derivatives_and_jvp() -> None:
    f = qg.jit(lambda x: qg.sum(x**3))
    x = mx.array([1.0, 2.0])
    assert mx.grad(lambda x: mx.grad(f)(x).sum())(x).tolist() == [6.0, 12.0]
    assert mx.jvp(f, (x,), (mx.ones(2),))[1][0].item() == 15


def test_vmap_of_a_dense_function() -> None:
    f = qg.jit(lambda x, w: qg.softmax(x @ w + 1.0))
    xs, w = normal(5, 3, 4), normal(4, 6, seed=1)
    got = mx.vmap(f, in_axes=(0, None))(xs, w)
    assert close(got, mx.softmax(xs @ w + 1.0, axis=(1, 2)))
    assert close(mx.vmap(mx.grad(lambda x: f(x, w).max()))(xs)[2], mx.grad(lambda x: f(x, w).max())(xs[2]))
    assert close(f(xs[0], w), got[0])


@pytest.mark.parametrize("eager", [False, True])
def test_vmap_over_a_quantized_product(eager: bool) -> None:
    """Native kernels have a rule for it: along x, and along the scales too."""
    if kernels.library() is None:
        pytest.skip("without the native kernels it is refused")
    w, xs = weight(), normal(5, 3, 64)
    f = (lambda x: qg.dot(x, w.T)) if eager else qg.jit(lambda x: qg.silu(x @ w.T) @ second.T)
    second = weight(1, (64, 32), group_size=32)
    found = mx.vmap(f)(xs)
    for i in range(5):
        assert close(found[i], f(xs[i]), k=96, path="graph")
    packed, scales, biases = w.components()
    product = qg.jit(lambda w: qg.dot(xs[0], w.T))

    def g(s):
        return product(qg.from_quantized(packed, s, biases, bits=4, group_size=64))

    factors = mx.array([1.0, -0.5, 3.0])[:, None, None]
    for got, factor in zip(mx.vmap(g)(scales * factors), factors, strict=True):
        assert close(got, g(scales * factor[0]), k=64, path="graph")


@pytest.mark.usefixtures("mlx_alone")
@pytest.mark.parametrize("eager", [False, True])
def test_vmap_over_a_quantized_product_of_mlx_is_refused_clearly(eager: bool) -> None:
    w, xs = weight(0, (64, 192)), normal(5, 3, 192)  # of which no test has made a program with kernels
    f = qg.jit(lambda x: qg.silu(x @ w.T) @ weight(1, (128, 64), group_size=32).T)
    with pytest.raises(TraceError, match=r"mx\.vmap over a quantized product") as info:
        mx.vmap((lambda x: qg.dot(x, w.T)) if eager else f)(xs)
    assert "fix:" in str(info.value)
    assert f(xs).shape == (5, 3, 128)  # leading axes need no vmap


def test_vmap_over_what_is_not_multiplied_by_packed_words_works() -> None:
    w, x, ys = weight(), normal(3, 64), normal(5, 32, seed=3)
    f = qg.jit(lambda x, y: x @ w.T + y)
    assert close(mx.vmap(f, in_axes=(None, 0))(x, ys)[4], f(x, ys[4]))


def test_jit_under_mx_compile() -> None:
    w, x = weight(), normal(3, 64)
    f = qg.jit(lambda x: qg.silu(x @ w.T) * 3.0 + qg.arange(32))
    g = mx.compile(lambda x: f(x) + 1)
    expected = np.array(f(x)) + 1
    assert close(g(x), mx.array(expected))
    assert close(g(x), mx.array(expected))


def test_a_program_first_made_under_a_transformation_works_outside_too() -> None:
    """Constants of a program are made when it is loaded: maybe while MLX traces."""
    for transform in (mx.vmap, mx.compile, lambda f: mx.grad(lambda x: f(x).sum())):
        f = qg.jit(lambda x: x * 2.5 + 1.5)
        mx.eval(transform(f)(mx.ones((3, 2))))
        assert close(f(mx.ones((3, 2))), mx.full((3, 2), 4.0))
        assert close(f(mx.ones(2)), mx.full((2,), 4.0))


# Laziness.


def test_a_call_does_not_evaluate() -> None:
    """The sum of 2^50 numbers is only ever described."""
    huge = mx.broadcast_to(mx.array(1.0), (1 << 25, 1 << 25))
    f = qg.jit(lambda x: qg.sum(qg.exp(x) @ x.T))
    out = f(huge)
    assert out.shape == ()
    small = qg.jit(lambda x: x[0, 0] + 1)(huge)
    assert small.item() == 2


def test_making_a_program_does_not_evaluate_its_arguments() -> None:
    bad = mx.broadcast_to(mx.array(1.0), (1 << 25, 1 << 25)).sum()
    w = weight()
    f = qg.jit(lambda x, bad: (x @ w.T, bad + 1))
    assert f(normal(1, 64), bad)[0].shape == (1, 32)
    assert f.source(normal(1, 64), bad)


# Threads.


def test_eight_threads_with_mixed_shapes_share_one_cache() -> None:
    w = mx.random.normal((64, 32), key=mx.random.key(1))
    mx.eval(w)
    traces: list[int] = []

    @qg.jit
    def f(x, w, scale):
        traces.append(1)
        return qg.tanh(x @ w) * scale

    barrier, failures = threading.Barrier(8), []

    def work(number: int) -> None:
        try:
            barrier.wait()
            for i in range(10):
                rows, scale = 1 + (number + i) % 4, float(i % 2)
                x = mx.full((rows, 64), 0.01 * number)
                got, expected = np.array(f(x, w, scale)), np.array(mx.tanh(x @ w)) * scale
                if not close(got, expected, F32, 64, magnitude=1.0):
                    failures.append((number, i))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    info = f.cache_info()
    assert (info.misses, info.hits, len(traces)) == (8, 72, 8)


def test_eight_threads_use_one_set_of_quantized_weights() -> None:
    w = weight()
    mx.eval(w.components())
    f = qg.jit(lambda x: x @ w.T)
    expected = np.array(mx.full((2, 64), 0.5) @ qg.dequantize(w).T)
    failures: list[Any] = []

    def work() -> None:
        try:
            for _ in range(5):
                if not close(f(mx.full((2, 64), 0.5)), expected, F32, 64):
                    failures.append("wrong")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert f.cache_info().misses == 1
