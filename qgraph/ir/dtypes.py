"""Element types: one interned object each, with its names in the text form, in MLX and in NumPy."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, final

import mlx.core as mx

from qgraph._errors import DTypeError


@final
class DType:
    """An element type. Interned: compare with ``is``.

    >>> BF16, BF16.size, BF16.is_float
    (bf16, 2, True)
    """

    __slots__ = ("is_complex", "is_float", "is_int", "mlx", "mlx_name", "name", "size")
    all: ClassVar[dict[str, DType]] = {}

    def __init__(self, name: str, mlx_name: str) -> None:
        self.name = name
        self.mlx_name = mlx_name
        self.mlx: mx.Dtype = getattr(mx, mlx_name)
        self.size: int = self.mlx.size
        self.is_float = name in ("f16", "bf16", "f32", "f64")
        self.is_complex = name == "c64"
        self.is_int = name[0] in "iu"
        DType.all[name] = self

    def __repr__(self) -> str:
        """Print the name of the text form."""
        return self.name

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Copies and pickles of a type are the type itself."""
        return dtype_named, (self.name,)

    @property
    def unit_roundoff(self) -> float:
        """Half the distance from 1 to the next number; 0 for exact types."""
        return {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24, "f64": 2.0**-53}.get(self.name, 0.0)


BOOL = DType("bool", "bool_")
U8, U16, U32, U64 = (DType(f"u{n}", f"uint{n}") for n in (8, 16, 32, 64))
I8, I16, I32, I64 = (DType(f"i{n}", f"int{n}") for n in (8, 16, 32, 64))
F16, BF16 = DType("f16", "float16"), DType("bf16", "bfloat16")
F32, F64 = DType("f32", "float32"), DType("f64", "float64")
C64 = DType("c64", "complex64")

_FROM_MLX: dict[mx.Dtype, DType] = {d.mlx: d for d in DType.all.values()}


def dtype_named(name: str) -> DType:
    """The type that the text form calls `name`."""
    found = DType.all.get(name)
    if found is None:
        raise DTypeError(f"unknown dtype {name!r}", fix=f"use one of {', '.join(DType.all)}")
    return found


def dtype_of(given: mx.Dtype | DType) -> DType:
    """Our type for MLX's (or for itself).

    >>> dtype_of(mx.bfloat16)
    bf16
    """
    if isinstance(given, DType):
        return given
    found = _FROM_MLX.get(given) if isinstance(given, mx.Dtype) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if found is None:
        raise DTypeError(f"expected an MLX dtype, found {given!r}", fix="pass mx.float32, mx.bfloat16, …")
    return found


def int_range(dtype: DType) -> tuple[int, int]:
    """The smallest and the largest number of an integer dtype.

    >>> int_range(I8), int_range(U16)
    ((-128, 127), (0, 65535))
    """
    bits = 8 * dtype.size
    return (0, 2**bits - 1) if dtype.name[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@cache
def promote(*types: DType) -> DType:
    """The dtype of an operation on `types`, by MLX's rule.

    >>> promote(BF16, F16), promote(I32, BF16)
    (f32, bf16)
    """
    out = types[0]
    for other in types[1:]:
        if other is not out:
            out = _FROM_MLX[mx.result_type(out.mlx, other.mlx)]
    return out


def floating(dtype: DType) -> DType:
    """What a float function gives for `dtype`: itself, or f32 for the integers and bool."""
    return dtype if dtype.is_float or dtype.is_complex else F32
