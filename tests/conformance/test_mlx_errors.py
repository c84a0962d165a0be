"""research/mlx.md §5, cases 19, 20 and 37: errors, gradients, and what MLX computes wrongly or dies of."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.execute.reference import to_numpy
from tests.agree import assert_close, normal
from tests.conformance.oracle import (
    MICROSCALED,
    MODES,
    assert_kernel,
    assert_product,
    by_hand,
    of,
    quantized,
    raw,
)

W = quantized(8, 64)


def pack(shape=(2, 64), dtype=mx.float32, **options):
    return lambda: qg.quantize(mx.ones(shape).astype(dtype), **options)


# MLX's message of each is in research/mlx.md §1.3; ours has the same facts.
ERRORS = {
    "mode": (pack(mode="foo"), "mode is 'foo', supported: affine, mxfp4, mxfp8, nvfp4"),
    "bits": (pack(bits=7), "bits is 7, supported: 1, 2, 3, 4, 5, 6, 8"),
    "group size": (pack(group_size=16), "group_size is 16, supported: 32, 64, 128"),
    "mxfp4 group": (pack(mode="mxfp4", group_size=64), "mxfp4: group_size is 64, supported: 32"),
    "mxfp4 bits": (pack(mode="mxfp4", bits=8), "mxfp4: bits is 8, supported: 4"),
    "vector": (pack((64,)), "rank 1"),
    "last axis": (pack((64, 100)), r"\(64, 100\).*group_size=64"),
    "integers": (pack(dtype=mx.int32), "i32 cannot be packed"),
    "float64": (pack(dtype=mx.float64), "f64 cannot be packed"),
    "global scale of affine": (pack(global_scale=1.0), "for nvfp4 only"),
    "global scale vector": (pack(mode="nvfp4", global_scale=mx.ones(2)), "one float32 number"),
    "inner": (lambda: qg.dot(normal(2, 32), W.T), r"32 \(lhs axis -1\) and 64 \(rhs axis -2\)"),
    "inner of the kernel": (lambda: qg.quantized_matmul(normal(2, 32), W), r"\(2, 32\).* contracts 64"),
    "a scalar": (lambda: qg.dot(mx.array(1.0), W), "a scalar cannot be contracted"),
    "a scalar for the kernel": (lambda: qg.quantized_matmul(mx.array(1.0), W), "x has shape"),
    "batch": (
        lambda: qg.dot(normal(2, 3, 64), quantized(4, 8, 64).swapaxes(1, 2)),
        r"batch axes \(2,\) and \(4,\) do not broadcast",
    ),
    "batch of the kernel": (lambda: qg.quantized_matmul(normal(2, 3, 64), quantized(4, 8, 64)), "broadcast"),
    "dense weight": (lambda: qg.quantized_matmul(normal(2, 64), normal(8, 64)), "is not quantized"),
    "transposed weight": (lambda: qg.quantized_matmul(normal(2, 64), W.T), "groups run along axis -2"),
    "nothing to unpack": (lambda: qg.dequantize(normal(2, 64)), "is not quantized"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_m19_an_error_says_what_mlx_says_and_the_fix(name):
    """MLX's ValueError is here an error of qgraph's own; in a trace it also names the line."""
    call, says = ERRORS[name]
    with pytest.raises(qg.QGraphError, match=says) as info:
        call()
    assert info.value.fix
    with pytest.raises(qg.QGraphError, match=says) as info:
        qg.jit(lambda x: call() + x)(mx.ones(1))
    assert "test_mlx_errors.py:" in str(info.value)


def part(name, **changes):
    packed, scales, biases = raw(of((name, 4, 64) if name == "affine" else ("mxfp4", 4, 32), 8, 64))[0]
    given = {"weight": packed, "scales": scales, "biases": biases, **changes}
    group = 64 if name == "affine" else 32
    return lambda: qg.from_quantized(**given, bits=4, group_size=group, mode=name)


PARTS = {
    "no biases": (part("affine", biases=None), "needs biases"),
    "biases beside mxfp4": (part("mxfp4", biases=mx.ones((8, 2))), "mxfp4 takes no biases"),
    "dense words": (part("affine", weight=normal(8, 8)), "float32, expected uint32"),
    "float scales of mxfp4": (part("mxfp4", scales=mx.ones((8, 2))), "float32, expected uint8"),
    "integer scales": (
        part("affine", scales=mx.ones((8, 1), mx.int32), biases=mx.ones((8, 1), mx.int32)),
        "scales are int32",
    ),
    "biases of another shape": (part("affine", biases=mx.ones((4, 1))), r"\(8, 1\), biases \(4, 1\)"),
    "scales of another batch": (
        part("affine", scales=mx.ones((2, 8, 1)), biases=mx.ones((2, 8, 1))),
        r"with scales \(2, 8, 1\)",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_m19_parts_that_do_not_fit_are_refused_before_mlx_reads_them(name):
    make, says = PARTS[name]
    with pytest.raises(qg.QGraphError, match=says) as info:
        make()
    assert info.value.fix


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m20_the_vjp_of_x_is_the_product_with_the_transpose_flipped(transpose, scheme):
    w = of(scheme, 64, 128)
    x = normal(3, 128 if transpose else 64)
    f = qg.jit(strict=True)(lambda x, w: x @ (w.T if transpose else w))
    cotangent = normal(3, 64 if transpose else 128, seed=5)
    _, [found] = mx.vjp(lambda x: f(x, w), (x,), (cotangent,))
    assert_kernel(found, cotangent, w, transpose=not transpose)
    assert_product(found, cotangent, w, transpose=not transpose)
    _, [moved] = mx.jvp(lambda x: f(x, w), (x,), (normal(*x.shape, seed=6),))
    assert_product(moved, normal(*x.shape, seed=6), w, transpose)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_m20_gradients_of_scales_and_biases_equal_finite_differences(transpose, bits):
    """The product is linear in both, so that differences in float64 are exact."""
    w = quantized(32, 64, bits=bits, group_size=32)
    packed, scales, biases = w.components()
    x, weights = normal(3, 64 if transpose else 32), normal(3, 32 if transpose else 64, seed=9)
    f = qg.jit(strict=True)(lambda x, w: x @ (w.T if transpose else w))

    def made(s, b):
        return qg.from_quantized(packed, s, b, bits=bits, group_size=32)

    found = mx.grad(lambda s, b: mx.sum(f(x, made(s, b)) * weights), (0, 1))(scales, biases)

    def loss(dense):
        return np.sum(to_numpy(x) @ (dense.T if transpose else dense) * to_numpy(weights))

    for i, got in enumerate(found):
        for row, group in ((0, 0), (31, 1), (7, 0)):
            one = np.zeros((32, 2), np.float32)
            one[row, group] = 2.0**-6
            parts = [[to_numpy(p) for p in (scales, biases)] for _ in range(2)]
            parts[0][i] = parts[0][i] + one
            parts[1][i] = parts[1][i] - one
            codes = by_hand(made(mx.ones_like(scales), mx.zeros_like(biases)))
            ends = [loss(np.repeat(s, 32, -1) * codes + np.repeat(b, 32, -1)) for s, b in parts]
            exact = (ends[0] - ends[1]) / 2.0**-5
            terms = (
                np.abs(to_numpy(x)).max() * np.abs(to_numpy(weights)).sum() * np.abs(codes).max() ** (i == 0)
            )
            assert_close(got[row, group], exact, k=96, path="P2", magnitude=terms)


@pytest.mark.parametrize("scheme", MICROSCALED, ids=str)
def test_m20_the_scales_of_the_microscaled_modes_have_no_gradient(scheme):
    w = of(scheme, 32, 64)
    x, (arrays, names) = normal(3, 64), raw(w)
    f = qg.jit(lambda x, w: qg.sum(x @ w.T))
    with pytest.raises(ValueError, match=f"no gradient wrt scales in {scheme[0]}"):
        mx.grad(lambda s: f(x, qg.from_quantized(arrays[0], s, **names, dtype=mx.float32)))(arrays[1])


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 3, 64), (1, 0, 64)])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m37_activations_without_rows(shape, scheme):
    """MLX's kernel divides by zero on a CPU, which kills the process."""
    w = of(scheme, 128, 64)
    for run in (qg.jit(lambda x, w: x @ w.T), lambda x, w: qg.dot(x, w.T), qg.quantized_matmul):
        assert run(mx.zeros(shape), w).shape == (*shape[:-1], 128)
    assert mx.grad(lambda x: qg.dot(x, w.T).sum())(mx.zeros(shape)).shape == shape
    assert qg.dot(w, mx.zeros((64, 0))).shape == (128, 0)
    assert qg.take(w, mx.zeros((0, 2), mx.int32), axis=0).shape == (0, 2, 64)
    experts = qg.swapaxes(qg.stack([w, w]), 1, 2)
    assert qg.gather_mm(normal(1, 2, 64), experts, None, mx.zeros((0,), mx.int32)).shape == (0, 2, 128)


