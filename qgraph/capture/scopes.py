"""Which module an operation belongs to: modules report what they were given and what they returned."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any

import mlx.core as mx

from qgraph.capture.importer import Step
from qgraph.ir.origin import Source, is_library

METHODS = ("__call__", "as_linear")  # of modules: how they are applied


@dataclass
class ModuleCall:
    """One call of a module during a capture: its path, and the arrays that went in and came out."""

    path: str
    given: list[mx.array]
    returned: list[mx.array]
    source: Source  # the line that calls it


@dataclass
class Calls:
    """The calls of a capture, in the order in which they ended; `open` are those that run.

    `active` tells whether arrays are those of the capture: inside mx.grad and its like they are others.
    """

    active: Callable[[], bool] = lambda: True
    ended: list[ModuleCall] = field(default_factory=list[ModuleCall])
    open: list[str] = field(default_factory=list[str])
    deepest: str = ""  # the module that was running when an exception was raised

    def run(self, path: str, method: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module's method and note it."""
        source = calling_line()
        self.open.append(path)
        try:
            out = method(module, *args, **kwargs)
        except Exception:
            self.deepest = self.deepest or path
            raise
        finally:
            self.open.pop()
        if not self.active():
            return out
        self.ended.append(ModuleCall(path, list(arrays_in((args, kwargs))), list(arrays_in(out)), source))
        return out


class _Current(threading.local):
    calls: Calls | None = None
    paths: Mapping[int, Sequence[str]] = {}


CURRENT = _Current()


@cache
def watched(kind: type) -> type:
    """A subclass of a module's class whose instances report their calls; the class itself is not touched."""
    methods = {
        name: _reporting(getattr(kind, name)) for name in METHODS if callable(getattr(kind, name, None))
    }
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _reporting(method: Any) -> Any:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls, places = CURRENT.calls, CURRENT.paths.get(id(self))
        if calls is None or not places or (calls.open and calls.open[-1] in places):
            return method(self, *args, **kwargs)  # super().__call__() is the same call
        return calls.run(place_in(places, calls.open), method, self, args, kwargs)

    return call


def place_in(places: Sequence[str], running: Sequence[str]) -> str:
    """Which of the places of a module is meant: the one inside the module that calls it.

    >>> place_in(["layers.0.act", "layers.1.act"], ["", "layers.1"]), place_in(["act"], ["layers.1"])
    ('layers.1.act', 'act')
    """
    inner = f"{running[-1]}." if running and running[-1] else ""
    return next((place for place in places if place.startswith(inner)), places[0])


def arrays_in(tree: Any) -> Iterable[mx.array]:
    """The arrays of nested lists, tuples and dicts."""
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for x in tree:  # pyright: ignore[reportUnknownVariableType]
            yield from arrays_in(x)
    elif type(tree) is dict:
        for x in tree.values():  # pyright: ignore[reportUnknownVariableType]
            yield from arrays_in(x)


def calling_line() -> Source:
    """The innermost line that is neither qgraph's nor of MLX's own layers."""
    frame = sys._getframe(2)
    while frame is not None:
        if not is_library(frame.f_code) and not _of_mlx(frame.f_code.co_filename):
            return Source(frame.f_code, frame.f_lasti)
        frame = frame.f_back
    return Source(None, 0)


@cache
def _of_mlx(file: str) -> bool:
    return Path(file).is_relative_to(Path(mx.__file__).parent)


@dataclass(frozen=True)
class Site:
    """Where an operation belongs: the module's path, and the line that calls the module."""

    path: str
    source: Source


def sites_of(
    steps: Mapping[str, Step], calls: Sequence[tuple[Site, Sequence[str], Sequence[str]]]
) -> dict[str, Site]:
    """The site of every named array.

    `calls` are (site, names given, names returned) in the order in which they ended. What a call's results
    are made of, back to what it was given, it made itself, where no call inside it did.
    """
    sites: dict[str, Site] = {}
    for site, given, returned in calls:
        inside = f"{site.path}." if site.path else ""
        seen = set(given)
        waiting = list(returned)
        while waiting:
            name = waiting.pop()
            step = steps.get(name)
            if name in seen or step is None:
                continue
            seen.add(name)
            found = sites.get(name)
            if found is None:
                sites.update(dict.fromkeys(step.record.outputs, site))
            elif not found.path.startswith(inside) and found is not site:
                continue  # made by a module that ran before
            waiting += step.record.inputs
    return sites
