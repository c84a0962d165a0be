"""Objects among the arguments that hold arrays and are changed by the call: a model's caches.

The captured program is a function of arrays. Such an object goes in as the arrays that it holds, and what
the model did to it comes out as arrays, which are stored back into the very object that the user has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import mlx.core as mx

from qgraph._errors import QGraphError

After = tuple[list[mx.array], Any]
Reader = Callable[[], After]


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

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        """What the model is given during a capture, holding `arrays`; and the reader of what it holds after.

        Called with traced arrays during a capture; with real ones it must work as well. The reader returns
        the arrays, which the program then returns, and what else `commit` has to know: things that are the
        same in every call of the program (a tree of plain values), and are kept with it.
        """
        ...

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        """Store what the program returned in the user's object; `after` is what the reader gave."""
        ...


class Step:
    """What the objects of one call share: how many positions the call adds, and its counters as arrays.

    `dynamic` false asks for the literal way: every counter is a constant of the graph, so that any model
    is captured as it is, once for every value.
    """

    __slots__ = ("_numbers", "dynamic", "length", "memory")

    def __init__(self, length: int, *, dynamic: bool = True) -> None:
        self.length = length
        self.dynamic = dynamic
        self.memory: dict[Any, Any] = {}  # what the holders of one call share, by keys of their own
        self._numbers: dict[tuple[int, str], mx.array] = {}

    def number(self, n: int, role: str = "offset") -> mx.array:
        """`n` as an i32 array of shape (): the same array for equal numbers of a role: they are one input.

        Numbers of different roles may be equal by chance, in one call only; they are never one input.
        """
        found = self._numbers.get((n, role))
        if found is None:
            found = self._numbers[n, role] = mx.array(n, mx.int32)
        return found


class NotDynamic(QGraphError):
    """A model did with an object what one program cannot do for all its states.

    Raised inside a capture. The call has to be made with `Step(length, dynamic=False)`, or eagerly.
    """


class Doubts(threading.local):
    """A list of its own for every thread: another one may capture before this one has read it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return iter(self.said)


Hold = Callable[[Any, Step], Held]
HOLDS: dict[type, Hold] = {}
OTHERS: list[Callable[[type], Hold | None]] = []  # asked once about a class that is not in HOLDS
DOUBTS = Doubts()  # of this thread's last capture: why its program is to be checked once
_UNHELD: set[type] = set()
AROUND: list[Callable[[], AbstractContextManager[Any]]] = []


def holder(kind: type) -> Hold | None:
    """How objects of a type are held; a subclass is not held as its base is, since it may do anything."""
    found = HOLDS.get(kind)
    if found is not None or kind in _UNHELD:
        return found
    for ask in OTHERS:
        found = ask(kind)
        if found is not None:
            HOLDS[kind] = found
            return found
    if OTHERS:
        _UNHELD.add(kind)
    return None


def commit_all(held: Sequence[Held], arrays: Sequence[mx.array], after: Sequence[tuple[int, Any]]) -> None:
    """Store what a program returned in all objects, or in none: an interrupt waits until they agree.

    `after` gives, for every object, how many of the arrays are its, and what its reader said.
    """
    try:
        _commit(held, arrays, after)
    except BaseException:
        _commit(held, arrays, after)  # again: to commit is to set, so that it can be done twice
        raise


def _commit(held: Sequence[Held], arrays: Sequence[mx.array], after: Sequence[tuple[int, Any]]) -> None:
    n = 0
    for one, (count, said) in zip(held, after, strict=True):
        one.commit(list(arrays[n : n + count]), said)
        n += count


@contextmanager
def around() -> Generator[None]:
    """Around the model's own code, at capture, inside whatever else is patched: what the stand-ins need.

    Afterwards `DOUBTS` says where a stand-in could not see that the model does with it what it would do
    with the object itself: then the first results of the program are to be compared with those of one that
    was captured with ``Step(length, dynamic=False)``. Errors: NotDynamic, at the end.
    """
    DOUBTS.said = []
    with ExitStack() as stack:
        for make in AROUND:
            stack.enter_context(make())
        yield
