"""`qg.jit`: the cache, the trees, nesting, MLX's transformations, laziness and threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from qgraph import TraceError

X = mx.arange(8.0).reshape(2, 4)


def weight(seed: int = 0, shape: tuple[int, ...] = (32, 64), **options: Any) -> qg.QuantizedTensor:
    return qg.quantize(mx.random.normal(shape, key=mx.random.key(seed)), **options)


def normal(*shape: int, seed: int = 7) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def close(a: mx.array, b: mx.array, tolerance: float = 1e-5) -> bool:
    return np.allclose(np.array(a), np.array(b), rtol=tolerance, atol=tolerance)


# The cache.


def test_equal_types_share_a_program_and_others_do_not() -> None:
    f = qg.jit(lambda x: x + 1)
    for x in (mx.ones(2), mx.zeros(2), mx.ones(3), mx.ones((2, 1)), mx.ones(2, mx.float16), mx.ones(2)):
        assert close(f(x), x + 1)
    assert f.cache_info() == (2, 4, 256, 4)
    f.clear_cache()
    assert f.cache_info() == (0, 0, 256, 0)


def test_the_cache_is_bounded_and_drops_the_least_recently_used() -> None:
    f = qg.jit(maxsize=2)(lambda x: x * 2)
    one, two, three = mx.ones(1), mx.ones(2), mx.ones(3)
    f(one), f(two), f(one), f(three)  # drops two
    assert f.cache_info() == (1, 3, 2, 2)
    f(one), f(three)
    assert f.cache_info().hits == 3
    f(two)
    assert f.cache_info().misses == 4


def test_two_weight_sets_of_one_type_share_a_program() -> None:
    f = qg.jit(lambda x, p: x @ p["w"].T)
    x = normal(2, 64)
    for seed in (1, 2):
        w = weight(seed)
        assert close(f(x, {"w": w}), x @ qg.dequantize(w).T, 1e-4)
    assert f.cache_info().misses == 1


@pytest.mark.parametrize(
    "other",
    [weight(bits=8), weight(group_size=32), weight(mode="mxfp4"), weight().T.T, weight(shape=(32, 128))],
)
def test_every_part_of_a_quantized_type_is_in_the_key(other: Any) -> None:
    f = qg.jit(lambda w: w.sum())
    f(weight())
    f(other)
    same = isinstance(other, qg.QuantizedTensor) and other.quantization == weight().quantization
    assert f.cache_info().misses == (1 if same and other.shape == (32, 64) else 2)


def test_static_values_are_told_apart_to_the_last_bit() -> None:
    f = qg.jit(lambda x, s: x * s)
    found = [f(mx.ones(1, mx.float32), s).item() for s in (1, 1.0, True, 0.0, -0.0, 2)]
    assert found == [1, 1, 1, 0, 0, 2]
    assert f.cache_info().misses == 6
    assert str(f(mx.ones(1), -0.0).item()) == "-0.0"
    assert np.isnan(f(mx.ones(1), float("nan")).item())
    assert np.isnan(f(mx.ones(1), float("nan")).item())
    assert f.cache_info().misses == 7


def test_static_numbers_decide_dtypes_as_in_mlx() -> None:
    f = qg.jit(lambda x, s: x * s)
    for s in (2, 2.0, True):
        assert f(mx.array([3]), s).dtype == (mx.array([3]) * s).dtype


def test_statics_can_be_strings_none_and_dtypes() -> None:
    @qg.jit
    def f(x, mode, dtype=None):
        y = qg.exp(x) if mode == "exp" else x
        return y if dtype is None else y.astype(dtype)

    assert close(f(X, "exp"), mx.exp(X))
    assert f(X, "plain", mx.float16).dtype == mx.float16
    assert f(X, mode="plain").dtype == mx.float32


def test_keyword_arguments_and_defaults() -> None:
    @qg.jit
    def f(x, *, scale=2.0, w=None):
        return x * scale if w is None else x @ w

    assert close(f(X), X * 2)
    assert close(f(X, scale=3.0), X * 3)
    assert close(f(x=X, w=mx.eye(4)), X)
    assert close(f(X, w=mx.eye(4)), X)


def test_positional_names_of_inputs_do_not_clash_with_captured_ones() -> None:
    w = mx.ones((2, 4))

    @qg.jit
    def f(captured0, x):
        return captured0 + w + x["a b"] + x["a_b"] + x["a_b.1"]

    zero, one = mx.zeros((2, 4)), mx.ones((2, 4))
    assert f(zero, {"a b": one, "a_b": one * 10, "a_b.1": one * 100}).tolist() == [[112.0] * 4] * 2


# Trees in, trees out.


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass
class Box:
    w: Any
    note: str = "n"


def test_structure_is_part_of_the_signature() -> None:
    f = qg.jit(lambda t: t[0][0] * 10 + len(t))
    a, b = mx.array(1.0), mx.array(2.0)
    assert f([[a], b]).item() == 12
    assert f([[a, b]]).item() == 11
    assert f(([a, b],)).item() == 11
    assert f.cache_info().misses == 3


def test_any_tree_goes_in_and_comes_out() -> None:
    @qg.jit
    def f(tree):
        return {
            "pair": Pair(tree.w["a"] + 1, None),
            "list": [tree.w["b"], 3, "s"],
            "box": Box((tree.w["a"],)),
        }

    out = f(Box({"a": mx.array(1.0), "b": mx.array(5)}))
    assert isinstance(out["pair"], Pair)
    assert out["pair"].a.item() == 2
    assert out["pair"].b is None
    assert out["list"][0].item() == 5
    assert out["list"][1:] == [3, "s"]
    assert isinstance(out["box"], Box)
    assert out["box"].w[0].item() == 1
    assert out["box"].note == "n"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x, [1.0]),
        (lambda x: (x, x), ([1.0], [1.0])),
        (lambda x: None, None),
        (lambda x: (), ()),
        (lambda x: [None, {"k": []}], [None, {"k": []}]),
        (lambda x: 3, 3),
        (lambda x: mx.array([5.0]), [5.0]),
        (lambda x: (qg.exp(x * 0), x, qg.exp(x * 0)), ([1.0], [1.0], [1.0])),
        (lambda x: np.float32(2) * x, [2.0]),
    ],
)
def test_outputs_that_are_inputs_constants_repeated_empty_or_none(function: Any, expected: Any) -> None:
    def plain(tree: Any) -> Any:
        if isinstance(tree, mx.array):
            return tree.tolist()
        if isinstance(tree, dict):
            return {k: plain(v) for k, v in tree.items()}
        return type(tree)(map(plain, tree)) if isinstance(tree, (list, tuple)) else tree

    f = qg.jit(function)
    assert plain(f(mx.array([1.0]))) == expected
    assert plain(f(mx.array([1.0]))) == expected


def test_the_same_array_passed_twice_is_two_inputs() -> None:
    f = qg.jit(lambda a, b: a - b)
    assert f(X, X).sum().item() == 0
    assert close(f(X, X * 0), X)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_quantized_values_and_their_views_are_returned_packed(mode: str) -> None:
    w = weight(mode=mode)
    f = qg.jit(lambda w: (w, w.T, w[8:16], qg.quantize(qg.dequantize(w), mode=mode)))
    same, transposed, part, again = f(w)
    for got in (same, transposed, part, again):
        assert qg.is_quantized(got)
    dense = qg.dequantize(w)
    assert same.packed.tolist() == w.packed.tolist()
    assert close(qg.dequantize(transposed), dense.T)
    assert close(qg.dequantize(part), dense[8:16])
    assert transposed.shape == (64, 32)
    x = normal(3, 64)
    assert close(qg.jit(lambda x, wt: x @ wt)(x, transposed), x @ dense.T, 1e-4)


# Nesting.


def test_a_nested_jitted_function_is_inlined() -> None:
    inner = qg.jit(lambda x, w: qg.silu(x @ w.T))
    outer = qg.jit(lambda x, w: inner(x, w) + inner(x, w))
    x, w = normal(2, 64), weight()
    graph = outer.graph(x, w)
    assert graph.histogram() == {"add": 1, "dot": 1, "silu": 1, "transpose": 1}
    assert close(outer(x, w), 2 * inner(x, w))
    assert inner.cache_info().misses == 1  # by the line above only


def test_recursion_is_unrolled() -> None:
    @qg.jit
    def power(x, n):
        return x if n == 1 else x * power(x, n - 1)

    assert power(mx.array(2.0), 5).item() == 32


def test_an_exception_inside_the_trace_leaves_the_cache_as_it_was() -> None:
    fail = [True]

    @qg.jit
    def f(x):
        if fail[0]:
            raise RuntimeError("not now")
        return x + 1

    with pytest.raises(RuntimeError, match="not now"):
        f(X)
    assert f.cache_info() == (0, 0, 256, 0)
    fail[0] = False
    assert close(f(X), X + 1)
    with pytest.raises(TraceError):
        qg.jit(lambda x: x.item())(X)
    assert close(f(X), X + 1)


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
    assert close(got, mx.grad(lambda x: mx.sum(mx.tanh(x @ dense.T)))(x), 1e-4)


def test_gradients_of_adapters_beside_a_quantized_weight() -> None:
    w, x = weight(), normal(3, 64)
    a, b = normal(64, 4, seed=2), normal(4, 32, seed=3)
    f = qg.jit(lambda a, b: qg.sum(qg.tanh(qg.dot(x, w.T) + 2.0 * qg.dot(x, a) @ b)))
    dense = qg.dequantize(w)
    eager = lambda a, b: mx.sum(mx.tanh(x @ dense.T + 2.0 * (x @ a) @ b))  # noqa: E731
    for argument in (0, 1):
        assert close(mx.grad(f, argument)(a, b), mx.grad(eager, argument)(a, b), 1e-3)


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
    assert close(
        mx.vmap(mx.grad(lambda x: f(x, w).max()))(xs)[2], mx.grad(lambda x: f(x, w).max())(xs[2]), 1e-4
    )
    assert close(f(xs[0], w), got[0])


@pytest.mark.parametrize("eager", [False, True])
def test_vmap_over_a_quantized_product_is_refused_clearly(eager: bool) -> None:
    w, xs = weight(), normal(5, 3, 64)
    f = qg.jit(lambda x: qg.silu(x @ w.T) @ weight(1, (64, 32), group_size=32).T)
    with pytest.raises(TraceError, match=r"mx\.vmap over a quantized product") as info:
        mx.vmap((lambda x: qg.dot(x, w.T)) if eager else f)(xs)
    assert "fix:" in str(info.value)
    assert f(xs).shape == (5, 3, 64)  # leading axes need no vmap


def test_vmap_over_what_is_not_multiplied_by_packed_words_works() -> None:
    w, x, ys = weight(), normal(3, 64), normal(5, 32, seed=3)
    f = qg.jit(lambda x, y: x @ w.T + y)
    assert close(mx.vmap(f, in_axes=(None, 0))(x, ys)[4], f(x, ys[4]))


def test_jit_under_mx_compile() -> None:
    w, x = weight(), normal(3, 64)
    f = qg.jit(lambda x: qg.silu(x @ w.T) * 3.0 + qg.arange(32))
    g = mx.compile(lambda x: f(x) + 1)
    expected = np.array(f(x)) + 1
    assert close(g(x), mx.array(expected), 1e-4)
    assert close(g(x), mx.array(expected), 1e-4)


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
                if not np.allclose(got, expected, atol=1e-5):
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
                if not np.allclose(np.array(f(mx.full((2, 64), 0.5))), expected, atol=1e-4):
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


# Eager.


def attention(x, w, wo):
    q = x @ w.T
    y = qg.softmax(q @ q.T * 0.125) @ q
    return qg.where(y > 0, y, 0.1 * y) @ wo, [y[..., :2].sum()]


@given(st.integers(1, 4), st.sampled_from(["affine", "mxfp8"]))
def test_eager_jitted_and_unjitted_agree(rows: int, mode: str) -> None:
    x, w, wo = normal(rows, 64), weight(mode=mode), normal(32, 8, seed=4)
    f = qg.jit(attention)
    jitted, eager, dense = f(x, w, wo), f.eager(x, w, wo), attention(x, qg.dequantize(w), wo)
    for got in (eager, dense):
        assert close(jitted[0], got[0], 1e-3)
        assert close(jitted[1][0], got[1][0], 1e-3)
        assert isinstance(got[0], mx.array)


def test_eager_shows_numbers_and_takes_branches() -> None:
    seen: list[Any] = []

    @qg.jit
    def f(x, w):
        y = x @ w.T
        seen.append(y[0, 0].item())
        if y.sum() > 1e9:
            return y * 0
        return y

    x, w = normal(2, 64), weight()
    assert close(f.eager(x, w), x @ qg.dequantize(w).T, 1e-4)
    assert isinstance(seen[0], float)
    with pytest.raises(TraceError):
        f(x, w)


def test_qg_functions_run_at_once_outside_a_trace() -> None:
    w, x = weight(), normal(2, 64)
    assert close(qg.dot(x, w.T), x @ qg.dequantize(w).T, 1e-4)
    assert close(qg.silu(X), X * mx.sigmoid(X))


# What can be seen of a program.


def test_source_graph_report_and_result_describe_what_runs() -> None:
    f = qg.jit(lambda x, w: qg.silu(x @ w.T))
    x, w = normal(2, 64), weight()
    assert "mx.quantized_matmul(" in f.source(x, w)
    assert f.graph(x, w).find("dot")
    assert not f.optimized(x, w).find("dot")
    assert f.report(x, w).counts() == {"quantized_matmul": 1}
    assert next(s.name for s in f.result(x, w).history) == "canonicalize"
    assert f.cache_info().misses == 1


def test_the_function_keeps_its_name_and_documentation() -> None:
    @qg.jit
    def layer(x):
        """One layer."""
        return x

    assert (layer.__name__, layer.__doc__) == ("layer", "One layer.")
    assert layer.__wrapped__ is layer.function


def test_a_pipeline_can_be_chosen() -> None:
    f = qg.jit(pipeline="canonicalize,legalize")(lambda x, w: x @ w.T)
    assert f.report(normal(1, 64), weight()).counts() == {"dequantize": 1}
    assert close(f(normal(1, 64), weight()), normal(1, 64) @ qg.dequantize(weight()).T, 1e-4)
