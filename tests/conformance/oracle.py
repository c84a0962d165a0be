"""The oracle of the conformance suite: the numbers of a packed weight in float64, and dense NumPy on them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph.execute.reference import to_numpy
from tests.agree import assert_as_mlx, assert_close, magnitude_of, normal

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
AFFINE = [("affine", bits, group) for bits in BITS for group in GROUPS]
MICROSCALED = [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
SCHEMES = AFFINE + MICROSCALED
MODES = [("affine", 4, 64), *MICROSCALED]

# The numbers that four bits of mxfp4 and nvfp4 stand for: sign, two bits of exponent, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def quantized(*shape, mode="affine", bits=None, group_size=None, dtype=mx.float32, seed=None):
    """A packed weight of random numbers of order 1."""
    w = normal(*shape, dtype=dtype, seed=seed)
    return qg.quantize(w, mode=mode, bits=bits, group_size=group_size)


def of(scheme, *shape, dtype=mx.float32):
    """A packed weight of one of SCHEMES."""
    mode, bits, group_size = scheme
    return quantized(*shape, mode=mode, bits=bits, group_size=group_size, dtype=dtype)


def ramp(*shape, over, start=0.0):
    """EMLX's fixtures: iota(shape) / over, in float32."""
    return (mx.arange(int(np.prod(shape))).reshape(shape) / over + start).astype(mx.float32)


def raw(w):
    """The arguments of MLX's kernels for `w`: arrays, then keywords."""
    q = w.quantization
    return (w.packed, w.scales, w.biases), {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}


def kernel(x, w, transpose=True):
    """MLX's own quantized_matmul."""
    arrays, scheme = raw(w)
    return mx.quantized_matmul(x, *arrays, transpose=transpose, **scheme)


def assert_product(found, x, w, transpose=True, dtype=None, about=""):
    """That `found` is x @ w.T (x @ w): float32 sums and one rounding. `w` packed or dense."""
    dense = to_numpy(w)
    exact = np.matmul(to_numpy(x), np.swapaxes(dense, -1, -2) if transpose else dense)
    magnitude = magnitude_of(x, w, transpose)
    assert_close(found, exact, dtype, k=x.shape[-1], path="P2", magnitude=magnitude, about=about)


def assert_kernel(found, x, w, transpose=True):
    """That `found` is what MLX's quantized_matmul gives: to the bit, or as near as two right sums are."""
    how = {"k": x.shape[-1], "path": "P2", "magnitude": magnitude_of(x, w, transpose)}
    assert_as_mlx(found, kernel(x, w, transpose), **how)


def largest_terms(w):
    """|scales| q + |biases| for every number of `w`: what its own rounding is relative to."""
    if w.biases is None:
        return np.abs(to_numpy(w))
    codes = codes_of(w.packed, w.quantization.bits)
    group = w.quantization.group_size
    wide = (np.repeat(np.abs(to_numpy(part)), group, axis=-1) for part in (w.scales, w.biases))
    scales, biases = wide
    return scales * codes + biases


def codes_of(words, bits):
    """The integers that uint32 words hold, low bits first, across words."""
    rows = np.array(words)
    flat = rows.reshape(-1, rows.shape[-1]).astype("<u4").view(np.uint8)
    stream = np.unpackbits(flat, axis=-1, bitorder="little")
    digits = stream.reshape(*rows.shape[:-1], -1, bits).astype(np.int64)
    return digits @ (1 << np.arange(bits))


def words_of(codes, bits):
    """The inverse of `codes_of`."""
    codes = np.asarray(codes)
    digits = (codes[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(digits.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")
    return mx.array(packed.view("<u4").astype(np.uint32))


def e4m3(byte):
    """The number of an 8-bit float with four bits of exponent (bias 7) and three of mantissa."""
    byte = np.asarray(byte).astype(np.int64)
    sign, exponent, mantissa = np.where(byte >> 7, -1.0, 1.0), (byte >> 3) & 15, byte & 7
    small = mantissa * 2.0**-9
    return sign * np.where(exponent == 0, small, (8 + mantissa) * np.exp2(exponent - 10.0))


def by_hand(w):
    """The numbers of a packed weight with axis -1, from its words, bit by bit."""
    q = w.quantization
    scales = np.repeat(np.array(w.scales.astype(mx.float32)), q.group_size, axis=-1).astype(np.float64)
    codes = codes_of(w.packed, q.bits)
    if q.mode == "affine":
        biases = np.repeat(np.array(w.biases.astype(mx.float32)), q.group_size, axis=-1)
        return scales * codes + biases.astype(np.float64)
    steps = e4m3(scales) if q.mode == "nvfp4" else np.exp2(scales - 127)
    return steps * (e4m3(codes) if q.mode == "mxfp8" else E2M1[codes])
