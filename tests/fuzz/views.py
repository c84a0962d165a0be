"""Chains of views on a packed value: most keep it packed, some cannot."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from hypothesis import strategies as st

import qgraph as qg
from qgraph.ops.dispatch import apply
from qgraph.ops.shape import Contiguous
from tests.fuzz.maker import Maker


def swapped(m: Maker, w: Any) -> Any:
    return qg.swapaxes(w, -1, -2)


def permuted(m: Maker, w: Any) -> Any:
    return qg.transpose(w, m.draw(st.permutations(range(w.ndim))))


def sliced(m: Maker, w: Any) -> Any:
    i = m.n(0, w.ndim - 1)
    n = w.shape[i]
    packing = w._type.packing
    group = packing.quantization.group_size if packing and i == w.ndim + packing.axis else 1
    if group > 1 and m.chance(2):
        group = 1  # cuts groups, unless the bounds happen to fit
    start = m.n(0, max(0, n // group - 1)) * group
    stop = m.n(start // group + 1, max(start // group + 1, n // group)) * group
    step = m.one([1, 1, 2]) if group == 1 else 1
    index = [slice(None)] * w.ndim
    index[i] = slice(start, min(stop, n), step)
    return w[tuple(index)]


def joined(m: Maker, w: Any) -> Any:
    axis = m.n(0, w.ndim - 1)
    if w._type.packing and w._type.packing.axis == -1 and w.ndim == 2 and m.n(0, 1):
        other = m.traced(m.packed((m.one([2, w.shape[0]]),), w.shape[1], [w._type.packing.quantization]))
        if other.dtype != w.dtype and m.n(0, 1):
            other = qg.astype(other, w.dtype)
        return qg.concatenate([w, other], 0)
    return qg.concatenate([w, w], axis)


def other_joined(m: Maker, w: Any) -> Any:
    """Joined with another weight, which is turned too or is not."""
    shape = w._type.shape
    other = m.traced(m.packed((*shape[:-2], shape[-1]), shape[-2], [w._type.packing.quantization]))
    if other.dtype != w.dtype:
        return qg.concatenate([w, w], m.n(0, w.ndim - 1))
    other = qg.swapaxes(other, -1, -2)
    if m.n(0, 1):
        other = m.traced(m.dense(shape, w._type.dtype))
    return qg.concatenate([w, other], m.n(0, w.ndim - 1))


def cast(m: Maker, w: Any) -> Any:
    if m.chance(2):
        return qg.astype(w, mx.int32)
    if m.narrow:
        return qg.astype(w, mx.int32) if m.n(0, 1) else w
    return qg.astype(w, m.one([mx.float32, mx.float16, mx.bfloat16]))


def with_one(m: Maker, w: Any) -> Any:
    if 1 in w.shape and w.ndim > 2 and m.n(0, 1):
        return qg.squeeze(w, w.shape.index(1))
    return qg.expand_dims(w, m.n(0, w.ndim))


def regrouped(m: Maker, w: Any) -> Any:
    shape = list(w.shape)
    i = m.n(0, w.ndim - 1)
    if m.n(0, 1) and i + 1 < w.ndim:
        merged = [*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]]
        return qg.reshape(w, merged) if len(merged) > 1 else w
    factor = m.one([f for f in (1, 2, 3, 32, 64) if shape[i] % f == 0])
    return qg.reshape(w, [*shape[:i], shape[i] // factor, factor, *shape[i + 1 :]])


def repeated(m: Maker, w: Any) -> Any:
    return qg.broadcast_to(w, (2, *w.shape))


def copied(m: Maker, w: Any) -> Any:
    return apply(Contiguous(), w)


VIEWS = [swapped, swapped, swapped, permuted, sliced, joined, cast, with_one, regrouped, repeated, copied]


def viewed(m: Maker, w: Any) -> Any:
    """`w` behind up to three views; two axes or more remain."""
    for _ in range(m.one([0, 1, 1, 2, 2, 3])):
        if w.ndim > 4 or w.size > 20000 or 0 in w.shape:
            break
        w = m.one(VIEWS)(m, w)
    return w
