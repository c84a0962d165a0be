"""The part of the table on ops that captured code brings: convolutions, transforms, views of bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from qgraph.ir.dtypes import BF16, F16, F32, I8, I16, I32, I64, U8, U16, U32
from qgraph.ir.op import Op
from qgraph.ops.dispatch import type_of
from tests.ops.cases import FLOATS, SCHEMES, Case, arrays, broadcasting, data, packed, seeds, shapes
from tests.ops.table_shapes import entry

VIEWED = (F32, F16, BF16, I8, I16, I32, I64, U8, U16, U32)


def complex_numbers(seed, shape):
    parts = [data(seed + i, shape, F32) for i in range(2)]
    return parts[0].astype(mx.complex64) + parts[1] * 1j


@entry("addmm")
def addmm(draw, kind):
    a, b = draw(broadcasting(2, draw(shapes(0, 2))))
    m, k, n = (draw(st.sampled_from([1, 2, 3, 8, 17, 33, 0])) for _ in range(3))
    left, right = (*a, m, k), (*b, k, n)
    left = left[-1:] if not a and draw(st.booleans()) else left
    right = right[:1] if not b and draw(st.booleans()) else right
    out = Op.registry["dot"]().infer(*(type_of(mx.zeros(s)) for s in (left, right))).shape
    (summand,) = draw(broadcasting(1, out))
    operands = [data(draw(seeds), s, draw(st.sampled_from(FLOATS))) for s in (summand, left, right)]
    alpha, beta = draw(st.sampled_from([(1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.5, 2.0)]))
    magnitude = np.max(np.abs(np.array(operands[0].astype(mx.float32))), initial=1.0) * beta + 16.0 * k
    return Case(kind(alpha, beta), operands, "sum", max(1, k), magnitude)


@entry("conv_general")
def convolution(draw, kind):
    axes = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2)) if axes < 3 else 1
    channels, out = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    each = {n: draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes)) for n in ("s", "kd", "id")}
    low, high = (draw(st.lists(st.integers(0, 2), min_size=axes, max_size=axes)) for _ in range(2))
    kernel = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    size = [(k - 1) * d + 1 + draw(st.integers(2, 4)) for k, d in zip(kernel, each["kd"], strict=True)]
    x = data(draw(seeds), (draw(st.integers(1, 2)), *size, channels * groups), draw(st.sampled_from(FLOATS)))
    w = data(draw(seeds), (out * groups, *kernel, channels), draw(st.sampled_from(FLOATS)))
    lists = (each["s"], low, high, each["kd"], each["id"])
    op = kind(*map(tuple, lists), groups, draw(st.booleans()))
    return Case(op, [x, w], "sum", channels * int(np.prod(kernel)))


@entry("hadamard_transform")
def hadamard(draw, kind):
    n = draw(st.sampled_from([1, 2, 8, 12, 24, 20, 28]))
    x = data(draw(seeds), (*draw(shapes(0, 2)), n), draw(st.sampled_from((*FLOATS, I32))))
    return Case(kind(draw(st.sampled_from([1.0, 0.25]))), [x], "sum", n, 9.0 * n)


@entry("fft")
def fft(draw, kind):
    shape = draw(shapes(1, 3, empty=False))
    axes = tuple(draw(st.permutations(range(len(shape))))[: draw(st.integers(1, len(shape)))])
    inverse, real = draw(st.booleans()), draw(st.booleans())
    size = 0
    if real and inverse:
        size = 2 * (shape[axes[-1]] - 1) + draw(st.integers(0 if shape[axes[-1]] > 1 else 1, 1))
    make = (lambda: data(draw(seeds), shape, F32)) if real and not inverse else None
    x = make() if make else complex_numbers(draw(st.integers(0, 2**31)), shape)
    return Case(
        kind(axes, inverse, real, size), [x], "sum", max(2, int(np.prod(shape))), 9.0 * np.prod(shape)
    )


@entry("real", "imag", "conjugate")
def part(draw, kind):
    shape = draw(shapes(0))
    if draw(st.booleans()):
        return Case(kind(), [complex_numbers(draw(st.integers(0, 2**31)), shape)])
    return Case(kind(), [draw(arrays(shape, (*FLOATS, I32)))])


@entry("inverse", "cholesky")
def solved(draw, kind):
    n, batch = draw(st.integers(1, 4)), draw(shapes(0, 1, empty=False))
    a = data(draw(seeds), (*batch, n, n), F32, low=-1, high=1) + 4 * mx.eye(n)  # far from singular
    if kind.name == "cholesky":
        return Case(kind(draw(st.booleans())), [a @ mx.swapaxes(a, -1, -2)], "sum", n, 64.0)
    triangular = draw(st.booleans())
    return Case(kind(triangular, triangular and draw(st.booleans())), [a], "sum", n, 16.0)


@entry("qr", "svd", "eigh", "eig")
def decomposed(draw, kind):
    n, batch = draw(st.integers(1, 4)), draw(shapes(0, 1, empty=False))
    m = n if kind.square else draw(st.integers(1, 4))
    a = data(draw(seeds), (*batch, m, n), F32)
    vectors = draw(st.booleans())
    extra = {"qr": (), "eigh": (draw(st.sampled_from("LU")), vectors)}.get(kind.name, (vectors,))
    # The signs of vectors are free, and so is the order of the eigenvalues of `eig`: see test_linalg.
    exact = kind.name in ("svd", "eigh") and not vectors
    return Case(kind(*extra), [a], "sum" if exact else "type", 4, 64.0)


@entry("erfinv")
def erfinv(draw, kind):
    return Case(kind(), [draw(arrays(draw(shapes(0)), FLOATS, low=-0.95, high=0.95))], "near")


@entry("searchsorted")
def searchsorted(draw, kind):
    dtype = draw(st.sampled_from((*FLOATS, I32)))
    a = mx.sort(data(draw(seeds), (draw(st.integers(0, 9)),), dtype, grid=True))
    return Case(kind(draw(st.booleans())), [a, draw(arrays(draw(shapes(0, 3)), (dtype,), grid=True))])


@entry("view")
def view(draw, kind):
    source, dtype = draw(st.sampled_from(VIEWED)), draw(st.sampled_from((I8, I16, I32, U8, U16, U32)))
    if dtype is source:
        dtype = F32
    x = data(draw(seeds), (*draw(shapes(0, 3)), 8), source)
    return Case(kind(dtype, source), [x], "exact")


@entry("as_strided")
def as_strided(draw, kind):
    x = draw(arrays(draw(shapes(empty=False)), (F32, I32)))
    shape, strides, left = [], [], x.size - 1
    for _ in range(draw(st.integers(0, 3))):
        shape.append(draw(st.integers(1, 3)))
        limit = left // max(1, shape[-1] - 1)
        strides.append(draw(st.integers(-limit, limit)))
        left -= abs(strides[-1]) * (shape[-1] - 1)
    back = sum(-min(0, by) * (n - 1) for n, by in zip(shape, strides, strict=True))
    op = kind(tuple(shape), tuple(strides), back + draw(st.integers(0, left)))
    return Case(op, [x.T if draw(st.booleans()) else x])


@entry("random_bits")
def random_bits(draw, kind):
    keys = mx.random.split(mx.random.key(draw(st.integers(0, 99))), draw(st.integers(1, 3)))
    n = draw(st.integers(0, 5))
    return Case(kind((keys.shape[0], n) if draw(st.booleans()) else (n * keys.shape[0],)), [keys])


@entry("pack")
def pack(draw, kind):
    w = draw(packed(schemes=tuple(q for q in SCHEMES if q.bits != 8 or q.has_biases)))
    dtype = type_of(w).dtype
    return Case(kind(w.quantization, dtype), list(w.components()), "sum", 1, 4.0)


@entry("quantize_parts")
def quantize_parts(draw, kind):
    w = draw(packed())
    return Case(kind(w.quantization), [data(draw(seeds), (2, *w.shape), F32)], "parts")


@entry("to_fp8")
def to_fp8(draw, kind):
    limit = draw(st.sampled_from([0.02, 4.0, 600.0]))  # below the smallest normal one, in between, too large
    return Case(kind(), [draw(arrays(None, FLOATS, low=-limit, high=limit))], "exact")


@entry("from_fp8")
def from_fp8(draw, kind):
    return Case(kind(draw(st.sampled_from(FLOATS))), [draw(arrays(None, (U8,), low=0, high=256))], "exact")
