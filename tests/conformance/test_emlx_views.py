"""research/emlx.md §4, cases 59–62: views of a packed weight, rows of it, and joined weights."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.execute.reference import to_numpy
from tests.agree import assert_close, magnitude_of, normal, ops
from tests.conformance.oracle import (
    BITS,
    MICROSCALED,
    MODES,
    assert_product,
    largest_terms,
    of,
    quantized,
)

VIEWS = {
    "transpose": lambda w: qg.transpose(w),
    "permute_dims": lambda w: qg.permute_dims(w, (1, 0)),
    "swapaxes": lambda w: qg.swapaxes(w, 0, 1),
    "swapaxes of negative axes": lambda w: qg.swapaxes(w, -1, -2),
    "moveaxis": lambda w: qg.moveaxis(w, 0, -1),
    "three transposes": lambda w: w.T.T.T,
    "reshape to the same": lambda w: w.reshape(32, 64).T,
    "reshape and back": lambda w: w.reshape(2, 16, 64).reshape(-1, 64).T,
    "flatten": lambda w: w.reshape(4, 8, 64).flatten(0, 1).T,
    "expand and squeeze": lambda w: qg.squeeze(w[None, :, None], axis=(0, 2)).T,
    "cast": lambda w: w.astype(mx.bfloat16).astype(mx.float32).T,
    "cast of the transpose": lambda w: w.T.astype(mx.float16).astype(mx.float32),
    "contiguous slices": lambda w: w[:][0:32].T,
    "stack and pick": lambda w: qg.stack([w, w])[0].T,
    "split and join": lambda w: qg.concatenate(qg.split(w, 4)).T,
}


@pytest.mark.parametrize("name", VIEWS)
def test_e59_views_around_the_weight_leave_one_quantized_matmul(name):
    x, w = normal(3, 64), quantized(32, 64)
    f = qg.jit(strict=True)(lambda x, w: x @ VIEWS[name](w))
    counts = ops(f.optimized(x, w))
    assert counts["quantized_matmul"] == 1
    assert not set(counts) & {"dot", "dequantize", "transpose"}
    assert_product(f(x, w), x, w)
    assert_product(qg.dot(x, VIEWS[name](w)), x, w)


@pytest.mark.parametrize("scheme", [*(("affine", bits, 64) for bits in BITS), *MICROSCALED], ids=str)
def test_e60_a_tied_head_and_rows_of_a_packed_table(scheme):
    w, ids = of(scheme, 40, 128), mx.array([[3, 39, 0], [7, 7, 1]])
    f = qg.jit(strict=True)(lambda w, ids: (w[ids], w[ids] @ w.T))
    counts = ops(f.optimized(w, ids))
    assert (counts["quantized_take"], counts["quantized_matmul"]) == (1, 1)
    rows, logits = f(w, ids)
    assert mx.array_equal(rows, qg.dequantize(w)[ids])
    assert mx.array_equal(qg.take(w, ids, axis=0), rows)
    assert_product(logits, rows, w)


@pytest.mark.parametrize("axes", [(0, 2, 1), (1, 0, 2), (2, 1, 0), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_e60_rows_through_a_transpose(axes, axis):
    """All stay packed but those along the packed axis, wherever the transpose put it."""
    w = quantized(5, 4, 64)
    f = lambda w, ids: qg.take(qg.transpose(w, axes), ids, axis=axis)  # noqa: E731
    for ids in (mx.array(2), mx.array([[3, 0], [-1, 3]])):
        expected = mx.take(mx.transpose(qg.dequantize(w), axes), ids, axis=axis)
        for run in (qg.jit(f), f):
            assert mx.array_equal(run(w, ids), expected)
        packed = axes[axis] == 2
        assert ops(qg.jit(f).optimized(w, ids)).get("quantized_take", 0) == (not packed)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e61_one_product_with_joined_weights_equals_three(scheme):
    x, parts = normal(3, 128), [of(scheme, n, 128) for n in (32, 16, 8)]
    f = qg.jit(strict=True)(lambda x, parts: x @ qg.concatenate(parts).T)
    assert ops(f.optimized(x, parts))["quantized_matmul"] == 1
    assert mx.array_equal(f(x, parts), mx.concatenate([qg.dot(x, w.T) for w in parts], axis=1))
    assert_product(f(x, parts), x, qg.concatenate(parts))


@pytest.mark.parametrize("rows", [slice(4, 20), slice(None, None, 3), slice(30, 2, -4), slice(-5, None)])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e62_slices_of_rows_are_exact(rows, scheme):
    x, w = normal(3, 128), of(scheme, 32, 128)
    f = qg.jit(strict=True)(lambda x, w: x @ w[rows].T)
    assert mx.array_equal(f(x, w), qg.dot(x, w.T)[:, rows])
    assert_product(f(x, w), x, w[rows])


def test_e62_slices_of_whole_groups_stay_packed_and_others_are_reported():
    x, w = normal(3, 64), quantized(32, 128)
    f = qg.jit(strict=True)(lambda x, w: x @ w[:, 64:].T)
    exact, magnitude = to_numpy(w)[:, 64:], magnitude_of(x, w[:, 64:])
    assert_close(f(x, w), to_numpy(x) @ exact.T, k=64, path="P2", magnitude=magnitude)
    g = qg.jit(lambda x, w: x @ w[:, 32:96].T)
    exact, magnitude = to_numpy(w)[:, 32:96], np.abs(to_numpy(x)) @ largest_terms(w)[:, 32:96].T
    assert_close(g(x, w), to_numpy(x) @ exact.T, k=64, path="P2", magnitude=magnitude)
    assert "the slice 32:96 of the packed axis cuts groups of 64" in str(g.report(x, w))
    with pytest.raises(qg.StrictError, match="cuts groups of 64"):
        qg.jit(strict=True)(g.function)(x, w)
