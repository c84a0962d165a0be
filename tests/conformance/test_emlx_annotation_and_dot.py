"""research/emlx.md §4, cases 20–45: the annotation, and every form of dot at once (without `qg.jit`)."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

import qgraph as qg
from qgraph import kernels
from qgraph.execute.reference import to_numpy
from qgraph.ops.dispatch import type_of
from tests.agree import assert_close, magnitude_of, normal, ops
from tests.conformance.oracle import (
    MICROSCALED,
    MODES,
    assert_kernel,
    assert_product,
    kernel,
    largest_terms,
    of,
    quantized,
    ramp,
    raw,
)

PAIRS = [*itertools.product([mx.float32, mx.float16, mx.bfloat16], repeat=2)]
FUNCTIONS = {"at once": lambda f: f, "jit": qg.jit, "step by step": lambda f: qg.jit(f).eager}


@pytest.fixture(params=FUNCTIONS)
def run(request):
    """How a function runs: eagerly, compiled, or op by op under `f.eager`."""
    return FUNCTIONS[request.param]


def fixture(mode="affine", rows=128, columns=64):
    """EMLX's: x {1,4,K}/100 and w {N,K}/1000."""
    return ramp(1, 4, columns, over=100), qg.quantize(ramp(rows, columns, over=1000), mode=mode)


def test_e20_a_plain_value_has_no_annotation():
    x = normal(4, 64)
    assert type_of(x).packing is None
    [value] = qg.jit(lambda x: x).graph(x).inputs
    assert value.type.packing is None


def test_e21_the_predicate():
    for plain in (normal(4, 64), None, {}, {"packed": 1}, "w", 3, np.ones(4), [quantized(4, 64)]):
        assert qg.is_quantized(plain) is False
    assert qg.is_quantized(quantized(4, 64)) is True


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e22_the_annotation_survives_tree_maps_streams_and_programs(scheme):
    """The copy to a GPU and back is not run here: there is none. A stream of the CPU stands in."""
    tree = {"a": [of(scheme, 8, 128)], "b": normal(3)}
    mapped = tree_map(lambda leaf: leaf, tree, is_leaf=qg.is_quantized)
    with mx.stream(mx.new_stream(mx.cpu)):
        returned = qg.jit(lambda tree: tree)(mapped)
        mx.eval(returned["a"][0].components())
    for found in (mapped, returned):
        [w] = found["a"]
        assert w.quantization == tree["a"][0].quantization
        assert (w.biases is None) == (scheme[0] != "affine")
        assert all(map(mx.array_equal, w.components(), tree["a"][0].components()))


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e23_the_text_shows_the_scheme_and_the_shapes_and_no_words(scheme):
    w = of(scheme, 8, 128)
    tag = str(w.quantization)
    text = repr(w)
    for part in ("f32[8,128]", tag, "packed uint32[8,"):
        assert part in text
    dump = str(qg.jit(lambda x, w: x @ w.T).graph(normal(2, 128), w))
    assert f"f32[8,128]:{tag}" in dump
    for shown in (text, dump):
        assert not any(str(n) in shown for n in w.packed.reshape(-1).tolist() if n > 1e6)


def test_e24_the_shape_of_the_product(run):
    x, w = fixture()
    assert run(lambda x, w: qg.dot(x, w.T))(x, w).shape == (1, 4, 128)


def test_e25_dot_equals_the_direct_call_of_the_kernel(run):
    x, w = ramp(1, 4, 64, over=100), qg.quantize(ramp(64, 64, over=100))
    found = run(lambda x, w: qg.dot(x, w.T))(x, w)
    assert_kernel(found, x, w)
    assert_product(found, x, w)


def test_e26_the_product_is_within_the_loss_of_quantization(run):
    """|x ŵ - x w| ≤ |x| |scale|: no number of the weight moved by more than a step of its group."""
    x, w = fixture()
    dense = to_numpy(ramp(128, 64, over=1000))
    lost = np.abs(to_numpy(run(lambda x, w: qg.dot(x, w.T))(x, w)) - to_numpy(x) @ dense.T)
    bound = np.abs(to_numpy(x)).sum(-1, keepdims=True) * np.abs(to_numpy(w.scales)).T
    assert np.all(lost <= bound)
    assert np.any(lost > 0), "the loss of four bits must show"


