"""`qg.jit`: trace once per signature, rewrite, emit, and run through MLX."""

from __future__ import annotations

import gc
import inspect
import re
import threading
import warnings
from collections.abc import Callable
from functools import cache, partial, update_wrapper
from operator import is_
from typing import Any, NamedTuple, TypeVar, overload

import mlx.core as mx

from qgraph._cache import LOCK, Cache, Entry, Programs
from qgraph._errors import QGraphError, RecompileWarning, TraceError
from qgraph._fork import PROCESS, refuse_after_fork
from qgraph.execute.eager import EAGER, collect, stored
from qgraph.execute.program import Program, compiling
from qgraph.execute.stepper import Stepper
from qgraph.inspector.inspect import install_jit
from qgraph.ir import Builder, Graph, Value
from qgraph.ir.origin import depth_of_user
from qgraph.ops.dispatch import active, type_of
from qgraph.rewrite import Pipeline, Result
from qgraph.rewrite.pipeline import DEFAULT, verify_level
from qgraph.trace.foreign import foreign_call, user_source_of
from qgraph.trace.storms import Storms, features_of
from qgraph.trace.surroundings import Surroundings
from qgraph.trace.tracer import Trace, Tracer, signature, unused
from qgraph.trace.tree import Tokens, flatten, paths, unflatten
from qgraph.trace.twice import HiddenDraws, Traced, refuse_difference

R = TypeVar("R")
ATTEMPTS = 3  # traces that other threads may disturb


