"""Contractions against NumPy, dense and packed, and the errors of shapes that do not fit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from qgraph import DTypeError, ShapeError
from qgraph.ir.dtypes import F32
from qgraph.numeric import tolerance
from tests.ops.cases import data, seeds


def check(found, exact, magnitude, k):
    exact = np.asarray(exact)
    assert found.shape == exact.shape
    assert np.all(tolerance(F32, max(1, k), "P2").allows(np.array(found), exact, magnitude))


def both(function, operands, k):
    """MLX's and NumPy's result of `function(namespace, operands)`, compared."""
    exact = [np.array(x, np.float64) for x in operands]
    check(function(qg, *operands), function(np, *exact), function(np, *map(np.abs, exact)), k)


EINSUM = [
    ("ij,jk->ik", "ij jk"),
    ("ij,jk", "ij jk"),
    ("ij,kj->ik", "ij kj"),
    ("bij,bjk->bik", "bij bjk"),
    ("bqhd,bkhd->bhqk", "bqhd bkhd"),
    ("bhqk,bkhd->bqhd", "bhqk bkhd"),
    ("ij,ij->", "ij ij"),
    ("i,j->ij", "i j"),
    ("i,j->ji", "i j"),
    ("i,i->i", "i i"),
    ("ijk->", "ijk"),
    ("ijk->kj", "ijk"),
    ("ij->ji", "ij"),
    ("ab,bc,cd->ad", "ab bc cd"),
    ("ab,cd->abcd", "ab cd"),
    ("abc,b->ac", "abc b"),
    ("abc,cb->a", "abc cb"),
    ("a,abc,c->b", "a abc c"),
    (" i j , j k -> i k ", "ij jk"),
]


@pytest.mark.parametrize(("subscripts", "terms"), EINSUM)
def test_einsum(subscripts, terms):
    size = {c: n for c, n in zip("abcdijkhqb", (2, 3, 4, 5, 2, 3, 4, 2, 3, 2), strict=True)}
    operands = [data(i, tuple(size[c] for c in t), F32) for i, t in enumerate(terms.split())]
    both(lambda m, *x: m.einsum(subscripts, *x), operands, 64)


@pytest.mark.parametrize(
    "axes", [0, 1, 2, ((0,), (1,)), ((1, 2), (0, 2)), ((2, 0), (2, 1)), ((-1,), (-1,)), ((), ())]
)
def test_tensordot(axes):
    shapes = {0: ((2, 3), (4,)), 1: ((2, 3, 4), (4, 5)), 2: ((2, 3, 4), (3, 4, 5))}
    shapes |= {((0,), (1,)): ((2, 3, 4), (5, 2)), ((1, 2), (0, 2)): ((2, 3, 4), (3, 5, 4))}
    shapes |= {
        ((2, 0), (2, 1)): ((2, 3, 4), (5, 2, 4)),
        ((-1,), (-1,)): ((2, 3), (4, 3)),
        ((), ()): ((2,), (3,)),
    }
    operands = [data(i, s, F32) for i, s in enumerate(shapes[axes])]
    both(lambda m, a, b: m.tensordot(a, b, axes), operands, 64)


@pytest.mark.parametrize(
    ("a", "b"), [((3,), (3,)), ((2, 3), (3,)), ((2, 3), (4, 5, 3)), ((), (2, 3)), ((2,), ())]
)
def test_inner_and_outer(a, b):
    operands = data(0, a, F32), data(1, b, F32)
    both(lambda m, x, y: m.inner(x, y), operands, 3)
    both(lambda m, x, y: m.outer(x, y), operands, 1)


@pytest.mark.parametrize(("a", "b", "axis"), [((3,), (3,), -1), ((2, 3), (2, 3), 0), ((2, 1, 3), (4, 3), -1)])
def test_vecdot(a, b, axis):
    x, y = np.array(data(0, a, F32), np.float64), np.array(data(1, b, F32), np.float64)
    found = qg.vecdot(data(0, a, F32), data(1, b, F32), axis)
    check(found, np.sum(x * y, axis), np.sum(np.abs(x * y), axis), 3)


@pytest.mark.parametrize("c", [(), (5,), (2, 5), (1, 5), (2, 1)])
def test_addmm(c):
    operands = data(0, c, F32), data(1, (2, 4), F32), data(2, (4, 5), F32)
    exact = [np.array(x, np.float64) for x in operands]
    for alpha, beta in ((1.0, 1.0), (0.5, -2.0)):
        expected = alpha * exact[1] @ exact[2] + beta * exact[0]
        magnitude = abs(alpha) * np.abs(exact[1]) @ np.abs(exact[2]) + abs(beta) * np.abs(exact[0])
        check(qg.addmm(*operands, alpha, beta), expected, magnitude, 5)


@given(st.sampled_from(["nk", "kn"]), st.integers(0, 2), seeds)
def test_a_contraction_of_a_packed_weight_is_that_of_its_numbers(stored, rank, seed):
    w = qg.quantize(data(seed, (8, 64), F32), bits=4, group_size=32)
    x = data(seed + 1, (*(2, 3)[:rank], 64), F32)
    rows, k = np.array(qg.dequantize(w), np.float64), np.array(x, np.float64)
    if stored == "nk":
        found = [qg.dot(x, w.T), qg.tensordot(x, w, ((-1,), (1,))), qg.inner(x, w)]
        exact, magnitude = k @ rows.T, np.abs(k) @ np.abs(rows.T)
    else:
        x = x[..., :8]
        found = [qg.dot(x, w), qg.tensordot(x, w, 1)]
        exact, magnitude = k[..., :8] @ rows, np.abs(k[..., :8]) @ np.abs(rows)
    for y in found:
        check(y, exact, magnitude, 64)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda a: qg.dot(a, a), "inner sizes differ, 3 (lhs axis -1) and 2 (rhs axis -2)"),
        (lambda a: qg.dot(a, mx.zeros(2)), "inner sizes differ, 3 (lhs axis -1) and 2 (rhs axis -1)"),
        (lambda a: qg.dot(mx.zeros((5, 1, 3)), mx.zeros((2, 3, 1))), "batch axes (5,) and (2,)"),
        (lambda a: qg.dot(a, mx.array(1.0)), "a scalar cannot be contracted"),
        (lambda a: qg.tensordot(a, a, 1), "do not pair"),
        (lambda a: qg.tensordot(a, a, 5), "tensordot"),
        (lambda a: qg.tensordot(a, a, ((0, 1), (0,))), "do not pair"),
        (lambda a: qg.tensordot(a, a, ((7,), (0,))), "out of range"),
        (lambda a: qg.inner(a, mx.zeros((2, 2))), "do not pair"),
        (lambda a: qg.vecdot(a, mx.zeros((2, 2))), "inner sizes differ"),
        (lambda a: qg.einsum("ij,jk->ik", a, a), "index 'j' has sizes 3 and 2"),
        (lambda a: qg.einsum("ij,jk->il", a, a.T), "does not fit"),
        (lambda a: qg.einsum("ijk->i", a), "names 3 axes of an operand of rank 2"),
        (lambda a: qg.einsum("ii->i", a), "index 'i' has sizes 2 and 3"),
        (lambda a: qg.einsum("ij->ii", a), "each once"),
        (lambda a: qg.einsum("...i->i", a), "lacks the ... of its left"),
        (lambda a: qg.einsum("......->", a), "cannot read"),
        (lambda a: qg.einsum("i.j->ij", a), "cannot read"),
        (lambda a: qg.einsum("ij,jk", a), "does not fit"),
        (lambda a: qg.einsum("ij", a, a), "does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, text):
    with pytest.raises(ShapeError) as caught:
        call(mx.zeros((2, 3)))
    assert text in str(caught.value)


def test_integers_are_not_multiplied():
    with pytest.raises(DTypeError, match="cast one"):
        qg.dot(mx.zeros((2, 2), mx.int32), mx.zeros((2, 2), mx.int32))
