"""Recompile storms: many programs of one function that differ in one thing only, and which thing it is."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, cast

import mlx.core as mx

from qgraph.ops.dispatch import type_of
from qgraph.quant import QuantizedTensor
from qgraph.trace.tree import typed

STORM = 8  # programs that differ in the same way
WINDOW = 16  # programs that a new one is compared with
SHOWN = 4  # values in the message

Feature = tuple[str, str]  # what of which argument: ("x", "axis 1")
Features = dict[Feature, Any]

_FIXES = {
    "value": "pass it as an mx.array, or pass few different values",
    "variable": "pass it as an argument, an mx.array",
    "axis": "pad it, or round the lengths up to few different ones (buckets)",
    "identity": "compute with qg functions on it (mx functions make constants), or pass it as an argument",
    "": "pass the same structure, ranks and dtypes every time",
}


class Storms:
    """The programs of one function so far, and what was said about them."""

    def __init__(self) -> None:
        self._recent: deque[Features] = deque(maxlen=WINDOW)
        self._groups: dict[tuple[Feature, ...], dict[Any, None]] = {}
        self._said: set[Feature] = set()

    def add(self, features: Features, name: str) -> str | None:
        """Note a new program of the function `name`; the warning, if it is the one too many."""
        near = [(d, old) for old in self._recent if (d := _difference(features, old))]
        self._recent.append(features)
        if not near:
            return None
        what, old = min(near, key=_size)
        if not self._said.isdisjoint(what):
            return None
        if len(self._groups) > WINDOW:
            self._groups.clear()
        group = self._groups.setdefault(what, {})
        for found in (old, features):
            group[tuple(found.get(feature) for feature in what)] = None
        if len(group) < STORM:
            return None
        self._said.update(what)
        return _message(name, what, list(group))


def _size(pair: tuple[tuple[Feature, ...], Features]) -> int:
    return len(pair[0])


def _difference(a: Features, b: Features) -> tuple[Feature, ...]:
    """The features that differ; where a structure or a rank does, what follows from it is left out."""
    found = [f for f in dict.fromkeys((*a, *b)) if a.get(f) != b.get(f)]
    structures = [f for f in found if f[1] == "structure"]
    if structures:
        return (structures[0],)
    ranks = {label for label, what in found if what == "rank"}
    return tuple(f for f in found if f[0] not in ranks or f[1] == "rank")


def _message(name: str, what: tuple[Feature, ...], values: list[tuple[Any, ...]]) -> str:
    lines: list[str] = []
    for i, (label, kind) in list(enumerate(what))[:3]:
        shown = ", ".join(_shown(v[i], kind) for v in values[:SHOWN])
        of = f"argument {label!r}" if kind in ("value", "structure", "rank", "dtype") else repr(label)
        lines.append(f"{of}{'' if kind in ('value', 'variable') else f' {kind}'}: {shown}, …")
    fix = _FIXES.get(what[0][1].partition(" ")[0], _FIXES[""])
    rest = f" and {len(what) - 3} more" if len(what) > 3 else ""
    return f"{name} was compiled {len(values)} times because of {'; '.join(lines)}{rest}\n  fix: {fix}"


def _shown(value: Any, kind: str) -> str:
    if kind == "identity":
        return "another object"
    if kind == "structure" and value is not None:
        return value[0]
    if isinstance(value, tuple) and len(cast("tuple[Any, ...]", value)) == 1:
        value = cast("tuple[Any, ...]", value)[0]
    if isinstance(value, tuple) and isinstance(value[0], type):  # as `typed` makes it
        items = cast("tuple[Any, ...]", value)
        value = items[2] if len(items) == 3 else items[1]
    text = repr(cast(object, value))
    return text if len(text) <= 40 else text[:39] + "…"


def features_of(arguments: Mapping[str, Any]) -> Features:
    """What a signature consists of, by argument."""
    found: Features = {}
    stack = list(arguments.items())
    while stack:
        label, x = stack.pop()
        if isinstance(x, (mx.array, QuantizedTensor)):
            _array(label, x, found)
            continue
        children = _children(x)
        if children is None:
            if hasattr(cast(object, type(x)), "__array__"):
                _array(label, mx.array(x), found)
            else:
                found[label, "value"] = typed(x)
            continue
        inside = list(children)
        keys = tuple(str(key) for key, _ in inside)
        found[label, "structure"] = (f"{type(x).__name__} of {len(inside)}", keys)
        stack += [(f"{label}.{key}", child) for key, child in inside]
    return found


def _array(label: str, x: Any, found: Features) -> None:
    t = type_of(x)
    found[label, "dtype"] = str(t.dtype) if t.packing is None else f"{t.dtype}:{t.packing}"
    found[label, "rank"] = len(t.shape)
    found.update({(label, f"axis {i}"): n for i, n in enumerate(t.shape)})


def _children(x: Any) -> Iterator[tuple[Any, Any]] | None:
    kind = cast(Any, type(x))
    if kind is dict:
        return iter(cast("dict[Any, Any]", x).items())
    if kind is list or kind is tuple:
        return enumerate(cast("list[Any]", x))
    names = getattr(kind, "_fields", None)
    if names is None and dataclasses.is_dataclass(kind):
        names = [f.name for f in dataclasses.fields(kind)]
    return None if names is None else ((name, getattr(x, name)) for name in names)
