"""quantize-take: embeddings and tied heads read one packed buffer."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.agree import agree, normal, ops

SCHEMES = [
    ("affine", 4, 32),
    ("affine", 3, 64),
    ("affine", 8, 128),
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]
# What keeps the ids of an input in range, by `guard-indices`.
GUARD = {"minimum": 1, "maximum": 1, "equal": 1, "reshape": 1, "where": 1}


def table(mode="affine", bits=4, group_size=32, shape=(40, 128)):
    return qg.quantize(normal(*shape), bits=bits, group_size=group_size, mode=mode)


@pytest.mark.parametrize(("mode", "bits", "group_size"), SCHEMES)
@pytest.mark.parametrize("ids", [[3], [0, 39, 7], [[1, 2], [3, 4]]])
def test_rows_of_a_packed_table(mode, bits, group_size, ids):
    graph = agree(
        qg.jit(lambda w, ids: qg.take(w, ids, axis=0)), table(mode, bits, group_size), mx.array(ids)
    )
    assert ops(graph) == {"quantized_take": 1, **GUARD}


def test_indexing_by_ids_is_a_take():
    assert ops(agree(qg.jit(lambda w, ids: w[ids]), table(), mx.array([5, 6]))) == {
        "quantized_take": 1,
        **GUARD,
    }


def test_rows_equal_dequantizing_all_of_the_table_exactly():
    w, ids = table(), mx.array([4, 4, 1])
    assert mx.array_equal(qg.take(w, ids, axis=0), qg.dequantize(w)[ids])


def test_a_tied_head_shares_the_words_with_the_embedding():
    f = qg.jit(lambda w, ids: w[ids] @ w.T)
    w, ids = table(), mx.array([[1, 2, 3]])
    graph = agree(f, w, ids)
    assert ops(graph) == {"quantized_take": 1, "quantized_matmul": 1, **GUARD}
    assert f.source(w, ids).count("w_packed") == 3  # the argument, the take, the product


def test_columns_of_the_transposed_table():
    graph = agree(qg.jit(lambda w, ids: qg.take(w.T, ids, axis=1)), table(), mx.array([[1, 2], [3, 4]]))
    assert "quantized_take" in ops(graph)
    assert "dequantize" not in ops(graph)


def test_middle_axis_of_a_batched_table():
    graph = agree(qg.jit(lambda w, ids: qg.take(w, ids, axis=1)), table(shape=(3, 5, 64)), mx.array([[4, 0]]))
    assert ops(graph) == {"quantized_take": 1, **GUARD}


def test_along_the_packed_axis_it_dequantizes_and_says_why():
    f = qg.jit(lambda w, ids: qg.take(w, ids, axis=1))
    w, ids = table(), mx.array([5, 6])
    assert "dequantize" in ops(agree(f, w, ids))
    [site] = f.report(w, ids).missed
    assert "takes along axis 1, which is packed" in str(site)


def test_empty_ids_give_an_empty_result():
    f = qg.jit(lambda w, ids: w[ids])
    assert f(table(), mx.array(np.zeros((0,), np.int32))).shape == (0, 128)
