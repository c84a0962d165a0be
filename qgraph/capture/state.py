"""Objects among the arguments that hold arrays and are changed by the call: a model's caches.

The captured program is a function of arrays. Such an object goes in as the arrays that it holds, and what
the model did to it comes out as arrays, which are stored back into the very object that the user has.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import mlx.core as mx


class Held(Protocol):
    """One such object, for one call."""

    @property
    def key(self) -> Hashable:
        """What the captured graph depends on beside the types of the arrays: another key, another capture."""
        ...

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that go in. One array object given twice (in this or another one) is one input."""
        ...

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Callable[[], list[mx.array]]]:
        """What the model is given while it is captured, holding `arrays`; and the reader of what it holds after.

        Called with traced arrays during a capture; with real ones it must work as well.
        """
        ...

    def commit(self, arrays: list[mx.array]) -> None:
        """Store what the program returned (what the reader gave, as real arrays) in the user's object."""
        ...


class Step:
    """What the objects of one call share: how many positions the call adds, and its counters as arrays."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._numbers: dict[int, mx.array] = {}

    def number(self, n: int) -> mx.array:
        """`n` as an i32 array of shape (): the same array for equal numbers, so that they are one input."""
        found = self._numbers.get(n)
        if found is None:
            found = self._numbers[n] = mx.array(n, mx.int32)
        return found


Hold = Callable[[Any, Step], Held]
HOLDS: dict[type, Hold] = {}


def holder(kind: type) -> Hold | None:
    """How objects of a type are held; a subclass is not held as its base is, since it may do anything."""
    return HOLDS.get(kind)
