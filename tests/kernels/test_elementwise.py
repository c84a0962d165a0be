"""Chains of element-wise operations: every function, layout, dtype and instruction set against float64."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.execute.reference import round_to, to_numpy
from qgraph.ir.dtypes import BF16, BOOL, F16, F32, dtype_of
from qgraph.numeric import tolerance

FLOATS = (F32, BF16, F16)
erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


# By name: the meaning, and the range of operands of order 1 that it takes.
UNARY = {
    "negative": (np.negative, (-3, 3)),
    "abs": (np.abs, (-3, 3)),
    "square": (np.square, (-3, 3)),
    "cube": (lambda x: x**3, (-3, 3)),
    "reciprocal": (lambda x: 1 / x, (0.3, 3)),
    "sqrt": (np.sqrt, (0, 3)),
    "rsqrt": (lambda x: 1 / np.sqrt(x), (0.3, 3)),
    "floor": (np.floor, (-3, 3)),
    "ceil": (np.ceil, (-3, 3)),
    "round": (np.round, (-3, 3)),
    "relu": (lambda x: np.maximum(x, 0), (-3, 3)),
    "exp": (np.exp, (-3, 3)),
    "expm1": (np.expm1, (-3, 3)),
    "log": (np.log, (0.1, 3)),
    "log1p": (np.log1p, (-0.9, 3)),
    "sin": (np.sin, (-3, 3)),
    "cos": (np.cos, (-3, 3)),
    "tanh": (np.tanh, (-3, 3)),
    "sigmoid": (sigmoid, (-3, 3)),
    "erf": (erf, (-3, 3)),
    "cast": (lambda x: x, (-3, 3)),
}
BINARY = {
    "add": (np.add, (-3, 3)),
    "subtract": (np.subtract, (-3, 3)),
    "multiply": (np.multiply, (-3, 3)),
    "divide": (np.divide, (0.3, 3)),
    "maximum": (np.maximum, (-3, 3)),
    "minimum": (np.minimum, (-3, 3)),
    "power": (np.power, (0.3, 3)),
    "logaddexp": (np.logaddexp, (-3, 3)),
}
TRUTHS = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
}


@pytest.fixture(params=["avx512vnni", "avx512", "avx2", "neon", "portable"])
def kernels(request, restored):
    """The module with each instruction set that there is."""
    if request.param not in restored.instruction_sets():
        pytest.skip("not built, or not of this CPU")
    restored.use(request.param)
    return restored


def drawn(seed, shape, dtype=F32, low=-3.0, high=3.0):
    x = np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)
    return mx.array(x > 0 if dtype is BOOL else x).astype(dtype.mlx)


def check(found, exact, magnitude=0.0, path="elementwise", about=""):
    mx.eval(found)
    dtype = dtype_of(found.dtype)
    of = tolerance(dtype, path=path)
    if dtype is F16:  # the subnormal numbers are 2**-24 apart
        magnitude = np.maximum(magnitude, 2.0**-25 / of.terms)
    problem = of.problem(to_numpy(found), exact, magnitude)
    assert not problem, (problem, about)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_operand(kernels, name, dtype):
    meaning, (low, high) = UNARY[name]
    for size in (1, 7, 512, 1100):
        x = drawn(size, (size,), dtype, low, high)
        magnitude = 1.0 if name in ("sin", "cos", "log") else 0.0  # near their zeros
        check(kernels.elementwise([x], f"{name}(0):{dtype}"), meaning(to_numpy(x)), magnitude)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_operands(kernels, name, dtype):
    meaning, (low, high) = BINARY[name]
    a, b = drawn(1, (5, 70), dtype, low, high), drawn(2, (5, 70), dtype, low, high)
    found = kernels.elementwise([a, b], f"{name}(0,1):{dtype}")
    check(found, meaning(to_numpy(a), to_numpy(b)), 3.0 if name in ("add", "subtract", "logaddexp") else 0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_truths_and_choices(kernels, dtype):
    a, b = (mx.array(np.random.default_rng(s).integers(-2, 3, (3, 50))).astype(dtype.mlx) for s in (1, 2))
    for name, meaning in TRUTHS.items():
        found = kernels.elementwise([a, b], f"{name}(0,1):bool")
        assert found.dtype == mx.bool_
        assert np.array_equal(np.array(found), meaning(to_numpy(a), to_numpy(b))), name
    assert np.array_equal(np.array(kernels.elementwise([a], "logical_not(0):bool")), to_numpy(a) == 0)
    found = kernels.elementwise([a > b, a, b], f"where(0,1,2):{dtype}")
    assert np.array_equal(to_numpy(found), np.maximum(to_numpy(a), to_numpy(b)))


SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 0.5, 1e-45, -1e-45, 1e-40, 1.1754944e-38, 3.4028235e38,
     -3.4028235e38, 88.7, 88.8, -87.5, -103.9, -104.1, 1e-20, -1e-20, 1e-8, 4.5, -20, 1e4, 1e6, -1e6, 3e7],
    np.float32,
)  # fmt: skip
WIDE = [
    *("negative", "abs", "square", "reciprocal", "sqrt", "rsqrt", "floor", "ceil", "round", "relu", "exp"),
    *("expm1", "log", "log1p", "sin", "cos", "tanh", "sigmoid", "erf"),
]


@pytest.mark.parametrize("name", WIDE)
def test_functions_over_the_whole_range(kernels, name):
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    x = np.concatenate([SPECIAL, bits.view(np.float32), drawn(1, (20000,), F32, -120, 120)])
    with np.errstate(all="ignore"):
        exact = UNARY[name][0](x.astype(np.float64)).astype(np.float32).astype(np.float64)
    if name == "sigmoid":
        exact[x == -np.inf] = 0
    found = kernels.elementwise([mx.array(x)], f"{name}(0):f32")
    with np.errstate(invalid="ignore"):  # some NaNs signal
        check(found, exact, np.finfo(np.float32).tiny)
    zero = exact == 0
    assert np.array_equal(np.signbit(np.array(found))[zero], np.signbit(exact)[zero]), x[zero]


@pytest.mark.parametrize("name", ["maximum", "minimum", "logaddexp", "add", "divide", "less", "equal"])
def test_two_special_operands(kernels, name):
    a, b = (x.ravel() for x in np.meshgrid(SPECIAL, SPECIAL))
    dtype = "bool" if name in TRUTHS else "f32"
    meaning = TRUTHS.get(name) or BINARY[name][0]
    with np.errstate(all="ignore"):
        exact = meaning(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)
    found = kernels.elementwise([mx.array(a), mx.array(b)], f"{name}(0,1):{dtype}")
    check(found.astype(mx.float32), exact.astype(np.float64), np.finfo(np.float32).tiny)


# ---- Chains ----


@st.composite
def programs(draw, operands, dtypes):
    """Steps on operands of these dtypes; constants among them."""
    steps, known = [], list(dtypes)
    for _ in range(draw(st.integers(1, 8))):
        dtype = draw(st.sampled_from(FLOATS))
        kind = draw(st.integers(0, 5))
        pick = st.integers(0, len(known) - 1)
        if kind == 0:
            steps.append(f"constant({draw(st.floats(-2, 2, width=16))!r}):{dtype}")
        elif kind == 1:
            dtype = BOOL
            steps.append(f"{draw(st.sampled_from(sorted(TRUTHS)))}({draw(pick)},{draw(pick)}):bool")
        elif kind == 2:
            steps.append(f"where({draw(pick)},{draw(pick)},{draw(pick)}):{dtype}")
        elif kind == 3:
            names = ["cast", "negative", "abs", "tanh", "sigmoid", "erf", "sin", "floor", "relu"]
            steps.append(f"{draw(st.sampled_from(names))}({draw(pick)}):{dtype}")
        else:
            names = ["add", "subtract", "multiply", "maximum", "minimum", "logaddexp"]
            steps.append(f"{draw(st.sampled_from(names))}({draw(pick)},{draw(pick)}):{dtype}")
        known.append(dtype)
    if steps[-1].startswith("constant"):
        steps.append(f"add(0,{operands + len(steps) - 1}):f32")
    return steps


def one_by_one(native, operands, steps):
    """Each step as a kernel of its own, its result in memory."""
    values = list(operands)
    for step in steps:
        head, _, rest = step.partition("(")
        inner, _, dtype = rest.partition("):")
        if head == "constant":
            values.append(
                mx.array(
                    float(inner), getattr(mx, {"f32": "float32", "bf16": "bfloat16"}.get(dtype, "float16"))
                )
            )
            continue
        numbers = [int(n) for n in inner.split(",")]
        places = ",".join(map(str, range(len(numbers))))
        values.append(native.elementwise([values[n] for n in numbers], f"{head}({places}):{dtype}"))
        mx.eval(values[-1])
    return values[-1]


@settings(max_examples=60)
@given(st.data())
def test_a_chain_gives_the_bits_of_its_steps(native, data):
    dtypes = data.draw(st.lists(st.sampled_from((*FLOATS, BOOL)), min_size=1, max_size=4))
    shape = data.draw(st.sampled_from([(3,), (2, 700), (4, 1, 33), (1,)]))
    operands = [drawn(i, shape, dtype) for i, dtype in enumerate(dtypes)]
    steps = data.draw(programs(len(operands), dtypes))
    before = native.instruction_set()
    try:
        for name in native.instruction_sets():
            native.use(name)
            found = native.elementwise(operands, " ".join(steps))
            wanted = one_by_one(native, operands, steps)
            wanted = mx.broadcast_to(wanted, shape)
            assert found.dtype == wanted.dtype
            assert found.shape == shape
            assert mx.array_equal(found, wanted, equal_nan=True).item(), (steps, found, wanted)
    finally:
        native.use(before)


@st.composite
def layouts(draw):
    """Arrays of shapes that broadcast to one, some of them views of others."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 40]), min_size=1, max_size=4)))
    arrays = []
    for i in range(draw(st.integers(1, 3))):
        own = tuple(1 if draw(st.booleans()) and i else s for s in shape)[
            draw(st.integers(0, len(shape) - 1)) if i else 0 :
        ]
        dtype = draw(st.sampled_from(FLOATS))
        seed, kind = (
            draw(st.integers(0, 9)),
            draw(st.sampled_from(["plain", "turned", "part", "steps", "wide"])),
        )
        if kind == "turned":
            x = mx.transpose(drawn(seed, own[::-1], dtype))
        elif kind == "part":
            x = drawn(seed, (*own[:-1], own[-1] + 3), dtype)[..., 2 : 2 + own[-1]]
        elif kind == "steps":
            x = drawn(seed, (*own[:-1], own[-1] * 2), dtype)[..., ::-2]
        elif kind == "wide":
            x = mx.broadcast_to(drawn(seed, (*own[:-1], 1), dtype), own)
        else:
            x = drawn(seed, own, dtype)
        arrays.append(x)
    return arrays


