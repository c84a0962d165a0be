"""Products with activations rounded to 8 bits, against the rounded numbers in float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.execute.reference import to_numpy
from qgraph.ir.dtypes import BF16, F16, F32
from qgraph.numeric import tolerance

DTYPES = {mx.float32: F32, mx.bfloat16: BF16, mx.float16: F16}
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
FEW = 6  # rows of x at most that take dot products, for weights of 4 and 8 bits
MANY = 2 * 6 + 1  # rows of x in tiles, of which no two sizes are equal
# Dot products take up to four rows at once, tiles have up to six.
ROWS = st.integers(1, 20)


@dataclass(frozen=True)
class Weight:
    """A packed matrix with random codes, scales and biases."""

    codes: np.ndarray
    packed: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group: int

    @staticmethod
    def random(rng, n, k, bits, group, dtype=mx.float32) -> Weight:
        codes = rng.integers(0, 2**bits, (n, k))
        scales, biases = (mx.array(rng.normal(size=(n, k // group))).astype(dtype) for _ in range(2))
        return Weight.of(codes, scales, biases, bits, group)

    @staticmethod
    def of(codes, scales, biases, bits, group) -> Weight:
        flat = ((codes[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(*codes.shape[:-1], -1)
        words = np.packbits(flat, axis=-1, bitorder="little").view(np.uint32)
        return Weight(codes, mx.array(words), scales, biases, bits, group)

    def numbers(self) -> np.ndarray:
        scales, biases = (np.repeat(to_numpy(a), self.group, -1) for a in (self.scales, self.biases))
        return scales * self.codes + biases

    def magnitude(self) -> np.ndarray:
        scales, biases = (np.repeat(np.abs(to_numpy(a)), self.group, -1) for a in (self.scales, self.biases))
        return scales * self.codes + biases

    def product(self, native: ModuleType, x: mx.array, activations: str = "int8") -> mx.array:
        how = {"transpose": True, "group_size": self.group, "bits": self.bits, "mode": "affine"}
        return native.quantized_matmul(
            x, self.packed, self.scales, self.biases, None, **how, activations=activations
        )

    def rounded(self, x: mx.array) -> np.ndarray:
        """`x` as the kernel sees it: blocks of 8-bit numbers, each with a scale, computed in float32."""
        if self.bits not in (4, 8) and x.size <= FEW * x.shape[-1]:
            return to_numpy(x)  # no kernel: exact
        block = min(self.group, 64)
        blocks = np.array(x.astype(mx.float32)).reshape(*x.shape[:-1], -1, block)
        top = np.max(np.abs(blocks), axis=-1, keepdims=True)
        inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
        numbers = np.rint(blocks * inverse).astype(np.float64) * (top / np.float32(127)).astype(np.float64)
        return numbers.reshape(x.shape)

    def check(self, native: ModuleType, x: mx.array) -> None:
        """Compare the product on every instruction set, and on one thread and two."""
        rounded, k = self.rounded(x), x.shape[-1]
        expected = np.matmul(rounded, self.numbers().T)
        magnitude = np.matmul(np.abs(rounded), self.magnitude().T)
        for name in native.instruction_sets():
            native.use(name)
            found = []
            for threads in (1, 2):
                native.set_threads(threads)
                y = self.product(native, x)
                found.append(to_numpy(y))
            problem = tolerance(DTYPES[y.dtype], k, "P2").problem(found[0], expected, magnitude)
            assert not problem, (name, problem)
            np.testing.assert_array_equal(found[0], found[1])


def normal(rng, *shape, dtype=mx.float32) -> mx.array:
    return mx.array(rng.normal(size=shape)).astype(dtype)


# Ways in which x lies in memory: each makes an array of the shape from a normal one.
LAYOUTS = {
    "contiguous": lambda rng, m, k, dtype: normal(rng, m, k, dtype=dtype),
    "transposed": lambda rng, m, k, dtype: normal(rng, k, m, dtype=dtype).T,
    "columns": lambda rng, m, k, dtype: normal(rng, m, k + 5, dtype=dtype)[:, 3 : k + 3],
    "every second": lambda rng, m, k, dtype: normal(rng, 2 * m, 2 * k, dtype=dtype)[::2, ::2],
    "one row": lambda rng, m, k, dtype: mx.broadcast_to(normal(rng, 1, k, dtype=dtype), (m, k)),
    "batched": lambda rng, m, k, dtype: normal(rng, 2, 1, m, k, dtype=dtype),
}


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    m=ROWS,
    n=st.integers(1, 75),
    groups=st.integers(1, 20),
    dtypes=st.tuples(*(st.sampled_from(list(DTYPES)),) * 2),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_products(native, bits, group, m, n, groups, dtypes, layout, seed):
    rng = np.random.default_rng(seed)
    before = native.instruction_set(), native.threads()
    try:
        k = group * groups
        w = Weight.random(rng, n, k, bits, group, dtypes[1])
        w.check(native, LAYOUTS[layout](rng, m, k, dtypes[0]))
    finally:
        native.use(before[0])
        native.set_threads(before[1])


@pytest.mark.parametrize("m", [1, 3, MANY, 150])
@pytest.mark.parametrize("bits", [4, 8])
def test_long_sums_and_many_tasks(restored, bits, m):
    """Several vectors of scales in a row, several tasks, and few panels for many rows."""
    rng = np.random.default_rng(bits + m)
    k = 4096 + 64 if m < MANY else 1024 + 64
    Weight.random(rng, 97, k, bits, 64, mx.bfloat16).check(restored, normal(rng, m, k, dtype=mx.bfloat16))


@pytest.mark.parametrize("m", [1, 4, MANY])
@pytest.mark.parametrize("bits", BITS)
def test_largest_numbers_do_not_saturate(restored, bits, m):
    """Integers within 127 are rounded to themselves, and their sums are exact."""
    rng = np.random.default_rng(bits)
    n, k, group = 40, 256, 64
    codes = np.full((n, k), 2**bits - 1)
    codes[n // 2 :] = rng.integers(0, 2**bits, (n - n // 2, k))
    w = Weight.of(codes, mx.ones((n, k // group)), mx.zeros((n, k // group)), bits, group)
    x = rng.choice([-127, 127], (m, k))
    x[0] = 127
    for name in restored.instruction_sets():
        restored.use(name)
        np.testing.assert_array_equal(
            to_numpy(w.product(restored, mx.array(x.astype(np.float32)))), x @ codes.T
        )


@pytest.mark.parametrize("m", [1, MANY])
def test_error_of_the_rounding(native, m):
    """x is off by half a step at most, and what this is multiplied with is the weight, not its codes."""
    rng = np.random.default_rng(m)
    n, k = 64, 512
    codes = rng.integers(0, 16, (n, k))
    scales = mx.array(rng.uniform(0.5, 1, (n, k // 64)))
    w = Weight.of(codes, scales, -7.5 * scales, 4, 64)
    x = normal(rng, m, k)
    exact, step = to_numpy(x), np.max(np.abs(to_numpy(x).reshape(m, -1, 64)), -1, keepdims=True) / 127
    half = np.broadcast_to(step / 2, (m, k // 64, 64)).reshape(m, k)
    error = np.abs(to_numpy(w.product(native, x)) - exact @ w.numbers().T)
    rounding = tolerance(F32, k, "P2").terms * (np.abs(exact) @ w.magnitude().T)
    assert np.all(error <= half @ np.abs(w.numbers()).T + rounding)
    # Independent errors, uniform within half a step: their standard deviation, and a margin of two.
    deviation = np.sqrt(np.square(half) @ np.square(w.numbers()).T / 3)
    assert np.sqrt(np.mean(np.square(error))) <= 2 * np.sqrt(np.mean(np.square(deviation)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [2, MANY])
def test_what_is_not_finite_shows(restored, m, bad):
    rng = np.random.default_rng(0)
    w = Weight.random(rng, 33, 192, 4, 64)
    x = np.array(normal(rng, m, 192))
    x[1, 70] = bad
    for name in restored.instruction_sets():
        restored.use(name)
        y = to_numpy(w.product(restored, mx.array(x)))
        assert np.all(np.isnan(y[1]))
        assert np.all(np.isfinite(np.delete(y, 1, 0)))


@pytest.mark.parametrize("m", [1, MANY])
def test_zeros_and_the_smallest_numbers(restored, m):
    rng = np.random.default_rng(0)
    w = Weight.random(rng, 20, 128, 4, 32)
    x = np.zeros((m, 128), np.float32)
    x[:, :32] = 1e-45
    x[:, 40] = 1.0
    for name in restored.instruction_sets():
        restored.use(name)
        exact = np.broadcast_to(w.numbers()[:, 40], (m, 20))
        problem = tolerance(F32, 128, "P2").problem(
            to_numpy(w.product(restored, mx.array(x))), exact, np.broadcast_to(w.magnitude()[:, 40], (m, 20))
        )
        assert not problem


def test_no_rows_and_no_columns(native):
    rng = np.random.default_rng(0)
    w = Weight.random(rng, 8, 64, 4, 32)
    assert w.product(native, mx.zeros((0, 64))).shape == (0, 8)
    assert w.product(native, mx.zeros((3, 0, 64))).shape == (3, 0, 8)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4", "not transposed"])
def test_what_has_no_kernel_is_exact(native, mode):
    rng = np.random.default_rng(0)
    x = normal(rng, 3, 64)
    transpose = mode != "not transposed"
    mode = mode if transpose else "affine"
    parts = mx.quantize(normal(rng, 64, 64), mode=mode)
    group = 64 if mode == "affine" else 16 if mode == "nvfp4" else 32
    how = {"group_size": group, "bits": 8 if mode == "mxfp8" else 4, "mode": mode, "transpose": transpose}
    biases = parts[2] if mode == "affine" else None
    rounded, exact = (
        native.quantized_matmul(x, parts[0], parts[1], biases, None, **how, activations=a)
        for a in ("int8", "")
    )
    assert mx.array_equal(rounded, exact)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("rows", [1, 9])
def test_gathered_matrices(restored, rows, ordered):
    """Each product reads and writes rows that lie apart."""
    rng = np.random.default_rng(rows)
    experts, n, k, count = 3, 21, 192, 14
    ws = [Weight.random(rng, n, k, 4, 64) for _ in range(experts)]
    parts = [mx.stack([getattr(w, part) for w in ws]) for part in ("packed", "scales", "biases")]
    x = normal(rng, count, rows, k)
    lhs, rhs = rng.permutation(count), rng.integers(0, experts, count)
    if ordered:
        rhs = np.sort(rhs)
    how = {"transpose": True, "group_size": 64, "bits": 4, "mode": "affine", "sorted_indices": ordered}
    indices = (mx.array(i.astype(np.uint32)) for i in (lhs, rhs))
    y = to_numpy(restored.gather_qmm(x, *parts, None, *indices, **how, activations="int8"))
    for i in range(count):
        w, a = ws[rhs[i]], x[int(lhs[i])]
        rounded = w.rounded(a)
        magnitude = np.abs(rounded) @ w.magnitude().T
        assert not tolerance(F32, k, "P2").problem(y[i], rounded @ w.numbers().T, magnitude)


def test_gradient_and_vmap(native):
    """The gradient is that of the exact product; vmap is of the formula."""
    rng = np.random.default_rng(0)
    w = Weight.random(rng, 24, 128, 4, 64)
    x, cotangent = normal(rng, 5, 128), normal(rng, 5, 24)
    grad = mx.grad(lambda x: mx.sum(w.product(native, x) * cotangent))(x)
    magnitude = np.abs(to_numpy(cotangent)) @ w.magnitude()
    assert not tolerance(F32, 24, "P2").problem(to_numpy(grad), to_numpy(cotangent) @ w.numbers(), magnitude)
    y = mx.vmap(lambda x: w.product(native, x))(x)
    exact, magnitude = (
        np.matmul(f(to_numpy(x)), g.T) for f, g in ((np.array, w.numbers()), (np.abs, w.magnitude()))
    )
    assert not tolerance(F32, 128, "P1").problem(to_numpy(y), exact, magnitude)
