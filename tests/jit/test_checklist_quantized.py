"""The checklist of a jit's correctness, items 18–24: quantized operands."""

from __future__ import annotations

import gc
import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import DTypeError, ShapeError, StrictError
from qgraph.execute.reference import to_numpy
from tests.agree import agree, assert_close, close, magnitude_of
from tests.jit.data import normal, weight

MODES = [{"bits": 4}, {"bits": 8, "group_size": 32}, {"mode": "mxfp4"}, {"mode": "nvfp4"}]
IDS = ["affine4", "affine8g32", "mxfp4", "nvfp4"]


def dense(w: qg.QuantizedTensor) -> mx.array:
    return qg.dequantize(w).astype(mx.float32)


# 18. Two users of one value.


@pytest.mark.parametrize("options", MODES, ids=IDS)
def test_j18_a_value_with_two_users_of_which_one_is_matched(options: Any) -> None:
    w, x = weight(**options), normal(3, 64)

    def f(x: Any, w: Any) -> Any:
        t = w.T
        y = x @ t
        return qg.silu(y), y + 1, t, qg.sum(w, axis=0), x @ t[:, :16]

    graph = agree(qg.jit(f), x, w)
    assert graph.find("quantized_matmul")


def test_j18_a_matched_value_that_is_an_output_too() -> None:
    w, x = weight(), normal(3, 64)
    a, b = normal(64, 4, seed=1), normal(4, 32, seed=2)

    def f(x: Any, w: Any, a: Any, b: Any) -> Any:
        base = x @ w.T
        low = x @ a
        return base + 2.0 * (low @ b), base, low

    agree(qg.jit(f), x, w, a, b)


def test_j18_weights_that_the_caller_drops_are_freed() -> None:
    f = qg.jit(lambda x, w: x @ w.T)
    x = normal(1, 1024)
    mx.eval(f(x, weight(shape=(1024, 1024))))
    gc.collect()
    before = mx.get_active_memory()
    w = weight(1, shape=(1024, 1024))
    mx.eval(f(x, w), w.components())
    assert mx.get_active_memory() > before
    del w
    gc.collect()
    assert mx.get_active_memory() <= before


def test_j18_a_weight_outside_that_is_rebound_is_freed() -> None:
    w = weight(shape=(1024, 1024))
    f = qg.jit(lambda x: x @ w.T)
    x = normal(1, 1024)
    mx.eval(f(x), w.components())
    gc.collect()
    before = mx.get_active_memory()
    for seed in range(3):
        w = weight(seed, shape=(1024, 1024))
        mx.eval(f(x), w.components())
    gc.collect()
    assert mx.get_active_memory() <= before


# 19. Uses outside a product.

USES = {
    "returned": lambda x, w: w,
    "added": lambda x, w: w + 1.0,
    "multiplied by itself": lambda x, w: w * w,
    "sliced": lambda x, w: w[4:8],
    "sliced inside a group": lambda x, w: w[:, 3:9],
    "one element": lambda x, w: w[2, 5],
    "summed": lambda x, w: qg.sum(w, axis=1),
    "compared": lambda x, w: w > 0,
    "in where": lambda x, w: qg.where(w > 0, w, 0.0),
    "cast": lambda x, w: w.astype(mx.float16),
    "reshaped": lambda x, w: qg.reshape(w, (4, 8, 64)),
    "flattened": lambda x, w: qg.reshape(w, (-1,)),
    "transposed and added": lambda x, w: w.T + x[0][:, None],
    "concatenated": lambda x, w: qg.concatenate([w, w * 2.0]),
    "stacked packed": lambda x, w: qg.concatenate([w, w]),
    "taken": lambda x, w: qg.take(w, [3, 0, 31], axis=0),
    "in a norm": lambda x, w: qg.rms_norm(w, x[0], 1e-5),
    "and in a product": lambda x, w: x @ w.T + qg.sum(w, axis=1),
    "argmax": lambda x, w: qg.argmax(w, axis=1),
}


