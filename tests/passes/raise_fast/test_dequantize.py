"""Packed values from words that are unpacked by hand."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from tests.agree import assert_close, leaves_of, normal
from tests.passes.raise_fast.raised import raised, reasons

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
BITS = [1, 2, 3, 4, 5, 6, 8]


def stored(bits, group, rows=(8,), k=128, dtype=mx.float32):
    """Words, scales and biases of random numbers."""
    return mx.quantize(normal(*rows, k, dtype=dtype), bits=bits, group_size=group)


def by_mask(words, scales, biases, bits, change=lambda codes: codes):
    """As plain code unpacks words of 2, 4 and 8 bits."""
    shifts = qg.arange(0, 32, bits, dtype=mx.uint32)
    codes = change(qg.bitwise_and(qg.right_shift(words[..., None], shifts), 2**bits - 1))
    groups = qg.reshape(codes, (*scales.shape, -1))
    numbers = qg.astype(groups, scales.dtype) * scales[..., None] + biases[..., None]
    return qg.reshape(numbers, (*words.shape[:-1], -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_what_mlx_writes_to_unpack_words_becomes_one_quantized_product(bits, group, dtype):
    parts = stored(bits, group, dtype=dtype)

    def f(x, *parts):
        return x @ mx.dequantize(*parts, bits=bits, group_size=group).T

    x = normal(3, 128, dtype=dtype)
    fast = qg.optimize(f)
    counts = fast.optimized(x, *parts).histogram()
    assert (counts["pack"], counts["quantized_matmul"]) == (1, 1)
    assert set(counts) <= {"pack", "quantized_matmul", "cast"}
    exact = leaves_of(qg.jit(lambda x, w: x @ w.T)(x, qg.from_quantized(*parts, bits=bits, group_size=group)))
    assert mx.array_equal(fast(x, *parts), exact[0]).item()
    assert raised(f, x, *parts, captured=True)["pack"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", [None, mx.float32])
def test_what_mlx_writes_to_unpack_mxfp4_becomes_one_quantized_product(asked, dtype):
    parts = mx.quantize(normal(8, 128), mode="mxfp4")

    def f(x, *parts):
        return x @ mx.dequantize(*parts, mode="mxfp4", bits=4, group_size=32, dtype=asked).T

    x = normal(3, 128, dtype=dtype)
    counts = qg.optimize(f).optimized(x, *parts).histogram()
    assert (counts["pack"], counts["quantized_matmul"]) == (1, 1)
    assert set(counts) <= {"pack", "quantized_matmul", "cast"}
    assert raised(f, x, *parts, captured=True)["pack"] == 1


@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    group=st.sampled_from([32, 64]),
    rows=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_plain_code_that_unpacks_words_is_the_packed_value(bits, group, rows, groups, dtype):
    parts = stored(bits, group, rows, 128 * groups, dtype)
    counts = raised(lambda *parts: by_mask(*parts, bits), *parts)
    assert set(counts) <= {"pack", "dequantize"}
    assert counts["pack"] == 1


def test_a_product_with_plain_unpacked_words_is_a_quantized_one():
    parts = stored(4, 32, dtype=mx.bfloat16)
    x = normal(3, 128, dtype=mx.bfloat16)
    f = qg.jit(lambda x, *parts: x @ by_mask(*parts, 4).T)
    assert f.optimized(x, *parts).find("quantized_matmul")
    w = qg.from_quantized(*parts, bits=4, group_size=32)
    assert_close(f(x, *parts), qg.jit(lambda x, w: x @ w.T)(x, w), path="P2", k=128)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("ids", [[2], [1, 5, 1], [[0, 7]]])
def test_rows_that_are_taken_before_they_are_unpacked_are_taken_of_the_packed_value(ids, bits):
    """As an embedding of packed words does it."""
    parts = stored(bits, 64)

    def f(ids, *parts):
        return mx.dequantize(*(p[ids] for p in parts), bits=bits, group_size=64)

    fast = qg.optimize(f)
    assert fast.optimized(mx.array(ids), *parts).find("quantized_take")
    assert mx.array_equal(fast(mx.array(ids), *parts), f(mx.array(ids), *parts)).item()


def test_rows_of_words_and_other_rows_of_scales_are_not_rows_of_one_value():
    words, scales, biases = stored(4, 64)

    def f(i, j, words, scales, biases):
        return mx.dequantize(words[i], scales[j], biases[j], bits=4, group_size=64)

    ids = mx.array([1, 5]), mx.array([0, 2])
    assert "quantized_take" not in qg.optimize(f).optimized(*ids, words, scales, biases).histogram()
    raised(f, *ids, words, scales, biases, captured=True)


def test_a_stack_of_experts():
    parts = stored(4, 64, (3, 8))

    def f(x, *parts):
        return x @ mx.swapaxes(mx.dequantize(*parts, bits=4, group_size=64), -1, -2)

    x = normal(3, 2, 128)
    assert qg.optimize(f).optimized(x, *parts).find("quantized_matmul")
    raised(f, x, *parts, captured=True)


def shuffled(words, scales, biases):
    shifts = qg.arange(28, -4, -4, dtype=mx.int32)
    return unpacked_with(words, scales, biases, qg.astype(shifts, mx.uint32), 15)


def unpacked_with(words, scales, biases, shifts, mask):
    codes = qg.bitwise_and(qg.right_shift(words[..., None], shifts), mask)
    groups = qg.reshape(codes, (*scales.shape, -1))
    return qg.reshape(groups.astype(mx.float32) * scales[..., None] + biases[..., None], (8, -1))


NEAR = {
    "high bits first": (shuffled, ""),
    "three bits of four": (
        lambda w, s, b: unpacked_with(w, s, b, qg.arange(0, 32, 4, dtype=mx.uint32), 7),
        "",
    ),
    "less a zero point": (
        lambda w, s, b: qg.reshape(
            (qg.reshape(by_mask(w, qg.ones_like(s), qg.zeros_like(s), 4), (8, 2, 64)) - b[..., None])
            * s[..., None],
            (8, -1),
        ),
        "",
    ),
    "no biases": (
        lambda w, s, b: qg.reshape(
            qg.reshape(
                qg.bitwise_and(qg.right_shift(w[..., None], qg.arange(0, 32, 4, dtype=mx.uint32)), 15),
                (8, 2, 64),
            ).astype(mx.float32)
            * s[..., None],
            (8, -1),
        ),
        "no bias for each group is added to the numbers",
    ),
    "one scale for all": (
        lambda w, s, b: by_mask(w, qg.ones((8, 2)), b, 4) * s[0, 0],
        "",
    ),
    "codes that are changed": (
        lambda w, s, b: by_mask(w, s, b, 4, lambda codes: codes + 1),
        "",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_only_looks_like_unpacking_keeps_its_numbers(name):
    f, reason = NEAR[name]
    parts = stored(4, 64)
    counts = raised(f, *parts)
    assert "pack" not in counts or name in ("less a zero point", "one scale for all")
    assert not reason or reason in reasons(f, *parts)


@pytest.mark.parametrize("group", [16, 256])
def test_groups_without_a_kernel_stay_unpacked(group):
    words, *_ = stored(4, 32, k=256)
    args = (words, normal(8, 256 // group), normal(8, 256 // group, seed=2))

    def f(*parts):
        return by_mask(*parts, 4)

    assert "pack" not in raised(f, *args)
    assert f"4 bits in groups of {group}" in reasons(f, *args)


def test_codes_that_something_else_reads_are_not_unpacked_twice():
    def f(words, scales, biases):
        kept = []
        out = by_mask(words, scales, biases, 4, lambda codes: kept.append(codes) or codes)
        return out, qg.reshape(kept[0], (8, 2, 64)).astype(mx.float32)

    raised(f, *stored(4, 64))
