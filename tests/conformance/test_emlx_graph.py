"""research/emlx.md §4, cases 46–58 and 63–68: the compiled path. Loop cases: see test_numbering.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.execute.reference import to_numpy
from qgraph.ir.digest import digest
from tests.agree import agree, assert_close, magnitude_of, normal, ops
from tests.conformance.oracle import (
    MICROSCALED,
    MODES,
    assert_kernel,
    assert_product,
    by_hand,
    largest_terms,
    of,
    quantized,
    ramp,
    raw,
)


def test_e46_a_dot_contracted_on_axis_0_equals_eager():
    x, w = ramp(4, 128, over=37), qg.quantize(ramp(128, 64, over=100))
    f = qg.jit(lambda x, w: qg.tensordot(x, w, [[1], [0]]))
    found = f(x, w)
    assert found.shape == (4, 64)
    assert mx.array_equal(found, qg.dot(x, w))
    assert_product(found, x, w, transpose=False)


def test_e47_other_activations_and_other_weights_use_the_program_again():
    f = qg.jit(lambda x, w: x @ w.T)
    for seed in range(4):
        x, w = normal(4, 64, seed=seed), quantized(32, 64, seed=10 + seed // 2)
        assert_product(f(x, w), x, w)
    assert f.cache_info()[:2] == (3, 1)


def test_e48_two_weights_in_one_function():
    x, w, v = normal(4, 64), quantized(32, 64), quantized(16, 64, bits=8)
    f = qg.jit(lambda x, w, v: qg.concatenate([x @ w.T, x @ v.T], axis=1))
    found = f(x, w, v)
    assert mx.array_equal(found, mx.concatenate([qg.dot(x, w.T), qg.dot(x, v.T)], axis=1))
    assert_product(found[:, :32], x, w)
    assert_product(found[:, 32:], x, v)


@pytest.mark.parametrize("scheme", MICROSCALED, ids=str)
def test_e49_no_biases_in_a_program(scheme):
    x, w = normal(4, 64), of(scheme, 32, 64)
    assert w.biases is None
    assert_product(qg.jit(strict=True)(lambda x, w: x @ w.T)(x, w), x, w)


def test_e50_a_weight_that_is_returned_beside_the_dot_keeps_its_annotation():
    x, w = normal(4, 64), quantized(32, 64)
    same, product = qg.jit(lambda x, w: (w, x @ w.T))(x, w)
    assert qg.is_quantized(same)
    assert same.quantization == w.quantization
    assert all(map(mx.array_equal, same.components(), w.components()))
    assert_product(product, x, w)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e51_dequantize_add_quantize_gives_an_annotated_value(scheme):
    mode, bits, group = scheme
    w = of(scheme, 8, 64)
    f = qg.jit(lambda w: qg.quantize(qg.dequantize(w) + 10.0, mode=mode, bits=bits, group_size=group))
    found, expected = f(w), mx.quantize(qg.dequantize(w) + 10.0, group, bits, mode)
    assert qg.is_quantized(found)
    assert all(map(mx.array_equal, found.components(), expected))
    if mode == "affine":
        steps = np.repeat(np.abs(to_numpy(found.scales)), group, axis=-1)
        excess = np.maximum(np.abs(to_numpy(found) - (to_numpy(w) + 10)) - steps, 0)
        assert_close(excess, np.zeros_like(excess), path="P1", magnitude=largest_terms(found))


def test_e54_a_quantized_left_operand_in_a_program():
    w, x = quantized(64, 128), normal(128, 4)
    for f, exact, magnitude in (
        (lambda w, x: w @ x, to_numpy(w) @ to_numpy(x), magnitude_of(x.T, w).T),
        (lambda w, x: w.T @ x[:64], to_numpy(w).T @ to_numpy(x[:64]), magnitude_of(x[:64].T, w, False).T),
    ):
        assert_close(qg.jit(strict=True)(f)(w, x), exact, k=128, path="P2", magnitude=magnitude)


@pytest.mark.parametrize("wshape", [(64, 128), (3, 64, 128), (2, 3, 64, 128)])
@pytest.mark.parametrize("rows", [(), (4,), (3, 1, 4), (5, 1, 3, 4)])
def test_e54_a_quantized_left_operand_by_vectors_and_batches(wshape, rows):
    """`rows`: the lead and the columns of x; none for a vector."""
    w = quantized(*wshape)
    for turned, k in ((False, 128), (True, 64)):
        x = normal(*rows[:-1], k, *rows[-1:])
        if len(rows) > 2 and len(wshape) > 3:
            continue  # these leads do not broadcast
        f = qg.jit(strict=True)(lambda w, x, t=turned: (qg.swapaxes(w, -1, -2) if t else w) @ x)
        turn = (lambda a: np.swapaxes(a, -1, -2)) if turned else (lambda a: a)
        exact = np.matmul(turn(to_numpy(w)), to_numpy(x))
        magnitude = np.matmul(turn(largest_terms(w)), np.abs(to_numpy(x)))
        for run in (f, f.eager):
            assert_close(run(w, x), exact, k=k, path="P2", magnitude=magnitude)


def test_e55_dequantize_alone():
    w = quantized(8, 64)
    assert mx.array_equal(qg.jit(qg.dequantize)(w), qg.dequantize(w))
    assert_close(qg.jit(qg.dequantize)(w), by_hand(w), path="P1", magnitude=largest_terms(w))


def test_e55_dequantize_between_other_ops_and_twice():
    w, v, x = quantized(8, 64), quantized(8, 64, mode="mxfp4"), normal(8, 64)
    f = lambda x, w: (qg.dequantize(w) + x) * 3.0  # noqa: E731
    assert mx.array_equal(qg.jit(f)(x, w), (qg.dequantize(w) + x) * 3.0)
    g = lambda w, v: qg.dequantize(w) * qg.dequantize(v)  # noqa: E731
    assert mx.array_equal(qg.jit(g)(w, v), qg.dequantize(w) * qg.dequantize(v))
    agree(qg.jit(f), x, w)
    agree(qg.jit(g), w, v)


@pytest.mark.parametrize("transpose", [True, False])
def test_e56_explicit_quantized_matmul_of_parts_that_are_arguments(transpose):
    w = quantized(64, 64)
    x = normal(4, 64)

    def f(x, pair):
        return qg.quantized_matmul(x, pair[0], transpose=transpose), pair[1] + 1.0

    found, other = qg.jit(f)(x, (w, x))
    assert_kernel(found, x, w, transpose)
    assert mx.array_equal(other, x + 1.0)
    arrays, scheme = raw(w)
    made = lambda x: f(x, (qg.from_quantized(*arrays, **scheme), x))[0]  # noqa: E731
    assert mx.array_equal(qg.jit(made)(x), found)


def test_e57_one_weight_after_the_other_adds_no_program():
    f = qg.jit(lambda x, w: x @ w.T)
    x, first, second = normal(4, 64), quantized(32, 64, seed=1), quantized(32, 64, seed=2)
    assert_product(f(x, first), x, first)
    size = f.cache_info().currsize
    assert_product(f(x, second), x, second)
    assert f.cache_info().currsize == size == 1


def test_e57_structurally_equal_functions_have_one_digest():
    def f(x, w):
        return qg.silu(x @ w.T)

    def g(x, w):
        turned = qg.swapaxes(w, -1, 0)
        unused = qg.exp(x)
        del unused
        return qg.silu(qg.dot(x, turned))

    args = normal(4, 64), quantized(32, 64)
    first, second = (digest(qg.jit(h).optimized(*args)) for h in (f, g))
    assert first == second
    assert first != digest(qg.jit(lambda x, w: qg.silu(x @ w.T) * 2.0).optimized(*args))


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e58_quantize_inside_the_graph_then_dot(scheme):
    mode, bits, group = scheme

    def f(x, w):
        return x @ qg.quantize(w, mode=mode, bits=bits, group_size=group).T

    x, w = normal(3, 64), normal(32, 64)
    assert ops(qg.jit(f).optimized(x, w)) == {"quantize": 1, "quantized_matmul": 1}
    packed = qg.quantize(w, mode=mode, bits=bits, group_size=group)
    for run in (qg.jit(f), qg.jit(f).eager, lambda x, w: qg.dot(x, qg.quantize(w, **raw(packed)[1]).T)):
        assert_product(run(x, w), x, packed)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e58_views_and_rows_of_what_is_quantized_inside(scheme):
    """As of a packed argument: also joined with one, and of a transposed or sliced dense value."""
    mode, bits, group = scheme

    def f(x, dense, packed, ids):
        w = qg.quantize(dense.T[::2], mode=mode, bits=bits, group_size=group)
        joined = qg.concatenate([w[4:], packed])
        return x @ joined.T, w[ids], joined + 1.0, x[:, :12] @ w[4:]

    x, dense, packed, ids = normal(3, 128), normal(128, 32), of(scheme, 8, 128), mx.array([[3, 0]])
    inside = qg.quantize(mx.contiguous(dense.T[::2]), mode=mode, bits=bits, group_size=group)
    joined = qg.concatenate([inside[4:], packed])
    for run in (qg.jit(f), qg.jit(f).eager):
        product, rows, dense_sum, plain = run(x, dense, packed, ids)
        assert_product(product, x, joined)
        assert mx.array_equal(rows, qg.dequantize(inside)[ids])
        assert mx.array_equal(dense_sum, qg.dequantize(joined) + 1.0)
        assert_product(plain, x[:, :12], inside[4:], transpose=False)


def test_e63_closures_over_other_arrays_of_one_shape_are_told_apart():
    def make(w, scale):
        return qg.jit(lambda x: x @ w.T * scale)

    x = normal(3, 64)
    weights, scales = [quantized(32, 64, seed=s) for s in (1, 2)], [mx.array(2.0), mx.array(4.0)]
    for w, scale in zip(weights, scales, strict=True):
        assert mx.array_equal(make(w, scale)(x), qg.dot(x, w.T) * scale)


def test_e63_a_captured_weight_that_is_replaced_is_seen():
    holder = {"w": quantized(32, 64, seed=1)}
    f = qg.jit(lambda x: x @ holder["w"].T)
    x = normal(3, 64)
    assert_product(f(x), x, holder["w"])
    holder["w"] = quantized(32, 64, seed=2)
    assert_product(f(x), x, holder["w"])


def test_e64_uses_beside_the_dot_are_right():
    def f(x, w):
        y = x @ w.T
        y.sum()  # of no use
        return y, qg.exp(y * 0.1), w + 1.0, y @ w

    x, w = normal(3, 64), quantized(32, 64)
    counts = ops(agree(qg.jit(f), x, w))
    assert counts["quantized_matmul"] == 2
    assert "sum" not in counts
    y, powered, dense, back = qg.jit(f)(x, w)
    assert_product(y, x, w)
    assert_product(back, y, w, transpose=False)
    assert_close(powered, np.exp(to_numpy(y) * 0.1), path="elementwise")
    assert_close(dense, to_numpy(w) + 1, path="P1", magnitude=largest_terms(w) + 1)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e65_the_gradient_of_the_activations_is_ones_times_the_weight(scheme):
    x, w = normal(3, 64), of(scheme, 32, 64)
    f = qg.jit(lambda x, w: qg.sum(x @ w.T))
    for run in (f, lambda x, w: qg.sum(qg.dot(x, w.T))):
        found = mx.grad(lambda x, run=run: run(x, w))(x)
        assert_product(found, mx.ones((3, 32)), w, transpose=False)


def test_e65_the_gradients_of_scales_and_biases():
    x, w = normal(3, 64), quantized(32, 64, group_size=32)
    packed, scales, biases = w.components()
    f = qg.jit(lambda x, w: qg.sum(x @ w.T))
    loss = lambda s, b: f(x, qg.from_quantized(packed, s, b, bits=4, group_size=32))  # noqa: E731
    found = mx.grad(loss, (0, 1))(scales, biases)
    steps = by_hand(qg.from_quantized(packed, mx.ones((32, 2)), mx.zeros((32, 2)), bits=4, group_size=32))

    def by_group(columns):
        """The sums over a group of the codes and of ones, with the column sums of x as weights."""
        return [(part * columns).reshape(32, 2, 32).sum(-1) for part in (steps, np.ones_like(steps))]

    exact, magnitude = by_group(to_numpy(x).sum(0)), by_group(np.abs(to_numpy(x)).sum(0))
    for got, want, terms in zip(found, exact, magnitude, strict=True):
        assert_close(got, want, k=3 * 32, path="P2", magnitude=terms)


UNSUPPORTED = {
    "scaled": (lambda x, w: x @ (w * 2.0).T, "multiply is not a view"),
    "cut": (lambda x, w: x[:, :16] @ w[:, 8:24].T, "cuts groups of 32"),
    "reversed columns": (lambda x, w: x @ w[:, ::-1].T, "cuts groups of 32"),
    "along the packed axis": (lambda x, w: qg.take(w, [1, 40], axis=1), "which is packed"),
    "reshaped": (lambda x, w: x[:, :16] @ w.reshape(128, 16).T, "cuts groups of 32"),
    "mixed axes": (lambda x, w: x @ w.T.reshape(32, 64).T, "mixes the packed axis"),
    "repeated": (lambda x, w: x @ qg.broadcast_to(w, (2, 32, 64)).swapaxes(1, 2), "repeats a packed value"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_e66_what_has_no_kernel_is_unpacked_with_a_reason_or_refused(name):
    f, reason = UNSUPPORTED[name]
    x, w = normal(3, 64), quantized(32, 64, group_size=32)
    assert "dequantize" in ops(agree(qg.jit(f), x, w))
    [site] = qg.jit(f).report(x, w).missed
    assert reason in str(site)
    assert "test_emlx_graph.py:" in str(site)
    with pytest.raises(qg.StrictError, match=reason):
        qg.jit(strict=True)(f)(x, w)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e67_strict_mode_proves_the_fused_product_with_a_bias(transpose, scheme):
    w = of(scheme, 64, 64)
    x, bias = normal(3, 64), normal(64)
    f = qg.jit(strict=True)(lambda x, w, b: x @ (w.T if transpose else w) + b)
    exact = to_numpy(x) @ (to_numpy(w).T if transpose else to_numpy(w)) + to_numpy(bias)
    magnitude = magnitude_of(x, w, transpose) + np.abs(to_numpy(bias))
    assert_close(f(x, w, bias), exact, k=64, path="P2", magnitude=magnitude)
    assert ops(f.optimized(x, w, bias)) == {"quantized_matmul": 1, "add": 1}


def test_e68_a_two_layer_mlp():
    """Within the loss of four bits of the dense one; what is not a weight of a dot stays as it is."""

    def mlp(x, p):
        return qg.relu(x @ p["up"].T + p["bias"]) @ p["down"].T * p["norm"]

    dense = {"up": normal(256, 128), "down": normal(64, 256), "bias": normal(256), "norm": normal(64)}
    packed = {k: qg.quantize(v) if v.ndim == 2 else v for k, v in dense.items()}
    x = normal(3, 128)
    f = qg.jit(strict=True)(mlp)
    found = f(x, packed)
    numbers = {k: mx.array(to_numpy(v).astype(np.float32)) for k, v in packed.items()}
    assert_close(found, mlp(x, numbers), k=256, path="graph")
    lost = to_numpy(found) - to_numpy(mlp(x, dense))
    assert 0 < np.linalg.norm(lost) < 0.15 * np.linalg.norm(to_numpy(mlp(x, dense)))
    assert packed["bias"] is dense["bias"]
    assert ops(f.optimized(x, packed))["quantized_matmul"] == 2