def test_e27_dot_equals_explicit_quantized_matmul(run):
    x, w = fixture()
    found = run(lambda x, w: qg.dot(x, w.T))(x, w)
    assert mx.array_equal(found, run(lambda x, w: qg.quantized_matmul(x, w))(x, w))
    assert_product(found, x, w)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e28_every_mode_equals_dequantize_and_dot_and_the_kernel(scheme, run):
    x, w = fixture(scheme[0], 64, 128)
    found = run(lambda x, w: qg.dot(x, w.T))(x, w)
    assert_product(found, x, w)
    dense = run(lambda x, w: qg.dot(x, qg.dequantize(w).T))(x, w)
    assert_product(dense, x, w)
    assert_product(mx.matmul(x, qg.dequantize(w).T), x, w)
    assert_kernel(found, x, w)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e29_quantize_dequantize_and_the_product_are_equal_in_a_program(scheme):
    x, w = ramp(1, 4, 128, over=100), ramp(64, 128, over=1000)
    mode, bits, group = scheme
    pack = lambda w: qg.quantize(w, mode=mode, bits=bits, group_size=group)  # noqa: E731
    at_once, compiled = pack(w), qg.jit(pack)(w)
    assert all(map(mx.array_equal, at_once.components(), compiled.components()))
    assert mx.array_equal(qg.dequantize(at_once), qg.jit(qg.dequantize)(at_once))
    assert mx.array_equal(qg.quantized_matmul(x, at_once), qg.jit(qg.quantized_matmul)(x, at_once))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e30_a_quantized_left_operand(scheme, transposed, run):
    w = of(scheme, 64, 128)
    x = normal(64 if transposed else 128, 4)
    found = run(lambda w, x: qg.dot(w.T if transposed else w, x))(w, x)
    dense = to_numpy(w).T if transposed else to_numpy(w)
    magnitude = magnitude_of(x.T, w, not transposed).T
    assert_close(found, dense @ to_numpy(x), k=x.shape[0], path="P2", magnitude=magnitude)


def test_e30_a_quantized_left_operand_costs_no_dequantize():
    counts = ops(qg.jit(strict=True)(lambda w, x: w @ x).optimized(quantized(64, 128), normal(128, 4)))
    assert counts["quantized_matmul"] == 1
    assert not set(counts) & {"dot", "dequantize"}


@pytest.mark.parametrize("left", MODES, ids=str)
@pytest.mark.parametrize("right", MODES, ids=str)
def test_e31_two_quantized_operands(left, right, run):
    a, b = of(left, 4, 128), of(right, 32, 128)
    found = run(lambda a, b: qg.dot(a, b.T))(a, b)
    magnitude = largest_terms(a) @ largest_terms(b).T
    assert_close(found, to_numpy(a) @ to_numpy(b).T, k=128, path="P2", magnitude=magnitude)


def test_e31_the_cheaper_operand_is_unpacked_and_reported():
    a, b = quantized(4, 64), quantized(32, 64)
    f = qg.jit(lambda a, b: a @ b.T)
    assert "the left one, the smaller, is dequantized" in str(f.report(a, b))
    assert "the right one, the smaller, is dequantized" in str(f.report(b, a))
    assert ops(f.optimized(a, b))["quantized_matmul"] == 1


def test_e32_dense_operands_are_unaffected(run):
    a, b = ramp(4, 3, over=1), ramp(3, 5, over=1)
    assert mx.array_equal(run(qg.dot)(a, b), a @ b)
    assert ops(qg.jit(qg.dot).optimized(a, b)) == {"dot": 1}


def test_e33_operands_from_elsewhere(run):
    """A NumPy array beside MLX's; another device is not at hand."""
    a, b = np.arange(12, dtype=np.float32).reshape(4, 3), ramp(3, 5, over=1)
    assert np.array_equal(np.array(run(lambda b: qg.dot(a, b))(b)), a @ np.array(b))
    w = quantized(5, 64)
    x = np.array(normal(4, 64))
    for f in (lambda w: qg.dot(x, w.T), lambda w: x @ w.T):
        assert_product(run(f)(w), mx.array(x), w)
    assert mx.array_equal(run(lambda w: x - w[:4])(w), mx.array(x) - qg.dequantize(w)[:4])