@pytest.mark.parametrize("options", MODES, ids=IDS)
@pytest.mark.parametrize("name", USES)
def test_j19_every_other_use_means_the_numbers_and_never_the_words(name: str, options: Any) -> None:
    w, x = weight(**options), normal(3, 64)
    f = qg.jit(USES[name])
    agree(f, x, w)
    eager, found = f.eager(x, w), f(x, w)
    dense_found = USES[name](x, dense(w)) if name not in ("in where", "cast", "compared", "argmax") else None
    for other in (eager, dense_found):
        if other is not None:
            assert found.shape == other.shape
            a, b = (qg.dequantize(y) if qg.is_quantized(y) else y for y in (found, other))
            assert close(a.astype(mx.float32), b.astype(mx.float32), k=64)


def test_j19_the_graph_shows_the_unpacking_at_the_users_line_and_products_strictly_refuse_it() -> None:
    w, x = weight(), normal(3, 64)
    (unpacked,) = qg.jit(lambda x, w: w + 1.0).optimized(x, w).find("dequantize")
    assert str(unpacked.origin.source).startswith("test_checklist_quantized.py:")
    cut = lambda x, w: x[:, :32] @ w[:, :32].T  # noqa: E731
    assert "test_checklist_quantized.py" in str(qg.jit(cut).report(x, w))
    with pytest.raises(StrictError, match=r"test_checklist_quantized\.py"):
        qg.jit(strict=True)(cut)(x, w)


# 20. Degenerate and strided operands.


@pytest.mark.parametrize("options", MODES, ids=IDS)
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((0, 64), 32), ((3, 64), 0), ((0, 64), 0), ((2, 0, 3, 64), 32), ((0, 3, 64), 32)],
    ids=["M = 0", "N = 0", "M = N = 0", "batch = 0", "first axis 0"],
)
def test_j20_zero_sizes_give_what_the_dense_product_gives(shape: Any, rows: int, options: Any) -> None:
    w = weight(**options)[:rows]
    f = qg.jit(lambda x, w: qg.silu(x @ w.T))
    x = mx.zeros(shape)
    for found in (f(x, w), f.eager(x, w)):
        mx.eval(found)
        assert found.shape == (*shape[:-1], rows)


def test_j20_k_zero() -> None:
    f = qg.jit(lambda x, w: x @ w.T)
    for found in (f(mx.zeros((3, 0)), mx.zeros((5, 0))), f(mx.zeros((3, 64))[:, :0], weight()[:, :0])):
        assert found.tolist() == np.zeros(found.shape).tolist()
        assert found.shape[0] == 3


VIEWS = {
    "rank 1": lambda: normal(64),
    "rank 5": lambda: normal(2, 1, 2, 3, 64),
    "broadcast": lambda: mx.broadcast_to(normal(1, 64), (5, 64)),
    "broadcast batch": lambda: mx.broadcast_to(normal(1, 3, 64), (4, 3, 64)),
    "strided": lambda: normal(6, 128)[::2, ::2],
    "reversed": lambda: normal(3, 64)[::-1, ::-1],
    "transposed": lambda: normal(64, 5).T,
    "swapped axes": lambda: mx.swapaxes(normal(4, 64, 3), 1, 2),
    "one column repeated": lambda: mx.broadcast_to(normal(3, 1), (3, 64)),
}


@pytest.mark.parametrize("options", MODES, ids=IDS)
@pytest.mark.parametrize("view", VIEWS)
def test_j20_views_as_activations(view: str, options: Any) -> None:
    w, x = weight(**options), VIEWS[view]()
    f = qg.jit(lambda x, w: x @ w.T)
    agree(f, x, w)
    exact = to_numpy(x) @ to_numpy(w).T
    assert_close(f(x, w), exact, k=64, path="P2", magnitude=magnitude_of(x, w))


# 21. Which transpose.


def matrix(rows: int = 64) -> qg.QuantizedTensor:
    return weight(shape=(rows, 64))


TRANSPOSES = {
    "T": (lambda w: w.T, True),
    "twice": (lambda w: w.T.T, False),
    "three times": (lambda w: w.T.T.T, True),
    "swapaxes": (lambda w: qg.swapaxes(w, 0, 1), True),
    "swapaxes negative": (lambda w: qg.swapaxes(w, -1, -2), True),
    "swapaxes of one axis": (lambda w: qg.swapaxes(w, 1, 1), False),
    "transpose in place": (lambda w: qg.transpose(w, (0, 1)), False),
    "moveaxis": (lambda w: qg.moveaxis(w, 0, 1), True),
    "under a reshape that splits rows": (lambda w: qg.reshape(qg.reshape(w, (2, 32, 64)), (64, 64)).T, True),
    "through a reshape that mixes": (lambda w: qg.reshape(w.T, (32, 128)).reshape(64, 64), None),
}


