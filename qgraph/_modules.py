"""`qg.optimize` of a module: its weights and its caches become arguments, the object stays what it was."""

from __future__ import annotations

import inspect
import re
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, cast

import mlx.core as mx

from qgraph._cache import LOCK, Cache, CacheInfo, Entry
from qgraph._errors import RecompileWarning, TraceError
from qgraph._fork import PROCESS, refuse_after_fork
from qgraph._jit import labels_of, without_collector
from qgraph.capture.capture import capture
from qgraph.capture.state import HOLDS, Held, NotDynamic, Step
from qgraph.capture.unify import unify
from qgraph.capture.weights import Weights
from qgraph.execute.eager import stored
from qgraph.execute.program import Program, compiling
from qgraph.ir import Builder, Graph
from qgraph.ir.origin import depth_of_user
from qgraph.ops.dispatch import type_of
from qgraph.rewrite import Pipeline, Report, Result
from qgraph.trace.tracer import signature, unused
from qgraph.trace.tree import Tokens, flatten, unflatten


@dataclass(frozen=True)
class ModuleEntry(Entry):
    """A program of a module: what else it returns beside the module's result."""

    held: tuple[tuple[int, Any], ...] = ()  # for every held object: how many arrays, and what commit wants
    changed: tuple[int, ...] = ()  # the weights that the module replaced, by place


class Place:
    """Where a held object stands among the arguments; equal by number, so that it can be part of a key."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and other.number == self.number

    def __hash__(self) -> int:
        return self.number


@dataclass
class Prepared:
    """The arguments of one call as flat arrays, and the key of its program."""

    weights: list[Any]
    leaves: list[Any]
    spec: Tokens
    held: list[Held]
    arrays: list[mx.array]  # of the held objects, every one once
    places: tuple[tuple[int, ...], ...]  # of every held object's arrays among them
    key: tuple[Any, ...]
    regime: tuple[Any, ...]  # the key without what may change from call to call


class ModuleProgram:
    """The programs of an optimized module: what ``fast.qgraph`` is."""

    def __init__(self, module: Any, pipeline: Pipeline, maxsize: int, fallback: bool) -> None:
        self.pipeline = pipeline
        self.fallback = fallback
        self._module = module
        self._name: str = type(module).__name__
        self._weights = Weights(module)
        self._types: dict[Any, int] = {}
        self._stored: tuple[int, list[mx.array], int] = (0, [], 0)
        self._cache = Cache(maxsize)
        self._making = threading.RLock()
        self._literal: set[Any] = set()  # regimes of models that read a cache's counters as numbers
        self._gave_up = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; unevaluated MLX arrays come back, and the caches among the arguments are updated."""
        if self._gave_up:
            return self._original(args, kwargs)
        try:
            call, entry = self._entry(args, kwargs)
        except TraceError as error:
            if not self.fallback:
                raise
            self._gave_up = True
            warnings.warn(f"{self._name} runs without qgraph: {error}", stacklevel=depth_of_user())
            return self._original(args, kwargs)
        _, flat, _ = self._stored
        found = entry.program.trusted(*flat, *stored(call.leaves), *call.arrays, *entry.captures)
        call.arrays.clear()  # a buffer that nothing references is updated in place
        n = len(entry.types)
        for held, (count, after) in zip(call.held, entry.held, strict=True):
            held.commit(list(found[n : n + count]), after)
            n += count
        for i, x in zip(entry.changed, found[n:], strict=True):
            slot = self._weights.slots[i]
            slot.holder[slot.key] = x
        return unflatten(entry.spec, list(found[: len(entry.types)]))

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph as captured, before any pass."""
        return self.result(*args, **kwargs).before

    def optimized(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph after all passes."""
        return self.result(*args, **kwargs).graph

    def result(self, *args: Any, **kwargs: Any) -> Result:
        """The whole pipeline run: graphs after every pass, statistics, report. Caches are not changed."""
        return self._entry(args, kwargs)[1].result

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """What every use of a quantized weight became, or why it did not."""
        return self.result(*args, **kwargs).report

    def source(self, *args: Any, **kwargs: Any) -> str:
        """The Python source that runs for these arguments."""
        return self._entry(args, kwargs)[1].program.source

    def cache_info(self) -> CacheInfo:
        """Hits, misses, the bound and the size of the program cache."""
        with LOCK:
            return self._cache.info()

    def clear_cache(self) -> None:
        """Forget all programs, e.g. after a number in the module was changed: those are read at capture."""
        with LOCK:
            self._cache.clear()

    def _original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = cast(Any, type(self._module))
        return kind._qgraph_original.__call__(self._module, *args, **kwargs)

    def _entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Prepared, ModuleEntry]:
        """The call and its program, captured if there is none yet."""
        if PROCESS.forked:
            refuse_after_fork()
        call = self._prepare(args, kwargs)
        entry = self._find(call)
        if entry is not None:
            return call, entry
        with self._making:
            entry = self._find(call)
            if entry is None:
                try:
                    entry = self._make(call)
                except NotDynamic as error:
                    self._literal.add(call.regime)
                    warnings.warn(
                        f"{self._name} is captured again at every call: {error}",
                        RecompileWarning,
                        stacklevel=depth_of_user(),
                    )
                    return self._entry(args, kwargs)
        return call, entry

    def _find(self, call: Prepared) -> ModuleEntry | None:
        with LOCK:
            found = self._cache.find(call.key, [])
        assert found is None or isinstance(found, ModuleEntry)
        return found

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared:
        weights, types = self._read()
        objects: list[Any] = []
        tree = (_set_aside(args, objects), _set_aside(kwargs, objects))
        leaves: list[Any] = []
        spec = Tokens()
        flatten(tree, leaves, spec)
        regime = (types, tuple(spec), signature(leaves), tuple(map(type, objects)), self._module.training)
        length = next((x.shape[1] for x in leaves if len(x.shape) > 1), 1)
        step = Step(length, dynamic=regime not in self._literal)
        held = [HOLDS[type(x)](x, step) for x in objects]
        arrays: list[mx.array] = []
        found: dict[int, int] = {}
        places = tuple(tuple(_place(x, arrays, found) for x in h.arrays) for h in held)
        keys = tuple(h.key for h in held)
        key = (*regime, keys, places, signature(arrays), str(mx.default_device()), compiling())
        return Prepared(weights, leaves, spec, held, arrays, places, key, regime)

    def _read(self) -> tuple[list[Any], int]:
        """The weights, and a number for their types."""
        version, weights = self._weights.read()
        if version != self._stored[0]:
            token = self._types.setdefault(
                (tuple(s.path for s in self._weights.slots), signature(weights)), len(self._types)
            )
            self._stored = (version, stored(weights), token)
        return weights, self._stored[2]

    def _make(self, call: Prepared) -> ModuleEntry:
        entry = without_collector(lambda: self._compile(call))
        with LOCK:
            kept = self._cache.keep(call.key, [], entry)
        assert isinstance(kept, ModuleEntry)
        return kept

    def _compile(self, call: Prepared) -> ModuleEntry:
        builder = Builder()
        labels = _labels(self._weights, call)
        given = [*call.weights, *call.leaves, *call.arrays]
        inputs = [builder.input(n, type_of(x)) for n, x in zip(labels, given, strict=True)]
        shadow = self._weights.shadow()
        spec: list[Any] = []
        types: list[mx.array] = []
        held: list[tuple[int, Any]] = []
        changed: list[int] = []
        n, m = len(call.weights), len(call.weights) + len(call.leaves)

        def flat(*arrays: mx.array) -> list[mx.array]:
            shadow.fill(list(arrays[:n]))
            stand_ins = [
                h.stand_in([arrays[m + i] for i in p]) for h, p in zip(call.held, call.places, strict=True)
            ]
            args, kwargs = _put_back(unflatten(call.spec, list(arrays[n:m])), [x for x, _ in stand_ins])
            leaves: list[mx.array] = []
            flatten(shadow.root(*args, **kwargs), leaves, spec)
            types.extend(leaves)
            for _, read in stand_ins:
                found, after = read()
                held.append((len(found), after))
                leaves += found
            replaced = shadow.changed(list(arrays[:n]))
            changed.extend(i for i, _ in replaced)
            return leaves + [x for _, x in replaced]

        captured = capture(flat, inputs, builder, paths=shadow.paths)
        graph = unify(captured.graph)
        result = self.pipeline.run(graph)
        out = tuple(v.type for v in graph.outputs[: len(types)])
        program = Program(result.graph)
        return ModuleEntry(result, program, captured.captures, spec, out, (), tuple(held), tuple(changed))


