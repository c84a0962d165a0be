"""Beyond the lists: an op on a packed value is that op on its numbers, compiled, at once and step by step."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from tests.agree import assert_close, leaves_of, normal
from tests.conformance.oracle import MICROSCALED, largest_terms, of

SCHEMES = [("affine", 4, 32), ("affine", 3, 32), *MICROSCALED]
UNARY = [
    "abs",
    "ceil",
    "cos",
    "cosh",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "logcumsumexp",
    "erf",
    "exp",
    "expm1",
    "flatten",
    "floor",
    "flip",
    "gelu",
    "gelu_approx",
    "gelu_fast_approx",
    "isfinite",
    "isinf",
    "isnan",
    "leaky_relu",
    "logical_not",
    "mish",
    "negative",
    "ones_like",
    "zeros_like",
    "relu",
    "relu_squared",
    "round",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "sinh",
    "softmax",
    "softplus",
    "sort",
    "all",
    "any",
    "max",
    "min",
    "mean",
    "sum",
    "prod",
    "std",
    "var",
    "logsumexp",
    "square",
    "tan",
    "tanh",
    "transpose",
    "tril",
    "triu",
    "squeeze",
    "atleast_3d",
    "unstack",
]
OPS = {name: getattr(qg, name) for name in UNARY} | {
    "argmax": lambda w: qg.argmax(qg.abs(w) + qg.arange(w.shape[-1]), axis=-1),
    "clip": lambda w: qg.clip(w, -0.5, 0.5),
    "topk": lambda w: qg.sort(qg.topk(w, 3)),
    "pad with zeros": lambda w: qg.pad(w, ((1, 2), (0, 32))),
    "pad with a number": lambda w: qg.pad(w, 1, constant_values=2.0),
    "tile": lambda w: qg.tile(w, (2, 2)),
    "repeat": lambda w: qg.repeat(w, 2, 0),
    "roll": lambda w: qg.roll(w, 3, 0),
    "split": lambda w: qg.split(w, 2, 1),
    "stack": lambda w: qg.stack([w, w], 1),
    "join with itself doubled": lambda w: qg.concatenate([w, w * 2.0], 0),
    "join with dense rows": lambda w: qg.concatenate([w, qg.ones((2, w.shape[1]))], 0),
    "join flattened": lambda w: qg.concatenate([w, w[:3]], axis=None),
    "join with another dtype": lambda w: qg.concatenate([w, w.astype(mx.float32)], 1),
    "broadcast": lambda w: qg.broadcast_to(w, (2, *w.shape)),
    "moveaxis": lambda w: qg.moveaxis(w, 0, 1),
    "slice by array": lambda w: qg.slice(w, mx.array([1]), [0], (2, w.shape[1])),
    "slice_update": lambda w: qg.slice_update(w, qg.ones((2, 3)), mx.array([1, 2]), (0, 1)),
    "rows": lambda w: qg.take(w, mx.array([2, -1, 0]), axis=0),
    "columns": lambda w: qg.take(w, mx.array([3, -1, 0]), axis=1),
    "elements": lambda w: qg.take(w, mx.array([[3, -1, 0]])),
    "take_along_axis": lambda w: qg.take_along_axis(w, mx.array([[1, 2]]), axis=1),
    "put_along_axis": lambda w: qg.put_along_axis(
        w, qg.argmax(w * 0, 1, keepdims=True), mx.array(1.5), axis=1
    ),
    "gather": lambda w: w[mx.array([0, 1]), mx.array([2, 3])],
    "a row": lambda w: w[1],
    "a number": lambda w: w[1, 2],
    "new axes": lambda w: w[None, ..., None],
    "to int": lambda w: w.astype(mx.int32),
    "to bool": lambda w: w.astype(mx.bool_),
    "to float64": lambda w: w.astype(mx.float64),
    "to complex": lambda w: w.astype(mx.complex64),
    "where": lambda w: qg.where(qg.greater(w, 0), w, -w),
    "power": lambda w: abs(w) ** 2.5,
    "number minus": lambda w: 1 - w,
    "number over": lambda w: 1 / (w + 10),
    "remainder": lambda w: w % 0.75,
    "floor_divide": lambda w: w // 0.75,
    "w + w": lambda w: w + w,
    "w * w": lambda w: w * w,
    "w == w": lambda w: qg.equal(w, w),
    "outer": lambda w: qg.outer(w[:2], w[:2]),
    "rms_norm": lambda w: qg.rms_norm(w, qg.ones(w.shape[-1]), 1e-5),
    "layer_norm": lambda w: qg.layer_norm(w, None, None, 1e-5),
    "swiglu": lambda w: qg.swiglu(w, w),
    "rope": lambda w: qg.rope(w[None], 32, traditional=False, base=10000.0, scale=1.0, offset=3),
    "attention": lambda w: qg.scaled_dot_product_attention(*[w[None, None]] * 3, scale=0.125),
    "w @ w.T": lambda w: w @ w.T,
    "w.T @ w": lambda w: w.T @ w,
    "einsum of one": lambda w: qg.einsum("ij->j", w),
    "einsum of three": lambda w: qg.einsum("ij,kj,kl->il", w, w, w),
    "vecdot": lambda w: qg.vecdot(w, w),
    "vecdot of columns": lambda w: qg.vecdot(w, qg.ones(w.shape), axis=0),
    "inner": lambda w: qg.inner(w, w),
    "tensordot of no axis": lambda w: qg.tensordot(w[:1], w[:1], 0),
    "tensordot of all": lambda w: qg.tensordot(w, w, 2),
    "addmm": lambda w: qg.addmm(w @ w.T, w, w.T, alpha=0.5, beta=2.0),
    "gather_mm on the right": lambda w: qg.gather_mm(
        qg.ones((3, 2, w.shape[1])), qg.stack([w.T, w.T * 2.0]), None, [0, 1, 0]
    ),
    "gather_mm on the left": lambda w: qg.gather_mm(qg.stack([w, w]), qg.ones((2, w.shape[1], 3)), [1, 0]),
    "logaddexp": lambda w: qg.logaddexp(w, 1.0),
    "cumsum backwards": lambda w: qg.cumsum(w, axis=1, reverse=True),
    "quantize again": lambda w: qg.quantize(w, bits=8, group_size=32),
    "max of columns": lambda w: qg.max(w, axis=0, keepdims=True),
    "var of rows": lambda w: w.var(axis=1),
    "unflatten": lambda w: qg.unflatten(w, 0, (2, -1)),
    "methods": lambda w: w.T.reshape(-1).sum(),
    "a tree": lambda w: {"a": w, "b": [w.T, w[1:]]},
    "itself": lambda w: w,
}
ROUNDING_DECIDES = {
    "quantize again",
    "floor_divide",
    "remainder",
    "to int",
    "to bool",
}  # equal or a step apart


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_an_op_on_a_packed_value(name, scheme):
    f = OPS[name]
    for shape in ((4, 64), (4, 32)):
        w = of(scheme, *shape)
        dense = qg.dequantize(w)
        expected = leaves_of(f(dense))
        for run in (qg.jit(f), f, qg.jit(f).eager):
            found = leaves_of(run(w))
            for got, want in zip(found, expected, strict=True):
                assert (got.shape, got.dtype) == (want.shape, want.dtype)
                if name in ROUNDING_DECIDES and not qg.is_quantized(got):
                    assert mx.array_equal(got, want)  # the numbers are those of dequantize, to the bit
                else:
                    assert_close(got, want, k=64, path="graph")


UPDATES = {
    "set": lambda w: w.at[0].set(5.0),
    "add": lambda w: w.at[1:3].add(1.0),
    "multiply": lambda w: w.at[:, 2].multiply(3.0),
}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_of_a_packed_value_is_one_of_its_numbers(name, scheme):
    w, f = of(scheme, 4, 64), UPDATES[name]
    dense = qg.dequantize(w)
    for run in (qg.jit(f), f, qg.jit(f).eager):
        assert mx.array_equal(run(w), qg.jit(f)(dense))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("scales", [mx.float32, mx.float16, mx.bfloat16])
def test_numbers_wider_than_their_scales_are_not_rounded_to_them(dtype, scales):
    """MLX computes scale * code + bias in the dtype of the scales, whatever dtype is asked for."""
    w = of(("affine", 4, 32), 8, 64, dtype=scales)
    wide = qg.QuantizedTensor(
        w.packed, w.scales.astype(mx.float32), w.biases.astype(mx.float32), w.quantization, dtype=mx.float32
    )
    exact = qg.dequantize(wide)
    if dtype == scales:
        return
    for f in (
        lambda w: qg.dequantize(w.astype(dtype)),
        lambda w: w.astype(dtype) + 0.0,
        lambda w: qg.take(w.astype(dtype), mx.arange(8), axis=0),
    ):
        for run in (qg.jit(f), f, qg.jit(f).eager):
            assert run(w).dtype == dtype
            assert_close(run(w), exact, path="elementwise", magnitude=largest_terms(wide))


@pytest.mark.parametrize("name", ["<", "<=", ">", ">="])
def test_packed_values_are_ordered_by_their_numbers(name):
    w, x = of(("affine", 4, 32), 4, 64), normal(4, 64)
    f = {
        "<": lambda w, x: w < x,
        "<=": lambda w, x: w <= x,
        ">": lambda w, x: w > x,
        ">=": lambda w, x: w >= x,
    }[name]
    for run in (qg.jit(f), f, qg.jit(f).eager):
        assert mx.array_equal(run(w, x), f(qg.dequantize(w), x))
