"""quantize-dot: every form of a contraction with a packed operand runs on the packed words."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from qgraph.execute.emit import emit
from qgraph.numeric import compare
from qgraph.rewrite import Context
from tests.agree import agree, assert_close, magnitude_of, normal, ops

MODES = [("affine", b, g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def packed(*shape, mode="affine", bits=4, group_size=32, dtype=mx.float32):
    return qg.quantize(normal(*shape, dtype=dtype), bits=bits, group_size=group_size, mode=mode)


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
@pytest.mark.parametrize("transpose", [True, False])
def test_every_scheme_in_both_orientations(mode, bits, group_size, transpose):
    w = packed(24, 128, mode=mode, bits=bits, group_size=group_size)
    x = normal(3, 128 if transpose else 24)
    graph = agree(qg.jit((lambda x, w: x @ w.T) if transpose else (lambda x, w: x @ w)), x, w)
    assert ops(graph)["quantized_matmul"] == 1
    assert not set(ops(graph)) & {"dot", "dequantize", "transpose"}


def test_nvfp4_with_a_global_scale():
    w = qg.quantize(normal(24, 64), mode="nvfp4", global_scale=mx.array(3.0))
    assert ops(agree(qg.jit(lambda x, w: x @ w.T), normal(3, 64), w))["quantized_matmul"] == 1


VIEWS = {
    "T": (lambda w: w.T, True),
    "swapaxes": (lambda w: qg.swapaxes(w, 0, 1), True),
    "double transpose": (lambda w: w.T.T.T, True),
    "reshape to same": (lambda w: w.reshape(32, 64).T, True),
    "reshape and back": (lambda w: w.reshape(2, 16, 64).reshape(32, 64).T, True),
    "reshape splits rows": (lambda w: w.reshape(1, 32, 64)[0].T, True),
    "cast": (lambda w: w.astype(mx.bfloat16).T, True),
    "cast after T": (lambda w: w.T.astype(mx.bfloat16), True),
    "row slice": (lambda w: w[4:20].T, True),
    "strided rows": (lambda w: w[::3].T, True),
    "columns after T": (lambda w: w.T[:, 3:9], True),
    "concatenated rows": (lambda w: qg.concatenate([w, w[:8]]).T, True),
    "concatenated columns after T": (lambda w: qg.concatenate([w.T, w.T[:, 5:7]], axis=1), True),
    "stack and pick": (lambda w: qg.stack([w, w])[1].T, True),
    "split": (lambda w: qg.split(w, 4)[2].T, True),
    "dequantize": (lambda w: qg.dequantize(w).T, True),
    "untransposed slice of rows": (lambda w: w[::2].reshape(16, 64)[:, :].T, True),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_views_between_weight_and_dot_leave_one_quantized_matmul(name, dtype):
    view, _ = VIEWS[name]
    x, w = normal(3, 64, dtype=dtype), packed(32, 64)
    graph = agree(qg.jit(lambda x, w: x @ view(w)), x, w)
    counts = ops(graph)
    assert counts["quantized_matmul"] == 1, str(graph)
    assert not set(counts) & {"dot", "dequantize", "transpose"}, str(graph)


def test_a_group_aligned_slice_of_the_contracted_axis():
    f = qg.jit(lambda x, w: x @ w[:, 32:].T)
    assert ops(agree(f, normal(3, 32), packed(16, 64)))["quantized_matmul"] == 1


UNALIGNED = {
    "slice cuts groups": (lambda w: w[:, 16:48].T, "cuts groups of 32"),
    "reverse": (lambda w: w[:, ::-1][:, :32].T, "cuts groups of 32"),
    "reshape cuts groups": (lambda w: w.reshape(64, 32 * 1)[:, :16].T, "cuts groups of 32"),
    "scaled": (lambda w: (w * 2.0)[:, :32].T, "multiply is not a view"),
}


@pytest.mark.parametrize("name", UNALIGNED)
def test_what_cannot_stay_packed_is_dequantized_with_the_reason_and_the_line(name):
    view, reason = UNALIGNED[name]
    f = qg.jit(lambda x, w: x @ view(w))
    w = packed(32, 64)
    k = view(mx.zeros((32, 64))).shape[0] if name != "scaled" else 32
    x = normal(3, k)
    assert "dequantize" in ops(agree(f, x, w))
    [site] = f.report(x, w).missed
    assert reason in str(site)
    assert "test_quantize_dot.py:" in str(site)


def test_strict_raises_with_the_reason_of_the_report():
    f = qg.jit(strict=True)(lambda x, w: x @ w[:, 16:48].T)
    with pytest.raises(qg.StrictError, match="cuts groups of 32"):
        f(normal(3, 32), packed(32, 64))


def test_strict_passes_where_all_is_quantized():
    f = qg.jit(strict=True)(lambda x, w: x @ w.T)
    assert f(normal(3, 64), packed(32, 64)).shape == (3, 32)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_quantized_left_operand(rank, transposed):
    w = packed(32, 64)
    k = 32 if transposed else 64
    x = normal(*{1: (k,), 2: (k, 5), 3: (2, k, 5)}[rank])
    graph = agree(qg.jit(lambda w, x: (w.T if transposed else w) @ x), w, x)
    assert ops(graph)["quantized_matmul"] == 1
    assert "dequantize" not in ops(graph)


@pytest.mark.parametrize("name", ["x @ w", "x @ w.T", "w @ x", "w.T @ x"])
def test_a_square_weight_whose_orientation_no_shape_can_tell(name):
    forms = {
        "x @ w": lambda x, w: x @ w,
        "x @ w.T": lambda x, w: x @ w.T,
        "w @ x": lambda x, w: w @ x,
        "w.T @ x": lambda x, w: w.T @ x,
    }
    assert ops(agree(qg.jit(forms[name]), normal(64, 64), packed(64, 64)))["quantized_matmul"] == 1


def test_two_quantized_operands_dequantize_the_smaller_and_say_so():
    f = qg.jit(lambda a, b: a @ b.T)
    a, b = packed(4, 64), packed(32, 64)
    counts = ops(agree(f, a, b))
    assert (counts["quantized_matmul"], counts["dequantize"]) == (1, 1)
    assert "the left one, the smaller, is dequantized" in str(f.report(a, b))


@pytest.mark.parametrize("xshape", [(64,), (5, 64), (1, 5, 64), (3, 5, 64), (2, 3, 5, 64)])
def test_batched_weights_with_x_of_every_rank(xshape):
    """MLX would use the first matrix only for x of rank 1 and 2, without a word."""
    w = packed(3, 16, 64)
    graph = agree(qg.jit(lambda x, w: x @ qg.swapaxes(w, -1, -2)), normal(*xshape), w)
    assert ops(graph)["quantized_matmul"] == 1


CONTRACTIONS = {
    "einsum bsd,nd": (lambda x, w: qg.einsum("bsd,nd->bsn", x, w), (2, 5, 64), (32, 64)),
    "einsum bsd,dn": (lambda x, w: qg.einsum("bsd,dn->bsn", x, w), (2, 5, 32), (32, 64)),
    "einsum heads": (lambda x, w: qg.einsum("bsd,dhk->bshk", x, w), (2, 5, 6), (6, 3, 32)),
    "einsum two axes": (lambda x, w: qg.einsum("bhk,nhk->bn", x, w), (2, 3, 32), (5, 3, 32)),
    "einsum w first": (lambda x, w: qg.einsum("nd,bd->bn", w, x), (2, 64), (32, 64)),
    "tensordot last two": (lambda x, w: qg.tensordot(x, w, [[1, 2], [1, 2]]), (4, 3, 32), (5, 3, 32)),
    "tensordot first": (lambda x, w: qg.tensordot(x, w, [[1], [0]]), (4, 5), (5, 64)),
    "inner": (lambda x, w: qg.inner(x, w), (4, 64), (32, 64)),
    "left non-last axis": (lambda x, w: qg.tensordot(x, w, [[0], [1]]), (64, 4), (32, 64)),
    "square, left non-last": (lambda x, w: qg.einsum("ki,nk->in", x, w), (64, 64), (64, 64)),
    "addmm": (lambda x, w: qg.addmm(qg.exp(x[:, :32]), x, w.T, alpha=0.5), (4, 64), (32, 64)),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_any_contraction_of_a_packed_weight(name):
    f, xshape, wshape = CONTRACTIONS[name]
    graph = agree(qg.jit(f), normal(*xshape), packed(*wshape))
    assert ops(graph)["quantized_matmul"] == 1, str(graph)
    assert not set(ops(graph)) & {"dot", "dequantize"}, str(graph)


@pytest.mark.parametrize("x", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("w", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_mixed_dtypes_give_the_dtype_of_the_dense_dot(x, w, mode):
    xs, ws = normal(3, 64, dtype=getattr(mx, x)), packed(32, 64, dtype=getattr(mx, w), mode=mode)
    f = qg.jit(lambda x, w: x @ w.T)
    agree(f, xs, ws)
    assert f(xs, ws).dtype == (xs @ mx.zeros((64, 32), ws.dtype)).dtype


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bit_sums_are_accumulated_in_float32(dtype):
    """MLX's CPU kernel alone gives 256 here: it adds ones in bfloat16."""
    w = qg.quantize(mx.ones((8, 4096), dtype))
    assert mx.all(qg.dot(mx.ones((1, 4096), dtype), w.T) == 4096).item()


