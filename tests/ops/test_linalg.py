"""Decompositions give the matrices back, whatever signs their vectors have."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.execute.reference import to_numpy
from qgraph.ir.dtypes import F32
from qgraph.ops.dispatch import apply
from qgraph.ops.linalg import Cholesky, Eig, Eigh, Inverse, Qr, Svd
from tests.agree import assert_close, normal

SHAPES = [(3, 3), (2, 4, 4), (1, 1)]


def near(found, expected, n):
    assert_close(found, expected, F32, k=n, magnitude=16.0 * n)


def made(op, a, which):
    """The results by MLX or by the reference, in float64."""
    if which == "reference":
        out = op.reference(to_numpy(a))
        return list(out) if isinstance(out, tuple) else [out]
    out = apply(op, a)
    return [to_numpy(x) for x in (out if isinstance(out, tuple) else (out,))]


both = pytest.mark.parametrize("which", ["mlx", "reference"])


@both
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5), (2, 5, 3)])
def test_qr_and_svd(shape, which):
    a = normal(*shape)
    q, r = made(Qr(), a, which)
    near(q @ r, to_numpy(a), shape[-1])
    near(
        np.swapaxes(q, -1, -2) @ q,
        np.broadcast_to(np.eye(q.shape[-1]), r.shape[:-1] + q.shape[-1:]),
        shape[-1],
    )
    assert not np.any(np.tril(r, -1))
    u, s, v = made(Svd(), a, which)
    k = s.shape[-1]
    near((u[..., :k] * s[..., None, :]) @ v[..., :k, :], to_numpy(a), shape[-1])
    near(made(Svd(vectors=False), a, which)[0], s, k)


@both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("uplo", ["L", "U"])
def test_eigh_looks_at_one_triangle(shape, uplo, which):
    a = normal(*shape)
    half = np.tril(to_numpy(a)) if uplo == "L" else np.triu(to_numpy(a))
    whole = half + np.swapaxes(half, -1, -2) - half * np.eye(shape[-1])
    values, vectors = made(Eigh(uplo), a, which)
    near((vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2), whole, shape[-1])
    near(made(Eigh(uplo, vectors=False), a, which)[0], values, shape[-1])


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_eig(shape, which):
    a = normal(*shape)
    values, vectors = made(Eig(), a, which)
    near(to_numpy(a) @ vectors, vectors * values[..., None, :], shape[-1])
    near(np.sort(made(Eig(vectors=False), a, which)[0]), np.sort(values), shape[-1])


@both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("upper", [False, True])
def test_cholesky_and_inverse(shape, upper, which):
    a = normal(*shape) / 4 + 2 * mx.eye(shape[-1])
    square = a @ mx.swapaxes(a, -1, -2)
    [c] = made(Cholesky(upper), square, which)
    lower = np.swapaxes(c, -1, -2) if upper else c
    near(lower @ np.swapaxes(lower, -1, -2), to_numpy(square), shape[-1])
    assert not np.any(np.triu(lower, 1))
    one = np.broadcast_to(np.eye(shape[-1]), shape)
    near(to_numpy(a) @ made(Inverse(), a, which)[0], one, shape[-1])
    half = (np.triu if upper else np.tril)(to_numpy(a))
    near(half @ made(Inverse(True, upper), a, which)[0], one, shape[-1])


@pytest.mark.parametrize("op", [Inverse(), Cholesky(), Qr(), Svd(), Eigh(), Eig()])
def test_what_mlx_has_no_decomposition_of_is_refused(op):
    with pytest.raises(qg.DTypeError, match="cast"):
        apply(op, mx.ones((3, 3), mx.bfloat16))
    with pytest.raises(qg.ShapeError, match="matrices"):
        apply(op, mx.ones((3,)))
    with pytest.raises(qg.ShapeError, match="with elements"):
        apply(op, mx.ones((0, 0)))
    if op.square:
        with pytest.raises(qg.ShapeError, match="square"):
            apply(op, mx.ones((3, 2)))