@pytest.mark.parametrize(("n", "k"), [(0, 64), (8, 0), (0, 0)])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_m37_weights_without_numbers(n, k, lead):
    """A sum of no terms is 0: that, too, kills the process in MLX."""
    w = qg.quantize(mx.zeros((*lead, n, k)))
    assert (w.packed.shape, w.scales.shape) == ((*lead, n, k // 8), (*lead, n, k // 64))
    for x, transpose in ((mx.ones((3, k)), True), (mx.ones((3, n)), False), (mx.ones(k), True)):
        turned = qg.swapaxes(w, -1, -2) if transpose else w
        expected = np.matmul(np.ones(x.shape), np.zeros(turned.shape))
        for run in (qg.jit(qg.dot), qg.dot, qg.jit(qg.dot).eager):
            found = run(x, turned)
            assert (found.shape, found.tolist()) == (expected.shape, expected.tolist())
        left = qg.dot(qg.swapaxes(turned, -1, -2), mx.ones((x.shape[-1], 2)))
        assert left.shape == (*lead, expected.shape[-1], 2)
    assert qg.dequantize(w).shape == w.shape
    for axis in (-1, -2):
        sums = qg.vecdot(mx.ones(w.shape), w, axis=axis)
        assert (sums.shape, sums.tolist()) == (w.sum(axis=axis).shape, np.zeros(sums.shape).tolist())
    assert qg.inner(mx.ones((3, k)), w).shape == (3, *lead, n)
    assert qg.tensordot(w, w, w.ndim).item() == 0
    assert qg.einsum("...nk,...nk->...", w, w).shape == tuple(lead)
    assert qg.jit(lambda w: qg.quantize(w * 1.0))(mx.zeros((*lead, n, k))).shape == w.shape


def test_m37_a_last_axis_of_partial_groups_is_refused():
    with pytest.raises(
        qg.ShapeError, match=r"the last axis of \(8, 100\) is not a multiple of group_size=64"
    ):
        qg.quantize(normal(8, 100))
    w = quantized(8, 128)
    with pytest.raises(qg.ShapeError, match="affine4g64 packed"):
        qg.from_quantized(w.packed[:, :10], w.scales, w.biases, bits=4, group_size=64)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (1, 64)])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m37_activations_of_lower_rank_meet_every_matrix(shape, scheme):
    w = of(scheme, 2, 3, 16, 64)
    for run in (qg.jit(qg.dot), qg.dot):
        found = run(normal(*shape), qg.swapaxes(w, -1, -2))
        assert found.shape == (2, 3, *shape[:-1], 16)
        assert_product(found, normal(*shape), w)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m37_a_matrix_meets_every_expert_of_a_stack(scheme):
    """Without indices MLX's gather_qmm is its quantized_matmul, and takes the first expert only."""
    x, w = normal(3, 64), of(scheme, 2, 4, 32, 64)
    for f in (lambda x, w: qg.gather_mm(x, qg.swapaxes(w, -1, -2)), lambda x, w: qg.gather_qmm(x, w)):
        for run in (qg.jit(strict=True)(f), f):
            found = run(x, w)
            assert found.shape == (2, 4, 3, 32)
            assert_product(found, x, w)


