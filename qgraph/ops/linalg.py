"""Decompositions of matrices, as MLX has them: in float32, on the CPU.

Which signs the vectors of a decomposition have, and the phases of complex ones, is the library's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import C64, F32, F64
from qgraph.ir.op import Op, Operand, Types
from qgraph.ir.types import Shape, TensorType
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, frontend_of, operand

__all__ = ["cholesky", "eig", "eigh", "eigvals", "eigvalsh", "inv", "qr", "svd", "tri_inv"]

_np: Any = np  # for expressions of Any, whose types NumPy's stubs do not know


class Decomposition(Op):
    """An op on the matrices that the last two axes hold; `call` is MLX's function and its arguments."""

    square: ClassVar[bool] = True
    numpy: ClassVar[Callable[..., Any]]  # what `reference` is for matrices that have a decomposition

    def reference(self, a: Any) -> Any:
        """NumPy's; NaN where there is none, e.g. of a singular matrix."""
        try:
            return self.numpy(a)
        except np.linalg.LinAlgError:
            types = self.infer(TensorType(np.shape(a), F32))
            kinds = types if isinstance(types, tuple) else (types,)
            made = [np.full(t.shape, np.nan, np.complex128 if t.dtype is C64 else None) for t in kinds]
            return tuple(made) if isinstance(types, tuple) else made[0]

    def check(self, a: TensorType) -> tuple[Shape, int, int]:
        """The axes before the matrices, and their sizes."""
        if a.dtype not in (F32, F64):
            raise DTypeError(f"{self.name}: the matrices are {a.dtype}", fix="cast them to float32")
        if a.ndim < 2 or (self.square and a.shape[-1] != a.shape[-2]) or not a.size:
            kind = "square matrices" if self.square else "matrices"
            raise ShapeError(f"{self.name}: an array of shape {a.shape}", fix=f"give {kind} with elements")
        return a.shape[:-2], a.shape[-2], a.shape[-1]

    def flops(self, inputs: Types, outputs: Types) -> int:
        """A few times n³ for every matrix."""
        return 4 * inputs[0].size * inputs[0].shape[-1]


@dataclass(frozen=True)
class Inverse(Decomposition):
    """The inverses; with `triangular` of the upper or lower triangles, the rest not looked at."""

    name = "inverse"
    triangular: bool = False
    upper: bool = False

    def infer(self, a: TensorType) -> TensorType:
        """The type of a."""
        self.check(a)
        return a.dense()

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.linalg.inv` or `mx.linalg.tri_inv`."""
        if self.triangular:
            return f"mx.linalg.tri_inv({operands[0]}, {self.upper}, stream=mx.cpu)"
        return f"mx.linalg.inv({operands[0]}, stream=mx.cpu)"

    def numpy(self, a: Any) -> Any:
        half: Any = (_np.triu if self.upper else _np.tril)(a) if self.triangular else a
        return _np.linalg.inv(half)


@dataclass(frozen=True)
class Cholesky(Decomposition):
    """The triangle whose product with its transpose the matrices are; they are symmetric and positive."""

    name = "cholesky"
    mlx = "mx.linalg.cholesky({0}, {upper}, stream=mx.cpu)"
    upper: bool = False

    def infer(self, a: TensorType) -> TensorType:
        """The type of a."""
        self.check(a)
        return a.dense()

    def numpy(self, a: Any) -> Any:
        lower = _np.linalg.cholesky(a)
        return np.swapaxes(lower, -1, -2) if self.upper else lower


@dataclass(frozen=True)
class Qr(Decomposition):
    """Orthonormal columns, and an upper triangle: their product is the matrix."""

    name = "qr"
    mlx = "mx.linalg.qr({0}, stream=mx.cpu)"
    square = False

    def infer(self, a: TensorType) -> Types:
        """(rows, k) and (k, columns), k being the smaller of both."""
        batch, m, n = self.check(a)
        k = min(m, n)
        return TensorType((*batch, m, k), a.dtype), TensorType((*batch, k, n), a.dtype)

    def numpy(self, a: Any) -> Any:
        return tuple(np.linalg.qr(a))


@dataclass(frozen=True)
class Svd(Decomposition):
    """The singular values in falling order; with `vectors` between left and right vectors, all of them."""

    name = "svd"
    mlx = "mx.linalg.svd({0}, compute_uv={vectors}, stream=mx.cpu)"
    square = False
    vectors: bool = True

    def infer(self, a: TensorType) -> TensorType | Types:
        """(k), or (rows, rows), (k) and (columns, columns)."""
        batch, m, n = self.check(a)
        values = TensorType((*batch, min(m, n)), a.dtype)
        if not self.vectors:
            return values
        return TensorType((*batch, m, m), a.dtype), values, TensorType((*batch, n, n), a.dtype)

    def numpy(self, a: Any) -> Any:
        made: Any = np.linalg.svd(a, compute_uv=self.vectors)
        return tuple(made) if self.vectors else made


@dataclass(frozen=True)
class Eigh(Decomposition):
    """The eigenvalues of symmetric matrices, rising; with `vectors` the eigenvectors as columns.

    Only the triangle that `uplo` names is looked at.
    """

    name = "eigh"
    uplo: str = "L"
    vectors: bool = True

    def infer(self, a: TensorType) -> TensorType | Types:
        """(n), or (n) and (n, n)."""
        batch, n, _ = self.check(a)
        values = TensorType((*batch, n), a.dtype)
        return (values, a.dense()) if self.vectors else values

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.linalg.eigh` or `mx.linalg.eigvalsh`."""
        function = "eigh" if self.vectors else "eigvalsh"
        return f"mx.linalg.{function}({operands[0]}, {self.uplo!r}, stream=mx.cpu)"

    def numpy(self, a: Any) -> Any:
        return tuple(_np.linalg.eigh(a, self.uplo)) if self.vectors else _np.linalg.eigvalsh(a, self.uplo)


@dataclass(frozen=True)
class Eig(Decomposition):
    """The eigenvalues of any square matrices, complex; with `vectors` the eigenvectors as columns."""

    name = "eig"
    vectors: bool = True

    def infer(self, a: TensorType) -> TensorType | Types:
        """(n), or (n) and (n, n), complex."""
        batch, n, _ = self.check(a)
        values = TensorType((*batch, n), C64)
        return (values, TensorType(a.shape, C64)) if self.vectors else values

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.linalg.eig` or `mx.linalg.eigvals`."""
        return f"mx.linalg.{'eig' if self.vectors else 'eigvals'}({operands[0]}, stream=mx.cpu)"

    def numpy(self, a: Any) -> Any:
        """Complex whatever the eigenvalues are."""
        if not self.vectors:
            return _np.linalg.eigvals(a).astype(np.complex128)
        return tuple(np.asarray(x, np.complex128) for x in _np.linalg.eig(a))


