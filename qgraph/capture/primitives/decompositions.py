"""Decompositions of matrices, which MLX computes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.capture.primitives.table import Primitive, primitive
from qgraph.ir import Value
from qgraph.ops.linalg import Cholesky, Eig, Eigh, Inverse, Qr, Svd


@primitive("Inverse")
def inverse(p: Primitive) -> Value:
    """[triangular, upper]: the second means something for triangles only."""
    triangular, upper = map(bool, p.arguments)
    return p.add(Inverse(triangular, triangular and upper), *p.inputs)


@primitive("Cholesky")
def cholesky(p: Primitive) -> Value:
    """[upper]."""
    return p.add(Cholesky(bool(p.arguments[0])), *p.inputs)


@primitive("QRF")
def qr(p: Primitive) -> Sequence[Value]:
    """No arguments."""
    return p.node(Qr(), *p.inputs)


@primitive("SVD")
def svd(p: Primitive) -> Sequence[Value]:
    """[with vectors]."""
    return p.node(Svd(bool(p.arguments[0])), *p.inputs)


@primitive("Eigh")
def eigh(p: Primitive) -> Sequence[Value]:
    """[triangle, with vectors]."""
    return p.node(Eigh(str(p.arguments[0]), bool(p.arguments[1])), *p.inputs)


@primitive("Eig")
def eig(p: Primitive) -> Sequence[Value]:
    """[with vectors]."""
    return p.node(Eig(bool(p.arguments[0])), *p.inputs)