class Call(NamedTuple):
    """The arguments of a call, as they are and flattened."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    spec: Tokens


class JitFunction(Programs):
    """A function compiled by qgraph; made by `qg.jit`. Call it as the original."""

    def __init__(self, function: Callable[..., Any], pipeline: Pipeline, maxsize: int) -> None:
        self.function = function
        self.pipeline = pipeline
        self.maxsize = maxsize
        self.warns = True  # of recompile storms
        self._cache = Cache(maxsize)
        self._name: str = getattr(function, "__name__", "f")
        self._surroundings = Surroundings(function)
        self._storms = Storms()
        self._making = threading.RLock()  # one trace at a time: a function may count its own
        self._pending: list[Any] = []
        update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; unevaluated MLX arrays come back. Inside another trace the function is inlined."""
        if active() is not None:
            return self.function(*args, **kwargs)
        leaves: list[Any] = []
        outer: list[Any] = []
        entry = self._entry(args, kwargs, leaves, outer)
        leaves += (outer[c] if type(c) is int else c for c in entry.captures)
        arrays = entry.program.trusted(*stored(leaves))
        return unflatten(entry.spec, collect(entry.types, arrays))

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """A jitted method: `self` is a static argument."""
        return self if instance is None else partial(self, instance)

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function op by op without compiling: for a debugger and for print.

        ``@`` and every method work as in the jitted function, on QuantizedTensors too.
        """
        return Stepper().run(self.function, args, kwargs)

    def result(self, *args: Any, **kwargs: Any) -> Result:
        """The whole pipeline run: graphs after every pass, statistics, report."""
        return self._entry(args, kwargs, [], []).result

    def source(self, *args: Any, **kwargs: Any) -> str:
        """The Python source that runs for these arguments."""
        return self._entry(args, kwargs, [], []).program.source

    def _entry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], outer: list[Any]
    ) -> Entry:
        """The program for these arguments; their arrays go to `leaves`, the surroundings' to `outer`."""
        if PROCESS.forked:
            refuse_after_fork()
        spec = Tokens()
        flatten(args, leaves, spec)
        flatten(kwargs, leaves, spec)
        given = (tuple(spec), signature(leaves), str(mx.default_device()), compiling())
        with LOCK:
            entry = self._cache.find((*given, *self._around(spec, outer)), outer)
        if entry is not None:
            return entry
        with self._making:
            with LOCK:  # maybe another thread made it while this one waited
                key = (*given, *self._around(spec, outer))
                entry = self._cache.find(key, outer)
            if entry is not None:
                return entry
            call = Call(args, kwargs, leaves, spec)
            entry = self._make(call, given, outer, key)
        self._warn(call, entry)
        return entry

    def _make(self, call: Call, given: tuple[Any, ...], outer: list[Any], key: tuple[Any, ...]) -> Entry:
        """Compile until nothing outside changed meanwhile, and keep the program."""
        if key in self._pending:
            raise TraceError(
                f"{self._name} was called with arguments for which it is being compiled just now",
                fix="a pass must not call the function that it is compiling",
            )
        depth = len(self._pending)
        try:
            self._pending.append(key)
            for _ in range(ATTEMPTS):
                entry = self._attempt(call, given, outer)
                if entry is not None:
                    return entry
        finally:
            del self._pending[depth:]
        raise TraceError(
            f"{self._name}: another thread kept changing what it reads while it was traced",
            fix="change it between calls, or pass it as an argument",
        )

    def _attempt(self, call: Call, given: tuple[Any, ...], outer: list[Any]) -> Entry | None:
        """Compile once; None if another thread changed what the function reads."""
        objects = call.spec.objects
        arrays: list[Any] = []
        with LOCK:
            before = self._surroundings.read(arrays, [], objects)
        entry = without_collector(lambda: self._compile(call, arrays))
        with LOCK:
            now: list[Any] = []
            after = self._surroundings.read(now, [], objects)
            if threading.active_count() > 1 and self._surroundings.changed_elsewhere(
                before, after, same_arrays=len(arrays) == len(now) and all(map(is_, arrays, now))
            ):
                return None
            self._surroundings.forget_written(before, after)
            return self._cache.keep((*given, *self._around(call.spec, outer)), outer, entry)

    def _around(self, given: Tokens, outer: list[Any]) -> tuple[Any, ...]:
        """What the function reads from outside: the part of the key that is not in its arguments."""
        outer.clear()
        spec: list[Any] = []
        self._surroundings.read(outer, spec, given.objects)
        return tuple(spec), signature(outer)

    def _warn(self, call: Call, entry: Entry) -> None:
        """Warn of a recompile storm, at the user's line."""
        if not self.warns:
            return
        features = features_of(named_arguments(self.function, call.args, call.kwargs))
        features["the default device", "value"] = str(mx.default_device())
        with LOCK:
            constants = not all(type(c) is int for c in entry.captures)
            features.update(self._surroundings.features(call.spec.objects, by_identity=constants))
            message = self._storms.add(features, self._name)
        if message:
            warnings.warn(message, RecompileWarning, stacklevel=depth_of_user())

    def _compile(self, call: Call, outer: list[Any]) -> Entry:
        draws = HiddenDraws()
        traced = self._trace(call, outer)
        given = set(map(id, outer))
        if verify_level() >= 2 or draws.happened(x for x in traced.captures if id(x) not in given):
            refuse_difference(self._name, traced, self._trace(call, outer))
        result = self.pipeline.run(traced.graph)
        types = tuple(v.type for v in traced.graph.outputs)
        return Entry(result, Program(result.graph), traced.captures, traced.spec, types)

    def _trace(self, call: Call, outer: list[Any]) -> Traced:
        """The graph of the function; `outer` are the arrays that it reads from outside."""
        del outer  # they come as captures of the trace
        trace = Trace(Builder(), self._name)
        labels = labels_of(self.function, call.args, call.kwargs)
        inputs = [trace.builder.input(n, type_of(x)) for n, x in zip(labels, call.leaves, strict=True)]
        trace.labels.update(dict.fromkeys(labels))
        spec: list[Any] = []

        def body() -> list[Value]:
            leaves: list[Any] = []
            flatten(self._traced(trace, inputs, call.spec), leaves, spec)
            return [trace.lift(x) for x in leaves]

        outputs = trace.record(body)
        captured = list(trace.captures.values())
        graph = Graph([*inputs, *(v for _, v in captured)], outputs, trace.builder)
        return Traced(graph, tuple(x for x, _ in captured), spec)

    def _traced(self, trace: Trace, inputs: list[Value], spec: list[Any]) -> Any:
        tracers = [Tracer(trace, v) for v in inputs]
        args, kwargs = unflatten(["tuple", 2, *spec], tracers)
        try:
            return self.function(*args, **kwargs)
        except QGraphError as error:
            source = user_source_of(error.__traceback__)
            error.where = error.where or (source.sentence() if source else None)
            raise
        except (TypeError, ValueError) as error:
            foreign = foreign_call(error)
            if foreign is None:
                raise
            raise foreign from error


