"""Types of graph values: shape, dtype and, for a quantized value, how it is packed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import BF16, F16, F32, U8, U32, DType, dtype_named
from qgraph.quant.scheme import Quantization

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packing:
    """How a quantized value is stored.

    `axis` is the logical axis, counted from the end, along which groups run. The storage has that axis
    last: the transpose of a packed (N, K) matrix is the same storage with axis -2. `scales` is the dtype
    of the scales, which may differ from the logical dtype after a cast. Text: ``affine4g64``, then
    ``@-2`` for another axis, ``/f32`` for another dtype of the scales, ``*`` with a global scale.
    """

    quantization: Quantization
    scales: DType
    axis: int = -1
    global_scale: bool = False

    def at(self, axis: int) -> Packing:
        """The same packing with groups along `axis` (negative)."""
        return Packing(self.quantization, self.scales, axis, self.global_scale)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the arrays that store the value, in order."""
        biases = ("biases",) if self.quantization.has_biases else ()
        return ("packed", "scales", *biases, *(("global_scale",) if self.global_scale else ()))


class Component(NamedTuple):
    """One of the arrays that hold a value."""

    name: str  # empty for a dense value
    shape: Shape
    dtype: DType


@dataclass(frozen=True, slots=True, eq=False)
class TensorType:
    """Shape, dtype and packing of a value; shape and dtype are the logical ones.

    >>> from qgraph.ir.dtypes import BF16
    >>> print(TensorType((2, 64), BF16, Packing(Quantization(bits=4, group_size=64), BF16)))
    bf16[2,64]:affine4g64
    """

    shape: Shape
    dtype: DType
    packing: Packing | None = None
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.shape, self.dtype.name, self.packing)))

    def __hash__(self) -> int:
        """Computed once: types are keys of every table."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Equal in shape, dtype and packing."""
        if self is other:
            return True
        if not isinstance(other, TensorType) or self._hash != other._hash:
            return False
        same = self.shape == other.shape and self.dtype is other.dtype
        return same and self.packing == other.packing

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def quantization(self) -> Quantization | None:
        """The scheme of a quantized value, None for a dense one."""
        return self.packing.quantization if self.packing else None

    @property
    def nbytes(self) -> int:
        """Bytes of the storage: packed words, scales and biases for a quantized value."""
        if self.packing is None:
            return self.size * self.dtype.size
        q, scale = self.packing.quantization, self.packing.scales.size
        groups = self.size // q.group_size
        return self.size * q.bits // 8 + groups * scale * (2 if q.has_biases else 1)

    @property
    def storage_axes(self) -> tuple[int, ...]:
        """The logical axes in the order of the storage: the packed one last."""
        axes = list(range(self.ndim))
        if self.packing:
            axes.append(axes.pop(self.ndim + self.packing.axis))
        return tuple(axes)

    @property
    def storage(self) -> tuple[Component, ...]:
        """The arrays that hold the value, in order: what a program takes and gives for it.

        Errors: ShapeError, DTypeError for a type that no arrays can have (see `check`).

        >>> from qgraph.ir.dtypes import BF16
        >>> scheme = Quantization(bits=4, group_size=64)
        >>> TensorType((128, 8), BF16, Packing(scheme, BF16, axis=-2)).storage[0]
        Component(name='packed', shape=(8, 16), dtype=u32)
        """
        p = self.packing
        if p is None:
            return (Component("", self.shape, self.dtype),)
        self.check()
        shapes = p.quantization.storage_shapes(tuple(self.shape[a] for a in self.storage_axes))
        parts = [Component(n, s, U32 if n == "packed" else p.scales) for n, s in shapes.items()]
        return (*parts, Component("global_scale", (), F32)) if p.global_scale else tuple(parts)

    def check(self) -> None:
        """Raise unless there can be such a value: the storage of a quantized one must exist.

        Errors: ShapeError, DTypeError.
        """
        p = self.packing
        if p is None:
            return
        q = p.quantization
        if self.ndim < 2 or not -self.ndim <= p.axis <= -1:
            raise ShapeError(
                f"{self}: a quantized value of rank {self.ndim} with groups along axis {p.axis}",
                fix=f"it has two axes or more; count the axis from the end, -{max(self.ndim, 2)} to -1",
            )
        if self.shape[p.axis] % q.group_size:
            raise ShapeError(
                f"{self}: axis {p.axis} has {self.shape[p.axis]} numbers, no whole groups of {q.group_size}",
                fix="keep whole groups together, or dequantize first",
            )
        allowed = (F32, F16, BF16) if q.has_biases else (U8,)
        if p.scales not in allowed or self.dtype not in (F32, F16, BF16):
            raise DTypeError(
                f"{self}: {q} has scales of {' or '.join(map(str, allowed))} and numbers of f32, f16 or bf16",
                fix="check the mode: only affine has float scales",
            )
        if p.global_scale and q.mode != "nvfp4":
            raise DTypeError(f"{self}: {q} takes no global scale", fix="only nvfp4 has one")

    def dense(self) -> TensorType:
        """The same shape and dtype, not quantized."""
        return self if self.packing is None else TensorType(self.shape, self.dtype)

    def __str__(self) -> str:
        """The type in the text form."""
        text = f"{self.dtype.name}[{','.join(map(str, self.shape))}]"
        p = self.packing
        if p is None:
            return text
        axis = "" if p.axis == -1 else f"@{p.axis}"
        scales = "" if p.scales is _usual_scales(p.quantization, self.dtype) else f"/{p.scales.name}"
        return f"{text}:{p.quantization}{axis}{scales}{'*' if p.global_scale else ''}"


