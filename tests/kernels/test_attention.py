"""Attention against float64: every mask, layout, dtype and instruction set, few rows and many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.execute.reference import to_numpy
from tests.agree import assert_close
from tests.kernels.everywhere import everywhere, problem

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
HIDDEN = -np.finfo(np.float32).max  # the score of a hidden key: of nothing else, all keys weigh the same
MASKS = ("none", "causal", "bool", "bool of keys", "float", "float of heads", "float32", "turned")


@dataclass(frozen=True)
class Sizes:
    """The axes of one attention."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = 1
    keys: int = 1
    dims: int = 8
    v_dims: int = 8

    @property
    def heads(self):
        return self.kv_heads * self.group


def inputs(rng, sizes, dtype, layout="plain"):
    """Queries, keys and values of order 1; `cache`: a slice of longer memory; `heads last`: transposed."""

    def random(batch, heads, length, dims):
        def normal(*shape):
            return mx.array(rng.normal(size=shape)).astype(dtype)

        if layout == "cache":
            return normal(batch, heads, length + 9, dims)[:, :, 4 : length + 4]
        if layout == "heads last":
            return mx.swapaxes(normal(batch, length, heads, dims), 1, 2)
        if layout == "every second":
            return normal(batch, heads, length, 2 * dims)[..., ::2]
        return normal(batch, heads, length, dims)

    return (
        random(sizes.batch, sizes.heads, sizes.queries, sizes.dims),
        random(sizes.batch, sizes.kv_heads, sizes.keys, sizes.dims),
        random(sizes.batch, sizes.kv_heads, sizes.keys, sizes.v_dims),
    )


def mask_of(kind, rng, sizes, dtype) -> Any:
    batch, heads, queries, keys = sizes.batch, sizes.heads, sizes.queries, sizes.keys
    match kind:
        case "none":
            return None
        case "causal":
            return "causal"
        case "bool":
            return mx.array(rng.random((batch, 1, queries, keys)) < 0.6)
        case "bool of keys":
            return mx.array(rng.random((batch, 1, 1, keys)) < 0.6)
        case "turned":
            return mx.array(rng.random((keys, queries)) < 0.6).T
        case "float of heads":
            return mx.array(rng.normal(size=(heads, 1, keys))).astype(dtype)
        case "float32" if dtype == mx.float32:
            return mx.array(rng.normal(size=(1, heads, queries, keys)).astype(np.float32))
    return mx.array(
        np.where(rng.random((queries, keys)) < 0.3, -np.inf, rng.normal(size=(queries, keys)))
    ).astype(dtype)


def reference(q, k, v, scale, mask=None, sinks=None):
    """The result in float64, and what its error is relative to."""
    q, k, v = (to_numpy(x) for x in (q, k, v))
    group, past = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores, sizes = scale * q @ np.swapaxes(k, -1, -2), scale * abs(q) @ np.swapaxes(abs(k), -1, -2)
    if isinstance(mask, str):
        mask = mx.array(np.arange(k.shape[2]) <= np.arange(q.shape[2])[:, None] + past)
    if mask is not None:
        mask = to_numpy(mask)
        scores = np.where(mask, scores, HIDDEN) if mask.dtype == bool else scores + mask
    if sinks is not None:
        column = np.broadcast_to(to_numpy(sinks)[:, None, None], (*scores.shape[:-1], 1))
        scores = np.concatenate([scores, column], -1)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - np.max(scores, -1, keepdims=True))
    weights = (weights / np.sum(weights, -1, keepdims=True))[..., : k.shape[2]]
    # An error of a score is one of its weight in proportion.
    return weights @ v, (weights * (1 + 2 * np.max(sizes, -1, keepdims=True))) @ abs(v)


def check_everywhere(native, q, k, v, **how):
    scale = how.pop("scale", q.shape[-1] ** -0.5)
    exact, magnitude = reference(q, k, v, scale, **how)
    for name, found in everywhere(
        native, lambda: native.scaled_dot_product_attention(q, k, v, scale=scale, **how)
    ):
        wrong = problem(found, exact, magnitude, q.shape[-1] + k.shape[2])
        assert not wrong, (wrong, name, q.shape, k.shape, v.shape)


