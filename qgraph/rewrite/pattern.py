"""Patterns: a Python function, traced with the same qg functions and operators as user code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Annotated, Any, get_type_hints

import mlx.core as mx

from qgraph._errors import RuleError
from qgraph.ir.types import TensorType
from qgraph.ops.dispatch import recording
from qgraph.ops.methods import ArrayMethods

Quantized = Annotated[mx.array, "quantized"]
"""Hint of a pattern's parameter: matches quantized values only."""
Scalar = Annotated[mx.array, "scalar"]
"""Hint of a pattern's parameter: matches values of one element, constants included."""


class Pattern(ArrayMethods):
    """Matches values. Made by running a rule's `pattern` on variables."""

    __slots__ = ("__dict__",)
    name: str = ""

    def __getattr__(self, name: str) -> Any:
        if name != "_type":
            raise AttributeError(name)
        raise RuleError(
            f"{self} is part of a pattern: it has no shape yet",
            fix="use functions of one op in a pattern (qg.transpose for .swapaxes), and shapes in check",
        )

    def named(self, name: str) -> Any:
        """Name an interior value: ``m["base"]`` in check and rewrite."""
        self.name = name
        return self

    def __hash__(self) -> int:
        """By identity."""
        return id(self)


@dataclass(eq=False)
class Variable(Pattern):
    """Matches any value that satisfies its hint; the same value everywhere it stands."""

    name: str
    hint: str = ""

    def refuses(self, t: TensorType) -> str | None:
        """Why a value of type `t` does not fit, None if it does."""
        if self.hint == "quantized" and t.packing is None:
            return f"{self.name} is not quantized ({t})"
        if self.hint == "scalar" and (t.size != 1 or t.packing is not None):
            return f"{self.name} is not one number ({t})"
        return None

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Call(Pattern):
    """Matches a node of one op whose operands match `args`; `keywords` must give the same op."""

    op: str
    function: Callable[..., Any]
    args: tuple[Pattern, ...]
    keywords: dict[str, Any] = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.args))})"


@dataclass(eq=False)
class Number(Pattern):
    """Matches a constant of one value."""

    value: float

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(eq=False)
class AnyOf(Pattern):
    """Matches what the first fitting alternative matches."""

    alternatives: tuple[Pattern, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.alternatives))


def any_of(*alternatives: Any) -> Any:
    """In a pattern: one of several forms."""
    return AnyOf(tuple(_pattern(a) for a in alternatives))


def _pattern(x: Any) -> Pattern:
    if isinstance(x, Pattern):
        return x
    if isinstance(x, (bool, int, float)):
        return Number(x)
    raise RuleError(f"a pattern contains {x!r}", fix="use the pattern's parameters, qg functions and numbers")


class _Recorder:
    def record(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Pattern:
        if name == "concatenate" and args and isinstance(args[0], (list, tuple)):
            args = (*args[0], *args[1:])  # pyright: ignore[reportUnknownVariableType]
        return Call(name, function, tuple(_pattern(a) for a in args), kwargs)


@cache
def trace_pattern(function: Callable[..., Any]) -> tuple[Pattern, tuple[str, ...]]:
    """The pattern of a rule's (unbound) `pattern` method, and the names of its variables."""
    names = list(signature(function).parameters)[1:]
    hints = get_type_hints(function, include_extras=True)
    variables = [Variable(n, next(iter(getattr(hints.get(n), "__metadata__", ("",))))) for n in names]
    with recording(_Recorder()):
        result = function(None, *variables)
    if not isinstance(result, (Call, AnyOf)):
        raise RuleError(
            f"{function.__qualname__} returns {result!r}", fix="a pattern returns the op to replace"
        )
    return result, tuple(names)


def root_ops(pattern: Pattern) -> tuple[str, ...]:
    """The ops at which a pattern can match: the rule is tried there and nowhere else."""
    if isinstance(pattern, Call):
        return (pattern.op,)
    assert isinstance(pattern, AnyOf)
    return tuple(op for a in pattern.alternatives for op in root_ops(a))