@pytest.mark.parametrize("xshape", [(0, 64), (2, 0, 64), (1, 0, 64)])
def test_zero_rows_are_an_empty_result_and_not_a_crash(xshape):
    f = qg.jit(lambda x, w: x @ w.T)
    assert f(mx.zeros(xshape), packed(32, 64)).shape == (*xshape[:-1], 32)


def test_a_quantize_in_the_graph_feeds_the_dot():
    f = qg.jit(lambda x, w: x @ qg.quantize(w, group_size=32).T)
    x, w = normal(3, 64), normal(32, 64)
    assert ops(f.optimized(x, w)) == {"quantize": 1, "quantized_matmul": 1}
    dense = mx.dequantize(*mx.quantize(w, 32, 4), 32, 4)
    assert_close(f(x, w), x @ dense.T, k=64, path="P2", magnitude=magnitude_of(x, dense))


def test_both_uses_of_a_shared_weight_are_right():
    f = qg.jit(lambda x, w: (x @ w.T, qg.exp(w * 0.1), w))
    x, w = normal(3, 64), packed(32, 64)
    agree(f, x, w)
    assert f(x, w)[2].packed.tolist() == w.packed.tolist()


@given(
    st.sampled_from(MODES),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2),
    st.booleans(),
)
def test_dot_equals_dequantize_and_dot_on_drawn_shapes(scheme, groups, n, m, batch, transpose):
    mode, bits, group_size = scheme
    k = groups * group_size
    w = packed(n, k, mode=mode, bits=bits, group_size=group_size)
    x = normal(*(2,) * batch, m, k if transpose else n)
    agree(qg.jit(lambda x, w: x @ (w.T if transpose else w)), x, w)


