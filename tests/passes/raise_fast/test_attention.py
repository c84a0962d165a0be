"""scaled_dot_product_attention from two products around a softmax."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from qgraph.ops.attention import Attention
from tests.agree import normal
from tests.passes.raise_fast.raised import PIPELINE, raised, reasons, same_as_mlx

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
NAME = "scaled_dot_product_attention"
INF = float("inf")


def turned(k):
    return qg.swapaxes(k, -1, -2)


def op(f, *args):
    """The one attention that the pass made."""
    (node,) = qg.jit(f, pipeline=PIPELINE).result(*args).after("raise-fast").find(NAME)
    assert isinstance(node.op, Attention)
    return node.op


def operands(batch=2, heads=4, served=2, queries=3, keys=5, features=8, values=6, dtype=mx.float32):
    return (
        normal(batch, heads, queries, features, dtype=dtype),
        normal(batch, served, keys, features, dtype=dtype),
        normal(batch, served, keys, values, dtype=dtype),
    )


def booleans(*shape):
    """A mask that hides no row whole."""
    mask = normal(*shape) > -0.3
    return mx.concatenate([mx.ones_like(mask[..., :1]), mask[..., 1:]], axis=-1)


SCALES = {
    "at q": lambda q, k: (q * 0.3) @ turned(k),
    "at k": lambda q, k: q @ turned(k * 0.3),
    "at k turned": lambda q, k: q @ (turned(k) * 0.3),
    "at both": lambda q, k: (0.6 * q) @ turned(k / 2),
    "at scores": lambda q, k: (q @ turned(k)) * 0.3,
    "divided": lambda q, k: (q @ turned(k)) / (1 / 0.3),
}
# How keys that serve two heads each meet them: what is done to q, to k or v, and to the result.
GROUPS = {
    "repeat": (lambda q: q, lambda k: qg.repeat(k, 2, axis=1), lambda o: o),
    "two axes": (
        lambda q: qg.unflatten(q, 1, (-1, 2)),
        lambda k: k[:, :, None],
        lambda o: qg.flatten(o, 1, 2),
    ),
    "two axes, broadcast": (
        lambda q: qg.unflatten(q, 1, (-1, 2)),
        lambda k: qg.broadcast_to(k[:, :, None], (*k.shape[:2], 2, *k.shape[2:])),
        lambda o: qg.flatten(o, 1, 2),
    ),
}
MASKS = {
    "none": lambda scores, m: scores,
    "added": lambda scores, m: scores + qg.astype(qg.where(m, 0.0, -1e9), scores.dtype),
    "added -inf": lambda scores, m: scores + qg.astype(qg.where(m, 0.0, -INF), scores.dtype),
    "chosen": lambda scores, m: qg.where(m, scores, -1e9 if scores.dtype == mx.float32 else -6e4),
    "chosen -inf": lambda scores, m: qg.where(m, scores, -INF),
    "dropped": lambda scores, m: qg.where(qg.logical_not(m), -6e4, scores),
}
SOFTMAX = {
    "softmax": lambda s: qg.softmax(s, axis=-1),
    "in f32": lambda s: qg.astype(qg.softmax(qg.astype(s, mx.float32), axis=-1), s.dtype),
    "written out": lambda s: (lambda e: e / qg.sum(e, axis=-1, keepdims=True))(
        qg.exp(s - qg.max(s, axis=-1, keepdims=True))
    ),
}


@given(
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "served": st.integers(1, 2),
            "queries": st.integers(1, 3),
            "keys": st.integers(1, 4),
            "features": st.sampled_from([1, 4]),
            "values": st.sampled_from([1, 3]),
        }
    ),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from(sorted(SCALES)),
    groups=st.sampled_from(sorted(GROUPS)),
    mask=st.sampled_from(sorted(MASKS)),
    softmax=st.sampled_from(sorted(SOFTMAX)),
)
def test_every_spelling_is_one_op(sizes, dtype, scale, groups, mask, softmax):
    for_q, for_k, back = GROUPS[groups]

    def f(q, k, v, m):
        scores = MASKS[mask](SCALES[scale](for_q(q), for_k(k)), m)
        return back(SOFTMAX[softmax](scores) @ for_k(v))

    args = operands(heads=2 * sizes["served"], **sizes, dtype=dtype)
    counts = raised(f, *args, booleans(sizes["queries"], sizes["keys"]))
    assert counts[NAME] == 1
    assert not set(counts) & {"softmax", "dot", "broadcast_to", "exp", "multiply"}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("served", [2, 4])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    "mask",
    [
        None,
        "causal",
        (3, 5),
        (1, 3, 5),
        (2, 1, 3, 5),
        (2, 4, 3, 5),
        (1, 4, 1, 5),
        (4, 3, 1),
        (1, 1, 1, 1),
        (5,),
    ],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_what_mlx_writes_for_its_attention_is_raised_and_runs_bit_by_bit_the_same(
    sinks, mask, queries, served, dtype
):
    q, k, v = operands(served=served, queries=queries, dtype=dtype)
    extra = {"sinks": normal(4, dtype=dtype)} if sinks else {}
    if isinstance(mask, tuple):
        shape = tuple(min(n, queries) if i == len(mask) - 2 else n for i, n in enumerate(mask))
        masks = [normal(*shape, dtype=dtype), booleans(*shape)]
    else:
        masks = [mask]
    for m in masks:
        arrays = {**extra, **({"m": m} if isinstance(m, mx.array) else {})}

        def f(q, k, v, *rest, m=m, names=tuple(arrays)):
            given = dict(zip(names, rest, strict=True))
            fast = mx.fast.scaled_dot_product_attention
            return fast(q, k, v, scale=0.3, mask=given.pop("m", m), **given)

        assert same_as_mlx(f, q, k, v, *arrays.values()) == {NAME: 1}


@pytest.mark.parametrize("rank", [2, 3])
def test_attention_of_fewer_axes(rank):
    def f(q, k, v):
        return qg.softmax(q @ turned(k) * 0.3, axis=-1) @ v

    args = [x[0] if rank == 3 else x[0, 0] for x in operands(served=4)]
    assert raised(f, *args) == {NAME: 1, "reshape": 4}


def test_heads_that_are_transposed_into_place():
    """(batch, length, heads, features), and the keys turned by the same transpose."""

    def f(q, k, v):
        q, v = (qg.transpose(x, (0, 2, 1, 3)) for x in (q, v))
        return qg.softmax(q @ qg.transpose(k, (0, 2, 3, 1)) * 0.3, axis=-1) @ v

    args = [normal(2, n, 4, d, seed=n + d) for n, d in ((3, 8), (5, 8), (5, 6))]
    counts = raised(f, *args)
    assert counts.pop(NAME) == 1
    assert set(counts) == {"transpose"}


def test_a_result_in_f32_is_not_rounded_to_16_bit():
    def f(q, k, v):
        return qg.softmax(qg.astype(q @ turned(k), mx.float32), axis=-1) @ v

    args = operands(served=4, dtype=mx.bfloat16)
    assert raised(f, *args)[NAME] == 1
    assert qg.jit(f)(*args).dtype == mx.float32


def test_the_exact_scale_is_read():
    def f(q, k, v):
        return qg.softmax(q @ turned(k) / math.sqrt(8), axis=-1) @ v

    assert op(f, *operands(served=4)).scale == 1 / math.sqrt(8)


@pytest.mark.parametrize("first", [True, False])
def test_sinks_before_or_behind_the_scores(first):
    def f(q, k, v, sinks):
        column = qg.broadcast_to(qg.reshape(sinks, (1, -1, 1, 1)), (*q.shape[:3], 1))
        scores = q @ turned(k) * 0.3
        wide = qg.softmax(qg.concatenate([column, scores] if first else [scores, column], axis=-1), axis=-1)
        return (wide[..., 1:] if first else wide[..., :-1]) @ v

    args = (*operands(served=4), normal(4))
    assert raised(f, *args) == {NAME: 1}
    assert op(f, *args).sinks


def attention(change=lambda s: s, after=lambda p: p):
    return lambda q, k, v: after(qg.softmax(change(q @ turned(k) * 0.3), axis=-1)) @ v


def first_column_kept(q, k, v):
    column = qg.broadcast_to(qg.arange(4, dtype=mx.float32)[:, None, None], (*q.shape[:3], 1))
    wide = qg.softmax(qg.concatenate([column, q @ turned(k)], axis=-1), axis=-1)
    return wide[..., :-1] @ v


def other_sinks(q, k, v):
    column = qg.broadcast_to(qg.arange(2, dtype=mx.float32)[:, None, None, None], (*q.shape[:3], 1))
    wide = qg.softmax(qg.concatenate([column, q @ turned(k)], axis=-1), axis=-1)
    return wide[..., 1:] @ v


def tiled(q, k, v):
    """Head 2 is served by key head 0, where a repeat has it served by 1."""
    few = [qg.tile(x[:, :2], (1, 2, 1, 1)) for x in (k, v)]
    return qg.softmax(q @ turned(few[0]), axis=-1) @ few[1]


def of_other_heads(q, k, v):
    return qg.softmax(q @ turned(k[:, :1]), axis=-1) @ v


def half_the_heads(q, k, v):
    """The mask differs along the second of the two axes of heads only."""
    q, k, v = (qg.unflatten(x, 1, (2, 2)) for x in (q, k, v))
    mask = qg.where(qg.reshape(qg.arange(2) > 0, (1, 1, 2, 1, 1)), 0.0, -1.0) * qg.arange(5)
    return qg.flatten(qg.softmax(q @ turned(k) + mask, axis=-1) @ v, 1, 2)


NEAR = {
    "capped": (attention(lambda s: qg.tanh(s) * 5), "the scores are not q @ k.T but made by tanh"),
    "masked twice": (
        attention(lambda s: qg.where(qg.arange(5) > 3, -1e9, s) + qg.arange(5) * 0.1),
        "the scores are masked twice",
    ),
    "over another axis": (
        lambda q, k, v: qg.softmax(q @ turned(k), axis=-2) @ v,
        "",
    ),
    "weights with a factor": (attention(after=lambda p: p * 2), ""),
    "the weights on the right": (
        lambda q, k, v: turned(v) @ qg.softmax(k @ turned(q), axis=-1),
        "",
    ),
    "a low score that is not low": (
        attention(lambda s: qg.where(qg.arange(5) > 3, -2.0, s)),
        "the scores are not q @ k.T but made by where",
    ),
    "the sinks kept": (first_column_kept, ""),
    "sinks of the queries": (
        other_sinks,
        "the column beside the scores is not one number for each head",
    ),
    "keys of other heads": (of_other_heads, "keys and values have other numbers of heads"),
    "half the heads": (half_the_heads, "differs along one of the two axes of heads"),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_only_looks_like_attention_stays_and_says_why(name):
    f, reason = NEAR[name]
    args = operands(served=4)
    assert NAME not in raised(f, *args)
    assert not reason or any(reason in r for r in reasons(f, *args, rule="raise-attention"))


def test_tiled_keys_are_not_repeated_ones():
    assert raised(tiled, *operands(served=4))[NAME] == 1
    assert raised(tiled, *operands(served=4))["broadcast_to"] == 2


def test_weights_that_are_also_returned_are_not_computed_twice():
    def f(q, k, v):
        weights = qg.softmax(q @ turned(k), axis=-1)
        return weights @ v, weights

    assert NAME not in raised(f, *operands(served=4))


def test_scores_that_are_also_returned_are_not_computed_twice():
    def f(q, k, v):
        scores = q @ turned(k)
        return qg.softmax(scores, axis=-1) @ v, scores

    assert NAME not in raised(f, *operands(served=4))
    assert any("has a foreign user" in r for r in reasons(f, *operands(served=4)))


def test_a_row_whose_keys_are_all_masked_keeps_its_meaning():
    """NaN for -inf, the mean of all values for a finite number: a boolean mask has the second only."""
    mask = mx.array([[True] * 5, [False] * 5, [True] * 5])
    for name in ("chosen", "chosen -inf", "added -inf", "dropped"):

        def f(q, k, v, m, name=name):
            return qg.softmax(MASKS[name](q @ turned(k), m), axis=-1) @ v

        assert raised(f, *operands(served=4), mask)[NAME] == 1


def test_packed_values_are_left_to_the_products():
    def f(q, k, v):
        return qg.softmax(q @ turned(k) * 0.3, axis=-1) @ v

    args = operands(served=4, keys=64, values=32)
    args = (*args[:2], qg.quantize(args[2], bits=8, group_size=32))
    found = qg.jit(f).optimized(*args)
    assert found.find("quantized_matmul")
    assert not found.find(NAME)


@pytest.mark.parametrize("sizes", [{"queries": 0}, {"batch": 0}, {"values": 0}])
def test_attention_without_elements_stays(sizes):
    assert NAME not in raised(attention(), *operands(served=4, **sizes))


def test_float64_stays_as_it_is_written():
    args = operands(served=4, dtype=mx.float64)
    assert NAME not in raised(attention(), *args)
    assert "there is no kernel for f64" in reasons(attention(), *args)


def test_two_layers_with_a_softmax_between_them_are_no_attention():
    """One product of all rows with one matrix is faster than one for each head."""

    def f(x, w, v):
        return qg.softmax(x @ w.T, axis=-1) @ v

    args = (normal(2, 3, 8), normal(5, 8), normal(5, 4))
    assert NAME not in raised(f, *args)
    assert reasons(f, *args) == ["all rows meet the same matrix: two layers, not attention"]
