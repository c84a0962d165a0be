"""`qg.jit`: trace once per signature, rewrite, emit, and run through MLX."""

from __future__ import annotations

import gc
import inspect
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial, update_wrapper
from typing import Any, NamedTuple, overload

import mlx.core as mx

from qgraph._errors import QGraphError
from qgraph.execute.eager import EAGER, collect, stored
from qgraph.execute.program import Program, compiling
from qgraph.execute.stepper import Stepper
from qgraph.inspector.inspect import install_jit
from qgraph.ir import Builder, Graph, TensorType, Value
from qgraph.ops.dispatch import active, type_of
from qgraph.rewrite import Pipeline, Report, Result
from qgraph.rewrite.pipeline import DEFAULT
from qgraph.trace.foreign import foreign_call, user_source_of
from qgraph.trace.surroundings import Same, Surroundings, is_plain_object
from qgraph.trace.tracer import Trace, Tracer, signature, unused
from qgraph.trace.tree import flatten, paths, unflatten


class CacheInfo(NamedTuple):
    """Counts of a jitted function's program cache."""

    hits: int
    misses: int
    maxsize: int
    currsize: int


@dataclass(frozen=True)
class _Entry:
    """A compiled signature: the program, what it captured, and the shape of what it returns."""

    result: Result
    program: Program
    captures: tuple[Any, ...]  # arrays, or their places among those that the surroundings give
    spec: list[Any]  # of the returned tree
    types: tuple[TensorType, ...]  # of its leaves


class JitFunction:
    """A function compiled by qgraph; made by `qg.jit`. Call it as the original."""

    def __init__(self, function: Callable[..., Any], pipeline: Pipeline, maxsize: int) -> None:
        self.function = function
        self.pipeline = pipeline
        self.maxsize = maxsize
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._hits = self._misses = 0
        self._lock = threading.RLock()
        self._surroundings = Surroundings(function)
        self._by_identity: set[Any] = set()
        update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; unevaluated MLX arrays come back. Inside another trace the function is inlined."""
        if active() is not None:
            return self.function(*args, **kwargs)
        leaves: list[Any] = []
        outer: list[Any] = []
        entry = self._entry(args, kwargs, leaves, outer)
        leaves += (outer[c] if type(c) is int else c for c in entry.captures)
        arrays = entry.program.run(*stored(leaves))
        return unflatten(entry.spec, collect(entry.types, arrays))

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """A jitted method: `self` is a static argument."""
        return self if instance is None else partial(self, instance)

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function op by op without compiling: for a debugger and for print.

        ``@`` and every method work as in the jitted function, on QuantizedTensors too.
        """
        return Stepper().run(self.function, args, kwargs)

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph as traced, before any pass."""
        return self.result(*args, **kwargs).before

    def optimized(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph after all passes."""
        return self.result(*args, **kwargs).graph

    def result(self, *args: Any, **kwargs: Any) -> Result:
        """The whole pipeline run: graphs after every pass, statistics, report."""
        return self._entry(args, kwargs, [], []).result

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """What every use of a quantized value became, or why it did not."""
        return self.result(*args, **kwargs).report

    def source(self, *args: Any, **kwargs: Any) -> str:
        """The Python source that runs for these arguments."""
        return self._entry(args, kwargs, [], []).program.source

    def cache_info(self) -> CacheInfo:
        """Hits, misses, the bound and the size of the program cache."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, self.maxsize, len(self._entries))

    def clear_cache(self) -> None:
        """Forget all programs."""
        with self._lock:
            self._entries.clear()
            self._by_identity.clear()
            self._hits = self._misses = 0

    def _entry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], outer: list[Any]
    ) -> _Entry:
        """The program for these arguments; their arrays go to `leaves`, the surroundings' to `outer`."""
        spec: list[Any] = []
        flatten(args, leaves, spec)
        flatten(kwargs, leaves, spec)
        given = (tuple(spec), signature(leaves), str(mx.default_device()), compiling())
        with self._lock:
            key = self._exact((*given, *self._around(args, outer)), outer)
            entry = self._entries.get(key)
            if entry is not None:
                self._hits += 1
                self._entries.move_to_end(key)
                return entry
            before = self._surroundings.read([], [], _objects(args))
            with collector_paused():
                entry = self._compile(args, kwargs, leaves, spec)
            self._misses += 1
            after = self._surroundings.read([], [], _objects(args))
            self._surroundings.forget_written(before, after)
            outer.clear()
            key = (*given, *self._around(args, outer))
            places = {id(x): i for i, x in enumerate(outer)}
            entry = replace(entry, captures=tuple(places.get(id(x), x) for x in entry.captures))
            if not all(type(c) is int for c in entry.captures):
                self._by_identity.add(key)
            self._keep(self._exact(key, outer), entry)
            return entry

    def _exact(self, key: tuple[Any, ...], outer: list[Any]) -> tuple[Any, ...]:
        """The key, with the arrays outside by identity where the program has one that is made of them.

        ``x @ W.T`` with an mx.array W outside the function is an example: MLX itself transposes it.
        """
        return (*key, *map(Same, outer)) if self._by_identity and key in self._by_identity else key

    def _keep(self, key: tuple[Any, ...], entry: _Entry) -> None:
        self._entries[key] = entry
        if len(self._entries) > self.maxsize:
            self._entries.popitem(last=False)
        if len(self._by_identity) > self.maxsize:
            self._by_identity.clear()  # the programs that are no longer found age out

    def _around(self, args: tuple[Any, ...], outer: list[Any]) -> tuple[Any, ...]:
        """What the function reads from outside: the part of the key that is not in its arguments."""
        spec: list[Any] = []
        self._surroundings.read(outer, spec, _objects(args))
        return tuple(spec), signature(outer)

    def _compile(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Any], spec: list[Any]
    ) -> _Entry:
        trace = Trace(Builder(), getattr(self.function, "__name__", "f"))
        labels = _labels(self.function, args, kwargs)
        inputs = [trace.builder.input(n, type_of(x)) for n, x in zip(labels, given, strict=True)]
        trace.labels.update(dict.fromkeys(labels))
        with trace.recording():
            returned = self._traced(trace, inputs, spec)
            leaves: list[Any] = []
            out_spec: list[Any] = []
            flatten(returned, leaves, out_spec)
            outputs = [trace.lift(x) for x in leaves]
        trace.finished = True
        captured = list(trace.captures.values())
        graph = Graph([*inputs, *(v for _, v in captured)], outputs, trace.builder)
        result = self.pipeline.run(graph)
        captures = tuple(x for x, _ in captured)
        return _Entry(result, Program(result.graph), captures, out_spec, tuple(v.type for v in outputs))

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


