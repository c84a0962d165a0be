"""Forms that real programs have and that rules look for, with the variations that a rule must refuse."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.ir.dtypes import BF16, C64, F16, F32, F64, I32, U32
from qgraph.ops.dispatch import apply
from qgraph.ops.shape import Contiguous
from tests.fuzz.maker import SCHEMES, Maker
from tests.fuzz.motifs_fast import FAST
from tests.fuzz.motifs_lora import lora, stacked
from tests.fuzz.views import cast as view_cast
from tests.fuzz.views import joined, other_joined, regrouped, sliced, viewed, with_one


def x_dtype(m: Maker) -> Any:
    """The dtype of activations: now and then one that has no kernel."""
    return m.one([m.float()] * 9 + [I32, C64, *([] if m.narrow else [F64])])


def activations(m: Maker, k: int, lead: tuple[int, ...] = ()) -> Any:
    shapes = [(3, k), (1, k), (k,), (1, 1, k), (0, k), (*lead, 2, k), (*lead, 2, k)]
    shape = m.one([*shapes, (2, 3, k)] if lead in ((), (1,), (2,)) else shapes)
    return m.traced(m.dense(shape, x_dtype(m)))


def weight(m: Maker) -> Any:
    lead = m.one([(8,), (3,), (1,), (32,), (64,), (2, 4), (1, 3), (2, 3, 2)])
    return viewed(m, m.traced(m.packed(lead)))


def product(m: Maker) -> list[Any]:
    """x @ w for a weight behind any views."""
    w = weight(m)
    if w.ndim < 2 or m.n(0, 1) == 0:
        w = m.traced(m.packed(m.one([(8,), (1,), (32,), (2, 3)])))
        w = qg.swapaxes(w, -1, -2) if m.n(0, 2) else w
    x = activations(m, w.shape[-2], w.shape[:-2])
    how = m.n(0, 4)
    if how == 1 and w.ndim == 2 and x.ndim == 2:
        return [qg.einsum("mk,kn->mn", x, w)]
    if how == 2 and w.ndim == 2:
        return [qg.tensordot(x, w, 1)]
    if how == 3 and w.ndim == 2 and x._type.dtype.is_float:
        return [qg.inner(x, w.T)]
    return [x @ w]


def summed(m: Maker) -> list[Any]:
    """A product that is added to something, in one op; the weight on either side."""
    w = viewed(m, m.traced(m.packed(m.one([(8,), (3,), (64,)]))))
    if w.ndim != 2:
        w = m.traced(m.packed((8,)))
    w = qg.swapaxes(w, -1, -2) if m.n(0, 1) else w
    alpha, beta = m.one([(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)])
    if m.n(0, 1):
        x, columns = activations(m, w.shape[0]), w.shape[1]
        return [qg.addmm(m.traced(m.dense((columns,))), x, w, alpha=alpha, beta=beta)]
    x = m.traced(m.dense((w.shape[1], 3), x_dtype(m)))
    return [qg.addmm(m.traced(m.dense((3,))), w, x, alpha=alpha, beta=beta)]


def turned_view(m: Maker) -> list[Any]:
    """A view of a transposed weight: the transpose has to sink below it to reach the dot."""
    w = qg.swapaxes(m.traced(m.packed(m.one([(8,), (3,), (1,), (64,), (2, 4)]))), -1, -2)
    views = [*[sliced] * 3, joined, view_cast, view_cast, with_one, regrouped, other_joined, other_joined]
    w = m.one(views)(m, w)
    if 0 in w.shape or w.ndim < 2 or not m.n(0, 3):
        return [w]
    return [activations(m, w.shape[-2], w.shape[:-2]) @ w]


def left_product(m: Maker) -> list[Any]:
    """w @ x: the packed operand on the left."""
    w = weight(m)
    k = w.shape[-1]
    x = m.traced(m.dense(m.one([(k, 2), (k,), (k, 1), (*w.shape[:-2], k, 3), (1, k, 2)]), x_dtype(m)))
    if w.ndim == 2 and x.ndim == 2 and m.chance(4):
        return [qg.einsum("ok,kn->on", w, x)]
    return [w @ x]


def both_packed(m: Maker) -> list[Any]:
    """w @ v.T: one has to be unpacked."""
    w = m.traced(m.packed(m.one([(4,), (1,), (2, 3)])))
    v = (
        w
        if m.chance(4)
        else m.traced(m.packed((m.one([1, 3, 32]),), w.shape[-1], [w._type.packing.quantization]))
    )
    return [w @ qg.swapaxes(v, -1, -2)]


def taken(m: Maker) -> list[Any]:
    """Rows of a packed table, along every axis."""
    w = weight(m)
    axis = m.n(0, w.ndim - 1)
    if m.n(0, 1):
        axis = 0 if w._type.packing is None or w.ndim + w._type.packing.axis else w.ndim - 1
    dtype = m.one([I32, I32, U32])
    n = w.shape[axis]
    if n == 0:
        return []
    low = 0 if dtype is U32 else -n
    past = m.one([0, 0, 0, 2])  # some out of range
    ids = m.traced(m.dense(m.one([(3,), (), (1,), (2, 2), (0,)]), dtype, (low, n - 1 + past)))
    return [qg.take(w, ids, axis=axis)]


def experts(m: Maker) -> list[Any]:
    """gather_mm on packed experts, with the indices of either side, of both, of none."""
    e, n, k = m.one([2, 3, 1]), m.one([1, 4, 32]), 32 * m.one([1, 2])
    w = m.traced(m.packed((e, n), k, [s for s in SCHEMES if k % s.group_size == 0]))
    if m.n(0, 1):
        w = qg.swapaxes(w, -1, -2)
    elif m.n(0, 1):
        w = qg.transpose(w, m.one([(1, 0, 2), (2, 0, 1), (2, 1, 0), (1, 2, 0)]))
    how = m.one([0, 0, 1, 2, 2, 3, 3, 4])
    stack, c = w.shape[0], w.shape[1]
    lhs, rhs = how in (1, 3, 4), how in (2, 3)
    count = m.one([2, 1, 3])
    lead = m.one([2, 1]) if lhs else count if rhs else m.one([stack, 1])
    if lhs and not rhs:
        count = stack
    if m.chance(4):
        x = m.traced(m.packed((lead, 2), c)) if c % 32 == 0 else m.traced(m.dense((lead, 2, c)))
    else:
        x = m.traced(
            m.dense((lead, m.one([1, 2, 0]), c), m.one([m.float()] * 4 + ([] if m.narrow else [F64])))
        )
    past = m.one([0, 0, 0, 2])
    i = m.traced(m.dense((count,), U32, (0, lead - 1 + past))) if lhs else None
    j = m.traced(m.dense((count,), U32, (0, stack - 1 + past))) if rhs else None
    if m.chance(6):  # the packed stack on the left
        y = m.traced(m.dense((lead, w.shape[2], 2)))
        return [qg.gather_mm(w, y, j, i)]
    return [qg.gather_mm(x, w, i, j)]


def kernel_call(m: Maker) -> list[Any]:
    """A kernel that the user called, on views and with packed activations."""
    n, k = m.one([8, 32, 64, 3]), m.one([32, 64, 96])
    w = m.traced(m.packed((n,), k))
    if m.chance(3) and n % 2 == 0:
        w = w[: n // 2] if m.n(0, 1) else w[::2]
    transpose = bool(m.n(0, 1))
    c = w.shape[1] if transpose else w.shape[0]
    if m.chance(4) and c % 32 == 0:
        x = m.traced(m.packed((2,), c))
    else:
        dtype = m.float() if m.narrow else m.one([F32, F16, BF16, F64])
        x = m.traced(m.dense(m.one([(2, c), (c,), (0, c), (1, 2, c)]), dtype))
    if m.chance(3):
        return [qg.quantized_take(w, m.traced(m.dense((2,), I32, (0, w.shape[0] - 1))))]
    if m.chance(3):
        out, r = w.shape[0] if transpose else w.shape[1], m.one([1, 2])
        a, b = m.traced(m.dense((c, r))), m.traced(m.dense((r, out)))
        s = m.traced(m.dense(m.one([(), (1,)])))
        return [qg.quantized_lora_matmul(x, w, a, b, s, transpose=transpose)]
    return [qg.quantized_matmul(x, w, transpose=transpose)]


def unpacked(m: Maker) -> list[Any]:
    """Ops that have no kernel for packed operands, on packed operands."""
    w = weight(m)
    how = m.n(0, 6)
    if how == 0:
        return [w + m.traced(m.dense(m.one([(), w.shape, w.shape[-1:]]), m.float()))]
    if how == 1:
        return [qg.softmax(w, axis=-1)]
    if how == 2:
        return [qg.sum(w, axis=m.n(0, w.ndim - 1), keepdims=bool(m.n(0, 1))), w]
    if how == 3:
        return [qg.where(w > 0, w, 0.5)]
    if how == 4:
        return [qg.dequantize(w) if w._type.packing else w, qg.exp(w * 0.5)]
    if how == 5:
        return [apply(Contiguous(), w)]
    return [w * w]


def casts(m: Maker) -> list[Any]:
    """Casts of casts: some lose nothing, some do."""
    types = (
        [mx.float32, mx.int32, mx.int64]
        if m.narrow
        else [mx.float32, mx.float32, mx.float16, mx.bfloat16, mx.int32]
    )
    x = m.traced(m.dense(m.one([(3,), (2, 3), (1,), ()]), m.one([F32, m.float(), I32])))
    if m.n(0, 2) == 0:
        x = qg.minimum(qg.maximum(x, -8), 8)
    for _ in range(m.n(2, 3)):
        x = qg.astype(x, m.one(types))
        if x._type.dtype.is_int:
            break
    y = qg.astype(x, m.one(types))
    return [y, qg.astype(y, mx.float32)]


def ones(m: Maker) -> list[Any]:
    """Products with one and what only looks like it."""
    x = m.traced(m.dense(m.one([(3,), (2, 3), (1,), (), (0, 2)]), m.one([m.float(), I32])))
    how = m.one([0, 1, 2, 2, 2, 3, 4, 5, 5, 6])
    if how == 0:
        return [x * 1]
    if how == 1:
        return [1.0 * x]
    if how == 2:
        return [x / 1, 2 / (qg.abs(x) + 2)]
    if how == 3:
        return (
            [x * m.traced(m.constant(x._type.dtype, 1, 1, 1, shape=(1, 3)))]
            if x.shape[-1:] in ((3,), (1,), ())
            else [x * 2]
        )
    if how == 4:
        return [x * m.one([2.0, 0.0, -1])]
    if how == 5:
        return [1 / (qg.abs(x) + 1)]
    return [x * m.traced(m.constant(F32, 1)), x / 2]


def constants(m: Maker) -> list[Any]:
    """Subgraphs of constants, to be folded where they do not round and are small."""
    dtype = m.one([F32, m.float(), m.float(), I32])
    n = m.one([1, 2, 80]) if dtype is not I32 else m.one([1, 3])
    data = [m.one([0, 1, -3, 2, 5]) + (0.5 if dtype.is_float and m.n(0, 1) else 0) for _ in range(min(n, 3))]
    data = (data * 40)[:n]
    a = m.traced(m.constant(dtype, *data, shape=(n,) if n > 1 or m.n(0, 1) else ()))
    b = m.traced(m.constant(dtype, m.one([1, 2, 0, -1])))
    made = m.one(
        [
            lambda: a + b,
            lambda: a * b,
            lambda: qg.exp(a * b),
            lambda: a - b,
            lambda: qg.maximum(a, b),
            lambda: a < b,
        ]
    )()
    if m.chance(6):
        special = m.one([float("inf"), float("-inf"), float("nan"), -0.0, 1e-30])
        made = qg.astype(made, mx.float32) * m.traced(m.constant(F32, special))
    x = m.traced(m.dense((m.one([1, n]),), dtype if dtype.is_float else F32))
    return [x + qg.astype(made, x.dtype)] if m.n(0, 2) else [made]


def reshapes(m: Maker) -> list[Any]:
    """Chains of reshapes and transposes, of dense and of packed values."""
    how = m.n(0, 3)
    if how == 0:  # the first reshape cuts groups, the second must not be merged with it
        w = m.traced(m.packed((m.one([2, 1]),), 64))
        return [
            qg.reshape(qg.reshape(w, m.one([(-1,), (-1, 16), (8, -1)])), m.one([(1, -1), (4, -1), (-1, 2)]))
        ]
    if how == 2:  # of equal sizes, so that an order of axes shows in the numbers alone
        x = m.traced(m.dense(m.one([(2, 2, 2), (3, 3, 3), (2, 3, 3)])))
        for _ in range(m.n(2, 3)):
            x = qg.transpose(x, m.draw(_permutations(3)))
        return [x]
    if how == 1:
        x = weight(m)
        for _ in range(m.n(1, 2)):
            shape = m.one([(-1,), (1, *x.shape), (*x.shape, 1), (-1, x.shape[-1]), (x.shape[0], -1)])
            x = qg.reshape(x, shape) if 0 not in x.shape else x
        return [x]
    x = m.traced(m.dense(m.one([(2, 3), (2, 1, 3), (4,), (1, 1), (2, 3, 4), (2, 2, 2), (3, 3, 3), (0, 3)])))
    start = x.shape
    for _ in range(m.n(1, 3)):
        if m.n(0, 1) and x.ndim > 1:
            x = qg.transpose(x, m.draw(_permutations(x.ndim)))
        else:
            x = qg.reshape(x, m.one([(x.size,), (1, *x.shape), start, (x.size, 1), x.shape[::-1]]))
    return [x]


def _permutations(n: int) -> Any:
    from hypothesis import strategies as st

    return st.permutations(range(n))


def tied(m: Maker) -> list[Any]:
    """An embedding and a head that share their words."""
    w = m.traced(m.packed((m.one([4, 8]),)))
    h = qg.take(w, m.traced(m.dense((2,), I32, (0, w.shape[0] - 1))), axis=0)
    return [h @ w.T]


def doubled(m: Maker) -> list[Any]:
    """A value that is used twice by one op."""
    v = m.traced(m.dense(m.one([(2, 3), (1,), (3, 3)])))
    return [m.one([lambda: v + v, lambda: v * v, lambda: qg.concatenate([v, v], 0), lambda: v - v])()]


MOTIFS = [
    *[product] * 4,
    *[left_product] * 3,
    *[summed] * 5,
    *[turned_view] * 8,
    *[both_packed] * 2,
    *[taken] * 3,
    *[experts] * 6,
    *[kernel_call] * 2,
    *[unpacked] * 4,
    *[lora] * 20,
    stacked,
    *[casts] * 4,
    *[ones] * 4,
    *[constants] * 3,
    *[reshapes] * 8,
    tied,
    doubled,
    *FAST,
]
