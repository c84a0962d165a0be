"""`qg.jit`: the cache, the trees, nesting, eager calls, and what can be seen of a program."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from qgraph import TraceError
from tests.agree import close
from tests.jit.data import normal, weight

X = mx.arange(8.0).reshape(2, 4)


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
        assert close(f(x, {"w": w}), x @ qg.dequantize(w).T)
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
    assert close(qg.jit(lambda x, wt: x @ wt)(x, transposed), x @ dense.T)


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
        assert close(jitted[0], got[0])
        assert close(jitted[1][0], got[1][0])
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
    assert close(f.eager(x, w), x @ qg.dequantize(w).T)
    assert isinstance(seen[0], float)
    with pytest.raises(TraceError):
        f(x, w)


def test_qg_functions_run_at_once_outside_a_trace() -> None:
    w, x = weight(), normal(2, 64)
    assert close(qg.dot(x, w.T), x @ qg.dequantize(w).T)
    assert close(qg.silu(X), X * mx.sigmoid(X))


# What can be seen of a program.


def test_source_graph_report_and_result_describe_what_runs() -> None:
    f = qg.jit(lambda x, w: qg.silu(x @ w.T))
    x, w = normal(2, 64), weight()
    assert re.search(r"(mx|native)\.quantized_matmul\(", f.source(x, w))
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
    assert close(f(normal(1, 64), weight()), normal(1, 64) @ qg.dequantize(weight()).T)


def test_numpy_arrays_are_arguments_like_any_other() -> None:
    f = qg.jit(lambda tree, w: tree["x"] @ w.T + tree["b"])
    tree = {"x": np.ones((2, 64), np.float32), "b": np.float32(1.0)}
    w = qg.quantize(mx.ones((8, 64)))
    assert f(tree, w).tolist() == [[65.0] * 8] * 2
    assert [v.op.label for v in f.graph(tree, w).inputs] == ["tree.x", "tree.b", "w"]
