"""LoRA branches beside packed bases: V0–V11 of the matrix in research, casts in every place."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import qgraph as qg
from tests.fuzz.maker import Maker


def lora(m: Maker) -> list[Any]:
    """base + s * (x @ a) @ b, varied."""
    k, n = m.one([64, 32]), m.one([8, 32, 3])
    x = m.traced(m.dense(m.one([(3, k), (1, k), (k,), (2, 3, k), (2, 2, k)])))
    return _layer(m, x, n)


def stacked(m: Maker) -> list[Any]:
    """Two layers, one after the other."""
    x = m.traced(m.dense((2, 64)))
    h = _layer(m, x, 32)[0]
    return _layer(m, h, 8) if h.shape == (2, 32) else [h]


def _cast(m: Maker, x: Any) -> Any:
    """`x`, now and then cast; rarely to a type that loses everything."""
    how = m.n(0, 9)
    if how == 9 and m.chance(3):
        return qg.astype(qg.minimum(qg.maximum(x, -8), 8), mx.int32)
    if m.narrow or how < 7:
        return x
    return qg.astype(x, m.one([mx.float32, mx.float16, mx.bfloat16]))


def _base(m: Maker, x: Any, n: int) -> tuple[Any, Any]:
    """x @ w for a packed w, stored in either order; also the (k, n) view of the weight."""
    k = x.shape[-1]
    if n % 32 == 0 and m.n(0, 2) == 0:
        w = m.traced(m.packed((k,), n))
    else:
        w = qg.transpose(m.traced(m.packed((n,), k)))
    if m.chance(6):
        w = qg.expand_dims(w, 0)  # a batch of weights
    if m.chance(6) and x.ndim == 2 and w.ndim == 2:
        return qg.einsum("mk,kn->mn", x, w), w
    return x @ w, w


def _scale(m: Maker) -> Any:
    how = m.n(0, 5)
    if how == 0:
        return 2.0
    if how == 5:
        return m.traced(m.dense((3,) if m.n(0, 1) else (1, 1)))
    return m.traced(m.dense(m.one([(), (), (1,)])))


def _layer(m: Maker, x: Any, n: int) -> list[Any]:
    k = x.shape[-1]
    base, w = _base(m, x, n)
    r = m.one([2, 1, 4, 4, 48])
    a, b = m.traced(m.dense((k, r))), m.traced(m.dense((r, n)))
    if m.chance(10):
        a, b = qg.expand_dims(a, 0), qg.expand_dims(b, 0)
    scale = _scale(m)
    scale = 0.5 if not isinstance(scale, float) and scale.size == 3 and n != 3 else scale
    how = m.n(0, 9)
    if how >= 8:  # V10: the merged weight
        delta = scale * (_cast(m, a) @ b)
        if m.chance(6):
            return [x @ (w + delta), delta]
        return [x @ (w + delta if m.n(0, 1) else delta + w)]
    other = x if not m.chance(8) else x + 1.0  # V6: a branch on another x
    if how in (5, 6, 7) and not (hasattr(scale, "size") and scale.size == 3):  # V11: the scale inside
        low, scale = _cast(m, other) @ (scale * a), None
    else:
        low = _cast(m, other) @ _cast(m, a)
    branch = _cast(m, _cast(m, low) @ b)
    if scale is not None and not m.chance(4):
        branch = scale * branch if m.n(0, 1) else branch * scale
    branch = _cast(m, branch)
    base = _cast(m, base)
    if m.n(0, 4) < 3:  # the base's bias; now and then something else
        base = base + _cast(m, m.traced(m.dense((n,) if not m.chance(12) else (1, n))))
    out = base + branch if m.n(0, 1) else branch + base
    kept = m.n(0, 9)  # V4: others read what is inside
    foreign = [base] if kept == 9 else [low] if kept == 8 else [qg.exp(base * 0.1)] if kept == 7 else []
    return [_cast(m, out), *foreign]
