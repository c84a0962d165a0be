"""Attention's masks: the causal one is recognized however it was written, and no other is taken for it."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph_passes.raise_fast import masks
from tests.passes.raise_fast.raised import raised
from tests.passes.raise_fast.test_attention import INF, NAME, op, operands, turned

CAUSAL = {
    "tril": lambda s, n, k: qg.where(qg.tril(qg.ones((n, k)), k=k - n) > 0, s, -1e9),
    "triu": lambda s, n, k: s + qg.triu(qg.full((n, k), -INF), k=k - n + 1),
    "arange": lambda s, n, k: qg.where(qg.arange(k) <= qg.arange(k - n, k)[:, None], s, -INF),
    "arange, dropped": lambda s, n, k: qg.where(qg.arange(k) > qg.arange(k - n, k)[:, None], -1e9, s),
    "a product": lambda s, n, k: (
        s + qg.astype(qg.arange(k - n, k)[:, None] < qg.arange(k)[None], mx.float32) * -1e9
    ),
    "of four axes": lambda s, n, k: s + qg.triu(qg.full((n, k), -1e9), k=k - n + 1)[None, None],
}


@pytest.mark.parametrize("spelling", CAUSAL)
@pytest.mark.parametrize("queries", [3, 5])
def test_a_mask_that_is_known_to_be_the_causal_one_is_no_array(spelling, queries):
    def f(q, k, v):
        return qg.softmax(CAUSAL[spelling](q @ turned(k), queries, 5), axis=-1) @ v

    args = operands(served=4, queries=queries)
    assert raised(f, *args) == {NAME: 1}
    assert op(f, *args).mask == "causal"


OTHER = {
    "one key more": lambda s, n, k: qg.where(qg.tril(qg.ones((n, k)), k=k - n + 1) > 0, s, -1e9),
    "one key less": lambda s, n, k: qg.where(qg.tril(qg.ones((n, k)), k=k - n - 1) > 0, s, -1e9),
    "a window": lambda s, n, k: qg.where(
        qg.logical_and(qg.tril(qg.ones((n, k)), k=k - n) > 0, qg.triu(qg.ones((n, k)), k=k - n - 1) > 0),
        s,
        -1e9,
    ),
    "the other triangle": lambda s, n, k: qg.where(qg.triu(qg.ones((n, k)), k=k - n) > 0, s, -1e9),
    "aligned above": lambda s, n, k: qg.where(qg.tril(qg.ones((n, k))) > 0, s, -1e9),
    "with a slope": lambda s, n, k: (
        s
        + qg.triu(qg.full((n, k), -1e9), k=k - n + 1)
        - qg.astype(qg.abs(qg.arange(k - n, k)[:, None] - qg.arange(k)), mx.float32)
    ),
}


@pytest.mark.parametrize("spelling", OTHER)
def test_another_mask_that_is_known_stays_an_array(spelling):
    def f(q, k, v):
        return qg.softmax(OTHER[spelling](q @ turned(k), 3, 5), axis=-1) @ v

    args = operands(served=4)
    if NAME in raised(f, *args):
        assert op(f, *args).mask == "array"


def test_a_causal_array_given_to_the_op_itself_is_known_too():
    def f(q, k, v):
        return qg.scaled_dot_product_attention(q, k, v, scale=0.3, mask=qg.tril(qg.ones((3, 5)), k=2) > 0)

    assert op(f, *operands()).mask == "causal"
    assert set(raised(f, *operands())) == {NAME}


@pytest.mark.parametrize("compared", ["greater_equal", "greater", "less_equal", "less"])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_large_mask_is_known_by_the_positions_that_it_compares(
    compared, inverted, swapped, shift, monkeypatch
):
    """And to be what it is when it is worked out whole."""

    def f(q, k, v):
        own, all_of_them = qg.arange(2 + shift, 5 + shift)[:, None], qg.arange(5)
        mask = getattr(qg, compared)(*((all_of_them, own) if swapped else (own, all_of_them)))
        scores = q @ turned(k)
        scores = qg.where(mask, -1e9, scores) if inverted else qg.where(mask, scores, -1e9)
        return qg.softmax(scores, axis=-1) @ v

    args = operands(served=4)
    whole = op(f, *args).mask
    monkeypatch.setattr(masks, "SMALL", 0)
    assert op(f, *args).mask == whole
    assert raised(f, *args)[NAME] == 1
