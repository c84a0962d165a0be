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


def test_the_public_functions_are_mlxs():
    a = normal(2, 3, 3) + 3 * mx.eye(3)
    square = a @ mx.swapaxes(a, -1, -2)
    calls = [
        *[("inv", a, {}), ("tri_inv", a, {}), ("tri_inv", a, {"upper": True}), ("qr", a, {}), ("svd", a, {})],
        *[("svd", a, {"compute_uv": False}), ("cholesky", square, {}), ("cholesky", square, {"upper": True})],
        *[("eigh", a, {"UPLO": "U"}), ("eigvalsh", a, {}), ("eig", a, {}), ("eigvals", a, {})],
    ]
    assert {name for name, *_ in calls} == set(qg.linalg.__all__)
    for name, x, options in calls:
        expected = getattr(mx.linalg, name)(x, **options, stream=mx.cpu)
        for f in (getattr(qg.linalg, name), qg.jit(getattr(qg.linalg, name))):
            found = f(x, **options)
            pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
            assert all((p == q).all() for p, q in pairs), name
    with pytest.raises(qg.ShapeError, match="UPLO"):
        qg.linalg.eigh(a, "X")


@pytest.mark.parametrize("name", qg.fft.__all__)
@pytest.mark.parametrize("sizes", [None, 3, 6])
@pytest.mark.parametrize("axis", [-1, 0])
def test_fourier_transforms_are_mlxs(name, sizes, axis):
    x = normal(4, 5) if name.startswith("r") else normal(4, 5) + 1j * normal(4, 5, seed=1)
    if name.endswith("n"):
        arguments = {"s": sizes and [sizes, sizes + 1], "axes": [0, 1] if axis else [1, 0]}
    else:
        arguments = {"n": sizes, "axis": axis}
    expected = getattr(mx.fft, name)(x, **arguments)
    assert (getattr(qg.fft, name)(x, **arguments) == expected).all()
    assert (qg.jit(lambda x: getattr(qg.fft, name)(x, **arguments))(x) == expected).all()


def test_sizes_that_do_not_fit_the_axes_are_refused():
    with pytest.raises(qg.ShapeError, match="one size for each axis"):
        qg.fft.fftn(mx.ones((2, 2)), [2, 2], [0])


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