def _place(x: mx.array, arrays: list[mx.array], found: dict[int, int]) -> int:
    place = found.get(id(x))
    if place is None:
        place = found[id(x)] = len(arrays)
        arrays.append(x)
    return place


def _set_aside(tree: Any, objects: list[Any]) -> Any:
    """The tree with a `Place` for every object that is held; the objects go to `objects`, each once."""
    kind = cast(Any, type(tree))
    if kind in HOLDS:
        for i, x in enumerate(objects):
            if x is tree:
                return Place(i)
        objects.append(tree)
        return Place(len(objects) - 1)
    return _mapped(tree, lambda x: _set_aside(x, objects))


def _put_back(tree: Any, objects: list[Any]) -> Any:
    kind = cast(Any, type(tree))
    if kind is Place:
        return objects[tree.number]
    return _mapped(tree, lambda x: _put_back(x, objects))


def _mapped(tree: Any, inner: Callable[[Any], Any]) -> Any:
    """The tree with its items replaced; anything but a plain list, tuple or dict has none."""
    kind: Any = cast(Any, type(tree))
    if kind is list or kind is tuple:
        return kind(map(inner, tree))
    return {key: inner(x) for key, x in tree.items()} if kind is dict else tree


def _labels(weights: Weights, call: Prepared) -> list[str]:
    """Names of the inputs: the paths of weights, then of arguments, then of what held objects have."""
    names = [slot.path for slot in weights.slots]
    names += labels_of(weights.root.__call__, *unflatten(call.spec, call.leaves))
    names += [f"state.{i}" for i in range(len(call.arrays))]
    out: dict[str, None] = {}
    for name in names:
        out[unused(re.sub(r"[^\w.\-]", "_", name), out)] = None
    return list(out)


@cache
def _optimized_class(kind: type) -> type:
    """A subclass whose instances run the program when they are called."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.qgraph(*args, **kwargs)

    call.__signature__ = inspect.signature(kind.__call__)
    names = {
        "__call__": call,
        "_qgraph_original": kind,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), names)


def optimize_module(module: Any, pipeline: Pipeline, maxsize: int, fallback: bool) -> Any:
    """An object like `module`, sharing its attributes and children, that runs compiled."""
    if "mlx_lm.models.cache" in sys.modules:
        import_module("qgraph.lm.caches").register()
    original = cast(Any, type(module))
    kind: Any = _optimized_class(getattr(original, "_qgraph_original", original))
    fast: Any = kind.__new__(kind)
    dict.update(fast, module)
    fast.__dict__.update(module.__dict__)
    fast.__dict__["qgraph"] = ModuleProgram(fast, pipeline, maxsize, fallback)
    return fast
