"""research/emlx.md §4, cases 1–19: quantize and dequantize."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.execute.reference import to_numpy
from tests.agree import assert_close, normal
from tests.conformance.oracle import (
    BITS,
    E2M1,
    GROUPS,
    MICROSCALED,
    MODES,
    SCHEMES,
    by_hand,
    codes_of,
    e4m3,
    largest_terms,
    of,
    quantized,
    ramp,
    words_of,
)


def assert_within(w, packed, share):
    """That quantizing moved no number by more than `share` of the scale, beside float32's rounding."""
    steps = np.repeat(np.abs(to_numpy(packed.scales)), packed.quantization.group_size, axis=-1)
    excess = np.maximum(np.abs(to_numpy(w) - to_numpy(packed)) - share * steps, 0)
    assert_close(excess, np.zeros_like(excess), path="P1", magnitude=largest_terms(packed))


def test_e01_quantize_gives_three_arrays_the_words_in_uint32():
    w = qg.quantize(ramp(64, 64, over=1000), group_size=64, bits=4)
    assert len(w.components()) == 3
    assert w.packed.dtype == mx.uint32


def test_e02_shapes_of_words_scales_and_biases():
    w = qg.quantize(ramp(128, 128, over=1000), group_size=64, bits=4)
    assert (w.packed.shape, w.scales.shape, w.biases.shape) == ((128, 16), (128, 2), (128, 2))


def test_e03_dequantize_gives_the_shape_and_a_float_dtype():
    w = ramp(64, 64, over=100)
    packed = qg.quantize(w)
    back = qg.dequantize(packed)
    assert (back.shape, back.dtype) == ((64, 64), mx.float32)
    assert_within(w, packed, 1)
    assert_close(back, to_numpy(packed), path="P1", magnitude=largest_terms(packed))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_e04_round_trip_of_every_scheme(scheme):
    mode, bits, group = scheme
    w = normal(8, 128)
    packed = qg.quantize(w, mode=mode, bits=bits, group_size=group)
    q = packed.quantization
    assert (q.mode, q.bits, q.group_size) == scheme
    assert (packed.biases is None) == (mode != "affine")
    if mode == "affine":
        assert_within(w, packed, 1)
        one_signed = ramp(8, 128, over=1024)  # 0 is an edge: the grid is not shifted
        assert_within(one_signed, qg.quantize(one_signed, mode=mode, bits=bits, group_size=group), 0.5)
    else:
        assert_nearest(w, packed)


def assert_nearest(w, packed):
    """Every number went to one of the nearest of its group's grid."""
    q = packed.quantization
    scales = np.array(packed.scales).astype(np.int64)
    steps = e4m3(scales) if q.mode == "nvfp4" else np.exp2(scales - 127.0)
    grid = e4m3([b for b in range(256) if b & 127 != 127]) if q.mode == "mxfp8" else E2M1
    groups = to_numpy(w).reshape(*scales.shape, q.group_size, 1)
    nearest = np.abs(groups - steps[..., None, None] * grid).min(-1)
    found = np.abs(to_numpy(w) - to_numpy(packed))
    assert_close(found, nearest.reshape(found.shape), path="elementwise", magnitude=np.abs(to_numpy(w)))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_e05_four_bits_lose_at_most_a_step_and_eight_bits_lose_less(rows, groups):
    w = mx.random.uniform(-1, 1, (rows, 64 * groups), key=mx.random.key(rows * 7 + groups))
    four, eight = (qg.quantize(w, bits=bits, group_size=64) for bits in (4, 8))
    lost4, lost8 = (np.abs(to_numpy(w) - to_numpy(p)).max() for p in (four, eight))
    # The grid of a group has 15 steps over at most [-1, 1], with 0 and an edge on it: 7 steps of 1/7.
    assert np.abs(to_numpy(four.scales)).max() <= np.float32(1 / 7)
    assert_within(w, four, 1)
    assert lost8 < lost4


