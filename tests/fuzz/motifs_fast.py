"""Code that spells out norms, rope, softmax, attention and packed words, and variations that must stay.

The numbers are bounded: plain code overflows, and masks by scores that are low only beside those.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.ir.dtypes import F32, I8, I32, U8, U32
from qgraph.ops.bits import Bitcast
from qgraph.ops.dispatch import apply
from tests.fuzz.maker import Maker

SIZES = [(2, 3, 4), (2, 4), (3, 3), (4,), (1, 1, 4), (2, 1, 3, 2), (0, 4), (2, 1)]
LUT = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def small(m: Maker, shape: tuple[int, ...]) -> Any:
    return m.traced(m.dense(shape, None, (-4, 4)))


def _rows(m: Maker) -> tuple[Any, int, bool]:
    """Rows, the axis over which they are reduced (now and then another one), and whether it is kept."""
    x = small(m, m.one(SIZES))
    x = qg.astype(x, mx.float32) if m.chance(3) else x
    return x, (m.n(0, x.ndim - 1) if m.chance(4) else x.ndim - 1), not m.chance(6)


def normed(m: Maker) -> list[Any]:
    """x / sqrt(mean(x²) + eps) and (x - mean) / sqrt(var + eps), with what may follow."""
    x, axis, kept = _rows(m)
    centred = m.n(0, 1) == 1
    y = x - qg.mean(x, axis=axis, keepdims=True) if centred else x
    over = m.n(0, x.ndim - 1) if m.chance(8) else axis
    if centred and m.n(0, 1):
        statistic = qg.var(x, axis=over, keepdims=kept, ddof=m.one([0, 0, 0, 1]) if x.shape[over] > 1 else 0)
    else:
        squares = m.one([lambda: y * y, lambda: qg.square(y), lambda: y**2])()
        statistic = qg.mean(squares, axis=over, keepdims=kept)
    if not kept and m.n(0, 2):
        statistic = qg.expand_dims(statistic, over)
    under = statistic + 2.0**-10
    how = m.n(0, 3)
    if how == 0:
        out = y / qg.sqrt(under)
    else:
        out = y * m.one([lambda: qg.rsqrt(under), lambda: 1 / qg.sqrt(under), lambda: under**-0.5])()
    foreign = [qg.exp(-under)] if m.chance(5) else []
    if m.chance(3) and not m.narrow:
        out = qg.astype(out, m.half.mlx)
    if m.n(0, 2):
        shape = m.one([x.shape[-1:]] * 3 + [x.shape, (1,), (1,) * (x.ndim - 1) + x.shape[-1:]])
        out = small(m, shape) * out
    if m.n(0, 1):
        out = out + small(m, m.one([x.shape[-1:]] * 3 + [x.shape]))
    return [out, *foreign]


def exponentials(m: Maker) -> list[Any]:
    """exp(x - max(x)) over its sum."""
    x, axis, kept = _rows(m)
    kept = kept and not m.chance(6)
    if x.size == 0:
        return [x]
    shift = m.one([qg.max, qg.max, qg.logsumexp])
    other = m.n(0, x.ndim - 1) if m.chance(6) else axis
    e = qg.exp(x - shift(x, axis=other, keepdims=True))
    if shift is qg.logsumexp:
        return [e]
    total = qg.sum(e, axis=axis, keepdims=kept)
    if not kept and m.n(0, 2):
        total = qg.expand_dims(total, axis)
    total = total + 1 if m.chance(8) else total
    return [e / total if m.n(0, 2) else e * qg.reciprocal(total), *([qg.exp(-e)] if m.chance(2) else [])]


def turned(m: Maker) -> list[Any]:
    """Pairs of features turned by the position."""
    half, length = m.one([1, 2, 3]), m.one([1, 3, 4])
    more = m.one([0, 0, 0, 1])
    lead = m.one([(), (2,), (1, 2), (2, 2)])
    x = small(m, (*lead, length, 2 * half + more))
    base = m.one([100.0, 10000.0])
    speeds = base ** (-qg.arange(half, dtype=mx.float32) / half)
    if m.chance(5):
        speeds = qg.abs(small(m, (half,))) + 1
    positions = m.traced(m.dense((length,), I32, (0, 9))) if m.chance(8) else qg.arange(length)
    if m.n(0, 1):
        positions = positions + (m.n(0, 5) if m.n(0, 1) else m.traced(m.dense((), I32, (0, 9))))
    positions = qg.astype(positions, mx.float32)
    positions = positions * 0.5 if m.chance(4) else positions
    angles = positions[:, None] * speeds
    cos, sin = (qg.astype(t, x.dtype) for t in (qg.cos(angles), qg.sin(angles)))
    if m.chance(8):
        sin = qg.cos(angles)
    dims, rest = 2 * half, [x[..., 2 * half :]] if more else []
    style = m.n(0, 2)
    if style == 0:
        a, b = x[..., 0:dims:2], x[..., 1:dims:2]
    else:
        a, b = x[..., :half], x[..., half:dims]
    if m.chance(8):
        a, b = b, a
    if style == 2:
        cos, sin = (qg.concatenate([t, t], axis=-1) for t in (cos, sin))
        out = x[..., :dims] * cos + qg.concatenate([-b, a], axis=-1) * sin
        return [qg.concatenate([out, *rest], axis=-1) if rest else out]
    first, second = a * cos - b * sin, a * sin + b * cos
    if style == 0:
        first = qg.reshape(qg.stack([first, second], axis=-1), (*x.shape[:-1], dims))
        return [qg.concatenate([first, *rest], axis=-1) if rest else first]
    return [qg.concatenate([first, second, *rest], axis=-1), *([first] if m.chance(8) else [])]


def attended(m: Maker) -> list[Any]:
    """softmax(q @ k.T) @ v with heads, masks, sinks and scales in any place."""
    batch, served, groups = m.one([1, 2]), m.one([1, 2]), m.one([1, 1, 2])
    queries, keys, features = m.one([1, 2, 3]), m.one([1, 3, 4]), m.one([1, 2])
    heads = served * groups
    rank = m.one([4, 4, 4, 3, 2])
    lead = {4: (batch, heads), 3: (heads,), 2: ()}[rank]
    few = {4: (batch, served), 3: (heads,), 2: ()}[rank]
    q, k, v = (
        small(m, (*lead, queries, features)),
        small(m, (*few, keys, features)),
        small(m, (*few, keys, 2)),
    )
    if rank == 4 and groups > 1:
        again = m.one(
            [lambda t: qg.repeat(t, groups, axis=1)] * 4 + [lambda t: qg.tile(t, (1, groups, 1, 1))]
        )
        k, v = again(k), again(v)
    q = q * 0.5 if m.chance(3) else q
    scores = q @ qg.swapaxes(k, -1, -2)
    scores = scores / 2 if m.chance(3) else scores
    scores = qg.tanh(scores) if m.chance(8) else scores
    how = m.n(0, 5)
    low = m.one([-1e9, -1e9, float("-inf")]) if scores.dtype != mx.float16 else -6e4
    shape = m.one([(queries, keys), (queries, keys), (keys,), scores.shape])
    if how == 1:
        scores = qg.where(small(m, shape) > -2, scores, low)
    elif how == 2:
        scores = scores + small(m, shape)
    elif how == 3 and keys >= queries:
        seen = qg.arange(keys) <= qg.arange(keys - queries, keys)[:, None] + m.one([0, 0, 0, 1])
        scores = qg.where(seen, scores, low)
    weights = qg.softmax(scores, axis=-1 if not m.chance(10) else -2)
    foreign = [qg.exp(-weights)] if m.chance(5) else []
    if rank == 4 and m.chance(4):
        column = qg.broadcast_to(qg.reshape(small(m, (heads,)), (heads, 1, 1)), (*scores.shape[:-1], 1))
        weights = qg.softmax(qg.concatenate([column, scores], axis=-1), axis=-1)[..., m.one([1, 1, 1, 0]) :]
        weights = weights[..., :keys]
    return [weights @ v, *foreign]


def masked(m: Maker) -> list[Any]:
    """The op itself, with a mask that may be known to be the causal one."""
    queries, keys = m.one([1, 2, 3]), m.one([3, 4])
    q, k = small(m, (1, 2, queries, 2)), small(m, (1, 2, keys, 2))
    seen = qg.arange(keys) <= qg.arange(keys - queries, keys)[:, None] + m.one([0, 0, 1])
    seen = qg.logical_and(seen, small(m, (keys,)) > -2) if m.chance(3) else seen
    return [qg.scaled_dot_product_attention(q, k, k, scale=0.5, mask=seen)]


def words(m: Maker) -> list[Any]:
    """Packed words unpacked by shifts and masks; and a product with them."""
    bits, group, rows = m.one([4, 2, 8, 1]), m.one([32, 32, 64, 16]), m.one([1, 3])
    k = 64
    packed = m.traced(m.dense((rows, k * bits // 32), U32, (0, 2**31 - 1)))
    shifts = qg.arange(0, 32, bits, dtype=mx.uint32)
    codes = qg.bitwise_and(qg.right_shift(packed[..., None], shifts), 2**bits - 1)
    codes = codes + 1 if m.chance(8) else codes
    scales = small(m, (rows, k // group))
    numbers = qg.astype(qg.reshape(codes, (rows, k // group, group)), scales.dtype) * scales[..., None]
    if not m.chance(6):
        numbers = numbers + small(m, (rows, k // group))[..., None]
    w = qg.reshape(numbers, (rows, k))
    return [small(m, (2, k)) @ w.T if m.n(0, 1) else w, *([numbers] if m.chance(8) else [])]


def looked_up(m: Maker) -> list[Any]:
    """mxfp4, as MLX writes it on a CPU."""
    group = m.one([32, 32, 64])
    packed = m.traced(m.dense((2, 8), U32, (0, 2**31 - 1)))
    scales = m.traced(m.dense((2, 64 // group), U8, (124, 130)))
    table = [*LUT, *(-x for x in LUT)]
    if m.chance(3):
        table[3] = 1.25
    lut = m.traced(m.constant(F32, *table, shape=(16,)))
    stored = apply(Bitcast(I8, U32), packed)
    low = qg.take(lut, qg.bitwise_and(stored, 15), axis=0)
    high = qg.take(lut, qg.right_shift(stored, 4), axis=0)
    pairs = qg.reshape(qg.stack([low, high], axis=-1), (-1, group))
    two = m.traced(m.constant(F32, 2.0))
    power = two ** (qg.astype(qg.reshape(scales, (-1, 1)), mx.float32) - 127)
    return [qg.reshape(pairs * power, (2, 64))]


FAST = [
    *[normed] * 3,
    *[exponentials] * 2,
    *[turned] * 2,
    *[attended] * 3,
    *[masked] * 2,
    *[words] * 2,
    looked_up,
]
