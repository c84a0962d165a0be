"""The cases of products of matrices, dense and packed, and of convolutions."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from qgraph.ir.dtypes import BOOL, F32, I32, U32
from tests.capture.primitives.cases import case, drawn
from tests.capture.primitives.replay import Case
from tests.ops.cases import FLOATS, broadcasting, data, seeds, shapes


@case("Matmul")
def matmul(draw, name):
    a, b = draw(broadcasting(2, draw(shapes(0, 2))))
    m, k, n = (draw(st.sampled_from([1, 2, 3, 8, 17, 0])) for _ in range(3))
    left, right = (*a, m, k), (*b, k, n)
    left = left[-1:] if not a and draw(st.booleans()) else left
    right = right[:1] if not b and draw(st.booleans()) else right
    dtype = draw(st.sampled_from(FLOATS))
    x, y = drawn(draw, left, (dtype,)), drawn(draw, right, (dtype, F32))
    if len(right) > 1 and draw(st.booleans()):
        return Case(
            lambda x, w: x @ mx.swapaxes(w, -1, -2), [x, mx.swapaxes(y, -1, -2)], k=k, magnitude=9.0 * k
        )
    return Case(mx.matmul, [x, y], k=max(1, k), magnitude=9.0 * k)


@case("AddMM")
def addmm(draw, name):
    batch = draw(shapes(0, 2))
    m, k, n = (draw(st.sampled_from([1, 2, 3, 8, 17])) for _ in range(3))
    dtype = draw(st.sampled_from(FLOATS))
    x, w = drawn(draw, (*batch, m, k), (dtype,)), drawn(draw, (n, k), (dtype, F32))
    c = drawn(draw, draw(st.sampled_from([(n,), (1, n), (m, n), (*batch, m, n), ()])), (dtype,))
    alpha, beta = draw(st.sampled_from([(1.0, 1.0), (0.5, 2.0)]))
    return Case(lambda c, x, w: mx.addmm(c, x, w.T, alpha, beta), [c, x, w], k=k, magnitude=9.0 * k)


def experts(draw):
    """A stack of matrices, rows for them, and which meet."""
    e, m, k, n = (draw(st.integers(1, 3)) for _ in range(4))
    tokens = draw(shapes(1, 2, empty=False))
    chosen = (*tokens, draw(st.integers(1, 2)))
    index = data(draw(seeds), chosen, U32, low=0, high=e)
    return e, m, k, n, tokens, index


@case("GatherMM")
def gather_mm(draw, name):
    e, m, k, n, tokens, index = experts(draw)
    x = drawn(draw, (*tokens, 1, m, k), (F32,))
    w = drawn(draw, (e, n, k), (F32,))
    if draw(st.booleans()):
        return Case(
            lambda x, w, i: mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=i),
            [x, w, index],
            k=k,
            magnitude=9.0,
        )
    size = int(np.prod(tokens))
    rows = data(draw(seeds), index.shape, I32, low=0, high=size)
    flat = x.reshape(size, m, k)
    return Case(
        lambda x, w, i, j: mx.gather_mm(x, w.swapaxes(-1, -2), j, i),
        [flat, w, index, rows],
        k=k,
        magnitude=9.0,
    )


def scheme(draw):
    mode = draw(st.sampled_from(["affine", "affine", "mxfp4", "mxfp8", "nvfp4"]))
    if mode != "affine":
        return {"mode": mode}, {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}[mode]
    group = draw(st.sampled_from([32, 64]))
    return {"group_size": group, "bits": draw(st.sampled_from([2, 3, 4, 5, 6, 8]))}, group


@case("QuantizedMatmul")
def quantized_matmul(draw, name):
    how, group = scheme(draw)
    transpose = draw(st.booleans())
    k, n = 64, draw(st.sampled_from([8, 64])) if transpose else 64
    stack = draw(st.sampled_from([(), (), (2,)]))
    parts = mx.quantize(drawn(draw, (*stack, n, k), (F32,)), **how)
    x = drawn(draw, (*stack, draw(st.integers(1, 3)), k), (F32,))
    if not stack:
        x = drawn(draw, (*draw(shapes(0, 2, empty=False)), k), (F32,))
    return Case(
        lambda x, *parts: mx.quantized_matmul(x, *parts, transpose=transpose, **how),
        [x, *parts],
        k=k,
        magnitude=9.0 * k,
        notes={"how": how},
    )


@case("GatherQMM")
def gather_qmm(draw, name):
    how, group = scheme(draw)
    e, m, _, _, tokens, index = experts(draw)
    parts = mx.quantize(drawn(draw, (e, 32, 64), (F32,)), **how)
    x = drawn(draw, (*tokens, 1, m, 64), (F32,))
    if draw(st.booleans()):
        x, index = x.reshape(-1, m, 64), mx.sort(index[..., 0].reshape(-1))
        function = lambda x, i, *w: mx.gather_qmm(x, *w, rhs_indices=i, sorted_indices=True, **how)  # noqa: E731
    else:
        function = lambda x, i, *w: mx.gather_qmm(x, *w, rhs_indices=i, **how)  # noqa: E731
    return Case(function, [x, index, *parts], k=64, magnitude=9.0 * 64, notes={"how": how})


@case("Quantize")
def quantize(draw, name):
    bits, group = draw(st.sampled_from([2, 3, 4, 5, 6, 8])), draw(st.sampled_from([32, 64]))
    w = drawn(draw, (draw(st.integers(1, 3)), 64), (F32,))
    how = {"group_size": group, "bits": bits}
    if draw(st.booleans()):
        return Case(lambda w: mx.quantize(w, **how), [w], notes=how)
    x = drawn(draw, (2, 64), (F32,))  # what was just quantized is one value again
    return Case(
        lambda x, w: mx.quantized_matmul(x, *mx.quantize(w, **how), **how), [x, w], k=64, magnitude=576.0
    )


@case("BlockMaskedMM")
def block_masked(draw, name):
    m, k, n = (draw(st.sampled_from([5, 32, 40])) for _ in range(3))
    count = [-(-s // 32) for s in (m, k, n)]
    dtypes = draw(st.sampled_from([(BOOL,), (F32,)]))
    out, lhs, rhs = (
        drawn(draw, s, dtypes) for s in ((count[0], count[2]), (count[0], count[1]), (count[1], count[2]))
    )
    a, b = drawn(draw, (m, k), (F32,)), drawn(draw, (k, n), (F32,))
    which = draw(st.sampled_from(["out", "sides", "all"]))
    given = {"out": [out], "sides": [lhs, rhs], "all": [out, lhs, rhs]}[which]

    def function(a, b, *masks):
        masks = {1: (*masks, None, None), 2: (None, *masks), 3: masks}[len(masks)]
        return mx.block_masked_mm(a, b, 32, *masks)

    return Case(function, [a, b, *given], k=k, magnitude=81.0 * k)


@case("Convolution")
def convolution(draw, name):
    axes = draw(st.integers(1, 2))
    groups, channels, out = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    stride, pad, dilation = (draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.integers(1, 2)))
    dtype = draw(st.sampled_from(FLOATS))
    x = drawn(draw, (draw(st.integers(1, 2)), *(6,) * axes, channels * groups), (dtype,))
    w = drawn(draw, (out * groups, *(2,) * axes, channels), (dtype,))
    kind = draw(st.sampled_from(["conv", "conv_transpose"]))
    function = getattr(mx, f"{kind}{axes}d")
    extra = (0,) if kind == "conv_transpose" else ()
    k = channels * 2**axes
    return Case(
        lambda x, w: function(x, w, stride, pad, dilation, *extra, groups), [x, w], k=k, magnitude=9.0 * k
    )