@settings(max_examples=60)
@given(
    sizes=st.builds(
        Sizes,
        batch=st.sampled_from((1, 2)),
        kv_heads=st.sampled_from((1, 2)),
        group=st.sampled_from((1, 2, 3, 8)),
        queries=st.sampled_from((1, 2, 4, 9, 33, 70)),
        keys=st.sampled_from((1, 5, 63, 64, 65, 130)),
        dims=st.sampled_from((1, 8, 33, 64, 80, 128)),
        v_dims=st.sampled_from((1, 8, 24, 64, 96, 131)),
    ),
    layout=st.sampled_from(("plain", "cache", "heads last", "every second")),
    mask=st.sampled_from(MASKS),
    sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_attention(native, sizes, layout, mask, sinks, dtype, seed):
    rng = np.random.default_rng(seed)
    q, k, v = inputs(rng, sizes, dtype, layout)
    how: dict[str, Any] = {"mask": mask_of(mask, rng, sizes, dtype)}
    if sinks:
        how["sinks"] = mx.array(rng.normal(size=sizes.heads).astype(np.float32))
    check_everywhere(native, q, k, v, **how)


@pytest.mark.parametrize("dims", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("queries", [1, 40])
def test_dims_of_models(native, queries, dims):
    rng = np.random.default_rng(dims)
    sizes = Sizes(kv_heads=2, group=2, queries=queries, keys=70, dims=dims, v_dims=dims)
    for dtype in DTYPES:
        check_everywhere(native, *inputs(rng, sizes, dtype, "cache"), mask="causal")


@pytest.mark.parametrize("rows", range(1, 20))
def test_every_number_of_rows(native, rows):
    """Few rows share one reading of the keys, one kernel for each number of them."""
    rng = np.random.default_rng(rows)
    sizes = Sizes(group=rows, keys=75, dims=40, v_dims=72)
    check_everywhere(native, *inputs(rng, sizes, mx.bfloat16))


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_long_sequences(native, queries, mask):
    """Pieces of keys are merged; blocks of them change the largest score many times."""
    rng = np.random.default_rng(queries)
    sizes = Sizes(batch=2, kv_heads=2, group=2, queries=queries, keys=1600, dims=32, v_dims=32)
    q, k, v = inputs(rng, sizes, mx.float32)
    sinks = mx.array(rng.normal(size=sizes.heads).astype(np.float32))
    check_everywhere(native, q, k, v, mask=mask_of(mask, rng, sizes, mx.float32), sinks=sinks)


@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("past", [0, 1, 100])
def test_causality(native, queries, past):
    """Values in the future have no influence at all, not even NaN in a block that is skipped."""
    rng = np.random.default_rng(past)
    sizes = Sizes(queries=queries, keys=queries + past, dims=16, v_dims=16)
    q, k, v = inputs(rng, sizes, mx.float32)
    check_everywhere(native, q, k, v, mask="causal")
    changed = mx.concatenate([v[:, :, :past], v[:, :, past : past + 1], 2 + v[:, :, past + 1 :]], axis=2)
    for _, first in everywhere(
        native, lambda: native.scaled_dot_product_attention(q, k, changed, scale=1.0, mask="causal")[:, :, :1]
    ):
        same = native.scaled_dot_product_attention(
            q[:, :, :1], k[:, :, : past + 1], v[:, :, : past + 1], scale=1.0
        )
        wrong = problem(first, to_numpy(same), 50, sizes.keys)
        assert not wrong


@pytest.mark.parametrize("queries", [5, 40])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_rows_that_see_nothing_are_as_in_mlx(native, kind, sinks, queries):
    rng = np.random.default_rng(0)
    sizes = Sizes(group=2, queries=queries, keys=90 if kind != "causal" else 3)
    q, k, v = inputs(rng, sizes, mx.float32)
    seen = rng.random((queries, sizes.keys)) < 0.5
    seen[::3] = False
    masks = {
        "bool": mx.array(seen),
        "float": mx.array(np.where(seen, 0, -np.inf).astype(np.float32)),
        "causal": "causal",
    }
    how = {"scale": 0.5, "mask": masks[kind], "sinks": mx.array([0.5, -0.5]) if sinks else None}
    expected = to_numpy(mx.fast.scaled_dot_product_attention(q, k, v, **how))
    for _, found in everywhere(native, lambda: native.scaled_dot_product_attention(q, k, v, **how)):
        wrong = problem(found, expected, 8, sizes.keys + sizes.dims)
        assert not wrong


@pytest.mark.parametrize(
    ("keys", "window"), [(8, (3, 8)), (128, (0, 70)), (1600, (500, 1100)), (64, (63, 64))]
)
@pytest.mark.parametrize("sinks", [False, True])
def test_keys_that_no_row_sees_are_as_if_they_were_not_there(native, keys, window, sinks):
    """The room of a cache beyond what it holds: its numbers, which may be anything, have no influence."""
    rng = np.random.default_rng(keys)
    sizes = Sizes(batch=2, kv_heads=2, group=2, queries=3, keys=keys, dims=64, v_dims=32)
    q, k, v = inputs(rng, sizes, mx.float32)
    first, end = window
    seen = np.zeros((2, 1, 3, keys), bool)
    seen[..., first:end] = rng.random((2, 1, 3, end - first)) < 0.7
    seen[0, :, 0, first] = seen[1, :, 2, end - 1] = seen[..., (first + end) // 2] = True
    hidden = mx.array(np.where(np.arange(keys) < first, np.nan, np.where(np.arange(keys) < end, 0, np.nan)))
    hidden = hidden.astype(mx.float32)[:, None]
    sink = mx.array([0.5, -0.5, 1.0, 0.0]) if sinks else None
    part = (slice(None), slice(None), slice(first, end))
    exact, magnitude = reference(q, k[part], v[part], 0.125, mask=mx.array(seen[..., first:end]), sinks=sink)
    for name, found in everywhere(
        native,
        lambda: native.scaled_dot_product_attention(
            q, k + hidden, v + hidden, scale=0.125, mask=mx.array(seen), sinks=sink
        ),
    ):
        wrong = problem(found, exact, magnitude, sizes.dims + end - first)
        assert not wrong, (wrong, name)


@pytest.mark.parametrize("queries", [1, 40])
def test_large_scores(native, queries):
    """Scores of 10^4 and more do not overflow, and one key that stands out gives exactly its value."""
    rng = np.random.default_rng(0)
    sizes = Sizes(queries=queries, keys=200, dims=200, v_dims=8)
    q, _, v = inputs(rng, sizes, mx.float32)
    chosen = rng.integers(0, 200, queries)
    q = mx.array(np.eye(200, dtype=np.float32)[chosen])[None, None] * 3e4
    k = mx.eye(200)[None, None]
    for dtype in DTYPES:
        exact = v.astype(dtype)[:, :, mx.array(chosen)]
        for _, found in everywhere(
            native,
            lambda t=dtype: native.scaled_dot_product_attention(*(x.astype(t) for x in (q, k, v)), scale=1.0),
        ):
            assert mx.array_equal(found, exact)


@pytest.mark.parametrize("queries", [2, 40])
def test_nan_stays_in_its_row_and_is_not_lost(native, queries):
    rng = np.random.default_rng(0)
    q, k, v = inputs(rng, Sizes(queries=queries, keys=100), mx.float32)
    bad = np.array(q)
    bad[0, 0, 1, 3] = np.nan
    for _, found in everywhere(
        native, lambda: native.scaled_dot_product_attention(mx.array(bad), k, v, scale=0.3)
    ):
        assert np.isnan(to_numpy(found)).any(-1).tolist() == [[[row == 1 for row in range(queries)]]]
    bad = np.array(k)
    bad[0, 0, 70, 0] = np.nan
    for _, found in everywhere(
        native, lambda: native.scaled_dot_product_attention(q, mx.array(bad), v, scale=0.3)
    ):
        assert np.isnan(to_numpy(found)).all()


@pytest.mark.parametrize("queries", [1, 6])
def test_heads_are_put_together_without_a_copy(native, queries):
    """The result lies in memory as (batch, length, heads, dims): what follows it sees the right numbers."""
    rng = np.random.default_rng(0)
    sizes = Sizes(batch=2, kv_heads=3, queries=queries, keys=11)
    q, k, v = inputs(rng, sizes, mx.float32)

    def result():
        return native.scaled_dot_product_attention(q, k, v, scale=0.3)

    y = result()
    plain = mx.array(to_numpy(y).astype(np.float32))
    together = mx.swapaxes(y, 1, 2).reshape(2, queries, -1)
    assert mx.array_equal(together, mx.swapaxes(plain, 1, 2).reshape(2, queries, -1))
    for f in (
        lambda y: y + 1,
        lambda y: mx.sum(y, axis=1),
        lambda y: y[:, 1:],
        lambda y: y.reshape(2, -1),
        mx.exp,
    ):
        assert_close(f(result()), f(plain))
    assert mx.array_equal(result() * result(), plain * plain)
    assert mx.array_equal(mx.concatenate([result(), plain], axis=2), mx.concatenate([plain, plain], axis=2))


def test_empty(native):
    for shape in ((0, 2, 3, 4), (1, 2, 0, 4)):
        keys = mx.ones((shape[0], 2, 5, 4))
        assert native.scaled_dot_product_attention(mx.ones(shape), keys, keys, scale=1.0).shape == shape
    none = mx.ones((1, 2, 0, 4))
    found = native.scaled_dot_product_attention(mx.ones((1, 2, 3, 4)), none, none, scale=1.0)
    assert mx.array_equal(found, mx.zeros((1, 2, 3, 4)))


def test_dtypes_are_promoted(native):
    x = mx.ones((1, 1, 2, 4))
    for q, k in ((mx.float16, mx.float16), (mx.float16, mx.bfloat16), (mx.bfloat16, mx.float32)):
        found = native.scaled_dot_product_attention(x.astype(q), x.astype(k), x.astype(k), scale=1.0)
        assert found.dtype == mx.result_type(q, k)
        assert mx.array_equal(found, mx.ones(x.shape, found.dtype))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": mx.ones((2, 3, 4))}, "four axes"),
        ({"q": mx.ones((1, 3, 3, 4))}, "multiple"),
        ({"q": mx.ones((2, 2, 3, 4))}, "batches"),
        ({"q": mx.ones((1, 2, 3, 5))}, "last axis"),
        ({"v": mx.ones((1, 2, 6, 4))}, "keys"),
        ({"mask": "full"}, "causal"),
        ({"mask": mx.ones((3, 3))}, "fit|broadcast"),
        ({"mask": mx.ones((1, 1, 1, 3, 5))}, "four axes"),
        ({"mask": mx.ones((3, 5)), "q": mx.ones((1, 2, 3, 4), mx.float16)}, ""),
        ({"sinks": mx.ones((3,))}, "sinks"),
    ],
)
def test_refused(native, changed, message):
    given = {"q": mx.ones((1, 2, 3, 4)), "k": mx.ones((1, 2, 5, 4)), "v": mx.ones((1, 2, 5, 4)), **changed}
    if message:
        with pytest.raises(ValueError, match=message):
            native.scaled_dot_product_attention(scale=1.0, **given)
        return
    half = {name: x.astype(mx.float16) if name in "qkv" else x for name, x in given.items()}
    with pytest.raises(ValueError, match="promote"):
        native.scaled_dot_product_attention(scale=1.0, **half)


@pytest.mark.parametrize("mask", ["none", "causal", "float of heads", "bool"])
def test_gradients_and_vmap(native, mask):
    rng = np.random.default_rng(0)
    sizes = Sizes(batch=2, kv_heads=2, group=2, queries=3, keys=5)
    q, k, v = inputs(rng, sizes, mx.float32)
    how = {
        "scale": 0.3,
        "mask": mask_of(mask, rng, sizes, mx.float32),
        "sinks": mx.array([0.1, -0.4, 0.3, 0.2]),
    }

    def gradients(attention):
        return mx.grad(lambda q, k, v: mx.sum(mx.sin(attention(q, k, v, **how))), argnums=(0, 1, 2))(q, k, v)

    expected = gradients(mx.fast.scaled_dot_product_attention)
    for mine, theirs in zip(gradients(native.scaled_dot_product_attention), expected, strict=True):
        wrong = problem(mine, to_numpy(theirs), 8, 64)
        assert not wrong
    if mask == "bool":
        return  # of the batch, which the mapped axis adds to
    stacked = [mx.stack([x, x + 1]) for x in (q, k, v)]
    found = mx.vmap(lambda q, k, v: native.scaled_dot_product_attention(q, k, v, **how))(*stacked)
    for i in range(2):
        exact, magnitude = reference(*(x[i] for x in stacked), **how)
        wrong = problem(found[i], exact, magnitude, 64)
        assert not wrong