def test_e34_a_wider_weight(run):
    x, w = ramp(1, 4, 128, over=100), qg.quantize(ramp(256, 128, over=1000))
    found = run(lambda x, w: qg.dot(x, w.T))(x, w)
    assert found.shape == (1, 4, 256)
    assert_product(found, x, w)


def test_e35_the_raw_kernel(run):
    x, w = fixture()
    found = run(qg.quantized_matmul)(x, w)
    assert found.shape == (1, 4, 128)
    assert_kernel(found, x, w)


def test_e36_a_lora_branch_equals_the_dense_reference(run):
    x, w = ramp(1, 4, 64, over=100), quantized(128, 64)
    a, b = normal(64, 8), normal(8, 128)
    found = run(lambda x, w, a, b: qg.dot(x, w.T) + 20.0 * qg.dot(qg.dot(x, a), b))(x, w, a, b)
    xn, an, bn = map(to_numpy, (x, a, b))
    branch = 20 * (xn @ an @ bn)
    magnitude = magnitude_of(x, w) + 20 * (np.abs(xn) @ np.abs(an) @ np.abs(bn))
    assert found.shape == (1, 4, 128)
    assert_close(found, xn @ to_numpy(w).T + branch, k=64, path="lora", magnitude=magnitude)
    assert np.abs(to_numpy(found) - to_numpy(qg.dot(x, w.T))).mean() > 1


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e37_a_weight_stored_in_out(scheme, run):
    x, w = normal(3, 2), of(scheme, 2, 128)
    found = run(lambda x, w: qg.dot(x, w))(x, w)
    assert found.shape == (3, 128)
    assert_product(found, x, w, transpose=False)
    assert_kernel(found, x, w, transpose=False)


@pytest.mark.parametrize(("batch", "out"), [*itertools.product([1, 2, 3, 4], [1, 2, 3, 4, 7])])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_e38_few_rows_and_few_outputs(batch, out, groups, run):
    x, w = normal(batch, 64 * groups), quantized(out, 64 * groups)
    assert_product(run(lambda x, w: qg.dot(x, w.T))(x, w), x, w)


def test_e39_the_left_operand_contracted_on_its_first_axis(run):
    """Square, so that a kernel which ignores the axis gives a wrong answer of the right shape."""
    x, w = normal(64, 64), quantized(64, 64)
    for f in (
        lambda x, w: qg.tensordot(x, w, [[0], [1]]),
        lambda x, w: qg.tensordot(x, w, [[-2], [-1]]),
        lambda x, w: qg.einsum("ki,nk->in", x, w),
        lambda x, w: qg.dot(x.T, w.T),
    ):
        assert_product(run(f)(x, w), x.T, w)
    assert_product(run(lambda x, w: qg.tensordot(x, w, [[0], [0]]))(x, w), x.T, w, transpose=False)


@pytest.mark.parametrize("axes", [[[1, 2], [1, 2]], [[-2, -1], [-2, -1]], [[2, 1], [2, 1]]])
def test_e40_two_contraction_axes(axes, run):
    x, w = normal(4, 3, 64), quantized(5, 3, 64)
    found = run(lambda x, w: qg.tensordot(x, w, axes))(x, w)
    flat = qg.reshape(w, (5, 192))
    assert_product(found, x.reshape(4, 192), flat)
    assert_product(run(lambda x, w: qg.einsum("bhk,nhk->bn", x, w))(x, w), x.reshape(4, 192), flat)


