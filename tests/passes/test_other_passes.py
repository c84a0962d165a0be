"""canonicalize, fold-transpose and legalize, on text before and after."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.execute.reference import to_numpy
from qgraph.ir import digest, parse_graph
from qgraph.rewrite import Context, Pipeline
from tests.agree import agree, normal, ops
from tests.kernels.everywhere import problem


def after(passes, text, device="cpu", native=None):
    return Pipeline.parse(passes).run(parse_graph(text), Context(device=device, native=native))


def same(graph, text):
    assert digest(graph) == digest(parse_graph(text)), str(graph)


def test_constants_fold():
    result = after(
        "canonicalize",
        """graph(%x: f32[2]) {
        %a = constant{data=(2.0,), shape=(), dtype=f32}() : f32[]
        %b = constant{data=(3.0,), shape=(), dtype=f32}() : f32[]
        %c = multiply(%a, %b) : f32[]
        %y = add(%x, %c) : f32[2]
        return %y
    }""",
    )
    same(
        result.graph,
        """graph(%x: f32[2]) {
        %c = constant{data=(6.0,), shape=(), dtype=f32}() : f32[]
        %y = add(%x, %c) : f32[2]
        return %y
    }""",
    )


def test_constants_in_16_bit_keep_their_roundings():
    f = qg.jit(lambda x: x + (qg.full((), 0.1, mx.bfloat16) * 3.0).astype(mx.float32))
    x = normal(3)
    assert mx.array_equal(f(x), x + (mx.array(0.1, mx.bfloat16) * 3.0).astype(mx.float32))


def test_multiplying_by_one_goes_and_by_a_promoting_one_stays():
    f = qg.jit(lambda x, y, one: (x * 1, x / 1.0, y * one))
    counts = ops(agree(f, normal(3), normal(3, dtype=mx.float16), mx.array(1.0)))
    assert counts == {"multiply": 1}


def test_division_has_an_order():
    f = qg.jit(lambda x: (1.0 / x, x / 1.0))
    assert ops(agree(f, abs(normal(3)) + 1)) == {"divide": 1}


def test_multiplying_by_zero_stays():
    f = qg.jit(lambda x: (x * 0.0, 0.0 * x + 1.0))
    x = normal(3)
    agree(f, x)
    assert f(x)[1].tolist() == [1.0] * 3


def test_a_cast_there_and_back_goes_only_when_exact():
    f = qg.jit(lambda x: x.astype(mx.float32).astype(mx.bfloat16))
    assert ops(f.optimized(normal(3, dtype=mx.bfloat16))) == {}
    g = qg.jit(lambda x: x.astype(mx.bfloat16).astype(mx.float32))
    assert ops(g.optimized(normal(3))) == {"cast": 2}


def test_transposes_compose_and_reshapes_merge():
    f = qg.jit(lambda x: (x.transpose(1, 2, 0).transpose(2, 0, 1), x.reshape(6, 4).reshape(4, 3, 2), x.T.T))
    assert ops(agree(f, normal(2, 3, 4))) == {"reshape": 1}


def test_transposes_compose_in_their_order():
    f = qg.jit(lambda x: x.transpose(1, 2, 0).transpose(0, 2, 1))
    x = normal(2, 3, 4)
    assert ops(agree(f, x)) == {"transpose": 1}
    assert f(x).shape == (3, 2, 4)


def test_equal_nodes_are_one_and_dead_ones_are_gone():
    def f(x, y):
        qg.exp(y)
        return qg.exp(x) + qg.exp(x)

    assert ops(qg.jit(f).optimized(normal(3), normal(3))) == {"exp": 1, "add": 1}


def test_an_output_that_the_user_dequantized_is_dense():
    f = qg.jit(lambda w: qg.dequantize(w))
    w = qg.quantize(normal(4, 64))
    assert ops(agree(f, w)) == {"dequantize": 1}
    assert isinstance(f(w), mx.array)


UNPACKING = {
    "add": lambda w: w + 1.0,
    "reshape": lambda w: w.reshape(-1),
    "slice": lambda w: w[:, 1:3],
    "concatenate": lambda w: qg.concatenate([w, qg.zeros(w.shape)]),
    "sum": lambda w: qg.exp(qg.sum(w)),
}


@pytest.mark.parametrize("name", UNPACKING)
def test_every_op_that_unpacks_is_reported_with_its_line_and_refused_by_strict(name):
    w = qg.quantize(normal(4, 64))
    [site] = qg.jit(UNPACKING[name]).report(w)
    assert (site.op, site.became) == (name, "dequantize")
    assert "test_other_passes.py:" in site.line
    assert site.reasons
    with pytest.raises(qg.StrictError, match=f"{name} at"):
        qg.jit(strict=True)(UNPACKING[name])(w)


def test_what_the_user_dequantizes_is_no_miss_and_one_miss_is_told_once():
    w, x = qg.quantize(normal(32, 64)), normal(3, 32)
    f = qg.jit(strict=True)(lambda w: qg.dequantize(w) * 2.0)
    assert list(f.report(w)) == []
    [site] = qg.jit(lambda x, w: x @ w[:, 16:48].T).report(x, w)
    assert site.op == "dot"


DOT = """graph(%x: bf16[2,96], %w: bf16[8,96]:affine4g32) {
    %y = quantized_matmul{transpose=True}(%x, %w) : bf16[2,8]
    return %y
}"""


def test_on_a_cpu_sixteen_bit_products_run_in_float32_and_round_once():
    same(
        after("legalize", DOT, native=False).graph,
        """graph(%x: bf16[2,96], %w: bf16[8,96]:affine4g32) {
        %c = cast{dtype=f32}(%x) : f32[2,96]
        %p = quantized_matmul{transpose=True}(%c, %w) : f32[2,8]
        %y = cast{dtype=bf16}(%p) : bf16[2,8]
        return %y
    }""",
    )


def test_on_a_cpu_with_native_kernels_sixteen_bit_products_take_them():
    found = after("legalize", DOT, native=True).graph
    same(found, DOT.replace("transpose=True", "transpose=True, kernel='native'"))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_a_softmax_of_16_bit_is_precise_whatever_captured_code_says(dtype):
    x = normal(3, 4096, dtype=dtype)
    fast = qg.optimize(lambda x: mx.softmax(x, axis=-1, precise=False))
    half = dtype != mx.float32
    assert f"precise={half}" in str(fast.optimized(x))
    assert "precise=False" in str(fast.graph(x))
    exact = mx.softmax(x.astype(mx.float32), axis=-1)
    assert not problem(fast(x), to_numpy(exact), to_numpy(exact), 4096)


def test_on_metal_the_same_product_stays_as_it_is():
    same(after("legalize", DOT, "metal").graph, DOT)


def test_on_cuda_a_width_without_a_kernel_is_dequantized_with_the_reason():
    result = after("legalize", DOT, "cuda")
    assert ops(result.graph) == {"dequantize": 1, "transpose": 1, "dot": 1}
    assert "contract multiples of 64; this one contracts 96" in str(result.report)
    assert result.report.missed


def test_on_metal_an_untransposed_odd_width_is_dequantized_with_the_reason():
    text = """graph(%x: f32[2,8], %w: f32[8,96]:affine4g32) {
        %y = quantized_matmul{transpose=False}(%x, %w) : f32[2,96]
        return %y
    }"""
    result = after("legalize", text, "metal")
    assert "quantized_matmul" not in ops(result.graph)
    assert "has returned garbage" in str(result.report)


def test_strided_storage_is_made_contiguous_before_a_gpu_kernel():
    text = """graph(%x: f32[2,64], %w: f32[16,64]:affine4g64) {
        %s = slice{start=(0, 0), stop=(16, 64), step=(2, 1)}(%w) : f32[8,64]:affine4g64
        %y = quantized_matmul{transpose=True}(%x, %s) : f32[2,8]
        return %y
    }"""
    assert ops(after("legalize", text, "metal").graph)["contiguous"] == 1
    assert "contiguous" not in ops(after("legalize", text, "cpu").graph)


@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_the_fallback_of_a_fused_lora_computes_the_same(device):
    from qgraph.numeric import compare

    text = """graph(%x: f32[2,32], %w: f32[32,96]:affine4g32, %a: f32[32,4], %b: f32[4,96], %s: f32[]) {
        %y = quantized_lora_matmul{transpose=False}(%x, %w, %a, %b, %s) : f32[2,96]
        return %y
    }"""
    before = parse_graph(text)
    assert compare(before, after("legalize", text, device).graph) is None


def test_an_op_without_a_packed_kernel_reads_the_numbers():
    assert ops(agree(qg.jit(lambda w: qg.exp(w * 0.1)), qg.quantize(normal(4, 64))))["dequantize"] == 1
