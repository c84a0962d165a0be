"""The arrays of a module: read at every call, replaced in a copy of its structure during a capture."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from operator import getitem, is_
from typing import Any, NamedTuple, cast

import mlx.core as mx

from qgraph._errors import TraceError
from qgraph.capture.scopes import watched
from qgraph.quant import QuantizedTensor


class Slot(NamedTuple):
    """Where an array is kept."""

    path: str
    holder: Any  # a module, dict or list; or the dict of a module's attributes
    key: Any
    owner: Any  # the module, dict or list


class Weights:
    """The arrays of a tree of modules, dicts and lists, each with its path.

    `root` is an `mlx.nn.Module`. Every array in it counts, not only what MLX calls parameters: positions and
    frequencies as well. A QuantizedTensor in the place of a dense weight is one of them.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        self._arrays: list[Any] = []
        self._version = 0
        self._lock = threading.Lock()
        self.structure = 0  # counts: the modules, not their arrays, are others
        self._look()

    def _look(self) -> None:
        self.slots: list[Slot] = []
        self._holders: list[Any] = []
        self._links: list[tuple[Any, Any, Any]] = []
        seen: set[int] = set()
        waiting: list[tuple[str, Any]] = [("", self.root)]
        while waiting:
            path, holder = waiting.pop()
            if id(holder) in seen:  # a module in two places: its weights are named by the first
                continue
            seen.add(id(holder))
            self._holders.append(holder)
            inner: list[tuple[str, Any]] = []
            for key, x in _parts_together(holder):
                name = f"{path}.{key}" if path else str(key)
                if isinstance(x, (mx.array, QuantizedTensor)):
                    self.slots.append(Slot(name, holder, key, holder))
                elif _is_holder(x):
                    self._links.append((holder, key, x))
                    inner.append((name, x))
            # MLX keeps what it does not know as an array among the attributes: layer.weight = qg.quantize(…)
            for key, x in getattr(holder, "__dict__", {}).items():
                if isinstance(x, QuantizedTensor):
                    name = f"{path}.{key}" if path else str(key)
                    self.slots.append(Slot(name, holder.__dict__, key, holder))
            waiting += reversed(inner)
        # As columns, since they are compared at every call.
        self._sizes = list(map(len, self._holders))
        self._parents = [parent for parent, _, _ in self._links]
        self._keys = [key for _, key, _ in self._links]
        self._children = [child for _, _, child in self._links]
        self._places = [slot.holder for slot in self.slots], [slot.key for slot in self.slots]

    def read(self) -> tuple[int, list[Any]]:
        """All arrays now; and a number that stays the same as long as they are the same objects."""
        with self._lock:
            now = self._now()
            if now is None:
                self._look()
                self.structure += 1
                self._arrays = list(map(getitem, *self._places))
                self._version += 1
            elif now is not self._arrays:
                self._arrays = now
                self._version += 1
            return self._version, self._arrays

    def _now(self) -> list[Any] | None:
        """The arrays, the list of before if they are the same; None if the structure is another."""
        try:
            children = map(getitem, self._parents, self._keys)
            if list(map(len, self._holders)) != self._sizes or not all(map(is_, children, self._children)):
                return None
            now = list(map(getitem, *self._places))
        except (KeyError, IndexError):
            return None
        if len(now) == len(self._arrays) and all(map(is_, now, self._arrays)):
            return self._arrays
        return now if all(isinstance(x, (mx.array, QuantizedTensor)) for x in now) else None

    def holders(self) -> list[Any]:
        """The modules, dicts and lists, each once."""
        return self._holders

    def shadow(self) -> Shadow:
        """A copy of the structure, whose arrays can be replaced."""
        return Shadow(self)


def _items(holder: Any) -> Iterator[tuple[Any, Any]]:
    items: Any = enumerate(holder) if _is_list(holder) else holder.items()
    return iter(items)


def _is_tuple(x: object) -> bool:
    return type(x) is tuple