def test_e40_two_contraction_axes_in_other_orders(run):
    """The second pairs the axes crosswise, which no view of the packed words can do."""
    x, w = normal(64, 3, 4), quantized(5, 3, 64)
    exact = np.einsum("khb,nhk->bn", to_numpy(x), to_numpy(w))
    magnitude = np.einsum("khb,nhk->bn", np.abs(to_numpy(x)), largest_terms(w))
    for f in (
        lambda x, w: qg.einsum("khb,nhk->bn", x, w),
        lambda x, w: qg.tensordot(x, w, [[1, 0], [1, 2]]),
        lambda x, w: qg.tensordot(x, w, [[0, 1], [2, 1]]),
    ):
        assert_close(run(f)(x, w), exact, k=192, path="P2", magnitude=magnitude)


EINSUMS = {
    "bd,nd->bn": ((3, 64), (32, 64)),
    "bd,nd": ((3, 64), (32, 64)),
    "nd,bd->bn": ((32, 64), (3, 64)),
    "b d, n d -> n b": ((3, 64), (32, 64)),
    "bd,dn->bn": ((3, 32), (32, 64)),
    "bsd,nd->bsn": ((2, 3, 64), (32, 64)),
    "...d,nd->...n": ((2, 1, 3, 64), (32, 64)),
    "...d,...nd->...n": ((3, 64), (3, 32, 64)),
    "...md,...nd->...mn": ((2, 1, 5, 64), (3, 32, 64)),
    "d,nd->n": ((64,), (32, 64)),
    "bmd,bnd->mbn": ((3, 5, 64), (3, 32, 64)),
    "bmd,bnd->bmn": ((1, 5, 64), (3, 32, 64)),
    "bd,hnd->bhn": ((3, 64), (2, 32, 64)),
    "bhd,hnd->bn": ((3, 2, 64), (2, 32, 64)),
    "bsd,dhk->bshk": ((2, 5, 6), (6, 3, 64)),
    "bd,nd->": ((3, 64), (32, 64)),
    "bd,nd->bnd": ((3, 64), (32, 64)),
    "bb,nd->bn": ((3, 3), (32, 64)),
    "b,nnd->bn": ((3,), (32, 32, 64)),
    "bd,nd,n->b": ((3, 64), (32, 64), (32,)),
}


@pytest.mark.parametrize("spelling", EINSUMS)
def test_e41_einsum_in_every_spelling(spelling, run):
    """Against NumPy's; the larger operand is packed."""
    args = [normal(*shape) for shape in EINSUMS[spelling]]
    at = max(range(2), key=lambda i: args[i].size)
    args[at] = qg.quantize(args[at])
    found = run(lambda *args: qg.einsum(spelling, *args))(*args)
    exact = np.einsum(spelling, *map(to_numpy, args))
    sizes = [largest_terms(a) if qg.is_quantized(a) else np.abs(to_numpy(a)) for a in args]
    assert_close(found, exact, k=64 * 32, path="P2", magnitude=np.einsum(spelling, *sizes))


@pytest.mark.parametrize("xshape", [(3, 5, 64), (2, 3, 5, 64), (1, 5, 64), (4, 1, 5, 64)])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e41_batch_axes(xshape, scheme, run):
    x, w = normal(*xshape), of(scheme, 3, 128, 64)
    found = run(lambda x, w: qg.dot(x, qg.swapaxes(w, -1, -2)))(x, w)
    assert_product(found, x, w)
    if x.ndim == 3 and x.shape[0] == 3:
        assert_product(run(lambda x, w: qg.einsum("bmk,bnk->bmn", x, w))(x, w), x, w)


@pytest.mark.parametrize("xshape", [(64,), (5, 64)])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e42_x_of_lower_rank_meets_every_matrix(xshape, scheme, run):
    """MLX's kernel takes the first matrix only, without a word."""
    x, w = normal(*xshape), of(scheme, 3, 128, 64)
    found = run(lambda x, w: qg.dot(x, qg.swapaxes(w, -1, -2)))(x, w)
    assert found.shape == (3, *xshape[:-1], 128)
    assert_product(found, x, w)
    with pytest.raises(qg.ShapeError, match=f"x of rank {len(xshape)} with a weight of rank 3"):
        qg.quantized_matmul(x, w)