def without_collector(body: Callable[[], R]) -> R:
    """Keep Python's cycle collector out of a compile.

    A compile makes tens of thousands of objects that stay; looking for garbage among them, and among all
    that was there before, took a third of its time.
    """
    was_on = gc.isenabled()
    try:
        gc.disable()
        return body()
    finally:
        if was_on:
            gc.enable()


def named_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments by the names of the parameters."""
    try:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {**{f"arg{i}": x for i, x in enumerate(args)}, **kwargs}


def labels_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the inputs: the parameter, then the path within its tree."""
    found: list[str] = []
    try:
        bound = list(inspect.signature(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        bound = []
    for i, arg in enumerate(args):
        paths(arg, bound[i] if i < len(bound) else f"arg{i}", found.append)
    paths(kwargs, "", found.append)
    out: dict[str, None] = {}
    for label in found:
        out[unused(re.sub(r"[^\w.\-]", "_", label) or "x", out)] = None
    return list(out)


@overload
def jit(function: Callable[..., Any], /) -> JitFunction: ...
@overload
def jit(
    *, pipeline: str | None = None, strict: bool = False, activations: str = "", maxsize: int = 256
) -> Callable[[Callable[..., Any]], JitFunction]: ...
def jit(
    function: Callable[..., Any] | None = None,
    /,
    *,
    pipeline: str | None = None,
    strict: bool = False,
    activations: str = "",
    maxsize: int = 256,
) -> Any:
    """Compile a function of arrays, QuantizedTensors and trees of them.

    Arrays and QuantizedTensors are traced; everything else in the arguments (numbers, strings, None) is
    static: another value makes another program. Programs are shared by all arguments of equal types, and
    the least recently used one is dropped beyond `maxsize`. The call returns unevaluated MLX arrays and
    composes with mx.grad, mx.value_and_grad and, without quantized operands, mx.vmap.

    `pipeline` replaces the default passes (`qg.rewrite.DEFAULT`); `strict` raises StrictError where a
    quantized operand would be unpacked; ``activations="int8"`` lets a CPU's native kernels round what they
    multiply packed weights by to 8 bits, which is faster and less exact.
    Errors: TraceError for what cannot be traced, with the line.

    >>> import mlx.core as mx, qgraph as qg
    >>> @qg.jit
    ... def layer(x, w):
    ...     return qg.silu(x @ w.T)
    >>> w = qg.quantize(mx.ones((32, 64)))
    >>> layer(mx.ones((2, 64)), w).shape
    (2, 32)
    >>> layer.cache_info().misses
    1
    """
    passes = Pipeline.chosen(pipeline, strict, activations)
    if function is None:
        return partial(JitFunction, pipeline=passes, maxsize=maxsize)
    return JitFunction(function, passes, maxsize)


@cache
def _default_pipeline() -> Pipeline:
    return Pipeline.parse(DEFAULT)


# Eager ops on packed operands run as a graph of one node, under the same passes.
EAGER.rewrite = lambda graph: _default_pipeline().run(graph).graph
install_jit(jit)
