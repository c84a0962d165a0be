"""Traced values, and the trace that records what is done to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Never, TypeVar

import mlx.core as mx

from qgraph._errors import QGraphError, TraceError
from qgraph.ir.graph import Builder, Value
from qgraph.ir.op import Op
from qgraph.ir.origin import Origin, user_source
from qgraph.ir.text import call_text
from qgraph.ir.types import TensorType
from qgraph.ops.dispatch import active, run_under, type_of
from qgraph.ops.methods import ArrayMethods
from qgraph.quant import QuantizedTensor
from qgraph.trace.foreign import instead

R = TypeVar("R")


class Tracer(ArrayMethods):
    """Stands for an array while a function is traced. It has a shape and a dtype, but no numbers."""

    __slots__ = ("_type", "trace", "value")

    def __init__(self, trace: Trace, value: Value) -> None:
        self.trace = trace
        self.value = value
        self._type: TensorType = value.type

    def __repr__(self) -> str:
        return f"Tracer({self._type}, made by {self.value.op.name})"

    def __len__(self) -> int:
        if not self.shape:
            raise self._refusal("len() of a 0-d value")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __hash__(self) -> int:
        """By identity."""
        return id(self)

    def _refusal(self, what: str, fix: str = "") -> TraceError:
        made = self.value.node.origin.source
        return TraceError(
            f"{what}: a traced {self._type} has no numbers yet",
            node=f"a value of {self.value.op.name}" + (f", made at {made}" if made.known else ""),
            where=user_source(3).sentence(),
            fix=fix or "compute with qg functions, return the value, and read it outside the jitted function",
        )

    def __bool__(self) -> Never:
        raise self._refusal(
            "if/while/and/or on a traced value",
            "choose with qg.where(condition, a, b); or make the condition depend on shapes or Python values",
        )

    def _number(self) -> Never:
        raise self._refusal(
            "a Python number from a traced value", "keep it an array; qg functions take it as is"
        )

    __float__ = __int__ = __index__ = __complex__ = _number

    def item(self) -> Never:
        """Refused: there is no number yet."""
        raise self._refusal(".item() of a traced value")

    def tolist(self) -> Never:
        """Refused: there are no numbers yet."""
        raise self._refusal(".tolist() of a traced value")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        made = super().__array_ufunc__(ufunc, method, *inputs, **kwargs)
        if made is NotImplemented:
            name = ufunc.__name__
            raise self._refusal(f"numpy.{name} of a traced value", instead(name))
        return made

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Never:
        name = function.__name__
        raise self._refusal(f"numpy.{name} of a traced value", instead(name))

    def __array__(self, *args: object, **kwargs: object) -> Never:
        raise self._refusal("a NumPy function on a traced value", "use the qg function of the same name")

    def __setitem__(self, index: object, update: object) -> Never:
        raise self._refusal(
            "x[...] = v on a traced value", "write x = x.at[index].set(v), which gives a new value"
        )


class _Scopes(threading.local):
    path = ""


_scopes = _Scopes()


@contextmanager
def scope(name: str) -> Generator[None]:
    """Name the module that the nodes traced inside belong to; scopes nest with dots.

    >>> import mlx.core as mx, qgraph as qg
    >>> @qg.jit
    ... def f(x):
    ...     with qg.scope("layers.3"):
    ...         return qg.exp(x)
    >>> print(f.graph(mx.ones(2)))  # doctest: +ELLIPSIS
    graph(%x: f32[2]) {
      %layers.3.exp = exp(%x) : f32[2]  // ...
      return %layers.3.exp
    }
    """
    before = _scopes.path
    _scopes.path = f"{before}.{name}" if before else name
    try:
        yield
    finally:
        _scopes.path = before


class Trace:
    """Records ops as nodes. `captures` are the arrays of the surroundings that the function used."""

    def __init__(self, builder: Builder, name: str = "", origin: Callable[[], Origin] | None = None) -> None:
        self.builder = builder
        self.name = name
        self.finished = False
        self.captures: dict[int, tuple[Any, Value]] = {}
        self.labels: dict[str, None] = {}  # of the inputs
        self._origin = origin

    def origin(self) -> Origin:
        """Where the op that is being recorded comes from."""
        if self._origin is not None:
            return self._origin()
        return Origin((user_source(3),), _scopes.path)

    def apply(self, op: Op, operands: tuple[Any, ...]) -> Any:
        """Record `op`; the interpreter's side of every qg function."""
        values = [self.lift(x) for x in operands]
        origin = self.origin()
        try:
            node = self.builder.add(op, values, origin)
        except QGraphError as error:
            error.node = error.node or call_text(op, values, origin.scope)
            error.where = error.where or (origin.source.sentence() if origin.source.known else None)
            raise
        outputs = node.outputs
        return Tracer(self, outputs[0]) if len(outputs) == 1 else tuple(Tracer(self, v) for v in outputs)

    def lift(self, x: Any) -> Value:
        """The value of an operand; an array from outside becomes a captured input."""
        if isinstance(x, Tracer):
            if x.trace is not self:
                raise _leaked(x, self)
            return x.value
        found = self.captures.get(id(x))
        if found is None:
            kind = "captured_w" if isinstance(x, QuantizedTensor) else "captured"
            label = unused(f"{kind}{len(self.captures)}", self.labels)
            self.labels[label] = None
            found = self.captures[id(x)] = (x, self.builder.input(label, type_of(x), self.origin()))
        return found[1]

    def tracer(self, value: Value) -> Tracer:
        """A tracer for a value of this trace."""
        return Tracer(self, value)

    def record(self, body: Callable[[], R]) -> R:
        """Record what `body` does, in this thread; then the trace is finished."""
        try:
            return run_under(self, body)
        finally:
            self.finished = True


def _leaked(x: Tracer, here: Trace | None) -> TraceError:
    made = x.value.node.origin.source
    owner = x.trace.name or "a jitted function"
    return TraceError(
        f"leaked tracer from {owner}: a traced {x._type} was kept and used "
        + (f"while {here.name or 'another function'} is traced" if here else "after the trace ended"),
        node=f"a value of {x.value.op.name}" + (f", made at {made}" if made.known else ""),
        where=user_source(3).sentence(),
        fix="return the value from the jitted function instead of storing it in a variable outside",
    )


def unused(label: str, taken: Container[str]) -> str:
    """`label`, with a number behind it where it is taken.

    >>> unused("w", {"w", "w.1"})
    'w.2'
    """
    name, n = label, 1
    while name in taken:
        name, n = f"{label}.{n}", n + 1
    return name


def signature(leaves: list[Any]) -> tuple[Any, ...]:
    """The types of arrays, as part of a key: fast for arrays, which are many and come at every call."""
    return tuple((x.shape, x.dtype) if type(x) is mx.array else _type(x) for x in leaves)


def _type(x: Any) -> TensorType:
    refuse_leaks((x,))
    return type_of(x)


def refuse_leaks(operands: tuple[Any, ...]) -> None:
    """Raise for a tracer that is used outside its trace; for the eager interpreter."""
    for x in operands:
        if isinstance(x, Tracer):
            raise _leaked(x, None)


def current_trace() -> Trace | None:
    """The trace that is active in this thread."""
    found = active()
    return found if isinstance(found, Trace) else None