def _is_list(x: object) -> bool:
    return isinstance(x, list)


def _is_holder(x: object) -> bool:
    """A module is a dict."""
    return isinstance(x, (dict, list))


def _parts_together(holder: Any) -> list[tuple[Any, Any]]:
    """The items, with the arrays that store a quantized weight one after the other."""
    items = list(_items(holder))
    parts = [key for key in ("weight", "scales", "biases") if not _is_list(holder) and key in holder]
    if "scales" in parts:
        items = [(key, holder[key]) for key in parts] + [item for item in items if item[0] not in parts]
    return items


PLACES = 256  # of one shared module that are told apart


class Shadow:
    """A copy of a module and of all modules in it; the arrays are shared until they are replaced.

    The user's module is never touched by a capture: another thread may be running it.
    """

    def __init__(self, weights: Weights) -> None:
        self._copies: dict[int, Any] = {}
        self._kept: list[Any] = []
        self.root = self._copy(weights.root)
        owners = [self._copies[id(s.owner)] for s in weights.slots]
        self.slots = [Slot(s.path, x, s.key, x) for s, x in zip(weights.slots, owners, strict=True)]
        self.originals = weights.slots
        self.paths: dict[int, list[str]] = {}  # of every module by its id: all places where it stands
        self._name(self.root, "", [])

    def _copy(self, x: Any) -> Any:
        """Modules, dicts and lists copied once each, the rest as it is."""
        found = self._copies.get(id(x))
        if found is not None:
            return found
        if _is_list(x):
            made: Any = []
            self._copies[id(x)] = made
            made += [self._copy(y) for y in x]
        elif _is_holder(x):
            made = _empty_like(x)
            self._copies[id(x)] = made
            dict.update(made, {key: self._copy(y) for key, y in x.items()})
        elif _is_tuple(x) and any(map(_is_holder, x)):
            made = self._copies[id(x)] = tuple(self._copy(y) for y in x)
        else:
            return x
        self._kept.append(x)  # so that its id is not given to another
        return made

    def _name(self, x: Any, path: str, outer: list[int]) -> None:
        if not _is_holder(x):
            return
        places = self.paths.setdefault(id(x), [])
        if id(x) in outer or len(places) >= PLACES:
            return
        places.append(path)
        for key, y in _items(x):
            self._name(y, f"{path}.{key}" if path else str(key), [*outer, id(x)])

    def fill(self, arrays: list[mx.array]) -> None:
        """Put `arrays` in the places of the weights."""
        for slot, x in zip(self.slots, arrays, strict=True):
            slot.holder[slot.key] = x  # among the items of a module, where its code looks for arrays
            if slot.key in getattr(slot.owner, "__dict__", ()):
                del slot.owner.__dict__[slot.key]

    def changed(self, arrays: list[mx.array]) -> list[tuple[int, mx.array]]:
        """The places in which the model has put other arrays since `fill`, e.g. running means.

        Errors: TraceError for one that cannot be stored back.
        """
        out: list[tuple[int, mx.array]] = []
        for i, (slot, before) in enumerate(zip(self.slots, arrays, strict=True)):
            now = slot.holder[slot.key]
            if now is before:
                continue
            if not isinstance(now, mx.array) or isinstance(_original(self.originals[i]), QuantizedTensor):
                raise TraceError(
                    f"the model replaces {slot.path} by {type(now).__name__}", fix="keep it an array"
                )
            out.append((i, now))
        return out


def _original(slot: Slot) -> Any:
    return slot.holder[slot.key]


def _empty_like(x: Any) -> Any:
    """An empty dict; for a module an instance with its attributes, which reports its calls."""
    kind = cast(Any, type(x))
    if kind is dict:
        return {}
    state: dict[str, Any] | None = getattr(x, "__dict__", None)
    original: Any = getattr(kind, "_qgraph_original", kind)
    watching: Any = watched(original) if callable(x) else kind
    made = watching.__new__(watching)
    if state is not None:
        made.__dict__.update(state)
    return made