@pytest.mark.parametrize("options", MODES, ids=IDS)
@pytest.mark.parametrize("name", TRANSPOSES)
def test_j21_only_a_transpose_of_the_last_two_axes_is_one(name: str, options: Any) -> None:
    """The weight is square: a wrong orientation has the right shape."""
    view, transposed = TRANSPOSES[name]
    w, x = weight(shape=(64, 64), **options), normal(3, 64)
    graph = agree(qg.jit(lambda x, w: x @ view(w)), x, w)
    found = [node.op.transpose for node in graph.find("quantized_matmul")]
    if transposed is not None and options == {"bits": 4}:
        assert found == [transposed]


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)])
def test_j21_swapped_axes_of_a_stack_of_square_matrices(axes: tuple[int, int]) -> None:
    w = weight(shape=(64, 64, 64))
    agree(qg.jit(lambda x, w: x @ qg.swapaxes(w, *axes)), normal(64, 3, 64), w)


# 22. LoRA.

LORA = {
    "alpha on the left": lambda y, x, a, b, s: y + s * ((x @ a) @ b),
    "alpha on the right": lambda y, x, a, b, s: y + ((x @ a) @ b) * s,
    "alpha inside": lambda y, x, a, b, s: y + ((x @ a) * s) @ b,
    "alpha on a": lambda y, x, a, b, s: y + (x @ (s * a)) @ b,
    "alpha on b": lambda y, x, a, b, s: y + (x @ a) @ (b * s),
    "alpha twice": lambda y, x, a, b, s: y + s * (((x @ a) @ b) * s),
    "divided": lambda y, x, a, b, s: y + ((x @ a) @ b) / s,
    "branch first": lambda y, x, a, b, s: s * ((x @ a) @ b) + y,
    "subtracted": lambda y, x, a, b, s: y - s * ((x @ a) @ b),
    "a product of three": lambda y, x, a, b, s: y + s * (x @ (a @ b)),
    "negated": lambda y, x, a, b, s: -(y + s * ((x @ a) @ b)),
    "dropout between": lambda y, x, a, b, s: y + s * ((qg.where(x > 0, x * 2.0, 0.0) @ a) @ b),
    "an activation between": lambda y, x, a, b, s: y + s * (qg.tanh(x @ a) @ b),
    "twice the base": lambda y, x, a, b, s: y + y + s * ((x @ a) @ b),
    "a bias": lambda y, x, a, b, s: y + 1.5 + s * ((x @ a) @ b),
    "cast": lambda y, x, a, b, s: y + (s * ((x @ a) @ b)).astype(mx.float32),
}
SCALES = {
    "number": lambda: 2.5,
    "0-d array": lambda: mx.array(2.5),
    "one element": lambda: mx.array([2.5]),
    "a row": lambda: normal(1, 4),
}
RESULT_ROWS = {"alpha inside", "alpha on a"}  # where a row of 4 fits the rank


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spelling", LORA)
def test_j22_every_spelling_of_lora_is_right_or_not_matched(spelling: str, scale: str) -> None:
    s = SCALES[scale]()
    if scale == "a row" and spelling not in RESULT_ROWS:
        s = normal(1, 32)
    w, x = weight(), normal(3, 64)
    a, b = normal(64, 4, seed=1), normal(4, 32, seed=2)
    agree(qg.jit(lambda x, w, a, b, s: LORA[spelling](x @ w.T, x, a, b, s)), x, w, a, b, s)


def test_j22_rank_zero_and_adapters_that_two_layers_share() -> None:
    w, v, x = weight(), weight(5), normal(3, 64)
    agree(
        qg.jit(lambda x, w, a, b: x @ w.T + 2.0 * ((x @ a) @ b)), x, w, mx.zeros((64, 0)), mx.zeros((0, 32))
    )
    a, b = normal(64, 4, seed=1), normal(4, 32, seed=2)

    def shared(x: Any, w: Any, v: Any, a: Any, b: Any) -> Any:
        low = x @ a
        return x @ w.T + 2.0 * (low @ b), x @ v.T + 3.0 * (low @ b)

    agree(qg.jit(shared), x, w, v, a, b)