@pytest.mark.parametrize("scheme", MICROSCALED, ids=str)
def test_e06_round_trip_of_the_microscaled_modes(scheme):
    """They differ from the weight by no more than the nearest number of the grid does."""
    w = ramp(2, 128, over=256, start=-0.25)
    mode, bits, group = scheme
    packed = qg.quantize(w, mode=mode, bits=bits, group_size=group)
    assert packed.scales.dtype == mx.uint8
    assert_nearest(w, packed)
    stored = qg.from_quantized(*packed.components(), mode=mode, bits=bits, group_size=group)
    assert qg.dequantize(stored).dtype == mx.bfloat16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_e07_pure_op_dequantize_equals_the_kernel(bits, group):
    w = of(("affine", bits, group), 5, 256)
    assert_close(qg.dequantize(w), by_hand(w), path="P1", magnitude=largest_terms(w))
    jitted = qg.jit(qg.dequantize)(w)
    assert mx.array_equal(jitted, mx.dequantize(*w.components(), group_size=group, bits=bits))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_e08_weights_of_rank_3(scheme):
    mode, bits, group = scheme
    w = normal(3, 4, 128)
    packed = qg.quantize(w, mode=mode, bits=bits, group_size=group)
    assert packed.shape == (3, 4, 128)
    for i in range(3):
        alone = qg.quantize(w[i], mode=mode, bits=bits, group_size=group)
        assert mx.array_equal(packed.packed[i], alone.packed)
        assert mx.array_equal(qg.dequantize(packed)[i], qg.dequantize(alone))
    assert_close(qg.dequantize(packed), by_hand(packed), path="P1", magnitude=largest_terms(packed))


def packed_by_hand(codes, bits, group_size, scales, mode="affine"):
    """A packed value of the integers `codes`; affine with a bias of -1 in every group."""
    words, biases = words_of(codes, bits), None
    if mode == "affine":
        scales = mx.array(scales, mx.float32)
        biases = mx.full(scales.shape, -1.0)
    else:
        scales = mx.array(scales, mx.uint8)
    return qg.from_quantized(
        words, scales, biases, bits=bits, group_size=group_size, mode=mode, dtype=mx.float32
    )


@pytest.mark.parametrize("bits", BITS)
def test_e09_hand_packed_integers_across_words(bits):
    """With 3, 5 and 6 bits numbers lie across two words. Every scale is a power of two: exact."""
    codes = (np.arange(2 * 128).reshape(2, 128) * 37) % 2**bits
    w = packed_by_hand(codes, bits, 64, [[0.5, 2.0], [4.0, 0.25]])
    exact = codes * np.repeat([[0.5, 2.0], [4.0, 0.25]], 64, axis=-1) - 1
    assert np.array_equal(np.array(qg.dequantize(w)), exact)
    assert np.array_equal(codes_of(w.packed, bits), codes)
    assert np.array_equal(np.array(qg.jit(lambda x, w: x @ w)(mx.eye(2), w)), exact)


def test_e09_three_bits_word_by_word():
    """32 threes-of-bits fill three words: 0b…010_001_000 and so on, low bits first."""
    codes = np.arange(32)[None] % 8
    stream = sum(int(c) << 3 * i for i, c in enumerate(codes[0]))
    words = [(stream >> 32 * i) & 0xFFFFFFFF for i in range(3)]
    assert words_of(codes, 3).tolist() == [words]
    scales = mx.ones((1, 1))
    w = qg.from_quantized(mx.array([words], mx.uint32), scales, scales * 0, bits=3, group_size=32)
    assert np.array_equal(np.array(qg.dequantize(w)), codes)


def test_e09_mxfp4_has_sixteen_numbers():
    codes = np.arange(64)[None] % 16
    w = packed_by_hand(codes, 4, 32, [[127, 129]], "mxfp4")
    exact = E2M1[codes] * np.repeat([[1.0, 4.0]], 32, axis=-1)
    assert np.array_equal(np.array(qg.dequantize(w)), exact)


def test_e09_mxfp8_numbers_are_e4m3():
    codes = np.array([c for c in range(256) if c & 127 != 127] + [0, 0]).reshape(2, 128)
    w = packed_by_hand(codes, 8, 32, [[127] * 4, [128] * 4], "mxfp8")
    assert np.array_equal(np.array(qg.dequantize(w)), e4m3(codes) * [[1.0], [2.0]])


def test_e09_nvfp4_scales_are_e4m3_and_groups_are_independent():
    scales = np.array([[0x38, 0x40, 0x01, 0x7E]])  # 1, 2, 2^-9, 448
    assert e4m3(scales).tolist() == [[1.0, 2.0, 2.0**-9, 448.0]]
    codes = np.arange(64)[None] % 16
    w = packed_by_hand(codes, 4, 16, scales, "nvfp4")
    exact = E2M1[codes] * np.repeat(e4m3(scales), 16, axis=-1)
    assert np.array_equal(np.array(qg.dequantize(w)), exact)


