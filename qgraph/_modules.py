"""`qg.optimize` of a module: its weights and its caches become arguments, the object stays what it was."""

from __future__ import annotations

import inspect
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import mlx.core as mx

from qgraph._cache import LOCK, Cache, Entry, Programs
from qgraph._errors import RecompileWarning, TraceError
from qgraph._fork import PROCESS, refuse_after_fork
from qgraph._jit import labels_of, named_arguments, without_collector
from qgraph.capture.arguments import put_back, set_aside
from qgraph.capture.caches import register
from qgraph.capture.capture import capture
from qgraph.capture.state import DOUBTS, HOLDS, Held, NotDynamic, Step, commit_all
from qgraph.capture.unify import unify
from qgraph.capture.weights import Weights
from qgraph.execute.eager import stored
from qgraph.execute.program import Program, compiling
from qgraph.ir import Builder
from qgraph.ir.dtypes import dtype_of
from qgraph.ir.origin import depth_of_user
from qgraph.numeric import tolerance
from qgraph.ops.dispatch import type_of
from qgraph.quant import QuantizedTensor
from qgraph.rewrite import Pipeline, Result
from qgraph.trace.storms import Storms, features_of
from qgraph.trace.tracer import signature, unused
from qgraph.trace.tree import Tokens, flatten, unflatten


@dataclass(frozen=True)
class ModuleEntry(Entry):
    """A program of a module: what else it returns beside the module's result."""

    held: tuple[tuple[int, Any], ...] = ()  # for every held object: how many arrays, and what commit wants
    changed: tuple[int, ...] = ()  # the weights that the module replaced, by place
    doubts: tuple[str, ...] = ()  # why the first results are to be compared


@dataclass
class Prepared:
    """The arguments of one call as flat arrays, and the key of its program."""

    weights: list[Any]
    flat: list[mx.array]  # what the weights store
    leaves: list[Any]
    spec: Tokens
    held: list[Held]
    arrays: list[mx.array]  # of the held objects, every one once
    places: tuple[tuple[int, ...], ...]  # of every held object's arrays among them
    key: tuple[Any, ...]
    regime: tuple[Any, ...]  # the key without what may change from call to call