def test_j22_two_adapters_on_one_base() -> None:
    w, x = weight(), normal(3, 64)
    parts = [normal(*shape, seed=i) for i, shape in enumerate([(64, 4), (4, 32), (64, 2), (2, 32)])]
    f = qg.jit(lambda x, w, a, b, c, d: x @ w.T + 2.0 * ((x @ a) @ b) + 0.5 * ((x @ c) @ d))
    agree(f, x, w, *parts)


# 23. The wrong K.


def test_j23_another_k_is_an_error_at_trace_time_that_names_all_of_it() -> None:
    """Shapes do not tell 4 bits in groups of 64 from 8 bits in groups of 32: the activation's K does."""
    parts = mx.quantize(normal(32, 128), bits=4, group_size=64)
    wrong = qg.from_quantized(*parts, bits=8, group_size=32)  # half as many columns; every shape fits
    assert wrong.shape == (32, 64)
    model = {"layers": [{"q_proj": wrong}]}

    @qg.jit
    def f(x: Any, model: Any) -> Any:
        with qg.scope("layers.0.q_proj"):
            return x @ model["layers"][0]["q_proj"].T

    with pytest.raises(ShapeError, match=r"inner sizes differ, 128 .* and 64") as info:
        f(normal(3, 128), model)
    text = str(info.value)
    assert "affine8g32" in text  # bits and group
    assert re.search(r"test_checklist_quantized\.py:\d+ in .*q_proj", text)  # the layer, at its line
    assert f.cache_info().currsize == 0
    right = qg.from_quantized(*parts, bits=4, group_size=64)
    assert f(normal(3, 128), {"layers": [{"q_proj": right}]}).shape == (3, 32)


def test_j23_bits_and_groups_that_do_not_exist() -> None:
    parts = mx.quantize(normal(32, 128), bits=4, group_size=64)
    for options in (
        {"bits": 0, "group_size": 64},
        {"bits": 7, "group_size": 64},
        {"bits": 4, "group_size": 0},
    ):
        with pytest.raises(DTypeError):
            qg.from_quantized(*parts, **options)


# 24. Mixed dtypes, and NaN.

FLOATS = [mx.float32, mx.float16, mx.bfloat16]


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
def test_j24_the_output_has_the_dtype_of_the_unrewritten_graph(x_dtype: Any, w_dtype: Any) -> None:
    w = qg.quantize(normal(32, 64).astype(w_dtype))
    x = normal(3, 64, seed=1).astype(x_dtype)
    f = qg.jit(lambda x, w: x @ w.T)
    result = f.result(x, w)
    kinds = {str(g.outputs[0].type.dtype) for g in (result.before, result.graph)}
    found = f(x, w)
    assert len(kinds) == 1
    assert found.dtype == (x @ qg.dequantize(w).T).dtype
    exact = to_numpy(x) @ to_numpy(w).T
    assert_close(found, exact, k=64, path="P2", magnitude=magnitude_of(x, w))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", MODES, ids=IDS)
@pytest.mark.parametrize("rows", [1, 2, 9, 33])
def test_j24_nan_and_infinity_in_one_row_stay_there(rows: int, options: Any, value: float) -> None:
    w, x = weight(**options), normal(rows, 64)
    f = qg.jit(lambda x, w: x @ w.T)
    clean = f(x, w)
    bad = rows // 2
    found = f(x.at[bad, 3].add(value), w)
    assert not np.isfinite(np.array(found)[bad]).any()
    others = [i for i in range(rows) if i != bad]
    assert np.array(found)[others].tolist() == np.array(clean)[others].tolist()


def test_j24_an_integer_beside_a_quantized_weight_is_promoted() -> None:
    x, w = mx.array([[3] * 64, [-2] * 64]), weight()
    assert_close(qg.jit(lambda x, w: x @ w.T)(x, w), to_numpy(x) @ to_numpy(w).T, k=64)
