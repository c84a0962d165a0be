"""The grids of the quantization schemes in NumPy: what `mx.quantize` followed by `mx.dequantize` gives.

Source: mlx.core.quantize (the CPU backend). The scale of a group depends on rounding in float32, so its
formulas are followed in float32; the numbers themselves come out as float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qgraph.quant.scheme import Quantization

_np: Any = np  # for expressions of Any, whose types NumPy's stubs do not know
Numbers = np.ndarray[Any, Any]

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # the magnitudes of 4-bit floats
E4M3_MAX = 448.0
# MLX divides nvfp4's global scale by the product of the largest values of its two formats.
GLOBAL_SCALE_DIVISOR = E4M3_MAX * 6.0


def round_to_grid(w: Numbers, q: Quantization, global_scale: Any = None) -> Numbers:
    """`w` (float64) after packing with scheme `q` and unpacking.

    Shape: w's, the last axis in whole groups.  Exact for float32 weights, up to the rounding of a weight
    that lies halfway between two numbers of the grid.  Source: mlx.core.quantize, mlx.core.dequantize.

    >>> round_to_grid(np.linspace(0, 3, 32)[None], Quantization(bits=2, group_size=32))[0, ::8]
    array([0., 1., 2., 2.])
    """
    groups = np.asarray(w, np.float32).reshape(*w.shape[:-1], -1, q.group_size)
    if q.mode == "affine":
        return _affine(groups, q.bits).reshape(w.shape)
    encode = (
        1.0 if global_scale is None else float(np.float32(GLOBAL_SCALE_DIVISOR) / np.float32(global_scale))
    )
    largest = np.abs(groups).max(-1, keepdims=True)
    if q.mode == "nvfp4":
        scale = e4m3(largest / np.float32(6) * np.float32(encode)) / encode
    else:
        scale = e8m0(largest / np.float32(6 if q.mode == "mxfp4" else E4M3_MAX))
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(scale == 0, 0.0, groups / scale)
    return (scale * (e4m3(scaled) if q.mode == "mxfp8" else e2m1(scaled))).reshape(w.shape)


def _affine(w: Any, bits: int) -> Any:
    """Steps from the end of larger magnitude, moved so that 0 is on the grid."""
    steps = np.float32(2**bits - 1)
    high, low = w.max(-1, keepdims=True), w.min(-1, keepdims=True)
    from_low = np.abs(low) > np.abs(high)
    step = np.maximum((high - low) / steps, np.float32(1e-7))
    if bits == 1:  # two numbers: the lowest and the highest
        return low + step.astype(np.float64) * np.clip(np.rint((w - low) / step), 0, 1)
    scale: Any = _np.where(from_low, step, -step)
    edge: Any = _np.where(from_low, low, high)
    q0 = _np.rint(edge / scale)
    scale = _np.where(q0 != 0, edge / np.where(q0 != 0, q0, np.float32(1)), scale)
    bias = _np.where(q0 != 0, edge, np.float32(0))
    codes = _np.clip(_np.rint((w - bias) / scale), 0, steps)
    return scale.astype(np.float64) * codes + bias


def e2m1(x: Numbers) -> Numbers:
    """The nearest 4-bit float, halves towards zero, as MLX's CPU backend has it."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    return np.copysign(E2M1[np.searchsorted(middles, np.abs(x), "left")], x)


def e4m3(x: Numbers) -> Numbers:
    """The nearest 8-bit float with 3 bits of mantissa, halves to even, limited to 448."""
    magnitude = np.minimum(np.abs(np.asarray(x, np.float64)), E4M3_MAX)
    _, exponent = np.frexp(magnitude)
    ulp = np.ldexp(1.0, np.maximum(exponent - 4, -9))  # 2**-9 below the normal range
    return np.copysign(np.rint(magnitude / ulp) * ulp, x)


def e8m0(x: Numbers) -> Numbers:
    """The power of two at or above x, within 2**-127 … 2**127."""
    with np.errstate(divide="ignore"):
        exponent = np.ceil(np.log2(np.asarray(x, np.float32)))
    return np.ldexp(1.0, np.clip(exponent, -127, 127).astype(np.int64))


def decode(
    q: Quantization, packed: Any, scales: Any, biases: Any = None, global_scale: Any = None
) -> Numbers:
    """The numbers (float64) that packed words store: (..., words) to (..., words * 32 / bits).

    A global scale stands in the place of the biases where a scheme has none.

    >>> words = np.array([[0b11100100, 0]])
    >>> decode(Quantization(bits=2, group_size=32), words, np.array([[2.0]]), np.array([[1.0]]))[0, :5]
    array([1., 3., 5., 7., 1.])
    """
    if not q.has_biases:
        biases, global_scale = None, biases
    codes = _codes(np.asarray(packed, np.uint32), q.bits)
    groups = codes.reshape(*codes.shape[:-1], codes.shape[-1] // q.group_size, q.group_size)
    scale: Any = _np.asarray(scales)[..., None]
    if biases is not None:
        return (groups * scale + _np.asarray(biases)[..., None]).reshape(codes.shape)
    numbers = _from_e4m3(groups) if q.mode == "mxfp8" else np.where(groups & 8, -1.0, 1.0) * E2M1[groups & 7]
    scale = _from_e4m3(scale) if q.mode == "nvfp4" else np.ldexp(1.0, scale.astype(np.int64) - 127)
    if global_scale is not None:
        scale = scale * (_np.asarray(global_scale, np.float64) / GLOBAL_SCALE_DIVISOR)
    return (numbers * scale).reshape(codes.shape)


def _codes(words: Any, bits: int) -> Any:
    """The numbers of `bits` bits in a stream of words, low bits first; they may straddle words."""
    stream = (words[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    stream = stream.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits, bits).astype(np.int64)
    return _np.sum(stream << np.arange(bits), -1)


def _from_e4m3(codes: Any) -> Any:
    """8-bit floats by their bits."""
    codes = codes.astype(np.int64)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    return _np.where(codes & 128, -1.0, 1.0) * _np.where(exponent == 0, mantissa / 512, normal)
