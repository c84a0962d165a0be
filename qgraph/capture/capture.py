"""Capture: a function of arrays, run once under MLX's tracer, becomes a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import mlx.core as mx

from qgraph.capture.cut import Cutter, cutting
from qgraph.capture.escapes import escaped, unsupported
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


def placeholder(value: Value) -> mx.array:
    """An array of a value's logical type that is never evaluated: MLX's tracer looks at types only."""
    return mx.zeros(value.type.shape, value.type.dtype.mlx)


def capture(
    function: Flat,
    inputs: Sequence[Value],
    builder: Builder,
    *,
    outer: Sequence[mx.array] = (),
    paths: Mapping[int, str] | None = None,
) -> Captured:
    """The graph of `function`, which takes one array for each of `inputs` and returns a list of arrays.

    `outer` are evaluated arrays that the function may read beside its arguments: those it reads become
    inputs, every other constant of the function's is part of the graph or kept with it. `paths` are the
    paths of modules by id, for functions that call modules: then `mx.fast` operations are kept whole (see
    `qgraph.capture.cut`), and nodes know their module. Nothing is evaluated.

    Errors: TraceError for what cannot be captured.
    """
    check_encodings()
    cutter = Cutter()
    calls = Calls()
    with CAPTURING:
        recording, counts = _record(function, inputs, cutter, calls, paths)
    n, operands = counts
    names = recording.outputs
    cuts = cutter.steps(recording, names[n : n + operands])
    steps = {x: step for step in (*map(Step, recording.records), *cuts) for x in step.record.outputs}
    sites = sites_of(steps, _named_calls(calls.ended, names[n + operands :]))
    pool = _Pool(builder, inputs, outer)
    known = dict(zip(recording.inputs, inputs, strict=True))
    importer = Importer(recording, builder, known, pool.value, cuts, sites)
    try:
        found = [importer.value(name) for name in names[:n]]
    except UnsupportedPrimitive as error:
        raise unsupported(error.name, error.scope) from None
    return Captured(Graph([*inputs, *pool.values], found, builder), tuple(pool.arrays))


def _record(
    function: Flat,
    inputs: Sequence[Value],
    cutter: Cutter,
    calls: Calls,
    paths: Mapping[int, str] | None,
) -> tuple[Recording, tuple[int, int]]:
    """The recording of the function's results, then the operands of cuts, then what modules took and gave."""
    counts = (0, 0)

    def run(*arrays: mx.array) -> list[mx.array]:
        nonlocal counts
        with nullcontext() if paths is None else around():
            found = list(function(*arrays))
        operands = [x for cut in cutter.cuts for x in cut.operands]
        counts = (len(found), len(operands))
        return [*found, *operands, *(x for call in calls.ended for x in (*call.given, *call.returned))]

    before = (CURRENT.calls, CURRENT.paths)
    try:
        if paths is None:
            return record(run, list(map(placeholder, inputs))), counts
        CURRENT.calls, CURRENT.paths = calls, paths
        with cutting(cutter):
            recording = record(run, list(map(placeholder, inputs)))
        return recording, counts
    except Exception as error:
        other = escaped(error, calls.deepest)
        if other is error:
            raise
        raise other from error
    finally:
        CURRENT.calls, CURRENT.paths = before


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