EXPERTS = {
    "rhs": lambda x, w, i: qg.gather_mm(x, qg.swapaxes(w, -1, -2), rhs_indices=i),
    "both": lambda x, w, i: qg.gather_mm(x, qg.swapaxes(w, -1, -2), i * 0, i),
    "in order": lambda x, w, i: qg.gather_mm(x, qg.swapaxes(w, -1, -2)),
    "stored (in, out)": lambda x, w, i: qg.gather_mm(
        x, qg.concatenate([w, w[:, :32]], axis=1), rhs_indices=i
    ),
    "square, stored (in, out)": lambda x, w, i: qg.gather_mm(x[..., :32], w[..., :32], rhs_indices=i),
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_mixture_of_experts_runs_through_gather_qmm(name, dtype):
    x, w = normal(4, 2, 64, dtype=dtype), packed(4, 32, 64, dtype=dtype)
    graph = agree(qg.jit(EXPERTS[name]), x, w, mx.array([3, 0, 0, 1]))
    assert ops(graph)["gather_qmm"] == 1
    assert not set(ops(graph)) & {"gather_mm", "dequantize", "transpose"}


@pytest.mark.parametrize("device", ["metal", "cuda"])
@pytest.mark.parametrize("name", [*VIEWS, *CONTRACTIONS])
def test_the_rules_of_the_gpus_keep_the_meaning(name, device):
    """On the graph alone: what MLX then runs there is not tested here."""
    if name in VIEWS:
        f, args = qg.jit(lambda x, w: x @ VIEWS[name][0](w)), (normal(3, 64), packed(32, 64))
    else:
        f, xshape, wshape = CONTRACTIONS[name]
        f, args = qg.jit(f), (normal(*xshape), packed(*wshape))
    before = f.graph(*args)
    after = qg.Pipeline.parse(qg.rewrite.DEFAULT).run(before, Context(device=device)).graph
    assert compare(before, after) is None
    assert emit(after).source


@pytest.mark.parametrize("dtype", [mx.int32, mx.bool_, mx.uint8])
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_integer_activations_promote_as_in_the_dense_dot(dtype, mode):
    x, w = mx.array([[1, 0, 1, 1] * 16] * 3).astype(dtype), packed(32, 64, mode=mode)
    f = qg.jit(lambda x, w: x @ w.T)
    assert ops(agree(f, x, w))["quantized_matmul"] == 1
    assert f(x, w).dtype == mx.float32


def test_a_dtype_without_a_kernel_is_dequantized_with_the_reason():
    f = qg.jit(lambda x, w: x @ w.T)
    x, w = mx.ones((2, 64), mx.complex64), packed(32, 64)
    assert "dequantize" in ops(f.optimized(x, w))
    assert "there is no kernel for c64" in str(f.report(x, w))
    assert f(x, w).dtype == mx.complex64


def test_packed_activations_are_dequantized_for_a_kernel_that_the_user_called():
    f = qg.jit(lambda q: qg.quantized_matmul(q, q) + qg.dequantize(q).sum())
    q = qg.quantize(normal(64, 64))
    graph = agree(f, q)
    assert (ops(graph)["quantized_matmul"], ops(graph)["dequantize"]) == (1, 1)
