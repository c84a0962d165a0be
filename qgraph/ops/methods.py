"""Operators and methods of traced values and QuantizedTensors: each is the function of its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from qgraph.ir.types import TensorType
from qgraph.ops import elementwise as e
from qgraph.ops import indexing, linear, positions, reduce, scan, shape, updates
from qgraph.ops.dispatch import Array, ArrayLike
from qgraph.quant import QuantizedTensor

# Every method is the function of the same name in `qg`, with the array first.
_SAME_NAME: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        *(
            e.abs,
            e.exp,
            e.log,
            e.log2,
            e.log10,
            e.log1p,
            e.sqrt,
            e.rsqrt,
            e.reciprocal,
            e.sin,
            e.cos,
            e.square,
        ),
        *(e.round, e.astype),
        *(
            shape.transpose,
            shape.reshape,
            shape.flatten,
            shape.squeeze,
            shape.swapaxes,
            shape.moveaxis,
            shape.split,
        ),
        *(reduce.sum, reduce.mean, reduce.max, reduce.min, reduce.prod, reduce.var, reduce.std, reduce.all),
        *(reduce.any, positions.argmax, positions.argmin, scan.cumsum, reduce.logsumexp),
    )
}


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: function(other, self)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "__neg__": e.negative,
    "__abs__": e.abs,
    "__invert__": e.bitwise_invert,
    "__eq__": e.equal,
    "__ne__": e.not_equal,
    "__lt__": e.less,
    "__le__": e.less_equal,
    "__gt__": e.greater,
    "__ge__": e.greater_equal,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": e.add,
    "sub": e.subtract,
    "mul": e.multiply,
    "truediv": e.divide,
    "floordiv": e.floor_divide,
    "mod": e.remainder,
    "pow": e.power,
    "and": e.bitwise_and,
    "or": e.bitwise_or,
    "xor": e.bitwise_xor,
    "lshift": e.left_shift,
    "rshift": e.right_shift,
    "matmul": linear.dot,
}
for _name, _function in _BINARY.items():
    _OPERATORS[f"__{_name}__"] = _function
    _OPERATORS[f"__r{_name}__"] = _reflected(_function)
_NUMPY_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    f.__name__: f
    for f in (
        e.add,
        e.subtract,
        e.multiply,
        e.divide,
        e.floor_divide,
        e.remainder,
        e.power,
        e.equal,
        e.not_equal,
        *(e.less, e.less_equal, e.greater, e.greater_equal),
    )
} | {"matmul": linear.dot}


class ArrayMethods:
    """What an array can do, in terms of the `qg` functions. Subclasses give shape and dtype."""

    __slots__ = ()
    _type: TensorType

    @property
    def type(self) -> TensorType:
        """Shape, dtype and packing."""
        return self._type

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self._type.shape

    @property
    def dtype(self) -> mx.Dtype:
        """The logical dtype, as MLX's."""
        return self._type.dtype.mlx

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._type.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._type.size

    @property
    def T(self) -> Array:
        """All axes reversed."""
        return shape.transpose(self)

    @property
    def at(self) -> updates.At:
        """``x.at[index].add(v)``, ``.set(v)`` …: an updated copy."""
        return updates.At(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """NumPy's operators with an array of theirs, or a number, on the left: ``np.float32(2) * x``."""
        function = _NUMPY_OPERATORS.get(ufunc.__name__)
        if function is None or method != "__call__" or kwargs:
            return NotImplemented
        return function(*inputs)

    def __getitem__(self, index: Any) -> Array:
        return indexing.getitem(self, index)

    def transpose(self, *axes: Any) -> Array:
        """Reorder axes; all reversed without arguments."""
        given: Sequence[int] | None = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        return shape.transpose(self, given or None)

    def reshape(self, *sizes: Any) -> Array:
        """Another shape, as numbers or as one sequence."""
        return shape.reshape(self, sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)


def _attach(cls: Any, names: dict[str, Callable[..., Any]]) -> None:
    for name, function in names.items():
        if name not in cls.__dict__:
            setattr(cls, name, _method(function))


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method.__name__, method.__doc__ = function.__name__, function.__doc__
    return method


_attach(ArrayMethods, {**_SAME_NAME, **_OPERATORS})
# A QuantizedTensor compares and hashes by identity, as a value of a dictionary of weights should.
_BY_IDENTITY = {"__eq__", "__ne__"}
_attach(QuantizedTensor, {**_SAME_NAME, **{k: f for k, f in _OPERATORS.items() if k not in _BY_IDENTITY}})
for _shared in ("T", "at", "__getitem__", "transpose", "reshape"):
    setattr(QuantizedTensor, _shared, ArrayMethods.__dict__[_shared])


def _ufunc(self: QuantizedTensor, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
    """As for a traced value; what is no operator would see packed words."""
    found = ArrayMethods.__array_ufunc__(self, ufunc, method, *inputs, **kwargs)  # pyright: ignore[reportArgumentType]
    return self._refuse(f"numpy.{ufunc.__name__}") if found is NotImplemented else found


QuantizedTensor.__array_ufunc__ = _ufunc  # pyright: ignore[reportAttributeAccessIssue]

__all__ = ["ArrayLike", "ArrayMethods", "mx"]
