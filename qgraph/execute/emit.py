"""Emission: a graph as one flat Python function of MLX calls.

Inputs and results are flat lists of arrays; a quantized value takes several places (packed, scales,
biases). The source is what runs, and is meant to be read: ``f.source(*args)`` prints it.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qgraph import kernels
from qgraph._errors import QGraphError
from qgraph.execute.vmap import first_activations
from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.op import KERNEL, NATIVE, NATIVE_KERNELS, Constant, Input, Operand, Storage, literal
from qgraph.ir.text import comment, names_of
from qgraph.ir.types import TensorType
from qgraph.ops import random_bits, tiled
from qgraph.ops.quantized import PRODUCTS, reads_storage
from qgraph.rewrite.guard import guard_indices

GUARD = "refuse_vmap"


@dataclass(frozen=True)
class Emitted:
    """Source of a function ``program``, and what it takes."""

    source: str
    arity: int  # flat arrays that the graph's inputs take
    constants: tuple[tuple[str, str], ...]  # name and MLX expression, made once


class _Writer:
    """Names for values, lines of the body."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.lines: list[str] = []
        self.constants: list[tuple[str, str]] = []
        self.names: dict[Value, Operand] = {}
        self.asides: dict[str, str] = {}  # source that is a statement of its own, and its name
        # copy: what index_update binds; float and slice: what literals and subscripts call.
        self.taken: set[str] = {"mx", "program", "copy", "float", "slice", GUARD}
        self.taken |= {random_bits.FUNCTION, tiled.FUNCTION, NATIVE}
        self.labels = names_of(graph)
        self.unguarded = set(first_activations(graph))

    def fresh(self, label: str) -> str:
        """A Python identifier for `label`, not yet taken."""
        base = re.sub(r"\W", "_", label) or "v"
        base = f"_{base}" if base[0].isdigit() or keyword.iskeyword(base) else base
        name, n = base, 1
        while name in self.taken:
            name, n = f"{base}_{n}", n + 1
        self.taken.add(name)
        return name

    def place(self, value: Value) -> Operand:
        """Fresh names for the storage of `value`."""
        packing = value.type.packing
        label = self.labels[value]
        if packing is None:
            return self.fresh(label)
        return Storage(**{part: self.fresh(f"{label}_{part}") for part in packing.components})

    def constant(self, op: Constant, label: str, types: tuple[TensorType, ...]) -> str:
        """The name of a constant, which is made once, outside the program."""
        name = self.fresh(label)
        # mx.compile on a CPU writes a scalar -0.0 as the integer -0, without a sign: negate in the program.
        negated = str(op.data) == "(-0.0,)"
        made = replace(op, data=(0.0,)) if negated else op
        self.constants.append((name, str(made.emit((), (), types))))
        if not negated:
            return name
        result = self.fresh(label)
        self.lines.append(f"    {result} = mx.negative({name})")
        return result

    def node(self, node: Node) -> None:
        """Append the statements of one node."""
        if isinstance(node.op, Constant):
            self.names[node.outputs[0]] = self.constant(node.op, self.labels[node.outputs[0]], node.types)
            return
        if node.op.name in PRODUCTS and getattr(node.op, KERNEL) not in NATIVE_KERNELS:  # which have a rule
            self.guard(node.inputs[0])
        empty = nothing(node)
        operands = tuple(self.names[v] for v in node.inputs) if empty else self.prepared(node)
        result = empty or node.op.emit(operands, tuple(v.type for v in node.inputs), node.types)
        if len(node.outputs) == 1 and result in operands:
            self.names[node.outputs[0]] = result  # a view that moves nothing
            return
        if isinstance(result, Storage):
            self.storage(node, result)
            return
        places = [self.place(v) for v in node.outputs]
        self.names.update(zip(node.outputs, places, strict=True))
        targets = [n for p in places for n in (p.parts() if isinstance(p, Storage) else (p,))]
        self.line(f"{', '.join(targets)} = {result}", node)

    def prepared(self, node: Node) -> tuple[Operand, ...]:
        """The operands, those that the op wants changed first by the names of what they became."""
        operands = [self.names[v] for v in node.inputs]
        for i, text in node.op.aside(tuple(operands), tuple(v.type for v in node.inputs)).items():
            if text not in self.asides:
                self.asides[text] = self.fresh(self.labels[node.inputs[i]])
                self.line(f"{self.asides[text]} = {text}", node)
            operands[i] = self.asides[text]
        return tuple(operands)

    def guard(self, x: Value) -> None:
        """Let mx.vmap over a product's left operand be refused by us; see `qgraph.execute.vmap`."""
        if x in self.unguarded:
            self.unguarded.remove(x)
            guarded = self.fresh(self.labels[x])
            self.lines.append(f"    {guarded} = {GUARD}({self.names[x]})")
            self.names[x] = guarded

    def storage(self, node: Node, result: Storage) -> None:
        """A packed result given component by component."""
        value = node.outputs[0]
        place = self.place(value)
        assert isinstance(place, Storage)
        self.names[value] = place
        for target, expression in zip(place.parts(), result.parts(), strict=True):
            self.line(f"{target} = {expression}", node)

    def line(self, text: str, node: Node) -> None:
        """One statement with the user's line behind it."""
        note = comment(node)
        self.lines.append(f"    {text}" + (f"  # {note}" if note else ""))