def _usual_scales(scheme: Quantization, dtype: DType) -> DType:
    """The dtype of scales that the text form leaves out."""
    return dtype if scheme.has_biases else U8


_TYPE = re.compile(
    r"(?P<dtype>\w+)\[(?P<shape>[\d,]*)\](?::(?P<tag>\w+)(?:@(?P<axis>-\d+))?(?:/(?P<scales>\w+))?(?P<gs>\*)?)?"
)


def parse_type(text: str) -> TensorType:
    """Read what ``str(type)`` prints.

    >>> parse_type("bf16[64,2]:affine4g64@-2").packing.axis
    -2
    """
    m = _TYPE.fullmatch(text.strip())
    if m is None:
        raise ShapeError(f"not a type: {text!r}", fix="write e.g. bf16[1,4096] or bf16[64,128]:affine4g64")
    dtype = dtype_named(m["dtype"])
    shape = tuple(int(n) for n in m["shape"].split(",") if n)
    if m["tag"] is None:
        return TensorType(shape, dtype)
    scheme = Quantization.parse(m["tag"])
    scales = dtype_named(m["scales"]) if m["scales"] else _usual_scales(scheme, dtype)
    packing = Packing(scheme, scales, int(m["axis"] or -1), m["gs"] is not None)
    found = TensorType(shape, dtype, packing)
    found.check()
    return found


def broadcast_shapes(*shapes: Shape) -> Shape:
    """NumPy's broadcast of `shapes`; ShapeError where they do not fit.

    >>> broadcast_shapes((3, 1), (4,))
    (3, 4)
    """
    first = shapes[0]
    if all(s == first for s in shapes):
        return first
    ndim = max(map(len, shapes))
    out: list[int] = []
    for i in range(-ndim, 0):
        sizes = {s[i] for s in shapes if len(s) >= -i} - {1}
        if len(sizes) > 1:
            listed = " and ".join(str(s) for s in shapes)
            raise ShapeError(
                f"shapes {listed} do not broadcast (axis {i})",
                fix="make the sizes equal or 1 on every axis, counted from the last",
            )
        out.append(sizes.pop() if sizes else 1)
    return tuple(out)


def normalize_axis(axis: int, ndim: int, what: str = "axis") -> int:
    """`axis` as a non-negative number; ShapeError when out of range.

    >>> normalize_axis(-1, 3)
    2
    """
    if not -ndim <= axis < ndim:
        raise ShapeError(f"{what} {axis} is out of range for rank {ndim}", fix=f"use {-ndim}..{ndim - 1}")
    return axis % ndim if ndim else 0