@pytest.mark.parametrize("expert", [4, -5, 1000])
def test_m37_a_written_out_expert_that_does_not_exist_is_refused(expert):
    w, x = quantized(4, 32, 64), normal(1, 2, 64)
    for call in (
        lambda: qg.gather_mm(x, qg.swapaxes(w, 1, 2), None, [0, expert]),
        lambda: qg.gather_qmm(x, w, None, [0, expert]),
        lambda: qg.take(w, [0, expert], axis=0),
    ):
        with pytest.raises(qg.ShapeError, match=f"index {expert} is out of range for axis 0 of size 4"):
            call()


@pytest.mark.parametrize("expert", [4, -5, 1000])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m37_an_expert_out_of_range_gives_nan_and_no_foreign_memory(expert, scheme):
    """In an array an index is known only when the program runs: MLX reads what lies behind the weights."""
    w, x = of(scheme, 4, 32, 64), normal(1, 2, 64)
    indices = mx.array([2, expert, -1])
    for f in (
        lambda x, w, i: qg.gather_mm(x, qg.swapaxes(w, 1, 2), None, i),
        lambda x, w, i: qg.gather_qmm(x, w, None, i),
        lambda x, w, i: qg.take(w, i, axis=0),
    ):
        for run in (qg.jit(f), f):
            found = run(x, w, indices)
            assert mx.all(mx.isnan(found[1])).item()
            assert not mx.any(mx.isnan(found[0])).item()
            assert mx.array_equal(found[:1], run(x, w, indices[:1]))
