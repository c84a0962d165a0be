"""rope from pairs that are turned by tables of cos and sin."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from qgraph.ops.nn import Rope
from tests.agree import normal
from tests.passes.raise_fast.raised import PIPELINE, raised, reasons, same_as_mlx

DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def op(f, *args, captured=False):
    """The one rope that the pass made."""
    compiled = (qg.optimize if captured else qg.jit)(f, pipeline=PIPELINE)
    (node,) = compiled.result(*args).after("raise-fast").find("rope")
    assert isinstance(node.op, Rope)
    return node.op


SPEEDS = {
    "power of arange": lambda base, d: 1.0 / (base ** (qg.arange(0, d, 2, dtype=mx.float32) / d)),
    "negative power": lambda base, d: base ** (-qg.arange(0, d // 2, dtype=mx.float32) / (d // 2)),
    "exponential": lambda base, d: qg.exp(qg.arange(0, d, 2, dtype=mx.float32) * (-math.log(base) / d)),
    "reciprocal": lambda base, d: qg.reciprocal(base ** (qg.arange(0, d, 2, dtype=mx.float32) / d)),
}
POSITIONS = {
    "arange": lambda n, o: qg.arange(o, o + n, dtype=mx.float32),
    "integers": lambda n, o: qg.astype(qg.arange(o, o + n), mx.float32),
    "a sum": lambda n, o: qg.astype(qg.arange(n) + o, mx.float32),
}
PRODUCTS = {
    "broadcast": lambda p, s: p[:, None] * s[None],
    "outer": lambda p, s: qg.outer(p, s),
    "product of matrices": lambda p, s: p[:, None] @ s[None],
}


def turned(x, cos, sin, style):
    """The four ways to turn: the tables have one column for each pair."""
    half = cos.shape[-1]
    dims, rest = 2 * half, x[..., 2 * half :]
    first = x[..., :dims]
    if style == "neighbours":
        a, b = first[..., 0::2], first[..., 1::2]
        out = qg.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
        out = qg.reshape(out, (*x.shape[:-1], dims))
        return out if dims == x.shape[-1] else qg.concatenate([out, rest], axis=-1)
    a, b = first[..., :half], first[..., half:]
    if style == "halves":
        parts = [a * cos - b * sin, b * cos + a * sin]
        return qg.concatenate(parts if dims == x.shape[-1] else [*parts, rest], axis=-1)

    def double(t):
        return qg.concatenate([t, t], axis=-1)

    out = first * double(cos) + qg.concatenate([-b, a], axis=-1) * double(sin)
    return out if dims == x.shape[-1] else qg.concatenate([out, rest], axis=-1)


STYLES = ["halves", "neighbours", "swapped"]


@given(
    lead=st.lists(st.integers(1, 3), min_size=0, max_size=3),
    length=st.integers(1, 4),
    half=st.integers(2, 4),
    more=st.sampled_from([0, 0, 2]),
    offset=st.sampled_from([0, 1, 5]),
    base=st.sampled_from([10000.0, 500000.0, 1e6]),
    dtype=st.sampled_from(DTYPES),
    style=st.sampled_from(STYLES),
    speeds=st.sampled_from(sorted(SPEEDS)),
    positions=st.sampled_from(sorted(POSITIONS)),
    product=st.sampled_from(sorted(PRODUCTS)),
)
def test_every_spelling_is_one_op(
    lead, length, half, more, offset, base, dtype, style, speeds, positions, product
):
    def f(x):
        p, s = POSITIONS[positions](length, offset), SPEEDS[speeds](base, 2 * half)
        angles = PRODUCTS[product](p, s)
        return turned(x, qg.astype(qg.cos(angles), x.dtype), qg.astype(qg.sin(angles), x.dtype), style)

    x = normal(*lead, length, 2 * half + more, dtype=dtype)
    counts = raised(f, x)
    assert counts["rope"] == 1
    assert not set(counts) & {"cos", "sin", "concatenate", "multiply"}
    found = op(f, x)
    assert (found.dims, found.traditional) == (2 * half, style == "neighbours")
    assert (found.base, found.scale, found.offset) == (base, 1.0, offset)


@pytest.mark.parametrize("style", STYLES)
def test_one_pair_has_no_base(style):
    def f(x):
        angles = qg.arange(3, dtype=mx.float32)[:, None] * qg.ones((1,))
        return turned(x, qg.cos(angles), qg.sin(angles), style)

    assert raised(f, normal(2, 3, 2)) == {"rope": 1}


KEYWORDS = {
    "as it is": {},
    "neighbours": {"traditional": True},
    "another base": {"base": 5e5},
    "scaled": {"scale": 0.25},
    "part": {"dims": 4},
    "part of neighbours": {"dims": 4, "traditional": True},
    "frequencies": {"base": None},
}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", [(2, 4, 3, 8), (2, 3, 8), (2, 2, 2, 3, 8), (2, 4, 1, 8)])
@pytest.mark.parametrize("offset", ["number", "one", "one for each"])
@pytest.mark.parametrize("name", KEYWORDS)
def test_what_mlx_writes_for_its_rope_is_raised_and_runs_bit_by_bit_the_same(name, offset, shape, dtype):
    keywords = {"dims": 8, "traditional": False, "base": 1e4, "scale": 1.0, **KEYWORDS[name]}
    dims = keywords.pop("dims")
    starts = {"number": 5, "one": mx.array(7), "one for each": mx.array([7, 2][: shape[0]])}

    def f(x, freqs=None):
        return mx.fast.rope(x, dims, **keywords, offset=starts[offset], freqs=freqs)

    def g(x, start, freqs=None):
        return mx.fast.rope(x, dims, **keywords, offset=start, freqs=freqs)

    freqs = [mx.abs(normal(dims // 2)) + 1] if keywords["base"] is None else []
    x = normal(*shape, dtype=dtype)
    counts = same_as_mlx(f, x, *freqs) if offset == "number" else same_as_mlx(g, x, starts[offset], *freqs)
    assert counts.pop("rope") == 1
    assert set(counts) <= {"reshape"}


def test_the_base_that_mlx_rounds_is_read_back():
    for base in (1e4, 5e5, 1e6, 1.5e5, 8e6, 1e7):
        for dims in (64, 96, 128):

            def f(x, base=base, dims=dims):
                return mx.fast.rope(x, dims, traditional=False, base=base, scale=1.0, offset=0)

            assert op(f, normal(1, 1, 2, dims), captured=True).base == base


def test_speeds_of_no_base_become_frequencies():
    def f(x):
        angles = qg.arange(3)[:, None] * (qg.arange(1, 5) * 0.1)
        return turned(x, qg.cos(angles), qg.sin(angles), "halves")

    counts = raised(f, normal(2, 3, 8))
    assert counts["rope"] == 1
    assert op(f, normal(2, 3, 8)).base is None


def test_wavelengths_that_are_an_argument_stay_one():
    def f(x, w):
        angles = qg.arange(3, dtype=mx.float32)[:, None] * (1 / w)
        return turned(x, qg.cos(angles), qg.sin(angles), "halves")

    assert raised(f, normal(2, 3, 8), mx.abs(normal(4)) + 1) == {"rope": 1}


def test_positions_along_another_axis_are_brought_to_their_place():
    """(batch, length, heads, features), as most code has it before it transposes."""

    def f(x):
        angles = (qg.arange(5, dtype=mx.float32)[:, None] * SPEEDS["exponential"](1e4, 8))[:, None]
        return turned(x, qg.cos(angles), qg.sin(angles), "swapped")

    assert raised(f, normal(2, 5, 3, 8)) == {"rope": 1, "transpose": 2}


def test_an_array_of_offsets_is_kept():
    def f(x, o):
        positions = qg.astype(qg.arange(3) + o[:, None], mx.float32)
        angles = positions[:, None, :, None] * SPEEDS["exponential"](1e4, 8)
        return turned(x, qg.cos(angles), qg.sin(angles), "halves")

    assert raised(f, normal(2, 4, 3, 8), mx.array([3, 11])) == {"rope": 1}


def test_a_step_of_decoding_needs_no_arange():
    def f(x, o):
        angles = qg.astype(o, mx.float32) * SPEEDS["exponential"](1e4, 8)
        return turned(x, qg.cos(angles), qg.sin(angles), "halves")

    assert raised(f, normal(2, 4, 1, 8), mx.array(12))["rope"] == 1


def test_positions_may_be_scaled():
    def f(x):
        angles = (qg.arange(3, dtype=mx.float32) / 4)[:, None] * SPEEDS["exponential"](1e4, 8)
        return turned(x, qg.cos(angles), qg.sin(angles), "halves")

    assert raised(f, normal(2, 3, 8)) == {"rope": 1}
    assert op(f, normal(2, 3, 8)).scale == 0.25


def standard(x, change=lambda cos, sin: (cos, sin), p=None, s=None):
    p = qg.arange(x.shape[-2], dtype=mx.float32) if p is None else p
    s = SPEEDS["exponential"](1e4, x.shape[-1]) if s is None else s
    angles = p[:, None] * s
    return turned(x, *change(qg.cos(angles), qg.sin(angles)), "halves")


def other_sign(x):
    cos, sin = (
        t(qg.arange(4, dtype=mx.float32)[:, None] * SPEEDS["exponential"](1e4, 8)) for t in (qg.cos, qg.sin)
    )
    a, b = x[..., :4], x[..., 4:]
    return qg.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def other_halves(x):
    cos, sin = (
        t(qg.arange(4, dtype=mx.float32)[:, None] * SPEEDS["exponential"](1e4, 8)) for t in (qg.cos, qg.sin)
    )
    a, b = x[..., 4:], x[..., :4]
    return qg.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def other_rest(x):
    cos, sin = (
        t(qg.arange(4, dtype=mx.float32)[:, None] * SPEEDS["exponential"](1e4, 4)) for t in (qg.cos, qg.sin)
    )
    a, b = x[..., :2], x[..., 2:4]
    return qg.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., :4]], axis=-1)


NEAR = {
    "scaled tables": (lambda x: standard(x, lambda c, s: (c * 1.1, s * 1.1)), ""),
    "sin for cos": (lambda x: standard(x, lambda c, s: (s, c)), ""),
    "other angles for sin": (
        lambda x: standard(x, lambda c, s: (c, qg.sin(qg.arange(4, dtype=mx.float32)[:, None] * qg.ones(4)))),
        "cos and sin are of different angles",
    ),
    "positions that do not count up": (
        lambda x: standard(x, p=qg.square(qg.arange(4, dtype=mx.float32))),
        "the positions do not count up from a whole number",
    ),
    "positions from a half": (
        lambda x: standard(x, p=qg.arange(4, dtype=mx.float32) + 0.5),
        "the positions do not count up from a whole number",
    ),
    "turned backwards": (other_sign, ""),
    "halves exchanged": (other_halves, "the pairs are not of two halves"),
    "another rest": (other_rest, "the features beside those that are turned are not kept as they are"),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_only_looks_like_a_rope_stays_and_says_why(name):
    f, reason = NEAR[name]
    x = normal(2, 4, 8)
    assert "rope" not in raised(f, x)
    assert not reason or reason in reasons(f, x, rule="raise-rope")


def test_tables_that_are_arguments_stay_and_say_so():
    def f(x, t):
        return turned(x, qg.cos(t), qg.sin(t), "halves")

    assert "rope" not in raised(f, normal(2, 3, 8), normal(3, 4))
    assert reasons(f, normal(2, 3, 8), normal(3, 4)) == [
        "the angles are made by input, not as positions times speeds"
    ]


def test_positions_that_are_an_argument_stay():
    def f(x, p):
        angles = qg.astype(p, mx.float32)[:, None] * SPEEDS["exponential"](1e4, 8)
        return turned(x, qg.cos(angles), qg.sin(angles), "halves")

    assert "rope" not in raised(f, normal(2, 3, 8), mx.array([0, 7, 3]))


def test_an_offset_that_is_no_integer_stays():
    def f(x, o):
        angles = (qg.arange(3, dtype=mx.float32) + o)[:, None] * SPEEDS["exponential"](1e4, 8)
        return turned(x, qg.cos(angles), qg.sin(angles), "halves")

    assert "rope" not in raised(f, normal(2, 3, 8), mx.array(0.5))


def test_positions_in_the_place_of_the_batch_are_no_offsets():
    """One row for each of the first axis, and known: they count up along it."""

    def f(x):
        angles = qg.arange(4, dtype=mx.float32)[:, None, None] * SPEEDS["exponential"](1e4, 8)
        return turned(x, qg.cos(angles), qg.sin(angles), "halves")

    counts = raised(f, normal(4, 1, 8))
    assert counts["rope"] == 1


def test_one_position_for_all_rows_is_not_many():
    def f(x):
        angles = qg.full((1, 1), 3.0) * SPEEDS["exponential"](1e4, 8)
        return turned(x, qg.cos(angles), qg.sin(angles), "halves")

    raised(f, normal(2, 4, 8))
    raised(f, normal(1, 4, 8))


def test_rope_of_heads_that_share_the_tables():
    """q and k of many layers: the tables are everybody's, and no reason against any."""

    def f(q, k):
        angles = qg.arange(3, dtype=mx.float32)[:, None] * SPEEDS["exponential"](1e4, 8)
        cos, sin = qg.cos(angles), qg.sin(angles)
        return turned(q, cos, sin, "halves"), turned(k, cos, sin, "neighbours")

    assert raised(f, normal(1, 4, 3, 8), normal(1, 2, 3, 8)) == {"rope": 2}


def test_turned_halves_that_something_else_reads_are_not_computed_twice():
    def f(x):
        angles = qg.arange(3, dtype=mx.float32)[:, None] * SPEEDS["exponential"](1e4, 8)
        cos, sin = qg.cos(angles), qg.sin(angles)
        a, b = x[..., :4], x[..., 4:]
        first = a * cos - b * sin
        return qg.concatenate([first, b * cos + a * sin], axis=-1), first + 1

    assert "rope" not in raised(f, normal(2, 3, 8))


def test_bases_are_those_of_few_digits():
    from qgraph_passes.raise_fast.angles import base_of

    half = 32

    def exact(base):
        return np.float64(base) ** (-np.arange(half) / half)

    assert base_of(exact(1234.5)) is None
    assert base_of(exact(1e4)[::-1]) is None
    assert base_of(-exact(1e4)) is None
    assert base_of(exact(1e4) * 2) is None
