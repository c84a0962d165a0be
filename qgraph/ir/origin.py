"""Where a node came from: the user's line, the module scope, and the rewrites that made it."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from os import path
from types import CodeType
from typing import NamedTuple

_LIBRARY = path.dirname(path.dirname(path.abspath(__file__)))


class Step(NamedTuple):
    """One rewrite in a node's history."""

    pass_name: str
    rule: str
    ordinal: int  # of the rewrite within the whole pipeline: QGRAPH_FUEL counts the same

    def __str__(self) -> str:
        return f"{self.pass_name}#{self.ordinal}"


@cache
def _lines(code: CodeType) -> list[int]:
    """The line of every instruction."""
    return [position[0] or 0 for position in code.co_positions()]


class Source:
    """A line of the user's code, captured as (code, offset) and read only when it is shown."""

    def __init__(self, code: CodeType | None, offset: int) -> None:
        self._code = code
        self._offset = offset

    def copy(self) -> Source:
        """The same line as another object: nodes are told apart by their source's identity."""
        return Source(self._code, self._offset)

    @property
    def known(self) -> bool:
        """Whether a frame outside qgraph was found."""
        return self._code is not None

    @cached_property
    def line(self) -> int:
        """The line number, 0 when unknown."""
        if self._code is None:
            return 0
        return _lines(self._code)[self._offset // 2]

    @property
    def file(self) -> str:
        """The file's path as Python knows it."""
        return self._code.co_filename if self._code else ""

    @property
    def function(self) -> str:
        """The qualified name of the function."""
        return self._code.co_qualname if self._code else ""

    @property
    def text(self) -> str:
        """The line itself, stripped."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        """``model.py:88``, or that it is unknown."""
        return f"{path.basename(self.file)}:{self.line}" if self._code else "unknown line"

    def sentence(self) -> str:
        """``model.py:41 in attention:  q = x @ wq.T`` for error messages."""
        if self._code is None:
            return str(self)
        text = self.text
        return f"{self} in {self.function}" + (f":  {text}" if text else "")


@dataclass(frozen=True, slots=True)
class Origin:
    """Provenance of a node. Never part of its identity."""

    sources: tuple[Source, ...] = ()
    scope: str = ""
    steps: tuple[Step, ...] = ()

    @property
    def source(self) -> Source:
        """The first line, or an unknown one."""
        return self.sources[0] if self.sources else UNKNOWN


UNKNOWN = Source(None, 0)
NOWHERE = Origin()

_library_code: dict[CodeType, bool] = {}


def is_library(code: CodeType) -> bool:
    """Whether `code` belongs to qgraph itself and is not a line to show to the user."""
    known = _library_code.get(code)
    if known is None:
        file = code.co_filename
        # <stdin>, <string> and doctests are the user's; only our own and Python's generated code is not.
        inside = path.abspath(file).startswith(_LIBRARY + path.sep) and not file.startswith("<")
        generated = code.co_qualname.startswith("__create_fn__")  # the methods of a dataclass
        known = inside or generated or file.startswith(("<qgraph ", "<frozen "))
        _library_code[code] = known
    return known


def user_source(depth: int = 2) -> Source:
    """The innermost frame outside qgraph, `depth` frames up or more."""
    frame = sys._getframe(depth)
    while frame is not None:
        if not is_library(frame.f_code):
            return Source(frame.f_code, frame.f_lasti)
        frame = frame.f_back
    return UNKNOWN


def depth_of_user() -> int:
    """The `stacklevel` with which the caller's warnings stand at the user's line."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and is_library(frame.f_code):
        depth, frame = depth + 1, frame.f_back
    return depth


def merge_origins(origins: list[Origin], step: Step) -> Origin:
    """The origin of what replaced nodes of `origins`: all their lines, their common scope, one step more."""
    sources = dict.fromkeys([source for origin in origins for source in origin.sources])
    steps = dict.fromkeys([step for origin in origins for step in origin.steps])
    return Origin(tuple(sources), _common({o.scope for o in origins if o.scope}), (*steps, step))


def _common(scopes: set[str]) -> str:
    """The longest path that all scopes begin with."""
    if len(scopes) < 2:
        return "".join(scopes)
    common: list[str] = []
    for parts in zip(*(scope.split(".") for scope in scopes), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
