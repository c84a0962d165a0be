"""Exact products with packed weights, and packed rows as numbers, against float64 on bits read apart."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qgraph.ir.dtypes import BF16, F16, F32
from qgraph.numeric import tolerance

DTYPES = {mx.float32: F32, mx.bfloat16: BF16, mx.float16: F16}
GLOBAL = 1.75 * 2688  # nvfp4's scale of the whole matrix is divided by 448 * 6


@dataclass(frozen=True)
class Format:
    """How numbers are packed."""

    mode: str
    bits: int
    group: int

    def __str__(self):
        return f"{self.mode}-{self.bits}-g{self.group}"

    @property
    def keywords(self):
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


AFFINE = [Format("affine", bits, group) for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMATS = [*AFFINE, Format("mxfp4", 4, 32), Format("mxfp8", 8, 32), Format("nvfp4", 4, 16)]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e4m3(codes):
    """The numbers of bytes of sign, four bits of exponent and three of mantissa."""
    codes = codes.astype(np.int64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(mantissa / 1.0, -9))
    return np.where(codes & 127 == 127, np.nan, np.where(codes & 128, -size, size))


class Weights:
    """A random packed matrix (or a stack): its arrays for MLX, its numbers and their sizes in float64."""

    def __init__(self, form, shape, dtype, seed, nan=False):
        rng = np.random.default_rng(seed)
        *_, columns = shape
        self.form, self.dtype = form, dtype
        raw = rng.integers(0, 256, (*shape[:-1], columns * form.bits // 8), dtype=np.uint8)
        if form.mode == "mxfp8" and not nan:
            raw = np.where(raw & 127 == 127, raw ^ 1, raw)
        bits = np.unpackbits(raw, axis=-1, bitorder="little").reshape(*shape, form.bits)
        codes = bits.astype(np.int64) @ (1 << np.arange(form.bits))
        groups = (*shape[:-1], columns // form.group)
        self.packed = mx.array(np.ascontiguousarray(raw).view(np.uint32))
        self.biases = self.scale = None
        if form.mode == "affine":
            self.scales = mx.array(rng.normal(size=groups)).astype(dtype)
            self.biases = mx.array(rng.normal(size=groups)).astype(dtype)
            scales, biases = (self._spread(as_float(part)) for part in (self.scales, self.biases))
            self.numbers = scales * codes + biases
            self.sizes = abs(scales) * codes + abs(biases)
            return
        if form.mode == "nvfp4":
            bytes_ = rng.integers(0, 100, groups).astype(np.uint8)
            self.scale = mx.array(GLOBAL, mx.float32)
            scales = e4m3(bytes_) * 1.75
        else:
            bytes_ = rng.integers(120, 132, groups).astype(np.uint8)
            scales = np.ldexp(1.0, bytes_.astype(np.int64) - 127)
        self.scales = mx.array(bytes_)
        values = e4m3(codes) if form.bits == 8 else np.where(codes & 8, -1, 1) * E2M1[codes & 7]
        self.numbers = self._spread(scales) * values
        self.sizes = abs(self.numbers)

    def _spread(self, per_group):
        return np.repeat(per_group, self.form.group, axis=-1)

    @property
    def parts(self):
        return self.packed, self.scales, self.biases, self.scale


def as_float(a):
    return np.array(a.astype(mx.float32), np.float64)


def product(native, x, w, transpose):
    return native.quantized_matmul(x, *w.parts, transpose=transpose, **w.form.keywords)


def check(found, x, w, transpose, about=None):
    """`found` is x @ w.T (x @ w), within what float32 sums and one rounding allow."""
    turned = (lambda a: np.swapaxes(a, -1, -2)) if transpose else lambda a: a
    x64 = as_float(x)
    exact, magnitude = x64 @ turned(w.numbers), abs(x64) @ turned(w.sizes)
    problem = tolerance(DTYPES[found.dtype], x.shape[-1], "P2").problem(as_float(found), exact, magnitude)
    assert not problem, (problem, about)


def same_bits(a, b):
    unsigned = mx.uint32 if a.dtype == mx.float32 else mx.uint16
    return bool(mx.all(a.view(unsigned) == b.view(unsigned)))


def laid_out(x, layout):
    """The same numbers as x, elsewhere in memory."""
    if layout == "wide":  # rows of a wider matrix
        return mx.concatenate([x, x], axis=-1)[..., : x.shape[-1]]
    if layout == "shifted":
        return mx.concatenate([x[..., :1], x], axis=-1)[..., 1:]
    if layout == "turned" and x.ndim > 1:
        return mx.contiguous(mx.swapaxes(x, -1, -2)).swapaxes(-1, -2)
    return x


@st.composite
def products(draw):
    form = draw(st.sampled_from(FORMATS))
    transpose = draw(st.booleans())
    packed = form.group * draw(st.integers(1, max(1, 640 // form.group)))
    plain = draw(st.integers(1, 70))
    k, n = (packed, plain) if transpose else (plain, packed)
    lead = draw(
        st.sampled_from([(), (1,), (2,), (3,), (4,), (5,), (6,), (7,), (9,), (23,), (2, 3), (2, 1, 5)])
    )
    dtype = draw(st.sampled_from(list(DTYPES)))
    layout = draw(st.sampled_from(["plain", "wide", "shifted", "turned"]))
    return form, transpose, k, n, lead, dtype, layout, draw(st.integers(0, 2**16))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(products())
def test_products(restored, case):
    form, transpose, k, n, lead, dtype, layout, seed = case
    w = Weights(form, (n, k) if transpose else (k, n), dtype, seed)
    x = laid_out(mx.random.normal((*lead, k), key=mx.random.key(seed)).astype(dtype), layout)
    for name in restored.instruction_sets():
        restored.use(name)
        restored.set_threads(1)
        alone = product(restored, x, w, transpose)
        mx.eval(alone)
        restored.set_threads(2)
        shared = product(restored, x, w, transpose)
        mx.eval(shared)
        assert alone.dtype == dtype
        assert alone.shape == (*lead, n)
        assert same_bits(alone, shared), (name, case)
        check(alone, x, w, transpose, (name, case))


@pytest.mark.parametrize("transpose", [True, False], ids=["turned", "plain"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 128), (257, 65, 1152), (300, 192, 64), (4, 1537, 256), (40, 7, 128)]
)
def test_sizes_about_the_blocks(restored, m, n, k, transpose):
    form = Format("affine", 4, 64)
    k, n = (k, n) if transpose else (k + 1, -(-n // 64) * 64)
    w = Weights(form, (n, k) if transpose else (k, n), mx.float32, m)
    x = mx.random.normal((m, k), key=mx.random.key(n))
    for name in restored.instruction_sets():
        restored.use(name)
        for threads in (1, 2):
            restored.set_threads(threads)
            check(product(restored, x, w, transpose), x, w, transpose, (name, threads))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_one_hot_rows_give_the_weights(restored, form):
    """No number of a row comes out at another place, or wrong by more than its own rounding."""
    k, n = 2 * form.group + (0 if form.group > 64 else 5 * form.group), 33
    w = Weights(form, (n, k), mx.float32, 1)
    limit = tolerance(F32)
    for name in restored.instruction_sets():
        restored.use(name)
        for rows in (1, 2, 3, 5, 8):  # the kernels of few rows and of many
            x = mx.eye(k)
            parts = [product(restored, x[i : i + rows], w, True) for i in range(0, k, rows)]
            problem = limit.problem(as_float(mx.concatenate(parts)), w.numbers.T, w.sizes.T)
            assert not problem, (problem, name, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_rows_as_numbers(restored, form, dtype):
    w = Weights(form, (11, 3 * form.group), mx.bfloat16, 3)
    chosen = [3, 10, 0, 0, 7]
    for name in restored.instruction_sets():
        restored.use(name)
        all_rows = restored.dequantize(*w.parts, dtype=dtype, **form.keywords)
        some = restored.quantized_take(*w.parts, mx.array(chosen), dtype=dtype, **form.keywords)
        problem = tolerance(DTYPES[dtype]).problem(as_float(all_rows), w.numbers, w.sizes)
        assert not problem, (problem, name)
        assert same_bits(some, all_rows[mx.array(chosen)])


def test_rows_are_counted_from_the_end_too_and_those_out_of_range_are_nan(native):
    form = Format("affine", 4, 64)
    w = Weights(form, (11, 64), mx.float32, 3)
    whole = native.dequantize(*w.parts, dtype=mx.float32, **form.keywords)
    huge = mx.array(np.array([2**64 - 1, 2**63, 11], np.uint64))
    for indices, rows in (
        (mx.array([-1, -11, 4]), [10, 0, 4]),
        (mx.array([-12, 11, 2**31 - 1]), None),
        (huge, None),
    ):
        found = native.quantized_take(*w.parts, indices, dtype=mx.float32, **form.keywords)
        if rows:
            assert same_bits(found, whole[mx.array(rows)])
        else:
            assert mx.all(mx.isnan(found))


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_every_code_of_e4m3(restored, rows):
    """The two NaNs among the codes stay NaNs, in every way to read them."""
    form = Format("mxfp8", 8, 32)
    packed = mx.array(np.arange(256, dtype=np.uint8).reshape(8, 32).view(np.uint32))
    scales = mx.full((8, 1), 127, mx.uint8)
    exact = e4m3(np.arange(256)).reshape(8, 32)
    x = mx.eye(32)
    for name in restored.instruction_sets():
        restored.use(name)
        dense = restored.dequantize(packed, scales, None, None, dtype=mx.float32, **form.keywords)
        np.testing.assert_array_equal(np.array(dense), exact)
        for transpose, expected in ((True, x @ mx.array(exact.T)), (False, None)):
            if transpose:
                found = [
                    restored.quantized_matmul(
                        x[i : i + rows], packed, scales, None, None, transpose=True, **form.keywords
                    )
                    for i in range(0, 32, rows)
                ]
                np.testing.assert_array_equal(np.array(mx.concatenate(found)), np.array(expected))
            else:
                one = mx.eye(8)
                found = restored.quantized_matmul(
                    one, packed, scales, None, None, transpose=False, **form.keywords
                )
                np.testing.assert_array_equal(
                    np.isnan(np.array(found)), np.isnan(np.array(one @ mx.array(exact)))
                )


@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(restored, dtype, m):
    form = Format("affine", 4, 64)
    w = Weights(form, (20, 128), dtype, 5)
    x = np.random.default_rng(m).normal(size=(m, 128))
    bad = x.copy()
    bad[0, 17], bad[-1, 100] = np.nan, np.nan
    inf = x.copy()
    inf[0, 17] = np.inf
    for name in restored.instruction_sets():
        restored.use(name)
        found = as_float(product(restored, mx.array(bad).astype(dtype), w, True))
        assert np.isnan(found[[0, -1]]).all(), name
        assert np.isfinite(found[1:-1]).all(), name
        found = as_float(product(restored, mx.array(inf).astype(dtype), w, True))
        np.testing.assert_array_equal(found[0], np.where(w.numbers[:, 17] < 0, -np.inf, np.inf))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(FORMATS),
    transpose=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    rows=st.integers(1, 7),
    picks=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_gathered_products(restored, form, transpose, dtype, rows, picks, seed):
    """Rows of x that use one matrix lie apart, and so do those of y."""
    rng = np.random.default_rng(seed)
    n, k = (13, 2 * form.group) if transpose else (2 * form.group, 13)
    w = Weights(form, (3, n, k) if transpose else (3, k, n), dtype, seed)
    x = mx.random.normal((4, rows, k), key=mx.random.key(seed)).astype(dtype)
    lhs, rhs = rng.integers(0, 4, picks), rng.integers(0, 3, picks)
    chosen = Weights.__new__(Weights)
    chosen.numbers, chosen.sizes = w.numbers[rhs], w.sizes[rhs]
    for name in restored.instruction_sets():
        restored.use(name)
        found = restored.gather_qmm(
            x,
            *w.parts,
            mx.array(lhs),
            mx.array(rhs),
            transpose=transpose,
            sorted_indices=False,
            **form.keywords,
        )
        check(found, x[mx.array(lhs)], chosen, transpose, name)


def test_stacks(restored):
    form = Format("affine", 6, 32)
    w = Weights(form, (3, 1, 10, 64), mx.float32, 4)
    x = mx.random.normal((3, 2, 5, 64), key=mx.random.key(0))
    for name in restored.instruction_sets():
        restored.use(name)
        check(product(restored, x, w, True), x, w, True, name)


@pytest.mark.parametrize("transpose", [True, False], ids=["turned", "plain"])
def test_gradient_and_vmap(restored, transpose):
    form = Format("affine", 4, 32)
    w = Weights(form, (64, 96), mx.float32, 9)
    x = mx.random.normal((5, 96 if transpose else 64), key=mx.random.key(1))
    y = mx.random.normal((5, 64 if transpose else 96), key=mx.random.key(2))
    _, (found,) = mx.vjp(lambda x: product(restored, x, w, transpose), [x], [y])
    check(found, y, w, not transpose)
    mapped = mx.vmap(lambda x: product(restored, x, w, transpose))(mx.stack([x, 2 * x]))
    check(mapped[1], 2 * x, w, transpose)


def test_many_rows_with_every_format(restored):
    """More rows than one filling of a panel serves."""
    for form in FORMATS:
        w = Weights(form, (50, 5 * form.group), mx.bfloat16, 2)
        x = mx.random.normal((259, 5 * form.group), key=mx.random.key(2)).astype(mx.bfloat16)
        check(product(restored, x, w, True), x, w, True, form)


PAIRED = [Format("affine", bits, group) for bits in (2, 4, 8) for group in (32, 64, 128)]


@pytest.mark.parametrize("form", [*PAIRED, Format("mxfp4", 4, 32)], ids=str)
def test_many_rows_of_bfloat16(restored, form):
    """Blocks of rows, of columns and of k that are full or not, as pairs where the CPU is fast at them."""
    for m, n, k in ((6, 33, 256), (7, 1, 384), (17, 71, 640), (40, 15, 128), (130, 47, 896), (515, 3, 384)):
        w = Weights(form, (n, k), mx.bfloat16, m)
        x = mx.random.normal((m, k), key=mx.random.key(n)).astype(mx.bfloat16)
        found = []
        for threads in (1, 2):
            restored.set_threads(threads)
            found.append(product(restored, laid_out(x, "wide"), w, True))
            check(found[-1], x, w, True, (m, n, k))
        assert same_bits(*found)


def test_many_gathered_rows_of_bfloat16(restored):
    form = Format("affine", 4, 64)
    rng = np.random.default_rng(5)
    w = Weights(form, (2, 37, 320), mx.bfloat16, 5)
    x = mx.random.normal((9, 1, 320), key=mx.random.key(5)).astype(mx.bfloat16)
    lhs, rhs = rng.integers(0, 9, 40), rng.integers(0, 2, 40)
    chosen = Weights.__new__(Weights)
    chosen.numbers, chosen.sizes = w.numbers[rhs], w.sizes[rhs]
    rows, matrices = mx.array(lhs), mx.array(rhs)
    found = restored.gather_qmm(
        x, *w.parts, rows, matrices, transpose=True, sorted_indices=False, **form.keywords
    )
    check(found, x[rows], chosen, True)


def test_huge_numbers_among_many_rows(restored):
    """Sums of x that overflow, though the products with small weights do not."""
    form = Format("affine", 4, 64)
    w = Weights(form, (21, 320), mx.bfloat16, 6)
    small = 2.0**-20
    w.scales, w.biases = w.scales * small, w.biases * small
    w.numbers, w.sizes = w.numbers * small, w.sizes * small
    x = mx.random.normal((8, 320), key=mx.random.key(6)).astype(mx.bfloat16)
    x[3] = mx.full((320,), 3e38, mx.bfloat16)
    check(product(restored, x, w, True), x, w, True)
