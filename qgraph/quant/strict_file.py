"""Reads files that may be hostile: regular files, strict JSON, errors that echo nothing raw."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import BinaryIO, NoReturn, ParamSpec, TypeVar, cast

from qgraph._errors import CheckpointError

P = ParamSpec("P")
R = TypeVar("R")

MAX_JSON_BYTES = 64_000_000  # the index of the largest public models is about 10 MB
_MAX_DEPTH = 64
_AGAIN = "download or write the file again"
_NO_MEMORY = "does not fit into the memory of this process"
_MAX_DIGITS = 32  # int() of a long literal takes quadratic time
# Elements of all lists and objects. The index of the largest public models has 200,000; a parsed
# element takes up to 100 bytes, so this bounds the memory and the time.
_MAX_ITEMS = 2_000_000
# A quoted string; possessive, and unterminated ones reach the end: linear time.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|\Z)', re.DOTALL)
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_JSON_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class Stamp:
    """What identifies the content of a file on disk: two equal stamps, no change in between."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp of what `os.stat` or `os.fstat` returned."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def clip(text: object, limit: int = 80) -> str:
    r"""`text` in at most `limit` printable characters, the others escaped.

    >>> print(clip("weight\x1b[2J"), clip("a" * 100, 10))
    weight\x1b[2J aaaaaaa...
    """
    whole = str(text)
    # Control, bidi and surrogate characters are not printable; cut first: names can be huge.
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in whole[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def refuse(
    path: str | os.PathLike[str], cause: str, *, tensor: str | None = None, fix: str
) -> CheckpointError:
    """The one error for a file that cannot be used: at most 400 printable characters.

    >>> print(refuse("model.safetensors", "is F64", tensor="x.weight", fix="cast it"))
    model.safetensors: tensor 'x.weight': is F64
      fix: cast it
    """
    name = clip(Path(path).name or path, 60)
    about = "" if tensor is None else f"tensor '{clip(tensor, 70)}': "
    return CheckpointError(f"{name}: {about}{clip(cause, 150)}", fix=clip(fix, 90))


def sealed(function: Callable[P, R]) -> Callable[P, R]:
    """Its CheckpointErrors hold neither their causes nor the frames that they passed through.

    Those would keep the memory of a failed load in use, and bytes of a foreign file in reach of
    whoever prints the traceback.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except CheckpointError as error:
            found = error
        try:
            found.__cause__ = found.__context__ = None
            raise found.with_traceback(None)
        finally:
            del found  # it refers to this frame

    return call


@contextmanager
def open_regular(path: Path) -> Generator[BinaryIO, None, None]:
    """Open a regular file for reading; links are followed, as the hub cache needs.

    Errors: CheckpointError for anything else; a pipe is refused, not waited for.
    """
    try:
        _check_kind(path, os.stat(path).st_mode)
        # O_NONBLOCK: the path may have become a pipe since the stat.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    with os.fdopen(descriptor, "rb") as file:
        _check_kind(path, os.fstat(descriptor).st_mode)
        yield file


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise refuse(path, f"is {kind}, not a regular file", fix="pass the file itself")


def read_at_most(file: BinaryIO, count: int, path: Path) -> bytes:
    """`count` bytes, fewer at the end of the file. Errors: CheckpointError."""
    try:
        return file.read(count) or b""  # None where a read would wait, as of some files under /proc
    except OSError as error:
        raise _unreadable(path, error) from None
    except MemoryError:
        raise refuse(path, _NO_MEMORY, fix=_AGAIN) from None


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        fix = "check the path; in a download cache, the link may point to a missing file"
        return refuse(path, "no such file", fix=fix)
    cause = error.strerror if isinstance(error, OSError) else str(error)
    return refuse(path, f"cannot be opened: {cause}", fix="check the path and its permissions")


def read_json(path: Path, *, constants: bool = False) -> dict[str, object]:
    """Read a JSON file whose top level is an object.

    `constants` allows NaN and Infinity, which config files of some models contain.
    Errors: CheckpointError for everything that strict JSON forbids, duplicate keys included.
    """
    with open_regular(path) as file:
        text = read_at_most(file, MAX_JSON_BYTES + 1, path)
    if len(text) > MAX_JSON_BYTES:
        raise refuse(path, f"is larger than {MAX_JSON_BYTES} bytes", fix="check what the file is")
    return parse_json(text, path, constants=constants)


def parse_json(text: bytes, path: Path, *, what: str = "file", constants: bool = False) -> dict[str, object]:
    """Parse strict UTF-8 JSON with an object at the top level. Errors: CheckpointError."""
    try:
        value = _parse(text, constants=constants)
    except UnicodeError:
        cause = "is not valid UTF-8"
    except json.JSONDecodeError as error:
        cause = f"is not JSON: {error.msg} at character {error.pos}"
    except _NotStrictError as error:
        cause = str(error)
    except RecursionError:
        cause = "nests too deep"
    except MemoryError:
        cause = _NO_MEMORY
    else:
        return as_object(value, path, f"the {what}")
    # Outside of the handlers: what they caught holds the whole text.
    raise refuse(path, f"the {what} {cause}", fix=_AGAIN)


class _NotStrictError(Exception):
    """Found in text that Python's JSON reader would take."""


def _parse(text: bytes, *, constants: bool) -> object:
    if text.startswith(b"\xef\xbb\xbf"):
        raise _NotStrictError("starts with a byte order mark")
    # Every element but the first of a list or an object stands behind a comma.
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_ITEMS:
        raise _NotStrictError(f"has more than {_MAX_ITEMS} items")
    if _nests_too_deep(text):
        raise _NotStrictError(f"nests deeper than {_MAX_DEPTH}")
    return json.loads(
        text.decode("utf-8"),
        object_pairs_hook=_pairs,
        parse_int=_integer,
        parse_constant=None if constants else _constant,
    )


def _pairs(items: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(items)
    if len(found) != len(items):
        raise _NotStrictError(f"has the key '{_first_twice(items)}' twice")
    for key in found:
        key.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _NotStrictError(f"contains a number of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> NoReturn:
    raise _NotStrictError(f"contains {name}, which is not JSON")


def as_object(value: object, path: Path, what: str) -> dict[str, object]:
    """`value` if it is a JSON object, CheckpointError if not."""
    if not isinstance(value, dict):
        raise refuse(path, f"{what} is {json_name(value)}, not an object", fix="correct the file")
    return cast("dict[str, object]", value)


def json_name(value: object) -> str:
    """What kind of JSON value it is, with an article."""
    return _JSON_NAMES.get(type(value), "something else")


def _first_twice(items: list[tuple[str, object]]) -> str:
    seen: set[str] = set()
    for key, _ in items:
        if key in seen:
            return clip(key, 70)
        seen.add(key)
    return ""


def _nests_too_deep(text: bytes) -> bool:
    """Asked before the JSON parser, which recurses. Pairs of brackets go, one level at a time."""
    left = _STRING.sub(b"", text).translate(_BRACKETS, _OTHERS)
    for _ in range(_MAX_DEPTH):
        if b"[]" not in left:
            break
        left = left.replace(b"[]", b"")
    # What is left closes what was never opened, then opens what is never closed; or is deeper.
    return b"[]" in left or left.count(b"[") > _MAX_DEPTH