@frontend_of("inverse")
def inv(a: ArrayLike) -> Array:
    """The inverses of square matrices.  Source: mlx.core.linalg.inv."""
    return apply(Inverse(), operand(a))


@frontend_of("inverse")
def tri_inv(a: ArrayLike, upper: bool = False) -> Array:
    """The inverses of triangular matrices.  Source: mlx.core.linalg.tri_inv."""
    return apply(Inverse(True, upper), operand(a))


@frontend
def cholesky(a: ArrayLike, upper: bool = False) -> Array:
    """The lower (or `upper`) triangle whose square `a` is.  Source: mlx.core.linalg.cholesky.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.linalg.cholesky(mx.array([[4.0]])).tolist()
    [[2.0]]
    """
    return apply(Cholesky(upper), operand(a))


@frontend
def qr(a: ArrayLike) -> tuple[Array, Array]:
    """Orthonormal columns and an upper triangle.  Source: mlx.core.linalg.qr."""
    return apply(Qr(), operand(a))


@frontend
def svd(a: ArrayLike, compute_uv: bool = True) -> Any:
    """Left vectors, singular values and right vectors; or the values alone.  Source: mlx.core.linalg.svd."""
    return apply(Svd(compute_uv), operand(a))


@frontend
def eigh(a: ArrayLike, UPLO: str = "L") -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of symmetric matrices.  Source: mlx.core.linalg.eigh."""
    return apply(Eigh(_triangle(UPLO)), operand(a))


@frontend_of("eigh")
def eigvalsh(a: ArrayLike, UPLO: str = "L") -> Array:
    """The eigenvalues of symmetric matrices.  Source: mlx.core.linalg.eigvalsh."""
    return apply(Eigh(_triangle(UPLO), vectors=False), operand(a))


@frontend
def eig(a: ArrayLike) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of square matrices, complex.  Source: mlx.core.linalg.eig."""
    return apply(Eig(), operand(a))


@frontend_of("eig")
def eigvals(a: ArrayLike) -> Array:
    """The eigenvalues of square matrices, complex.  Source: mlx.core.linalg.eigvals."""
    return apply(Eig(vectors=False), operand(a))


def _triangle(uplo: str) -> str:
    if uplo not in ("L", "U"):
        raise ShapeError(f"eigh: UPLO={uplo!r}", fix='use "L" or "U"')
    return uplo
