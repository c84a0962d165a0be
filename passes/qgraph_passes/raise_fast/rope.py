"""Pairs of features turned by angles that grow with the position → rope.

concatenate(a * cos - b * sin, a * sin + b * cos, rest)      a and b the halves of x, or every other feature
x * cos + concatenate(-b, a) * sin                           cos and sin of the angles written twice
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import qgraph as qg
from qgraph.ir import Value
from qgraph.ops.shape import Broadcast, Concatenate, Reshape
from qgraph.rewrite import NoMatch
from qgraph_passes.raise_fast.angles import Angles, read_angles
from qgraph_passes.raise_fast.form import Form, Now, Raised, Search
from qgraph_passes.raise_fast.walk import KERNELS, Shape, last_axis, ones_dropped, uncast


@dataclass(frozen=True)
class _Turned:
    """What a form found: the turned features, and the tables."""

    x: Value  # all features
    traditional: bool
    dims: int
    cos: Value
    sin: Value
    root: Value


class RaiseRope(Form):
    """concatenate(a * cos - b * sin, a * sin + b * cos) → rope."""

    anchors = ("concatenate",)
    size = 9

    def find(self, s: Search) -> Raised | None:
        op, parts = s.node.op, s.node.inputs
        assert isinstance(op, Concatenate)
        if op.axis != parts[0].type.ndim - 1 or len(parts) not in (2, 3):
            return None
        turned = _by_halves(s, parts) or _by_swapping(s, parts)
        if turned is None:
            return None
        cos, sin = _table(turned.cos, "cos"), _table(turned.sin, "sin")
        s.require(cos is not None and sin is not None, "the tables are not cos and sin of angles", turned.cos)
        assert cos is not None
        assert sin is not None
        s.require(cos == sin, "cos and sin are of different angles", cos.angles)
        dtype = turned.root.type.dtype
        s.require(dtype.name in KERNELS, f"there is no kernel for {dtype}", turned.root)
        s.require(turned.x.type.size, "there is nothing to turn", turned.x)
        shape = (*turned.x.type.shape[:-1], turned.dims // 2)
        angles = read_angles(s.walk, cos.angles, cos.shape, shape)
        s.private(turned.root)
        turned, angles = _as_it_was(s, turned, angles)
        return Raised(turned.root, lambda now: _rope(now, turned, angles))


def _rope(now: Now, turned: _Turned, angles: Angles) -> Any:
    """The op, with the axis of the positions last but one."""
    out = turned.root.type
    x = qg.astype(now(turned.x), out.dtype.mlx)
    axis, ndim = angles.axis, x.ndim
    order = [*(i for i in range(ndim - 1) if i != axis), axis, ndim - 1]
    moved = order != list(range(ndim))
    x = qg.transpose(x, order) if moved else x
    shape = x.shape
    if ndim < 3:
        x = qg.reshape(x, (1,) * (3 - ndim) + shape)
    made = qg.rope(
        x,
        turned.dims,
        traditional=turned.traditional,
        base=angles.base,
        scale=angles.scale,
        offset=angles.offset_now(now, x.shape[0]),
        freqs=angles.freqs_now(now),
    )
    made = qg.reshape(made, shape)
    made = qg.transpose(made, [order.index(i) for i in range(ndim)]) if moved else made
    return qg.reshape(made, out.shape)


def _as_it_was(s: Search, turned: _Turned, angles: Angles) -> tuple[_Turned, Angles]:
    """MLX brings every rank to 4 and back: the op takes the rank that there was."""
    x, user = turned.x, s.walk.user(turned.root)
    if user is None or not (isinstance(user.op, Reshape) and isinstance(x.op, Reshape)):
        return turned, angles
    source, out = x.node.inputs[0], user.outputs[0]
    whole = x.type.shape == turned.root.type.shape and source.type.shape == out.type.shape
    first = source.type.shape[:1] == x.type.shape[:1] or isinstance(angles.offset, int)
    same = source.type.shape[-2:] == x.type.shape[-2:] and source.type.ndim > 2
    if not (whole and first and same and angles.axis == x.type.ndim - 2):
        return turned, angles
    return replace(turned, x=source, root=out), replace(angles, axis=source.type.ndim - 2)


# a * cos - b * sin and a * sin + b * cos


def _by_halves(s: Search, parts: tuple[Value, ...]) -> _Turned | None:
    """The parts are the turned halves; or, of the traditional form, neighbours in an axis of their own."""
    first, second = parts[0], parts[1]
    traditional = len(parts) == 2 and _has_own_axis(first) and _has_own_axis(second)
    if traditional:
        first, second = first.node.inputs[0], second.node.inputs[0]
    first, second = uncast(first), uncast(second)
    if first.op.name != "subtract" or second.op.name != "add":
        return None
    found = _products(first, second)
    if found is None:
        return None
    a, b, cos, sin = found
    s.inner(*parts, first, second, *first.node.inputs, *second.node.inputs)
    windows = _windows(a, b, step=2 if traditional else 1)
    s.require(
        windows, "the pairs are not neighbours" if traditional else "the pairs are not of two halves", a
    )
    out = s.node.outputs[0]
    if traditional:
        merged = s.walk.user(out)
        if merged is not None and isinstance(merged.op, Reshape):
            s.inner(out)
            out = merged.outputs[0]
    whole = _whole(s, out, windows, parts[2:])
    return _Turned(whole[0], traditional, whole[1], cos, sin, whole[2])


def _whole(
    s: Search, out: Value, windows: Sequence[tuple[Value, int]], rest: Sequence[Value]
) -> tuple[Value, int, Value]:
    """``(x, dims, root)``: all of x is turned, or its other features are put behind those that are.

    Errors: NoMatch if they are not.
    """
    for x, dims in reversed(windows):
        n = x.type.shape[-1]
        if rest and (x, dims, n, 1) in last_axis(rest[0]):
            return x, dims, out
        if not rest and n == dims:
            return x, dims, out
        joined = s.walk.user(out)
        if rest or joined is None or not isinstance(joined.op, Concatenate) or len(joined.inputs) != 2:
            continue
        behind = joined.inputs[0] is out and out.type.shape == (*x.type.shape[:-1], dims)
        along = joined.op.axis == out.type.ndim - 1
        if behind and along and (x, dims, n, 1) in last_axis(joined.inputs[1]):
            s.inner(out)
            return x, dims, joined.outputs[0]
    raise NoMatch("the features beside those that are turned are not kept as they are", out)


def _has_own_axis(v: Value) -> bool:
    return isinstance(v.op, Reshape) and v.type.shape == (*v.node.inputs[0].type.shape, 1)


def _products(first: Value, second: Value) -> tuple[Value, Value, Value, Value] | None:
    """(a, b, cos, sin) for a * cos - b * sin and a * sin + b * cos, in any order."""
    four = [uncast(v) for v in (*first.node.inputs, *second.node.inputs)]
    if any(v.op.name != "multiply" for v in four):
        return None
    ac, bs = (v.node.inputs for v in four[:2])
    for a, cos in (ac, ac[::-1]):
        for b, sin in (bs, bs[::-1]):
            want = [{a, sin}, {b, cos}]
            crossed = [set(v.node.inputs) for v in four[2:]] in (want, want[::-1])
            if crossed and _table(cos, "cos") is not None:
                return a, b, cos, sin
    return None


def _windows(a: Value, b: Value, step: int) -> list[tuple[Value, int]]:
    """``(x, dims)`` for every x of whose first features a and b are the halves (the even and odd ones)."""
    n = a.type.shape[-1]
    if a.type.shape != b.type.shape:
        return []
    of_b = {(x, start, by) for x, start, _, by in last_axis(b)}
    second = n if step == 1 else 1
    pairs = last_axis(a)
    return [(x, 2 * n) for x, start, _, by in pairs if (start, by) == (0, step) and (x, second, step) in of_b]


# x * cos + concatenate(-b, a) * sin


def _by_swapping(s: Search, parts: tuple[Value, ...]) -> _Turned | None:
    if len(parts) != 2 or uncast(parts[0]).op.name != "negative":
        return None
    b, a = uncast(parts[0]).node.inputs[0], parts[1]
    swapped = s.node.outputs[0]
    product = s.walk.user(swapped)
    total = None if product is None else s.walk.user(product.outputs[0])
    if product is None or total is None or product.op.name != "multiply" or total.op.name != "add":
        return None
    other = total.inputs[1] if total.inputs[0] is product.outputs[0] else total.inputs[0]
    windows = _windows(a, b, step=1)
    if not windows or other.op.name != "multiply":
        return None
    dims = windows[0][1]
    cos = next(
        (
            table
            for given, table in (other.node.inputs, other.node.inputs[::-1])
            if any((x, 0, dims, 1) in last_axis(given) for x, _ in windows)
        ),
        None,
    )
    if cos is None:
        return None
    sin = product.inputs[1] if product.inputs[0] is swapped else product.inputs[0]
    s.inner(parts[0], swapped, product.outputs[0], other)
    x, dims, root = _whole(s, total.outputs[0], windows, ())
    return _Turned(x, False, dims, cos, sin, root)


# tables


@dataclass(frozen=True)
class _Table:
    """Angles, and the shape with which their cosines meet the features, before it is broadcast."""

    angles: Value
    shape: Shape


def _table(v: Value, name: str) -> _Table | None:
    """The angles of a table of cos or sin; of one that is written twice, once."""
    shape: Shape | None = None
    taken = doubled = False
    while True:
        if isinstance(v.op, Broadcast) and shape is None:
            v = v.node.inputs[0]
            continue
        shape = shape or v.type.shape
        x = v.node.inputs[0] if v.node.inputs else v
        if v.op.name == name and not taken:
            taken = True
        elif isinstance(v.op, Concatenate) and not doubled and v.node.inputs == (x, x):
            if v.op.axis != x.type.ndim - 1:
                return None
            doubled = True
        elif isinstance(v.op, Reshape):
            if ones_dropped(x.type.shape) != ones_dropped(v.type.shape):
                return None
        elif not (v.op.name == "cast" and v.type.dtype.is_float and x.type.dtype.is_float):
            break
        v = x
    if not taken:
        return None
    return _Table(v, (*shape[:-1], shape[-1] // 2) if doubled else shape)
