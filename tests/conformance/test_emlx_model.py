"""research/emlx.md §4, cases 69–72, 76 and 77: a decoder layer, greedy tokens, experts, memory."""

from __future__ import annotations

import gc

import mlx.core as mx
import pytest

import qgraph as qg
from tests.agree import assert_close, normal, ops
from tests.conformance import decoder
from tests.conformance.oracle import MODES, assert_kernel, assert_product, of, quantized, raw

SCHEMES = [("affine", 4, 32), ("mxfp4", 4, 32)]
ALL = (*decoder.PROJECTIONS, "table", "head")
MLP = ("gate", "up", "down")


def both(p, x, cache, offset):
    """A layer's result and cache: by a program, and op by op in MLX."""
    found = qg.jit(strict=True)(decoder.layer)(p, x, cache, mx.array(offset))
    return found, decoder.layer(p, x, cache, mx.array(offset), decoder.MLX, decoder.mlx_linear)


def assert_equal_layers(found, expected):
    for got, want in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert_close(got, want, k=decoder.HIDDEN, path="graph")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_e69_a_decoder_layer_on_a_prompt_equals_mlx_op_by_op(scheme):
    p = decoder.parameters(scheme)
    x = normal(1, 2, decoder.HIDDEN)
    assert_equal_layers(*both(p, x, decoder.empty_cache(8), 0))
    counts = ops(qg.jit(decoder.layer).optimized(p, x, decoder.empty_cache(8), mx.array(0)))
    assert counts["quantized_matmul"] == 7
    assert not set(counts) & {"dot", "dequantize"}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_e70_a_decoder_layer_on_the_token_after_the_prompt(scheme):
    p = decoder.parameters(scheme)
    _, cache = both(p, normal(1, 2, decoder.HIDDEN), decoder.empty_cache(8), 0)[1]
    found, expected = both(p, normal(1, 1, decoder.HIDDEN), cache, 2)
    assert_equal_layers(found, expected)
    assert mx.array_equal(found[1][0][:, :, :2], cache[0][:, :, :2]), "what is in the cache stays"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_e71_with_a_packed_mlp_only_the_cache_is_that_of_the_dense_layer(scheme):
    packed, dense = decoder.parameters(scheme, MLP), decoder.parameters(scheme, ())
    x = normal(1, 2, decoder.HIDDEN)
    found, expected = both(packed, x, decoder.empty_cache(8), 0)
    assert_equal_layers(found, expected)
    for got, want in zip(found[1], both(dense, x, decoder.empty_cache(8), 0)[1][1], strict=True):
        assert_close(got, want, k=decoder.HIDDEN, path="graph")
    assert ops(qg.jit(decoder.layer).optimized(packed, x, decoder.empty_cache(8), mx.array(0)))["dot"] == 4


def step_by_step(p, prompt, count):
    """Greedy tokens, each read before the next is asked for."""
    f, cache, tokens = qg.jit(decoder.next_token), decoder.empty_cache(prompt.shape[1] + count), []
    token, offset = prompt, 0
    for _ in range(count):
        made, cache = f(p, token, cache, mx.array(offset))
        offset += token.shape[1]
        tokens.append(made.item())
        token = mx.array([[tokens[-1]]])
    return tokens


PROMPT = mx.array([[3, 41, 17, 88, 5]])


def test_e72_three_greedy_steps_in_one_program():
    def chunk(p, token, cache, offset):
        tokens = []
        for _ in range(3):
            length = token.shape[1]
            token, cache = decoder.next_token(p, token, cache, offset)
            tokens.append(token)
            offset = offset + length
        return qg.concatenate(tokens, axis=1)

    p = decoder.parameters(("affine", 4, 32), ALL)
    found = qg.jit(strict=True)(chunk)(p, PROMPT, decoder.empty_cache(8), mx.array(0))
    assert found.tolist() == [step_by_step(p, PROMPT, 3)]


@pytest.mark.slow
def test_e72_a_chunk_of_1023_tokens_is_not_cut():
    """1,023 steps are asked for before the first is computed; and as many tokens of a prompt at once."""
    p = decoder.parameters(("affine", 4, 32), ALL)
    f, token, cache, tokens = qg.jit(decoder.next_token), PROMPT, decoder.empty_cache(1028), []
    offset = 0
    for _ in range(1023):
        made, cache = f(p, token, cache, mx.array(offset))
        offset += token.shape[1]
        tokens.append(made)
        token = made
    found = mx.concatenate(tokens, axis=1)
    assert found.shape == (1, 1023)
    assert found.tolist() == [step_by_step(p, PROMPT, 1023)]
    assert len(set(found.tolist()[0])) > 3, "a constant sequence would prove little"
    prompt = mx.concatenate([PROMPT, found], axis=1)[:, :1023]
    last, _ = f(p, prompt, decoder.empty_cache(1028), mx.array(0))
    assert last.item() == found[0, 1023 - PROMPT.shape[1]].item()


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e76_experts_equal_a_loop_over_them(in_order, scheme):
    """4 experts, 6 rows, 2 experts a row; sorted by expert, or as they come."""
    x, w = normal(6, 64), of(scheme, 4, 32, 64)
    chosen = [[0, 1], [3, 2], [2, 2], [1, 3], [0, 3], [1, 0]]

    def f(x, w, rows, experts):
        y = qg.gather_mm(x[:, None], qg.swapaxes(w, -1, -2), rows, experts, sorted_indices=in_order)
        return y[:, 0]

    pairs = [(row, expert) for row, experts in enumerate(chosen) for expert in experts]
    if in_order:
        pairs.sort(key=lambda pair: pair[1])
    rows, experts = (mx.array(part) for part in zip(*pairs, strict=True))
    compiled = qg.jit(strict=True)(f)
    assert ops(compiled.optimized(x, w, rows, experts))["gather_qmm"] == 1
    for found in (compiled(x, w, rows, experts), compiled.eager(x, w, rows, experts)):
        for got, (row, expert) in zip(found, pairs, strict=True):
            one = qg.squeeze(w[expert : expert + 1], axis=0)
            assert_product(got[None], x[row : row + 1], one)
            assert_kernel(got[None], x[row : row + 1], one)


def test_e77_a_thousand_products_leave_no_memory_in_use():
    x, w = normal(4, 64), quantized(64, 64)
    f = qg.jit(lambda x, w: x @ w.T * 0.125)
    arrays, scheme = raw(w)
    mx.eval(f(x, w), *arrays)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    y = x
    for _ in range(1000):
        y = f(y, w)
        mx.eval(y)
        f(y, qg.from_quantized(*arrays, **scheme))
    gc.collect()
    mx.clear_cache()
    assert mx.get_active_memory() - before < 4 * 2**20
