"""The forms that captured code takes: those of code in qgraph's functions, so that rules know them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
from qgraph.ir.text import print_graph
from tests.agree import assert_as_mlx, assert_close, magnitude_of, normal
from tests.capture.primitives.replay import Case, captured, check


def form(function, *arrays):
    """The ops that are not inputs or constants, in order."""
    graph = check(Case(function, list(arrays), k=64, magnitude=9.0 * 64))
    return [n.op.name for n in graph.nodes if n.op.name not in ("input", "constant")]


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 1, 3, 8), (1, 1, 8)])
def test_a_linear_layer_is_one_dot(shape):
    assert form(lambda x, w: x @ w.T, normal(*shape), normal(5, 8)) == ["transpose", "dot"]


def test_a_product_with_a_vector_is_one_of_matrices_as_in_mlx():
    found = form(lambda x, w: x @ w.T, normal(8), normal(5, 8))
    assert sorted(found) == ["dot", "reshape", "reshape", "transpose"]


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_a_linear_layer_with_a_bias_is_one_addmm(shape):
    x, w, b = normal(*shape), normal(5, 8), normal(5)
    assert form(lambda x, w, b: mx.addmm(b, x, w.T), x, w, b) == ["transpose", "addmm"]


def test_a_product_of_merged_rows_is_one_of_the_batch_that_it_becomes():
    """As heads are merged and projected: the reshape before MLX's own is the one that stays."""
    x, w = normal(2, 3, 8), normal(5, 8)
    assert form(lambda x, w: x.reshape(6, 8) @ w.T, x, w) == ["reshape", "transpose", "dot"]
    other = form(lambda x, w: (x.reshape(6, 8) @ w.T).reshape(3, 2, 5), x, w)
    assert other == ["reshape", "transpose", "dot"]
    other = form(lambda x, w: (x.reshape(6, 8) @ w.T).reshape(2, 3, 5, 1), x, w)
    assert other == ["reshape", "transpose", "dot", "reshape"]
    merged = form(lambda x, w: x.reshape(3, 2, 8) @ w.T, normal(3, 2, 2, 4), w)
    assert merged == ["reshape", "transpose", "dot"]


def test_two_layers_in_a_row_have_no_reshapes_between():
    x, a, b = normal(2, 3, 8), normal(8, 4), normal(4, 8)
    assert form(lambda x, a, b: x + 2 * ((x @ a) @ b), x, a, b).count("dot") == 2
    assert "reshape" not in form(lambda x, a, b: x + 2 * ((x @ a) @ b), x, a, b)


def test_broadcasts_that_ops_do_by_themselves_are_gone():
    x, row = normal(2, 3, 8), normal(8)
    assert form(lambda x, row: (x * row + 1.5) / row, x, row) == ["multiply", "add", "divide"]
    assert form(lambda x, y: x + y, normal(2, 1), normal(1, 3)) == ["add"]
    assert form(lambda c, x: mx.where(c > 0, x, -1.0), row, x) == ["greater", "where"]
    assert "broadcast_to" in form(lambda x: mx.broadcast_to(x, (2, 8)).reshape(16), row)


def test_an_embedding_is_one_take():
    w, ids = normal(9, 8), mx.array([[3, 1], [8, 0]])
    assert form(lambda w, ids: w[ids], w, ids) == ["take"]


def test_an_index_that_is_known_is_a_slice():
    assert form(lambda x: x[2], normal(4, 8)) == ["slice", "reshape"]
    assert form(lambda x: x[1:3, -1], normal(4, 8)) == ["slice", "reshape"]
    assert form(lambda x: x[mx.array(-1)], normal(4, 8)) == ["slice", "reshape"]


def test_einsum_leaves_no_transposes_that_move_nothing():
    x, y = normal(2, 3, 4), normal(2, 5, 4)
    assert form(lambda x, y: mx.einsum("bij,bkj->bik", x, y), x, y) == ["transpose", "dot"]


def test_experts_have_the_indices_that_were_given():
    """mlx-lm's SwitchLinear: MLX numbers the rows by itself, and is told that the experts are sorted."""
    x, w, i = normal(6, 1, 8), normal(3, 5, 8), mx.array([0, 0, 1, 1, 2, 2], mx.uint32)

    def experts(x, w, i):
        return mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=i, sorted_indices=True)

    assert form(experts, x, w, i) == ["transpose", "gather_mm"]
    graph, _ = captured(experts, [x, w, i])
    assert "gather_mm{lhs=False, rhs=True, sorted_indices=True}" in print_graph(graph)
    rows = normal(2, 3, 1, 1, 8)
    chosen = mx.array([[[0, 1], [2, 0], [1, 1]], [[2, 2], [0, 1], [1, 0]]], mx.uint32)
    both = lambda x, w, i: mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=i)  # noqa: E731
    assert form(both, rows, w, chosen) == ["transpose", "gather_mm"]
    turned = lambda x, w, i: mx.gather_mm(x, w.swapaxes(-1, -2), mx.arange(5, -1, -1, mx.uint32), i)  # noqa: E731
    assert "arange" in form(turned, x, w, i)
    given = mx.array([5, 4, 3, 2, 1, 0], mx.uint32)
    assert "lhs=True, rhs=True, sorted_indices=False" in print_graph(
        captured(lambda x, w, i, j: mx.gather_mm(x, w.swapaxes(-1, -2), j, i), [x, w, i, given])[0]
    )


