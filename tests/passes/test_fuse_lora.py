"""fuse-lora on every spelling of research's V0–V11 matrix: what must fuse, and what must say why not."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.rewrite.pipeline import DEFAULT
from tests.agree import agree, close, normal, ops

K, N, R = 64, 32, 4


def arguments(dtype=mx.float32, adapter=mx.float32, rank=2):
    shape = {1: (K,), 2: (3, K), 3: (2, 3, K)}[rank]
    w = qg.quantize(normal(N, K, dtype=dtype))
    return (
        normal(*shape, dtype=dtype),
        w,
        normal(K, R, dtype=adapter),
        normal(R, N, dtype=adapter),
        mx.array(0.7),
    )


SPELLINGS = {
    "V0 canonical": lambda x, w, a, b, s: x @ w.T + s * ((x @ a) @ b),
    "V1 branch first": lambda x, w, a, b, s: s * ((x @ a) @ b) + x @ w.T,
    "V2 scale last": lambda x, w, a, b, s: x @ w.T + ((x @ a) @ b) * s,
    "V3 cast around the branch": lambda x, w, a, b, s: x @ w.T + (s * ((x @ a) @ b)).astype(x.dtype),
    "V3 cast of x": lambda x, w, a, b, s: x @ w.T + s * ((x.astype(mx.float32) @ a) @ b),
    "V7 transpose by name": lambda x, w, a, b, s: x @ qg.swapaxes(w, 0, 1) + s * ((x @ a) @ b),
    "V8 Python number": lambda x, w, a, b, s: x @ w.T + 2.0 * ((x @ a) @ b),
    "no scale": lambda x, w, a, b, s: x @ w.T + (x @ a) @ b,
    "einsum base": lambda x, w, a, b, s: qg.einsum("mk,nk->mn", x, w) + s * ((x @ a) @ b),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_fused_op(name):
    graph = agree(qg.jit(SPELLINGS[name]), *arguments())
    counts = ops(graph)
    assert counts.pop("quantized_lora_matmul") == 1
    assert not set(counts) & {"dot", "add", "quantized_matmul", "dequantize", "transpose"}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_activations_of_any_rank_fuse(rank):
    f = qg.jit(SPELLINGS["V0 canonical"])
    assert ops(agree(f, *arguments(rank=rank))) == {"quantized_lora_matmul": 1}


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", ["V0 canonical", "V3 cast around the branch"])
def test_mlx_lms_form_with_float32_adapters_on_a_16_bit_base(name, dtype):
    """V9 of the real world: the cast is carried into the fused op, which rounds once."""
    args = arguments(dtype=dtype)
    graph = agree(qg.jit(SPELLINGS[name]), *args)
    assert ops(graph)["quantized_lora_matmul"] == 1
    assert qg.jit(SPELLINGS[name])(*args).dtype == (mx.float32 if name.startswith("V0") else dtype)


def test_v4_a_base_that_is_also_returned_is_refused_with_the_reason():
    def f(x, w, a, b, s):
        base = x @ w.T
        return base + s * ((x @ a) @ b), base

    jitted = qg.jit(f)
    assert "quantized_lora_matmul" not in ops(agree(jitted, *arguments()))
    misses = jitted.result(*arguments()).context.misses.values()
    assert any(
        "base has a foreign user: it is an output" in m.reason for m in misses if m.rule == "lora-branch"
    )


def test_v4_a_foreign_user_inside_is_named_with_its_line():
    def f(x, w, a, b, s):
        base = x @ w.T
        return base + s * ((x @ a) @ b), qg.exp(base * 0.01)

    jitted = qg.jit(f)
    assert "quantized_lora_matmul" not in ops(agree(jitted, *arguments()))
    misses = jitted.result(*arguments()).context.misses.values()
    assert any("foreign user: multiply (test_fuse_lora.py:" in m.reason for m in misses)


BIASED = {
    "bias of the base": lambda x, w, a, b, s, c: x @ w.T + c + s * ((x @ a) @ b),
    "bias first": lambda x, w, a, b, s, c: c + x @ w.T + s * ((x @ a) @ b),
    "branch first": lambda x, w, a, b, s, c: (s * ((x @ a) @ b)).astype(x.dtype) + (x @ w.T + c),
    "addmm": lambda x, w, a, b, s, c: qg.addmm(c, x, w.T) + s * ((x @ a) @ b),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_of_the_base_is_added_to_the_fused_op(name, dtype):
    graph = agree(qg.jit(BIASED[name]), *arguments(dtype=dtype), normal(N, dtype=dtype))
    counts = ops(graph)
    assert (counts["quantized_lora_matmul"], counts["add"]) == (1, 1)
    assert not set(counts) & {"dot", "quantized_matmul", "dequantize"}


def test_what_is_no_bias_is_not_moved():
    def f(x, w, a, b, s, c):
        return x @ w.T + c + s * ((x @ a) @ b)

    jitted = qg.jit(f)
    assert "quantized_lora_matmul" not in ops(agree(jitted, *arguments(), normal(3, N)))
    misses = jitted.result(*arguments(), normal(3, N)).context.misses.values()
    assert any("has 2 axes, a bias has one" in m.reason for m in misses)


def test_v5_two_layers_fuse_both():
    def f(x, w, a, b, v, c, d, s):
        h = x @ w.T + s * ((x @ a) @ b)
        return h @ v.T + s * ((h @ c) @ d)

    x, w, a, b, s = arguments()
    v = qg.quantize(normal(K, N, seed=5), group_size=32)
    args = (x, w, a, b, v, normal(N, R, seed=6), normal(R, K, seed=7), s)
    assert ops(agree(qg.jit(f), *args)) == {"quantized_lora_matmul": 2}


def test_v5_two_sites_that_share_the_transpose_fuse_both():
    def f(x, w, a, b, s):
        wt = w.T
        return x @ wt + s * ((x @ a) @ b), (x * 2) @ wt + s * (((x * 2) @ a) @ b)

    counts = ops(agree(qg.jit(f), *arguments()))
    assert counts["quantized_lora_matmul"] == 2
    assert "transpose" not in counts


def test_v6_a_branch_on_another_x_is_refused_with_the_reason():
    def f(x, w, a, b, s):
        return x @ w.T + s * (((x + 1.0) @ a) @ b)

    jitted = qg.jit(f)
    assert "quantized_lora_matmul" not in ops(agree(jitted, *arguments()))
    misses = jitted.result(*arguments()).context.misses.values()
    assert any("x is already another value" in m.reason for m in misses if m.rule == "lora-branch")


REASSOCIATING = DEFAULT.replace("fuse-lora", "fuse-lora{reassociate=true}")


def test_v10_the_merged_weight_is_taken_apart_on_request_only():
    def f(x, w, a, b, s):
        return x @ (w.T + s * (a @ b))

    assert ops(agree(qg.jit(pipeline=REASSOCIATING)(f), *arguments())) == {"quantized_lora_matmul": 1}
    assert ops(agree(qg.jit(f), *arguments()))["dequantize"] == 1


def test_v11_a_scale_in_a_moves_out_on_request_only():
    def f(x, w, a, b, s):
        return x @ w.T + (x @ (s * a)) @ b

    assert ops(agree(qg.jit(pipeline=REASSOCIATING)(f), *arguments())) == {"quantized_lora_matmul": 1}
    assert ops(agree(qg.jit(f), *arguments())) == {"quantized_lora_matmul": 1, "multiply": 1}


def test_a_zero_adapter_would_hide_a_dropped_branch_and_a_random_one_does_not():
    x, w, a, b, s = arguments()
    f = qg.jit(SPELLINGS["V0 canonical"])
    base = qg.dot(x, w.T)
    assert close(f(x, w, a, mx.zeros_like(b), s), base)
    assert not close(f(x, w, a, b, s), base)


def test_a_wide_branch_is_not_low_rank_and_says_so():
    x, w, _, _, s = arguments()
    f = qg.jit(SPELLINGS["V0 canonical"])
    args = (x, w, normal(K, 48), normal(48, N), s)
    assert "quantized_lora_matmul" not in ops(agree(f, *args))
    assert any("rank 48 is not low" in m.reason for m in f.result(*args).context.misses.values())


def test_what_widens_the_base_is_no_bias():
    def f(x, w, a, b, s, c):
        return x @ w.T + c + s * ((x @ a) @ b)

    w = qg.quantize(normal(1, K))
    args = normal(3, K), w, normal(K, 1), normal(1, 1), mx.array(0.7), normal(5)
    assert "quantized_lora_matmul" not in ops(agree(qg.jit(f), *args))
