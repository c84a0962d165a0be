"""The table of MLX's primitives: for every name that the tracer reports, how it becomes nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qgraph.ir import Builder, TensorType, Value
from qgraph.ir.op import Op
from qgraph.ir.origin import NOWHERE, Origin


@dataclass(frozen=True)
class Primitive:
    """One primitive as MLX reports it, its operands already values of the graph."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[TensorType, ...]  # as MLX says; the importer checks that the nodes have these types
    arguments: tuple[Any, ...]
    builder: Builder
    origin: Origin = NOWHERE

    def add(self, op: Op, *operands: Value) -> Value:
        """A node with one result."""
        return self.node(op, *operands)[0]

    def node(self, op: Op, *operands: Value) -> tuple[Value, ...]:
        """A node and all its results."""
        return self.builder.add(op, operands, self.origin).outputs


Meaning = Callable[[Primitive], Value | Sequence[Value]]
MEANINGS: dict[str, Meaning] = {}


def primitive(*names: str) -> Callable[[Meaning], Meaning]:
    """Register the meaning of the primitives of these names, as MLX's tracer spells them."""

    def register(meaning: Meaning) -> Meaning:
        MEANINGS.update(dict.fromkeys(names, meaning))
        return meaning

    return register