def test_e10_the_default_is_four_bits_in_groups_of_64():
    w = qg.quantize(ramp(128, 128, over=1000))
    assert qg.is_quantized(w)
    assert (w.shape, w.dtype, str(w.quantization)) == ((128, 128), mx.float32, "affine4g64")


def test_e11_eight_bits_in_groups_of_128_are_recorded():
    w = qg.quantize(ramp(128, 128, over=1000), bits=8, group_size=128)
    assert (w.quantization.bits, w.quantization.group_size) == (8, 128)
    assert (w.packed.shape, w.scales.shape) == ((128, 32), (128, 1))


def raises_both_ways(kind, match, w, **options):
    """The same error at once and in a trace, which adds the line."""
    with pytest.raises(kind, match=match) as info:
        qg.quantize(w, **options)
    assert info.value.fix
    with pytest.raises(kind, match=match) as info:
        qg.jit(lambda w: qg.quantize(w, **options))(w)
    assert "test_emlx_quantize.py" in str(info.value)


def test_e12_an_unknown_mode_names_the_valid_ones():
    raises_both_ways(qg.DTypeError, "supported: affine, mxfp4, mxfp8, nvfp4", normal(4, 64), mode="foo")


@pytest.mark.parametrize(
    ("mode", "options", "says"),
    [
        ("mxfp4", {"group_size": 64}, "mxfp4: group_size is 64, supported: 32"),
        ("mxfp4", {"bits": 8}, "mxfp4: bits is 8, supported: 4"),
        ("mxfp8", {"group_size": 16}, "mxfp8: group_size is 16, supported: 32"),
        ("mxfp8", {"bits": 4}, "mxfp8: bits is 4, supported: 8"),
        ("nvfp4", {"group_size": 32}, "nvfp4: group_size is 32, supported: 16"),
        ("nvfp4", {"bits": 8}, "nvfp4: bits is 8, supported: 4"),
    ],
)
def test_e13_a_microscaled_mode_with_another_group_size_or_bits(mode, options, says):
    raises_both_ways(qg.DTypeError, says, normal(4, 64), mode=mode, **options)


def test_e14_rank_3_is_accepted_and_rank_1_is_not():
    assert quantized(2, 3, 64).shape == (2, 3, 64)
    raises_both_ways(qg.ShapeError, "rank 1", normal(64))


def test_e15_a_last_axis_that_does_not_divide_into_groups():
    raises_both_ways(qg.ShapeError, r"last axis of \(64, 70\).*multiple of group_size=64", normal(64, 70))


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.bool_])
def test_e16_integers_cannot_be_quantized(dtype):
    raises_both_ways(qg.DTypeError, "cannot be packed", mx.ones((4, 64), dtype))


@pytest.mark.parametrize("bits", [0, 7, 9, 16, -4])
def test_e17_unsupported_bits(bits):
    raises_both_ways(qg.DTypeError, "supported: 1, 2, 3, 4, 5, 6, 8", normal(4, 64), bits=bits)


@pytest.mark.parametrize("call", [qg.quantize, qg.jit(lambda w, **o: qg.quantize(w, **o))])
def test_e18_an_unknown_keyword_is_an_error(call):
    with pytest.raises(TypeError, match="type"):
        call(normal(4, 64), type="s4")
    with pytest.raises(TypeError, match="positional"):
        qg.quantize(normal(4, 64), 4)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_e19_words_of_a_file_come_back_bit_for_bit(scheme, tmp_path):
    w = of(scheme, 16, 128, dtype=mx.bfloat16)
    qg.save(tmp_path / "w.safetensors", {"head": {"weight": w}})
    loaded = qg.load(tmp_path / "w.safetensors")["head"]["weight"]
    qg.save(tmp_path / "again.safetensors", {"head": {"weight": loaded}})
    again = qg.load(tmp_path / "again.safetensors")["head"]["weight"]
    for packed in (loaded, again):
        assert all(map(mx.array_equal, packed.components(), w.components()))


def test_e19_no_pass_quantizes_what_was_packed():
    def f(x, w):
        wide = qg.dequantize(w) * 1.0
        return x @ wide.T + x @ w.T, w.T, qg.concatenate([w, w]), w.astype(mx.float16)

    x, w = normal(3, 128), quantized(16, 128)
    jitted = qg.jit(f)
    for stage in jitted.result(x, w).history:
        assert "quantize" not in stage.graph.histogram()
    _, turned, twice, cast = jitted(x, w)
    for packed in (turned, cast):
        assert all(map(mx.array_equal, packed.components(), w.components()))
    assert mx.array_equal(twice.packed, mx.concatenate([w.packed, w.packed]))
