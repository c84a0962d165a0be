"""Run a function op by op on concrete values that have the operators of traced ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from qgraph.execute.eager import EAGER
from qgraph.ir.op import Op
from qgraph.ops.dispatch import run_under, type_of
from qgraph.ops.methods import ArrayMethods
from qgraph.trace.tree import flatten, unflatten


class Concrete(ArrayMethods):
    """An array or a QuantizedTensor with the operators of a traced value; each runs at once."""

    __slots__ = ("_type", "array")

    def __init__(self, array: Any) -> None:
        self.array = array
        self._type = type_of(array)

    def __hash__(self) -> int:
        """By identity."""
        return id(self)

    def __repr__(self) -> str:
        return repr(self.array)

    def __bool__(self) -> bool:
        return bool(self.array)

    def item(self) -> Any:
        """The one element as a Python number."""
        return self.array.item()

    def tolist(self) -> Any:
        """The elements as nested lists."""
        return self.array.tolist()


class Stepper:
    """The interpreter that `JitFunction.eager` runs a function with."""

    def apply(self, op: Op, operands: tuple[Any, ...]) -> Any:
        """Run one op on the arrays inside."""
        results = EAGER.apply(op, tuple(_unwrap(x) for x in operands))
        if isinstance(results, tuple):
            return tuple(Concrete(x) for x in cast(tuple[Any, ...], results))
        return Concrete(results)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `function` with its arrays wrapped, and unwrap what it returns."""
        args, kwargs = _mapped(args, Concrete), _mapped(kwargs, Concrete)
        out = run_under(self, lambda: function(*args, **kwargs))
        return _mapped(out, _unwrap)


def _unwrap(x: Any) -> Any:
    return x.array if isinstance(x, Concrete) else x


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    leaves: list[Any] = []
    spec: list[Any] = []
    flatten(tree, leaves, spec)
    return unflatten(spec, [change(x) for x in leaves])