class ModuleProgram(Programs):
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
        self._checked: set[Any] = set()  # the keys of programs that were compared
        self._gave_up = False
        self._storms = Storms()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; unevaluated MLX arrays come back, and the caches among the arguments are updated."""
        if self._gave_up:
            return self._original(args, kwargs)
        try:
            call, entry = self._entry(args, kwargs)
            if entry.doubts and not self._confirmed(call, entry, args, kwargs):
                return self(*args, **kwargs)
        except TraceError as error:
            if not self.fallback or self._packed():
                raise
            self._gave_up = True
            warnings.warn(f"{self._name} runs without qgraph: {error}", stacklevel=depth_of_user())
            return self._original(args, kwargs)
        found = self._run(call, entry)
        call.arrays.clear()  # a buffer that nothing references is updated in place
        n = len(entry.types)
        m = len(found) - len(entry.changed)
        commit_all(call.held, found[n:m], entry.held)
        for i, x in zip(entry.changed, found[m:], strict=True):
            slot = self._weights.slots[i]
            slot.holder[slot.key] = x
        return unflatten(entry.spec, list(found[:n]))

    def _run(self, call: Prepared, entry: ModuleEntry) -> Sequence[mx.array]:
        return entry.program.trusted(*call.flat, *stored(call.leaves), *call.arrays, *entry.captures)

    def _confirmed(
        self, call: Prepared, entry: ModuleEntry, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a program that serves all states of the caches gives what one made for this state gives.

        It is asked where the capture left doubts, once for every program; if not, this regime is captured
        again at every call.
        """
        if call.key in self._checked or not any(getattr(h, "slack", 0) for h in call.held):
            return True  # with no room in the buffers nothing would show: the next call is asked
        exact, literal = self._entry(args, kwargs, dynamic=False)
        n = len(entry.types)
        results = [list(self._run(call, entry)[:n]), list(self._run(exact, literal)[:n])]
        if all(map(_agree, *results)):
            self._checked.add(call.key)
            return True
        self._give_up(call, "; ".join(entry.doubts))
        return False

    def _give_up(self, call: Prepared, why: str) -> None:
        """Capture calls like this one anew for every state of their caches.

        Errors: TraceError where the original may run instead, which is faster than a capture.
        """
        if self.fallback and not self._packed():
            raise TraceError(f"every call would be captured again: {why}")
        self._literal.add(call.regime)
        message = f"{self._name} is captured again at every call: {why}"
        warnings.warn(message, RecompileWarning, stacklevel=depth_of_user())

    def result(self, *args: Any, **kwargs: Any) -> Result:
        """The whole pipeline run: graphs after every pass, statistics, report. Caches are not changed."""
        return self._entry(args, kwargs)[1].result

    def source(self, *args: Any, **kwargs: Any) -> str:
        """The Python source that runs for these arguments."""
        return self._entry(args, kwargs)[1].program.source

    def _packed(self) -> bool:
        """Whether weights are QuantizedTensors: then MLX's own code cannot run on them."""
        return any(isinstance(x, QuantizedTensor) for x in self._weights.read()[1])

    def _original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = cast(Any, type(self._module))
        return kind._qgraph_original.__call__(self._module, *args, **kwargs)

    def _entry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool = True
    ) -> tuple[Prepared, ModuleEntry]:
        """The call and its program, captured if there is none yet."""
        if PROCESS.forked:
            refuse_after_fork()
        call = self._prepare(args, kwargs, dynamic)
        entry = self._find(call)
        if entry is not None:
            return call, entry
        with self._making:
            entry = self._find(call)
            if entry is None:
                try:
                    entry = self._make(call)
                except NotDynamic as error:
                    self._give_up(call, str(error))
                    return self._entry(args, kwargs, dynamic=False)
                self._warn(call)
        return call, entry

    def _warn(self, call: Prepared) -> None:
        """Warn of arguments that make every call another program; lengths are the user's to choose."""
        args, kwargs = unflatten(call.spec, call.leaves)
        features = features_of(named_arguments(self._module.__call__, args, kwargs))
        message = self._storms.add(
            {(of, what): x for (of, what), x in features.items() if not what.startswith("axis")}, self._name
        )
        if message:
            warnings.warn(message, RecompileWarning, stacklevel=depth_of_user())

    def _find(self, call: Prepared) -> ModuleEntry | None:
        with LOCK:
            found = self._cache.find(call.key, [])
        assert found is None or isinstance(found, ModuleEntry)
        return found

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> Prepared:
        weights, flat, types = self._read()
        objects: list[Any] = []
        tree = (set_aside(args, objects), set_aside(kwargs, objects))
        leaves: list[Any] = []
        spec = Tokens()
        flatten(tree, leaves, spec)
        regime = (types, tuple(spec), signature(leaves), tuple(map(type, objects)), self._module.training)
        length = next((x.shape[1] for x in leaves if len(x.shape) > 1), 1)
        step = Step(length, dynamic=dynamic and regime not in self._literal)
        held = [HOLDS[type(x)](x, step) for x in objects]
        arrays: list[mx.array] = []
        found: dict[int, int] = {}
        places = tuple(tuple(_place(x, arrays, found) for x in h.arrays) for h in held)
        keys = tuple(h.key for h in held)
        key = (*regime, step.dynamic, keys, places, signature(arrays), str(mx.default_device()), compiling())
        return Prepared(weights, flat, leaves, spec, held, arrays, places, key, regime)

    def _read(self) -> tuple[list[Any], list[mx.array], int]:
        """The weights, the arrays that they store, and a number for their types."""
        version, weights = self._weights.read()
        known = self._stored
        if version != known[0]:
            paths = tuple(s.path for s in self._weights.slots)
            types = (self._weights.structure, paths, signature(weights))
            token = self._types.setdefault(types, len(self._types))
            known = self._stored = (version, stored(weights), token)
        return weights, known[1], known[2]

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
            for kept in (spec, types, held, changed):
                kept.clear()  # after an error the function is run again, to find its place
            shadow.fill(list(arrays[:n]))
            stand_ins = [
                h.stand_in([arrays[m + i] for i in p]) for h, p in zip(call.held, call.places, strict=True)
            ]
            args, kwargs = put_back(unflatten(call.spec, list(arrays[n:m])), [x for x, _ in stand_ins])
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
        doubts = tuple(DOUBTS) if call.held else ()
        extras = tuple(held), tuple(changed), doubts
        return ModuleEntry(result, program, captured.captures, spec, out, (), *extras)


def _place(x: mx.array, arrays: list[mx.array], found: dict[int, int]) -> int:
    place = found.get(id(x))
    if place is None:
        place = found[id(x)] = len(arrays)
        arrays.append(x)
    return place


def _agree(a: mx.array, b: mx.array) -> bool:
    """Whether two results are equal up to the rounding of a model's sums."""
    if not mx.issubdtype(a.dtype, mx.floating) or not a.size:
        return bool(mx.array_equal(a, b).item())
    dtype = dtype_of(a.dtype)
    limit = max(tolerance(dtype, 1, "model").frobenius, 16 * dtype.unit_roundoff)  # 16 bit: a few roundings
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool((mx.linalg.norm(a - b) <= limit * mx.linalg.norm(b)).item())


def _labels(weights: Weights, call: Prepared) -> list[str]:
    """Names of the inputs: the paths of weights, then of arguments, then of what held objects have."""
    names = [slot.path for slot in weights.slots]
    names += labels_of(weights.root.__call__, *unflatten(call.spec, call.leaves))
    state: dict[int, str] = {}
    for n, (held, places) in enumerate(zip(call.held, call.places, strict=True)):
        named = dict(enumerate(getattr(held, "names", ())))
        for k, i in enumerate(places):
            state.setdefault(i, f"cache.{n}.{named.get(k, k)}")
    names += [state[i] for i in range(len(call.arrays))]
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
        register()
    original = cast(Any, type(module))
    kind: Any = _optimized_class(getattr(original, "_qgraph_original", original))
    fast: Any = kind.__new__(kind)
    dict.update(fast, module)
    fast.__dict__.update(module.__dict__)
    fast.__dict__["qgraph"] = ModuleProgram(fast, pipeline, maxsize, fallback)
    return fast
