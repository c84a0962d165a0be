"""From what MLX's tracer reports to a graph: every record becomes nodes when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from qgraph._errors import QGraphError
from qgraph.capture.primitives import MEANINGS, Primitive
from qgraph.capture.primitives.table import Meaning
from qgraph.capture.records import Record, Recording
from qgraph.ir import Builder, Value
from qgraph.ir.dtypes import dtype_of
from qgraph.ir.op import Constant
from qgraph.ir.origin import UNKNOWN, Origin, Source

if TYPE_CHECKING:
    from qgraph.capture.scopes import Site

SMALL = 64  # numbers of a constant that is written into the graph; larger ones are inputs


@dataclass(frozen=True)
class Step:
    """What makes named arrays: a primitive, or an operation that was cut out whole."""

    record: Record
    meaning: Meaning | None = None  # None: as the table says
    source: Source | None = None


class Importer:
    """Makes the values of one recording, each when it is first needed."""

    def __init__(
        self,
        recording: Recording,
        builder: Builder,
        known: Mapping[str, Value],
        constant: Callable[[mx.array], Value],
        cuts: Sequence[Step] = (),
        sites: Mapping[str, Site] | None = None,
    ) -> None:
        self.builder = builder
        self._values: dict[str, Value] = dict(known)
        self._constants = recording.constants
        self._constant = constant
        self._sites = sites or {}
        self._steps: dict[str, Step] = {}
        for step in (*map(Step, recording.records), *cuts):
            for name in step.record.outputs:
                self._steps[name] = step

    def value(self, name: str) -> Value:
        """The value of an array by its name; what it is made of is made before, without recursion."""
        stack = [name]
        while stack:
            top = stack[-1]
            if top in self._values:
                stack.pop()
                continue
            if top in self._constants and top not in self._steps:
                self._values[top] = self._constant(self._constants[top])
                continue
            step = self._steps[top]
            waiting = [x for x in step.record.inputs if x not in self._values]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                self._make(step)
        return self._values[name]

    def _make(self, step: Step) -> None:
        record = step.record
        site = self._sites.get(record.outputs[0])
        scope = site.path if site else ""
        source = step.source or (site.source if site else UNKNOWN)
        # An object of its own for every node: the report tells the uses of a value apart by it.
        origin = Origin((source.copy(),), scope)
        inputs = tuple(self._values[x] for x in record.inputs)
        primitive = Primitive(record.name, inputs, record.types, record.arguments, self.builder, origin)
        meaning = step.meaning or MEANINGS.get(record.name)
        if meaning is None:
            raise UnsupportedPrimitive(record.name, scope, source)
        try:
            made = meaning(primitive)
        except QGraphError as error:
            error.add_note(f"while importing MLX's {_shown(record)}" + (f" in {scope}" if scope else ""))
            raise
        values = (made,) if isinstance(made, Value) else tuple(made)
        found = tuple(v.type.dense() for v in values)
        if found != record.types:
            types = [", ".join(map(str, t)) for t in (record.types, found)]
            raise QGraphError(
                f"MLX's {_shown(record)} gives {types[0]}, the graph's nodes {types[1]}",
                where=scope or None,
                fix="report it: MLX may encode this primitive in another way than the tested versions",
            )
        self._values.update(zip(record.outputs, values, strict=True))


class UnsupportedPrimitive(Exception):
    """A primitive that the table does not have; `qgraph.capture.escapes` says it to the user."""

    def __init__(self, name: str, scope: str, source: Source) -> None:
        super().__init__(name)
        self.name = name
        self.scope = scope
        self.where = source.sentence() if source.known else None


def literal_constant(builder: Builder, x: mx.array) -> Value | None:
    """A small array as a node of the graph, None for a large one."""
    dtype = dtype_of(x.dtype)
    if x.size > SMALL or dtype.is_complex:
        return None
    flat: Any = x.reshape(-1).tolist()
    return builder.add(Constant(tuple(flat), tuple(x.shape), dtype)).outputs[0]


def _shown(record: Record) -> str:
    return f"{record.name}{list(record.arguments) if record.arguments else ''}"