def test_a_quantized_layer_is_a_product_with_a_quantized_value():
    parts = mx.quantize(normal(8, 64), group_size=32, bits=4)

    def linear(x, w, s, b):
        return mx.quantized_matmul(x, w, s, b, group_size=32, bits=4)

    assert form(linear, normal(2, 3, 64), *parts) == ["pack", "quantized_matmul"]


def test_rows_of_a_quantized_embedding_are_read_packed():
    """`mlx.nn.QuantizedEmbedding` takes rows of words, scales and biases, and unpacks those."""
    how = {"group_size": 32, "bits": 4}
    layer = nn.Embedding(9, 64).to_quantized(**how)
    fast = qg.optimize(layer)
    ids = mx.array([[3, 1], [8, 0]])
    graph = fast.qgraph.optimized(ids)
    assert graph.histogram().get("quantized_take") == 1, str(graph)
    assert not {"dequantize", "take"} & set(graph.histogram()), str(graph)
    assert (fast(ids) == layer(ids)).all()


# Quantized by rewrite


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 2.0)])
def test_addmm_on_a_packed_weight_is_a_quantized_product_and_a_sum(bits, scales):
    x, b, dense = normal(2, 3, 64), normal(8), normal(8, 64)
    w = qg.quantize(dense, bits=bits, group_size=32)
    alpha, beta = scales
    fast = qg.optimize(lambda b, x, w: mx.addmm(b, x, w.T, alpha, beta))
    graph = fast.optimized(b, x, w)
    assert graph.histogram().get("quantized_matmul") == 1, str(graph)
    assert not {"dequantize", "addmm", "transpose"} & set(graph.histogram()), str(graph)
    assert [s.became for s in fast.report(b, x, w)] == ["quantized_matmul"]
    exact = qg.jit(lambda b, x, w: alpha * (x @ w.T) + beta * b)
    assert_close(fast(b, x, w), exact(b, x, w), k=64, path="P2", magnitude=magnitude_of(x, w) + 9.0)
    if scales == (1.0, 1.0):
        eager = mx.quantized_matmul(x, *w.components(), bits=bits, group_size=32) + b
        assert_as_mlx(fast(b, x, w), eager, k=64, path="P2", magnitude=magnitude_of(x, w) + 9.0)


def test_addmm_with_a_packed_left_operand_is_turned_around():
    x, c = normal(64, 3), normal(8, 3)
    w = qg.quantize(normal(8, 64), bits=4, group_size=32)
    fast = qg.optimize(lambda c, w, x: mx.addmm(c, w, x))
    assert "quantized_matmul" in fast.optimized(c, w, x).histogram()
    assert_close(fast(c, w, x), mx.addmm(c, qg.dequantize(w), x), k=64, magnitude=9.0 * 64)


def test_addmm_of_two_packed_operands_unpacks_the_smaller_one():
    w = qg.quantize(normal(8, 64), bits=4, group_size=32)
    v = qg.quantize(normal(64, 64), bits=4, group_size=32)
    fast = qg.optimize(lambda c, w, v: mx.addmm(c, w, v))
    graph = fast.optimized(normal(64), w, v)
    assert graph.histogram().get("quantized_matmul") == 1
    assert graph.histogram().get("dequantize") == 1
    [site] = fast.report(normal(64), w, v)
    assert any("smaller" in reason for reason in site.reasons)


def test_experts_on_packed_weights_run_packed():
    x, i = normal(2, 3, 1, 1, 64), mx.array([[[0, 1], [2, 0], [1, 1]], [[2, 2], [0, 1], [1, 0]]], mx.uint32)
    w = qg.quantize(normal(3, 8, 64), bits=4, group_size=32)
    fast = qg.optimize(lambda x, w, i: mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=i))
    graph = fast.optimized(x, w, i)
    assert graph.histogram().get("gather_qmm") == 1, str(graph)
    assert not {"dequantize", "gather_mm"} & set(graph.histogram()), str(graph)
    eager = mx.gather_qmm(x, *w.components(), rhs_indices=i, bits=4, group_size=32)
    assert_as_mlx(fast(x, w, i), eager, k=64, path="P2", magnitude=9.0 * 64)


def test_one_matrix_of_a_packed_stack_stays_packed():
    x, w = normal(3, 64), qg.quantize(normal(4, 8, 64), bits=4, group_size=32)
    fast = qg.optimize(lambda x, w: x @ w[2].T)
    graph = fast.optimized(x, w)
    assert graph.histogram().get("quantized_matmul") == 1, str(graph)
    assert "dequantize" not in graph.histogram()
    assert_close(fast(x, w), x @ qg.dequantize(w)[2].T, k=64, magnitude=9.0 * 64)


def test_softmax_keeps_the_precision_that_was_asked_for():
    x = normal(3, 64).astype(mx.bfloat16)
    for precise in (False, True):
        graph, _ = captured(lambda x, p=precise: mx.softmax(x, -1, precise=p), [x])
        assert f"precise={precise}" in print_graph(graph)