def _objects(args: tuple[Any, ...]) -> list[Any]:
    """The static arguments that have state, e.g. the `self` of a method."""
    return [x for x in args if is_plain_object(x)]


@contextmanager
def collector_paused() -> Generator[None]:
    """Keep Python's cycle collector out of a compile.

    A compile makes tens of thousands of objects that stay; looking for garbage among them, and among all
    that was there before, took a third of its time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _labels(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
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
    *, pipeline: str | None = None, strict: bool = False, maxsize: int = 256
) -> Callable[[Callable[..., Any]], JitFunction]: ...
def jit(
    function: Callable[..., Any] | None = None,
    /,
    *,
    pipeline: str | None = None,
    strict: bool = False,
    maxsize: int = 256,
) -> Any:
    """Compile a function of arrays, QuantizedTensors and trees of them.

    Arrays and QuantizedTensors are traced; everything else in the arguments (numbers, strings, None) is
    static: another value makes another program. Programs are shared by all arguments of equal types, and
    the least recently used one is dropped beyond `maxsize`. The call returns unevaluated MLX arrays and
    composes with mx.grad, mx.value_and_grad and, without quantized operands, mx.vmap.

    `pipeline` replaces the default passes (`qg.rewrite.DEFAULT`); `strict` raises StrictError where a
    quantized operand would be unpacked. Errors: TraceError for what cannot be traced, with the line.

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
    passes = Pipeline.parse(pipeline or DEFAULT)
    if strict:
        passes = passes.with_option("strict", True)
    if function is None:
        return partial(JitFunction, pipeline=passes, maxsize=maxsize)
    return JitFunction(function, passes, maxsize)


@cache
def _default_pipeline() -> Pipeline:
    return Pipeline.parse(DEFAULT)


# Eager ops on packed operands run as a graph of one node, under the same passes.
EAGER.rewrite = lambda graph: _default_pipeline().run(graph).graph
install_jit(jit)
