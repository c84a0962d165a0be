"""Packed words unpacked by shifts and masks, times scales, plus biases → the packed value itself.

A product with it then becomes a quantized one. MLX writes 2, 4 and 8 bits as a shift left and one right for
each number of a word, other widths as a stream of single bits, and mxfp4 as a look-up; users write
``(words >> shifts) & mask``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import qgraph as qg
from qgraph.ir import Value
from qgraph.ir.dtypes import U8, U32
from qgraph.ops.dispatch import apply
from qgraph.ops.elementwise import Cast
from qgraph.ops.formats import E2M1
from qgraph.ops.indexing import Take
from qgraph.ops.reduce import Reduction
from qgraph.ops.shape import Concatenate, Reshape
from qgraph.ops.storage import Pack
from qgraph.quant import Quantization
from qgraph_passes.raise_fast.form import Form, Now, Raised, Search
from qgraph_passes.raise_fast.walk import Shape, Walk, number, shaped

AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
MX_GROUP = 32


@dataclass(frozen=True)
class _Codes:
    """Words of which a value holds the numbers, some bits each."""

    words: Value
    bits: int


class RaiseDequantize(Form):
    """codes(words) * scales + biases → the packed value."""

    anchors = ("cast",)
    size = 12

    def find(self, s: Search) -> Raised | None:
        x, cast = s.node.inputs[0], s.node.outputs[0]
        if x.type.dtype is not U32 or not cast.type.dtype.is_float:
            return None
        codes = _codes(s.walk, _bare(x))
        if codes is None:
            return None
        grouped = _regrouped(s, cast)
        group = grouped.type.shape[-1]
        scaled = _step(s, grouped, "multiply", group)
        shifted = None if scaled is None else _step(s, scaled[0], "add", group)
        s.require(scaled is not None, "the numbers are not multiplied by one scale for each group", cast)
        s.require(shifted is not None, "no bias for each group is added to the numbers", cast)
        assert scaled is not None
        assert shifted is not None
        (_, scales), (out, biases) = scaled, shifted
        bits = codes.bits
        s.require(bits in AFFINE_BITS and group in GROUPS, f"{bits} bits in groups of {group}", out)
        same = scales.type.dtype is biases.type.dtype and scales.type.dtype.is_float
        s.require(same, f"scales are {scales.type.dtype}, biases {biases.type.dtype}", scales)
        s.require(out.type.dtype.name in ("f32", "f16", "bf16"), f"the numbers are {out.type.dtype}", out)
        words = codes.words.type.shape
        shape = (*words[:-1], words[-1] * 32 // bits)
        s.require(len(shape) > 1, "there is one row", out)
        rows = out.type.shape == (*shape[:-1], shape[-1] // group, group)
        s.require(rows, f"the numbers of {shape} are grouped as {out.type.shape}", out)
        root = _merged(s, out)
        s.inner(out, scaled[0])
        s.private(root)
        q = Quantization(bits=bits, group_size=group)
        return _packed(root, q, codes.words, (scales, biases))


class RaiseMxfp4(Form):
    """lut[codes(words)] * 2 ** (scales - 127) → the packed value."""

    anchors = ("power",)
    size = 14

    def find(self, s: Search) -> Raised | None:
        base, exponent = s.node.inputs
        scales = _exponents(exponent)
        product = s.walk.user(s.node.outputs[0])
        if number(base) != 2 or scales is None or product is None or product.op.name != "multiply":
            return None
        power, out = s.node.outputs[0], product.outputs[0]
        numbers = product.inputs[0] if product.inputs[1] is power else product.inputs[1]
        words = _looked_up(s, numbers)
        s.require(words is not None, "what is scaled is not looked up in the 16 numbers of 4 bits", numbers)
        assert words is not None
        group = out.type.shape[-1]
        s.require(group == MX_GROUP, f"groups of {group}, where mxfp4 has {MX_GROUP}", out)
        shape = (*words.type.shape[:-1], words.type.shape[-1] * 8)
        wanted = (*shape[:-1], shape[-1] // MX_GROUP)
        s.require(scales.type.shape == wanted, f"scales {scales.type.shape} for {shape}", scales)
        s.require(len(shape) > 1, "there is one row", out)
        root = _merged(s, out)
        s.require(out.type.dtype.name in ("f32", "f16", "bf16"), f"the numbers are {out.type.dtype}", out)
        s.inner(out, numbers)
        s.private(root)
        return _packed(root, Quantization.of_mode("mxfp4"), words, (scales,))


def _packed(root: Value, q: Quantization, words: Value, rest: tuple[Value, ...]) -> Raised:
    """The packed value; of rows that were taken, rows taken of it."""
    words_shape = words.type.shape
    scales_shape = (*words_shape[:-1], words_shape[-1] * 32 // q.bits // q.group_size)
    pack = Pack(q, root.type.dtype)
    parts = (words, *rest)
    ids = _taken(parts, scales_shape)
    if ids is None:

        def make(now: Now) -> Any:
            packed = apply(pack, now(words), *(shaped(now(p), scales_shape) for p in rest))
            return qg.reshape(packed, root.type.shape)

        return Raised(root, make)

    def take(now: Now) -> Any:
        packed = apply(pack, *(now(p.node.inputs[0]) for p in parts))
        return qg.reshape(qg.quantized_take(packed, now(ids)), root.type.shape)

    return Raised(root, take)


def _taken(parts: tuple[Value, ...], scales: Shape) -> Value | None:
    """The indices by which rows of all parts were taken, None if they were not."""
    first = parts[0]
    if not all(isinstance(p.op, Take) and p.op.axis == 0 for p in parts):
        return None
    ids = first.node.inputs[1]
    same = all(p.node.inputs[1] is ids for p in parts) and all(p.type.shape == scales for p in parts[1:])
    return ids if same and first.node.inputs[0].type.ndim == 2 else None


def _bare(v: Value) -> Value:
    """`v` before reshapes."""
    while isinstance(v.op, Reshape):
        v = v.node.inputs[0]
    return v


def _regrouped(s: Search, v: Value) -> Value:
    """The value with an axis of groups at the end, if a reshape makes it only now."""
    user = s.walk.user(v)
    if user is not None and isinstance(user.op, Reshape):
        s.inner(v)
        return user.outputs[0]
    return v


def _step(s: Search, v: Value, op: str, group: int) -> tuple[Value, Value] | None:
    """The product (sum) of groups with one number for each: ``(result, numbers)``."""
    user = s.walk.user(v)
    if user is None or user.op.name != op or len(set(user.inputs)) != 2:
        return None
    each = user.inputs[0] if user.inputs[1] is v else user.inputs[1]
    n = v.type.size // group
    while isinstance(each.op, (Reshape,)) and each.node.inputs[0].type.size == n:
        each = each.node.inputs[0]
    per_group = user.inputs[0] if user.inputs[1] is v else user.inputs[1]
    fits = per_group.type.shape == (*v.type.shape[:-1], 1) and user.outputs[0].type.shape == v.type.shape
    return (user.outputs[0], each) if fits else None


def _merged(s: Search, v: Value) -> Value:
    """The reshape that joins the groups of each row (and may go on to another shape)."""
    user = s.walk.user(v)
    if user is not None and isinstance(user.op, Reshape):
        s.inner(v)
        return user.outputs[0]
    return v


# codes


def _codes(walk: Walk, v: Value) -> _Codes | None:
    """The words whose numbers `v` holds, in order."""
    return _by_parts(v) or _by_mask(walk, v) or _by_stream(walk, v)


def _by_parts(v: Value) -> _Codes | None:
    """concatenate((words << high) >> high'), one part for each number of a word."""
    parts = v.node.inputs
    if not isinstance(v.op, Concatenate) or v.op.axis != v.type.ndim - 1 or 32 % len(parts):
        return None
    bits = 32 // len(parts)
    words: Value | None = None
    for i, part in enumerate(parts):
        right = _bare(part)
        left = _shifted(right, "right_shift", 32 - bits)
        word = None if left is None else _shifted(left, "left_shift", 32 - bits * (i + 1))
        if word is None or (words is not None and word is not words):
            return None
        if part.type.shape != (*word.type.shape, 1):
            return None
        words = word
    return None if words is None else _Codes(words, bits)


def _shifted(v: Value, op: str, by: int) -> Value | None:
    """What was shifted by so many bits."""
    if v.op.name != op or number(v.node.inputs[1]) != by:
        return v if by == 0 and v.op.name != op else None
    return v.node.inputs[0]


def _by_mask(walk: Walk, v: Value) -> _Codes | None:
    """(words >> (0, bits, 2 * bits, …)) & (2 ** bits - 1)."""
    if v.op.name != "bitwise_and":
        return None
    for right, mask in (v.node.inputs, v.node.inputs[::-1]):
        ones = number(mask)
        if ones is None or right.op.name != "right_shift":
            continue
        bits = int(ones + 1).bit_length() - 1
        words, shifts = right.node.inputs
        known = walk.known(shifts)
        if ones != 2**bits - 1 or known is None or 32 % max(bits, 1) or known.ndim < 1:
            return None
        in_order = np.array_equal(np.reshape(known, -1), np.arange(0, 32, bits))
        along = known.shape[-1] == known.size == v.type.shape[-1]
        source = _one_axis_less(words)
        return _Codes(source, bits) if in_order and along and source is not None else None
    return None


def _one_axis_less(v: Value) -> Value | None:
    """`v` of shape (…, 1) without its last axis."""
    inner = v.node.inputs[0] if isinstance(v.op, Reshape) else v
    return inner if v.type.shape == (*inner.type.shape, 1) else None


def _by_stream(walk: Walk, v: Value) -> _Codes | None:
    """sum(((words >> (0 … 31)) & 1 in groups of bits) << (0 … bits - 1))."""
    if v.op.name != "sum" or not isinstance(v.op, Reduction):
        return None
    left = v.node.inputs[0]
    if left.op.name != "left_shift" or v.op.axes != (left.type.ndim - 1,):
        return None
    stream, places = left.node.inputs
    bits = left.type.shape[-1]
    known = walk.known(places)
    if known is None or known.size != bits or known.shape[-1] != bits:
        return None
    if not np.array_equal(np.reshape(known, -1), np.arange(bits)) or stream.type.shape != left.type.shape:
        return None
    single = _by_mask(walk, _bare(stream))
    return _Codes(single.words, bits) if single is not None and single.bits == 1 else None


# mxfp4


def _exponents(v: Value) -> Value | None:
    """The bytes of which `v` is the exponent, less 127."""
    if v.op.name != "subtract" or number(v.node.inputs[1]) != 127:
        return None
    x = v.node.inputs[0]
    if not isinstance(x.op, Cast) or not x.op.dtype.is_float:
        return None
    x = _bare(x.node.inputs[0])
    return x if x.type.dtype is U8 else None


def _looked_up(s: Search, v: Value) -> Value | None:
    """The words whose 4-bit numbers were looked up, low and high ones of each byte in turn."""
    pairs = _bare(v)
    if not isinstance(pairs.op, Concatenate) or len(pairs.node.inputs) != 2:
        return None
    if pairs.op.axis != pairs.type.ndim - 1 or pairs.type.shape[-1] != 2:
        return None
    low, high = (_bare(x) for x in pairs.node.inputs)
    if not (isinstance(low.op, Take) and isinstance(high.op, Take)):
        return None
    if not all(_is_table(s.walk, x.node.inputs[0]) for x in (low, high)):
        return None
    lower, upper = low.node.inputs[1], high.node.inputs[1]
    if lower.op.name != "bitwise_and" or number(lower.node.inputs[1]) != 15:
        return None
    stored = lower.node.inputs[0]
    if upper.op.name != "right_shift" or number(upper.node.inputs[1]) != 4:
        return None
    if upper.node.inputs[0] is not stored or stored.op.name != "view" or stored.type.dtype.size != 1:
        return None
    words = _bare(stored.node.inputs[0])
    return words if words.type.dtype is U32 else None


def _is_table(walk: Walk, v: Value) -> bool:
    """Whether the table holds the numbers of 4 bits, by their code."""
    known = walk.known(v)
    return known is not None and np.array_equal(np.reshape(known, -1), np.concatenate([E2M1, -E2M1]))