@pytest.mark.parametrize(("x", "scales"), PAIRS)
def test_e43_another_dtype_of_the_activations_is_cast_and_shown(x, scales, run):
    xs, w = normal(3, 64, dtype=x), quantized(32, 64, dtype=scales)
    f = lambda x, w: qg.dot(x, w.T)  # noqa: E731
    found = run(f)(xs, w)
    assert found.dtype == (mx.zeros(1, x) + mx.zeros(1, scales)).dtype
    assert_product(found, xs, w)
    # In 16 bit MLX's CPU kernel needs its input in float32: a node of the graph, and a line of the source.
    casts = ops(qg.jit(f).optimized(xs, w)).get("cast", 0)
    if x == scales and kernels.library():  # native kernels sum in float32 themselves
        assert casts == 0
    else:
        assert casts == (x != mx.float32) + (x == scales != mx.float32)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize(("x", "scales"), PAIRS)
def test_e44_the_inferred_dtype_of_the_kernel_is_mlxs(mode, x, scales):
    """All 18: affine promotes x with the scales; the microscaled modes keep x's."""
    xs, w = normal(3, 64, dtype=x), quantized(32, 64, mode=mode, dtype=scales)
    [out] = qg.jit(qg.quantized_matmul).graph(xs, w).outputs
    assert out.type.dtype.mlx == kernel(xs, w).dtype == qg.quantized_matmul(xs, w).dtype


@pytest.mark.parametrize("scheme", [*MICROSCALED, ("affine", 4, 64)], ids=str)
def test_e45_integer_activations_are_computed_in_float32(scheme, run):
    x, w = mx.array([[1, -2, 3, 4] * 16] * 3), of(scheme, 32, 64)
    found = run(lambda x, w: qg.dot(x, w.T))(x, w)
    assert found.dtype == mx.float32
    assert_product(found, x.astype(mx.float32), w)


def test_e45_inner_sizes_that_differ_name_the_node_and_the_line():
    w = quantized(128, 64)
    with pytest.raises(qg.ShapeError, match=r"inner sizes differ, 32 \(lhs axis -1\) and 64") as info:
        qg.jit(lambda x, w: x @ w.T)(normal(2, 32), w)
    for part in (
        "at dot(%x: f32[2,32], %w.T: f32[64,128]:affine4g64@-2)",
        "test_emlx_annotation_and_dot.py",
        "fix:",
    ):
        assert part in str(info.value)
    with pytest.raises(qg.ShapeError, match=r"x has shape \(2, 32\), the weight contracts 64") as info:
        qg.jit(qg.quantized_matmul)(normal(2, 32), w)
    assert "quantized_matmul{transpose=True}" in str(info.value)
    with pytest.raises(ValueError, match="does not match the expanded quantized matrix"):
        kernel(normal(2, 32), w)  # MLX agrees


WRONG_PARTS = {
    "bits": (lambda w, s, b: (w, s, b, 8, 64), qg.ShapeError, "affine8g64 packed"),
    "group size": (lambda w, s, b: (w, s, b, 4, 32), qg.ShapeError, "affine4g32 packed"),
    "scales of another shape": (lambda w, s, b: (w, s[:, :1], b[:, :1], 4, 64), qg.ShapeError, "scales"),
    "fewer rows of scales": (lambda w, s, b: (w, s[:3], b[:3], 4, 64), qg.ShapeError, r"expected \(8, 2\)"),
    "no biases": (lambda w, s, b: (w, s, None, 4, 64), qg.DTypeError, "affine4g64 needs biases"),
    "int32 words": (lambda w, s, b: (w.view(mx.int32), s, b, 4, 64), qg.DTypeError, "expected uint32"),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_e45_parts_that_do_not_belong_together(name):
    change, kind, says = WRONG_PARTS[name]
    arrays, _ = raw(quantized(8, 128))
    packed, scales, biases, bits, group = change(*arrays)
    with pytest.raises(kind, match=says) as info:
        qg.from_quantized(packed, scales, biases, bits=bits, group_size=group)
    assert info.value.fix
    with pytest.raises(kind, match=says) as info:
        qg.jit(lambda x: qg.from_quantized(packed, scales, biases, bits=bits, group_size=group))(mx.ones(1))
    assert "test_emlx_annotation_and_dot.py" in str(info.value)
