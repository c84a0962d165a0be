"""Beyond the lists: chains of views of a packed weight, then a contraction, against NumPy on its numbers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

import qgraph as qg
from qgraph.execute.reference import to_numpy
from tests.agree import assert_close, normal
from tests.conformance.oracle import SCHEMES, of

SHORT = [s for s in SCHEMES if s[2] <= 64]
LARGEST = 20_000


def at(axis, ndim, index):
    """A subscript that says something about one axis."""
    return tuple(index if i == axis else slice(None) for i in range(ndim))


@st.composite
def views(draw, shape):
    """A view as a function of (namespace, array): NumPy's and qgraph's names are the same."""
    ndim = len(shape)
    axis = draw(st.integers(0, ndim - 1))
    size = shape[axis]
    kind = draw(st.sampled_from(KINDS))
    if kind == "permute":
        axes = draw(st.permutations(range(ndim)))
        return lambda ns, a: ns.transpose(a, axes)
    if kind == "reshape":
        sizes = draw(factors(int(np.prod(shape))))
        return lambda ns, a: ns.reshape(a, sizes)
    if kind == "slice":
        unit = draw(st.sampled_from([1, 16, 32]))
        start = draw(st.integers(0, (size - 1) // unit)) * unit
        index = slice(start, start + unit * draw(st.integers(1, 3)))
        return lambda ns, a: a[at(axis, ndim, index)]
    if kind == "step":
        step = draw(st.sampled_from([-1, 2, 3, -2]))
        return lambda ns, a: a[at(axis, ndim, slice(None, None, step))]
    if kind == "pick":
        i = draw(st.integers(-size, size - 1))
        return lambda ns, a: a[at(axis, ndim, i)]
    if kind == "take":
        ids = np.array(draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=3)))
        return lambda ns, a: ns.take(a, ids if ns is np else mx.array(ids), axis)
    if kind == "roll":
        shift = draw(st.sampled_from([1, 32, -3]))
        return lambda ns, a: ns.roll(a, shift, axis)
    return {
        "T": lambda ns, a: a.T,
        "join": lambda ns, a: ns.concatenate([a, a], axis),
        "stack": lambda ns, a: ns.stack([a, a], axis),
        "new axis": lambda ns, a: ns.expand_dims(a, axis),
        "squeeze": lambda ns, a: ns.squeeze(a),
        "repeat": lambda ns, a: ns.repeat(a, 2, axis),
        "tile": lambda ns, a: ns.tile(a, [2] + [1] * (ndim - 1)),
        "broadcast": lambda ns, a: ns.broadcast_to(a, (2, *shape)),
        "flip": lambda ns, a: ns.flip(a, axis),
    }[kind]


KINDS = ("permute", "reshape", "slice", "step", "pick", "take", "roll")
KINDS += ("T", "join", "stack", "new axis", "squeeze", "repeat", "tile", "broadcast", "flip")


@st.composite
def factors(draw, size):
    """A shape of `size` elements."""
    out = []
    for _ in range(draw(st.integers(0, 3))):
        out.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= out[-1]
    return draw(st.permutations([*out, size]))


@st.composite
def contractions(draw, shape):
    """A contraction of x with a weight of `shape`: x's shape, a function of (ns, x, w), the sums' length."""
    kind = draw(st.sampled_from(["right", "left", "tensordot", "einsum", "inner"]))
    ndim, rows = len(shape), draw(st.integers(1, 4))
    lead = list(shape[:-2]) if draw(st.booleans()) else []
    if kind in ("right", "left"):
        k = shape[-2:][0] if kind == "right" else shape[-1]
        matrix = [*lead, rows, k] if kind == "right" else [*lead, k, rows]
        x = draw(st.sampled_from([[k], matrix[-2:], matrix]))
        return x, (lambda ns, x, w: ns.matmul(x, w) if kind == "right" else ns.matmul(w, x)), k
    if kind == "inner":
        return [rows, shape[-1]], lambda ns, x, w: ns.inner(x, w), shape[-1]
    axes = draw(st.permutations(range(ndim)))[: draw(st.integers(0, min(2, ndim)))]
    sizes = [shape[a] for a in axes]
    order = draw(st.permutations(range(len(axes) + 1)))
    x, k = [[*sizes, rows][i] for i in order], int(np.prod(sizes))
    if kind == "tensordot":
        mine, theirs = [order.index(i) for i in range(len(axes))], [a - ndim for a in axes]
        if draw(st.booleans()):
            return x, lambda ns, x, w: ns.tensordot(w, x, (theirs, mine)), k
        return x, lambda ns, x, w: ns.tensordot(x, w, (mine, theirs)), k
    of_w = "abcdefgh"[:ndim]
    of_x = "".join([*(of_w[a] for a in axes), "z"][i] for i in order)
    out = "".join(draw(st.permutations([c for c in [*of_w, "z"] if draw(st.booleans())])))
    known = dict(zip([*of_w, *of_x], [*shape, *x], strict=True))
    k = int(np.prod([known[c] for c in known if c not in out]))
    return x, lambda ns, x, w: ns.einsum(f"{of_x},{of_w}->{out}", x, w), k


@given(st.data(), st.sampled_from(SHORT))
def test_views_then_a_contraction(data, scheme):
    lead = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    w = of(scheme, *lead, scheme[2] * data.draw(st.integers(1, 3)))
    dense, chain = to_numpy(w), []
    for _ in range(data.draw(st.integers(0, 3))):
        view = data.draw(views(dense.shape))
        dense = view(np, dense)
        assume(0 < dense.size <= LARGEST and 0 < dense.ndim < 7)
        chain.append(view)
    shape, contract, k = data.draw(contractions(dense.shape))
    x = normal(*shape)

    def program(x, w):
        for view in chain:
            w = view(qg, w)
        return contract(qg, x, w)

    exact = contract(np, to_numpy(x), dense)
    assume(exact.size <= LARGEST)
    # No code of a group stands for more than three times its largest number, of either sign.
    sizes = np.full(dense.shape, 3 * np.abs(to_numpy(w)).max())
    magnitude = contract(np, np.abs(to_numpy(x)), sizes)
    for run in (qg.jit(program), program, qg.jit(program).eager):
        assert_close(run(x, w), exact, k=k, path="P2", magnitude=magnitude, about=(w, shape))