@given(layouts())
def test_layouts_and_broadcasting(native, arrays):
    exact, text, last = to_numpy(arrays[0]), [], 0
    for i, x in enumerate(arrays[1:], 1):
        text.append(f"add({last},{i}):f32")
        exact, last = exact + to_numpy(x), len(arrays) + i - 1
    text.append(f"multiply({last},{last}):f32")
    found = native.elementwise(arrays, " ".join(text))
    assert found.shape == exact.shape
    check(found, exact**2, 81.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threads_change_no_bit(kernels, dtype):
    x, y = drawn(1, (300, 513), dtype), drawn(2, (513,), dtype)
    text = f"sigmoid(0):{dtype} multiply(0,2):{dtype} multiply(3,1):{dtype}"
    results = []
    for threads in (1, 2):
        kernels.set_threads(threads)
        results.append(kernels.elementwise([x, y], text))
        mx.eval(results[-1])
    assert mx.array_equal(*results).item()


def test_casts_of_integers_and_truths(kernels):
    for x in (mx.array([[-3, 5, 2**24, -(2**31)]], mx.int32), mx.array([[True, False, True, True]])):
        for dtype in (F32, BF16):
            found = kernels.elementwise([x], f"cast(0):{dtype}")
            assert np.array_equal(to_numpy(found), round_to(dtype, to_numpy(x).astype(np.float64)))


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-0.0", "1e-07", "65504.0", "0.1"])
def test_constants_are_rounded_to_their_dtype(kernels, text):
    for dtype in FLOATS:
        x = mx.zeros((20,), dtype.mlx)
        found = kernels.elementwise([x < 0, x], f"constant({text}):{dtype} where(0,1,2):{dtype}")
        wanted = mx.full((20,), float(text), dtype.mlx)
        assert mx.array_equal(found, wanted, equal_nan=True).item()
        assert np.array_equal(np.signbit(to_numpy(found)), np.signbit(to_numpy(wanted)))
        wide = kernels.elementwise([mx.ones((20,))], f"constant({text}):{dtype} multiply(0,1):f32")
        assert mx.array_equal(wide, wanted.astype(mx.float32), equal_nan=True).item()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_step_is_rounded(kernels, dtype):
    operands = [drawn(1, (3, 500), dtype), drawn(2, (3, 500), dtype)]
    steps = [f"add(0,1):{dtype}", f"multiply(2,0):{dtype}", f"exp(1):{dtype}", "subtract(3,4):f32"]
    found = kernels.elementwise(operands, " ".join(steps))
    assert mx.array_equal(found, one_by_one(kernels, operands, steps)).item()


def test_what_is_read_again_is_not_overwritten(native):
    x, y = drawn(1, (3000,)), drawn(2, (3000,))
    kept = to_numpy(x)
    made = x + y  # nobody else's: its memory may become the result's
    check(native.elementwise([made, y], "subtract(0,1):f32"), kept, 6.0)
    used = x * 2
    both = native.elementwise([used], "negative(0):f32"), used + 0
    mx.eval(*both)
    check(both[0], -2 * kept)
    check(both[1], 2 * kept)
    square = (x + y)[:2500].reshape(50, 50)
    turned = mx.transpose(square + 0)  # read in another order than it is written
    del square
    check(
        native.elementwise([turned], "negative(0):f32"), -(kept + to_numpy(y))[:2500].reshape(50, 50).T, 6.0
    )
    part = mx.concatenate([x, y])[:3000]  # the head of a longer buffer
    check(native.elementwise([part], "abs(0):f32"), np.abs(kept))
    assert np.array_equal(to_numpy(x), kept)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 512)])