def nothing(node: Node) -> str:
    """Source of a dense result without elements: on such operands MLX's kernels may die or never return."""
    t = node.types[0]
    if t.size or t.packing or len(node.outputs) > 1:
        return ""
    return f"mx.zeros({t.shape}, {literal(t.dtype)})"


def flat(operand: Operand) -> tuple[str, ...]:
    """The names that store a value."""
    return operand.parts() if isinstance(operand, Storage) else (operand,)


def components(type: TensorType) -> int:
    """How many flat arrays a value of `type` takes."""
    return len(type.packing.components) if type.packing else 1


def emit(graph: Graph, *, native: bool | None = None) -> Emitted:
    """The source of `graph`, which must be legal for MLX (see the legalize pass).

    `native` is whether kernels of `qgraph.kernels` may be called; unless said, where there are any.
    """
    native = kernels.library() is not None if native is None else native
    graph = guard_indices(graph if native else _without_native(graph))
    writer = _Writer(graph)
    for value in graph.inputs:
        writer.names[value] = writer.place(value)
    arguments = [n for v in graph.inputs for n in flat(writer.names[v])]
    for node in graph.nodes:
        if not isinstance(node.op, Input):
            _check_legal(node)
            writer.node(node)
    results = _unshared([n for v in graph.outputs for n in flat(writer.names[v])], arguments, writer)
    returned = f"    return ({', '.join(results)}{',' if len(results) == 1 else ''})"
    head = f"def program({', '.join(arguments)}):"
    constants = [f"{name} = {text}" for name, text in writer.constants]
    source = "\n".join([*constants, *([""] if constants else []), head, *writer.lines, returned, ""])
    return Emitted(source, len(arguments), tuple(writer.constants))


def _without_native(graph: Graph) -> Graph:
    """A graph that was made where there are native kernels, for a place without."""

    def rebuild(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
        op = node.op.without_native()
        same = op is node.op and all(a is b for a, b in zip(inputs, node.inputs, strict=True))
        return node.outputs if same else graph.builder.add(op, inputs, node.origin).outputs

    return graph.rewritten(rebuild)


def _unshared(results: list[str], arguments: list[str], writer: _Writer) -> list[str]:
    """The results as array objects of their own: ``y[0] = 9`` by the caller must change y alone.

    A result may be an argument, a constant of the program, or two results at once. The copy is of the
    object; the numbers are shared until somebody writes.
    """
    taken = {*arguments, *(name for name, _ in writer.constants)}
    out: list[str] = []
    for name in results:
        out.append(f"{name}.__copy__()" if name in taken else name)
        taken.add(name)
    return out


def _check_legal(node: Node) -> None:
    for v in node.inputs:
        if v.type.packing is not None and not reads_storage(node):
            raise QGraphError(
                f"{node.op.name} cannot read the packed operand {v.type}",
                fix="put `legalize` into the pipeline: it dequantizes such operands and reports why",
            )
