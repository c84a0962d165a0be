"""No 16-bit path accumulates in 16 bit: sums of positive terms stay within the rounding of their result.

With positive data nothing cancels, so a bad accumulator shows in every element: in bfloat16 a running sum of
ones ends at 256. Three lengths, since the error of a bad accumulator grows with them.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.execute.reference import evaluate, to_numpy
from qgraph.ir.op import Op
from tests.agree import assert_close, leaves_of

LENGTHS = [64, 1024, 16384]
DTYPES = [mx.bfloat16, mx.float16]


def positive(seed, *shape):
    return mx.random.uniform(0.1, 1.0, shape, key=mx.random.key(seed))


def near_one(seed, *shape):
    """Factors whose products stay in the range of float16."""
    return 1 + mx.random.normal(shape, key=mx.random.key(seed)) / 256


def rows(k):
    return [positive(1, 3, k)]


def matrices(k):
    return [positive(1, 3, k), positive(2, 8, k)]


def stacks(k):
    return [positive(1, 4, 2, k), positive(2, 2, 8, k)]


def packed(operands, **scheme):
    """The operands with the second one packed, as they are made: in 16 bit after the cast."""
    return lambda k: [qg.quantize(x, **scheme) if i == 1 else x for i, x in enumerate(operands(k))]


EXPERTS = [1, 0, 0, 1]
# Every op that adds up or multiplies up: how it is called, its operands for a length, and the path. More than
# one rounding to 16 bit on the way is P1.
SUMS = {
    "conv_general": (lambda a, b: qg.conv_general(a[:, None], b[:, None]), matrices, "P2"),
    "hadamard_transform": (lambda x: qg.hadamard_transform(x)[:, :1], rows, "P2"),
    "sum": (lambda x: qg.sum(x, -1), rows, "P2"),
    "sum of columns": (lambda x: qg.sum(x.T, 0), rows, "P2"),
    "mean": (lambda x: qg.mean(x, -1), rows, "P1"),
    "prod": (lambda x: qg.prod(x, -1), lambda k: [near_one(1, 3, k)], "P2"),
    "var": (lambda x: qg.var(x, -1), rows, "P1"),
    "std": (lambda x: qg.std(x, -1), rows, "P1"),
    "logsumexp": (lambda x: qg.logsumexp(x, -1), rows, "P1"),
    "softmax": (lambda x: qg.softmax(x, -1), rows, "P1"),
    "softmax, told not to be precise": (lambda x: qg.softmax(x, -1, precise=False), rows, "P1"),
    "cumsum": (lambda x: qg.cumsum(x, -1), rows, "P2"),
    "cumsum in reverse, exclusive": (lambda x: qg.cumsum(x, -1, reverse=True, inclusive=False), rows, "P2"),
    "cumprod": (lambda x: qg.cumprod(x, -1), lambda k: [near_one(1, 3, k)], "P2"),
    "logcumsumexp": (lambda x: qg.logcumsumexp(x, -1), rows, "P1"),
    "dot": (lambda x, w: x @ w.T, matrices, "P2"),
    "dot of vectors": (lambda x: x @ x, lambda k: [positive(1, k)], "P2"),
    "einsum": (lambda x, w: qg.einsum("bk,nk->nb", x, w), matrices, "P2"),
    "addmm": (lambda x, w: qg.addmm(x[:, :8], x, w.T), matrices, "P1"),
    "gather_mm": (lambda x, w: qg.gather_mm(x, qg.swapaxes(w, 1, 2), rhs_indices=EXPERTS), stacks, "P2"),
    "rms_norm": (lambda x: qg.rms_norm(x, None, 1e-5), rows, "P1"),
    "layer_norm": (lambda x: qg.layer_norm(x, None, None, 1e-5), rows, "P1"),
    "attention": (
        lambda q, v: qg.scaled_dot_product_attention(q, v, v, scale=0.125),
        lambda k: [positive(1, 1, 2, 3, 64), positive(2, 1, 2, k, 64)],
        "P1",
    ),
    "quantized_matmul": (lambda x, w: x @ w.T, packed(matrices), "P2"),
    "quantized_matmul, fp8": (lambda x, w: x @ w.T, packed(matrices, mode="mxfp8"), "P2"),
    "gather_qmm": (
        lambda x, w: qg.gather_mm(x, qg.swapaxes(w, 1, 2), rhs_indices=EXPERTS),
        packed(stacks),
        "P2",
    ),
    "quantized_lora_matmul": (
        lambda x, w, a, b: x @ w.T + 0.5 * ((x @ a) @ b),
        packed(lambda k: [*matrices(k), positive(3, k, 4) / k, positive(4, 4, 8)]),
        "lora",
    ),
    "index_update add": (
        lambda x: qg.zeros((2, 3), x.dtype).at[qg.zeros(x.shape[1], mx.int32)].add(x.T),
        rows,
        "P2",
    ),
}


# What else the error is relative to: a difference from the mean is as wrong as the mean.
ALSO = {"layer_norm": 6.0}


def in_16_bit(operands, dtype):
    """The operands in a 16-bit dtype; a packed one with scales of that dtype."""
    dense = [qg.dequantize(x) if qg.is_quantized(x) else x for x in operands]
    return [
        qg.quantize(d.astype(dtype), mode=x.quantization.mode) if qg.is_quantized(x) else d.astype(dtype)
        for x, d in zip(operands, dense, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("how", ["jit", "eager"])
def test_sums_of_16_bit_numbers_are_kept_in_32(name, dtype, how):
    function, operands, path = SUMS[name]
    f = qg.jit(function)
    for k in LENGTHS:
        args = in_16_bit(operands(k), dtype)
        found = f(*args) if how == "jit" else f.eager(*args)
        assert found.dtype == dtype
        [expected] = evaluate(f.graph(*args), [to_numpy(x) for x in leaves_of(args)])
        assert_close(
            found, expected, k=k, path=path, magnitude=np.abs(expected) + ALSO.get(name, 0.0), about=(name, k)
        )


def test_the_list_has_every_op_that_accumulates():
    """Found by name: an op whose NumPy meaning reduces, runs or contracts."""
    ran = {op for f, operands, _ in SUMS.values() for op in qg.jit(f).optimized(*operands(64)).histogram()}
    words = ("sum", "prod", "mean", "var", "std", "norm", "softmax", "dot", "mm", "matmul", "attention")
    named = {name for name in Op.registry if any(w in name for w in words) and "random" not in name}
    summing = named - {"cummax", "cummin"}
    assert summing - {"dot", "gather_mm"} <= ran | {"dot", "gather_mm"}
    assert {"dot", "gather_mm", "index_update"} <= ran


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_exact_data_come_out_exact(dtype, bits):
    """Ones, one-hot rows and powers of two have exact products: not one bit may differ."""
    k = 2048
    ones = qg.quantize(mx.ones((8, k), dtype), bits=bits)
    assert mx.array_equal(qg.dot(mx.ones((1, k), dtype), ones.T), mx.full((1, 8), k, dtype))
    powers = mx.array([0.25, 0.5, 1.0, 2.0] * 2, dtype)[:, None] * mx.ones((8, k), dtype)
    w = qg.quantize(powers, bits=bits)
    assert mx.array_equal(qg.dot(mx.ones((1, k), dtype), w.T)[0], powers[:, 0] * k)
    w = qg.quantize(mx.random.normal((8, k)).astype(dtype), bits=bits)
    hot = mx.eye(k, dtype=dtype)[::257]
    numbers = mx.array(to_numpy(w).astype(np.float32)).astype(dtype)
    assert mx.array_equal(qg.dot(hot, w.T), numbers.T[::257])
