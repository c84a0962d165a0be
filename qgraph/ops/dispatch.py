"""How a public function reaches an interpreter: the trace that is active in this thread, or eager MLX.

Every function of the `qg` namespace ends in ``apply(op, *operands)``. Inside `qg.jit` that records a
node; in a rule's pattern it records a pattern; elsewhere it runs at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import mlx.core as mx

from qgraph._errors import DTypeError, QGraphError
from qgraph.ir.dtypes import BOOL, F32, I32, DType, dtype_of
from qgraph.ir.op import Constant, Op
from qgraph.ir.types import Packing, TensorType
from qgraph.quant import QuantizedTensor

Array = mx.array  # what users get back; inside a trace a traced value stands in for it
ArrayLike = Any  # mx.array, QuantizedTensor, traced value, NumPy array or Python scalar
Scalar = (bool, int, float)

P = ParamSpec("P")
R = TypeVar("R")


class Interpreter(Protocol):
    """Gives meaning to ops."""

    def apply(self, op: Op, operands: tuple[Any, ...]) -> Any:
        """The results of `op`: one, or a tuple for an op with several."""
        ...


class Recorder(Protocol):
    """Records calls of public functions by name, while a rule's pattern is traced."""

    def record(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the call stands for in the pattern."""
        ...


class _Current(threading.local):
    interpreter: Interpreter | None = None
    recorder: Recorder | None = None


_current = _Current()
_eager: list[Interpreter] = []


def install_eager(interpreter: Interpreter) -> None:
    """Set what runs ops outside any trace; called once, by `qgraph.execute`."""
    _eager[:] = [interpreter]


@contextmanager
def interpreting(interpreter: Interpreter | None) -> Generator[None]:
    """Make `interpreter` the active one in this thread (None: eager)."""
    before, _current.interpreter = _current.interpreter, interpreter
    try:
        yield
    finally:
        _current.interpreter = before


def run_under(interpreter: Interpreter | None, body: Callable[[], R]) -> R:
    """Call `body` with `interpreter` active, and leave no trace of it whatever happens.

    Where a Ctrl-C may come this is to be used in place of `interpreting`: Python may raise it when a
    context manager's __exit__ begins, which then never runs, but not between two statements without a call.
    """
    before = _current.interpreter
    try:
        _current.interpreter = interpreter
        return body()
    finally:
        _current.interpreter = before


@contextmanager
def recording(recorder: Recorder) -> Generator[None]:
    """Send calls of public functions in this thread to `recorder`."""
    before, _current.recorder = _current.recorder, recorder
    try:
        yield
    finally:
        _current.recorder = before


def active() -> Interpreter | None:
    """The trace that is active in this thread, None when ops run at once."""
    return _current.interpreter


def apply(op: Op, *operands: ArrayLike) -> Any:
    """Give `op` and its operands to the active interpreter."""
    return (_current.interpreter or _eager[0]).apply(op, operands)


def frontend(function: Callable[P, R], op: str | None = None) -> Callable[P, R]:
    """Mark the public function of one op (`op`, or the one of its own name).

    In a rule's pattern a call of it matches that op; keyword arguments given there must match too.
    """
    name = op or function.__name__

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _current.recorder is not None:
            return _current.recorder.record(name, function, args, kwargs)
        made = function(*args, **kwargs)
        if type(made) is mx.array and any(made is x for x in args):
            # Eagerly, what moved nothing: `y[0] = 9` must not reach the argument.
            return cast(R, made.__copy__())
        return made

    return call


def frontend_of(op: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`frontend` for a function whose name is not its op's."""
    return lambda function: frontend(function, op)


def type_of(x: ArrayLike) -> TensorType:
    """The graph type of an array, a QuantizedTensor or a traced value."""
    if isinstance(x, mx.array):
        return TensorType(tuple(x.shape), dtype_of(x.dtype))
    if isinstance(x, QuantizedTensor):
        return _quantized_type(x)
    found = getattr(x, "_type", None)
    if isinstance(found, TensorType):
        return found
    raise DTypeError(f"expected an array, found {type(x).__name__}", fix="pass an mx.array")


def _quantized_type(x: QuantizedTensor) -> TensorType:
    if x._type is None:
        packing = Packing(x.quantization, dtype_of(x.scales.dtype), x.axis, x.global_scale is not None)
        object.__setattr__(x, "_type", TensorType(tuple(x.shape), dtype_of(x.dtype), packing))
    found: TensorType = x._type  # pyright: ignore[reportAssignmentType]
    return found


def operand(x: ArrayLike, like: DType | None = None) -> Any:
    """`x` as something an op takes. A Python scalar gets MLX's weak dtype next to an array of `like`.

    int: the array's dtype (i32 next to bool); float: the array's if that is a float, else f32.
    """
    if hasattr(x, "_type") or isinstance(x, (mx.array, QuantizedTensor)):
        return x
    if isinstance(x, Scalar):
        return apply(Constant((x,), (), _weak_dtype(x, like)))
    if hasattr(x, "__array__") or isinstance(x, (list, tuple)):
        return mx.array(x)
    raise DTypeError(
        f"expected an array or a number, found {type(x).__name__}",
        fix="pass an mx.array, a QuantizedTensor, a NumPy array, or a Python number",
    )


def _weak_dtype(x: bool | float, like: DType | None) -> DType:
    if isinstance(x, bool):
        return like or BOOL
    if isinstance(x, int):
        return I32 if like in (None, BOOL) else like
    return like if like is not None and (like.is_float or like.is_complex) else F32


def operands(a: ArrayLike, b: ArrayLike) -> tuple[Any, Any]:
    """Two operands of one elementwise op; a Python scalar takes its dtype from the other."""
    if isinstance(a, Scalar):
        b = operand(b)
        return operand(a, type_of(b).dtype), b
    a = operand(a)
    return a, operand(b, type_of(a).dtype) if isinstance(b, Scalar) else operand(b)


def shape_of(x: ArrayLike) -> tuple[int, ...]:
    """The logical shape of an operand."""
    return type_of(x).shape


def as_axes(axis: int | tuple[int, ...] | list[int] | None, ndim: int) -> tuple[int, ...]:
    """MLX's `axis` argument as sorted non-negative axes; None means all."""
    from qgraph.ir.types import normalize_axis

    if axis is None:
        return tuple(range(ndim))
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(sorted(normalize_axis(a, ndim) for a in given))
    if len(set(axes)) != len(axes):
        raise QGraphError(f"axis {given} names an axis twice", fix="name every axis once")
    return axes