def test_no_elements(native, shape):
    x = mx.zeros(shape)
    found = native.elementwise([x, mx.array(1.0)], "add(0,1):bf16 exp(2):f16")
    mx.eval(found)
    assert (found.shape, found.dtype) == (shape, mx.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_and_vmaps_are_those_of_the_formula(native, dtype):
    text = f"sigmoid(0):f32 multiply(0,2):{dtype} multiply(3,1):{dtype}"
    x, y = drawn(1, (4, 6), dtype), drawn(2, (6,), dtype)

    def plain(x, y):
        return (x * mx.sigmoid(x.astype(mx.float32))).astype(x.dtype) * y

    def ours(x, y):
        return native.elementwise([x, y], text)

    for argnums in (0, 1):
        wanted = mx.grad(lambda x, y: plain(x, y).astype(mx.float32).sum(), argnums)(x, y)
        found = mx.grad(lambda x, y: ours(x, y).astype(mx.float32).sum(), argnums)(x, y)
        check(found, to_numpy(wanted), 4.0, "composed")
    check(mx.vmap(ours, (0, None))(x, y), to_numpy(plain(x, y)), 1.0, "composed")
    wanted = mx.jvp(plain, [x, y], [x, y])[1][0]
    check(mx.jvp(ours, [x, y], [x, y])[1][0], to_numpy(wanted), 4.0, "composed")


def test_inside_mx_compile(native):
    x, y = drawn(1, (4, 6)), drawn(2, (6,))
    compiled = mx.compile(lambda x, y: native.elementwise([x, y], "add(0,1):f32") * 2, shapeless=True)
    for shape in ((4, 6), (2, 6)):
        check(compiled(x[: shape[0]], y), 2 * (to_numpy(x[: shape[0]]) + to_numpy(y)), 6.0)


@pytest.mark.parametrize(
    ("why", "operands", "program"),
    [
        ("no steps", 1, ""),
        ("no operands", 0, "constant(1.0):f32"),
        ("an unknown operation", 1, "frobnicate(0):f32"),
        ("too many operands", 2, "exp(0,1):f32"),
        ("a later operand", 1, "add(0,1):f32"),
        ("no such dtype", 1, "exp(0):i32"),
        ("no dtype", 1, "exp(0)"),
        ("no number", 1, "constant(one):f32 add(0,1):f32"),
        ("a cast to bool", 1, "cast(0):bool"),
        ("nonsense", 1, "exp"),
    ],
)
def test_programs_that_are_none(native, why, operands, program):
    with pytest.raises(ValueError, match="elementwise"):
        native.elementwise([mx.ones((2,))] * operands, program)


def test_operands_that_do_not_fit(native):
    with pytest.raises(ValueError, match="broadcast"):
        native.elementwise([mx.ones((2,)), mx.ones((3,))], "add(0,1):f32")
    with pytest.raises(ValueError, match="8 axes"):
        native.elementwise([mx.ones((1,) * 9)], "exp(0):f32")
    with pytest.raises(ValueError, match="dtype"):
        native.elementwise([mx.ones((2,), mx.complex64)], "exp(0):f32")
