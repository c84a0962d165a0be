"""Positions that models count with in Python, as arrays of the captured graph.

A model that does `mx.arange(cache.offset, cache.offset + L)` needs the difference only, not the numbers.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qgraph.capture.state import NotDynamic

REAL_ARANGE = mx.arange


class Position(mx.array):
    """An i32 array of shape () that knows from which number it is counted.

    Attributes:
        base: The number counted from; two positions of one base differ by a known int.
        delta: How far from it.
        span: The positions of the buffer that end here, as attention reads them: `arange(origin, position)`.
        origin: The base of the position where the buffer begins; None: it begins at 0.
    """

    base: mx.array
    delta: int
    span: int | None
    origin: mx.array | None

    @classmethod
    def counted(
        cls,
        base: mx.array,
        delta: int = 0,
        span: int | None = None,
        origin: mx.array | None = None,
    ) -> Position:
        """The position `base + delta`."""
        made: Any = cls(base if delta == 0 else base + delta)
        made.base, made.delta, made.span, made.origin = base, delta, span, origin
        return made

    def moved(self, n: int, span: int | None) -> Position:
        """The position `n` further, where `span` positions end."""
        return Position.counted(self.base, self.delta + n, span, self.origin)

    def __add__(self, other: Any) -> Any:
        return self.moved(other, self.span) if type(other) is int else mx.array.__add__(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if type(other) is int:
            return self.moved(-other, self.span)
        if isinstance(other, Position) and other.base is self.base:
            return self.delta - other.delta
        return mx.array.__sub__(self, other)


class Span(int):
    """The length of a window, which models take for the number of positions so far.

    What is so many positions from the end is a position: `keys.shape[2] - L`. Whatever else a model does
    with the number may be wrong, since it is larger.
    """

    end: Position

    @classmethod
    def of(cls, n: int, end: Position) -> Span:
        """The length `n` of a window in which `end` is where the filled positions end."""
        made = cls(n)
        made.end = end
        return made

    def __sub__(self, other: Any) -> Any:
        return self.end - other if type(other) is int else int(self) - other


def distance(start: Any, stop: Any) -> int:
    """`stop - start` as an int of the graph.

    Errors: NotDynamic where it differs from call to call.
    """
    if isinstance(stop, Span):
        if type(start) is int:
            return int(stop) - start
        stop = stop.end
    if isinstance(start, Position) and isinstance(stop, Position) and start.base is stop.base:
        return stop.delta - start.delta
    if isinstance(stop, Position) and stop.span is not None:
        begins = stop.origin is None and type(start) is int and start == 0
        begins = begins or (isinstance(start, Position) and start.base is stop.origin and start.delta == 0)
        if begins:
            return stop.span
    raise NotDynamic(
        "a number of positions that grows with the cache",
        fix="run this model as it is: it builds arrays as long as the text so far",
    )


def arange(*args: Any, **kwargs: Any) -> mx.array:
    """`mx.arange`, also from one position to another."""
    if not any(isinstance(a, (Position, Span)) for a in args):
        return REAL_ARANGE(*args, **kwargs)
    start, stop, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
    step = kwargs.pop("step", step)
    if step != 1:
        raise NotDynamic(f"arange between positions by steps of {step}")
    counted = REAL_ARANGE(distance(start, stop))
    made = counted if type(start) is int and start == 0 else counted + start
    return made.astype(kwargs["dtype"]) if kwargs.get("dtype") is not None else made
