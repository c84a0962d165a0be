"""Capture: a function of arrays, run once under MLX's tracer, becomes a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from qgraph._errors import TraceError
from qgraph.capture.cut import Cutter, cutting, spelling_out
from qgraph.capture.escapes import escaped, unexported, unsupported
from qgraph.capture.importer import Importer, Step, UnsupportedPrimitive, literal_constant
from qgraph.capture.records import CAPTURING, Flat, Recording, address, record
from qgraph.capture.scopes import CURRENT, Calls, ModuleCall, Site, sites_of
from qgraph.capture.selftest import check_encodings
from qgraph.capture.state import around
from qgraph.ir import Builder, Graph, Value
from qgraph.ops.dispatch import type_of
from qgraph.trace.tracer import unused


@dataclass(frozen=True)
class Captured:
    """The graph, and the arrays that it uses beside its arguments, in the order of its last inputs."""

    graph: Graph
    captures: tuple[mx.array, ...]


def capture(
    function: Flat,
    inputs: Sequence[Value],
    builder: Builder,
    *,
    outer: Sequence[mx.array] = (),
    paths: Mapping[int, Sequence[str]] | None = None,
) -> Captured:
    """The graph of `function`, which takes one array for each of `inputs` and returns a list of arrays.

    `outer` are evaluated arrays that the function may read beside its arguments: those it reads become
    inputs, every other constant of the function's is part of the graph or kept with it. `paths` are the
    paths of modules by id, for functions that call modules: then `mx.fast` operations are kept whole (see
    `qgraph.capture.cut`), and nodes know their module. Nothing is evaluated.

    Errors: TraceError for what cannot be captured.
    """
    check_encodings()
    run = _Run(function, inputs, paths)
    with CAPTURING:
        recording = run.record()
    names, n = recording.outputs, run.results
    operands = sum(len(cut.operands) for cut in run.cutter.cuts)
    cuts = run.cutter.steps(recording, names[n : n + operands])
    steps = {x: step for step in (*map(Step, recording.records), *cuts) for x in step.record.outputs}
    sites = sites_of(steps, _named_calls(run.calls.ended, names[n + operands :]))
    pool = _Pool(builder, inputs, outer)
    known = dict(zip(recording.inputs, inputs, strict=True))
    importer = Importer(recording, builder, known, pool.value, cuts, sites)
    try:
        found = [importer.value(name) for name in names[:n]]
    except UnsupportedPrimitive as error:
        raise unsupported(error.name, error.scope, error.where) from None
    return Captured(Graph([*inputs, *pool.values], found, builder), tuple(pool.arrays))


class _Run:
    """The function under MLX's tracer, with whatever is replaced and watched meanwhile."""

    def __init__(
        self, function: Flat, inputs: Sequence[Value], paths: Mapping[int, Sequence[str]] | None
    ) -> None:
        self.function = function
        self.arrays = [mx.zeros(v.type.shape, v.type.dtype.mlx) for v in inputs]  # never evaluated
        self.paths = paths
        self._renew()

    def _renew(self) -> None:
        self.cutter = Cutter()
        self.calls = Calls(lambda: self.cutter.active)
        self.results = 0

    def record(self) -> Recording:
        """Of the function's results, then the operands of cuts, then what modules were given and returned."""
        try:
            return self._traced(self._everything)
        except Exception as error:
            primitive = unexported(error)
            if primitive:
                raise self._blame(primitive) from error
            other = escaped(error, self.calls.deepest)
            if other is error:
                if self.calls.deepest:  # the user's own error, of its own type, as without qgraph
                    error.add_note(f"in module {self.calls.deepest}, which qgraph was capturing")
                raise
            raise other from error

    def _traced(self, outputs: Callable[[list[mx.array]], list[mx.array]]) -> Recording:
        def body(*arrays: mx.array) -> list[mx.array]:
            if self.paths is None:
                return outputs(list(self.function(*arrays)))
            with around():
                found = list(self.function(*arrays))
            return outputs(found)

        if self.paths is None:
            with spelling_out():
                return record(body, self.arrays)
        before = (CURRENT.calls, CURRENT.paths)
        CURRENT.calls, CURRENT.paths = self.calls, self.paths
        try:
            with cutting(self.cutter):
                return record(body, self.arrays)
        finally:
            CURRENT.calls, CURRENT.paths = before

    def _everything(self, found: list[mx.array]) -> list[mx.array]:
        self.results = len(found)
        operands = [x for cut in self.cutter.cuts for x in cut.operands]
        return [*found, *operands, *(x for call in self.calls.ended for x in (*call.given, *call.returned))]

    def _blame(self, primitive: str) -> TraceError:
        """The error for a primitive without an exporter. MLX does not say where it is: find the module."""
        calls = self.calls.ended
        low, high = 0, len(calls)  # the results of the first `low` calls are without it
        while low < high:
            middle = (low + high) // 2
            if self._exports(middle + 1):
                low = middle + 1
            else:
                high = middle
        if low == len(calls):
            return unsupported(primitive, "")
        return unsupported(primitive, calls[low].path, calls[low].source.sentence())

    def _exports(self, n: int) -> bool:
        """Whether MLX reports what the first `n` calls of modules return."""
        self._renew()
        try:
            self._traced(lambda _: [x for call in self.calls.ended[:n] for x in call.returned])
        except ValueError:
            return False
        return True


def _named_calls(
    calls: Sequence[ModuleCall], names: Sequence[str]
) -> list[tuple[Site, Sequence[str], Sequence[str]]]:
    out: list[tuple[Site, Sequence[str], Sequence[str]]] = []
    i = 0
    for call in calls:
        j = i + len(call.given)
        k = j + len(call.returned)
        out.append((Site(call.path, call.source), names[i:j], names[j:k]))
        i = k
    return out


class _Pool:
    """Constants of the function: arrays of its surroundings, numbers, and the rest."""

    def __init__(self, builder: Builder, inputs: Sequence[Value], outer: Sequence[mx.array]) -> None:
        self.arrays: list[mx.array] = []
        self.values: list[Value] = []
        self._builder = builder
        self._labels = {str(getattr(v.op, "label", "")): None for v in inputs}
        self._outer = {_identity(x): x for x in outer}

    def value(self, x: mx.array) -> Value:
        """The value of a constant that MLX reports."""
        given = self._outer.get(_identity(x))
        literal = literal_constant(self._builder, x) if given is None else None
        if literal is not None:
            return literal
        label = unused(f"captured{len(self.arrays)}", self._labels)
        self._labels[label] = None
        value = self._builder.input(label, type_of(x))
        if value not in self.values:
            self.arrays.append(x if given is None else given)
            self.values.append(value)
        return value


def _identity(x: mx.array) -> tuple[object, ...]:
    """The same for two Python objects that are one array: MLX reports constants as new objects."""
    return (address(x) if x.size else 0, tuple(x.shape), str(x.dtype), memoryview(x).strides)  # pyright: ignore[reportArgumentType]
