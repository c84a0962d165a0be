"""QGRAPH_DEBUG_NAN=1: which node made the NaN or the infinities that a program returned."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from qgraph._errors import NonFiniteError, QGraphError
from qgraph.execute.emit import Emitted, components, emit
from qgraph.ir.graph import Builder, Graph, Node, Value
from qgraph.ir.op import Input, Op
from qgraph.ir.text import names_of, print_node
from qgraph.ir.types import TensorType
from qgraph.ops.indexed import Indexed
from qgraph.rewrite.guard import PASS

Flat = Callable[..., tuple[mx.array, ...]]
Load = Callable[[Emitted], Flat]
LIMIT = 4096  # programs of one node that are kept
_programs: dict[tuple[Op, tuple[TensorType, ...]], Flat] = {}


def debugging() -> bool:
    """Whether ``QGRAPH_DEBUG_NAN`` is 1. Errors: QGraphError for another value than 0 or 1."""
    text = os.environ.get("QGRAPH_DEBUG_NAN", "")
    if text not in ("", "0", "1"):
        raise QGraphError(f"QGRAPH_DEBUG_NAN={text!r}", fix="set it to 1, or unset it")
    return text == "1"


def watched(program: Flat, graph: Graph, load: Load) -> Flat:
    """`program`, which raises NonFiniteError for results that are not finite and should be."""

    def run(*arrays: mx.array) -> tuple[mx.array, ...]:
        results = program(*arrays)
        try:
            bad = not all(_counts([x]).finite for x in results)
        except ValueError:  # MLX is tracing: there are no numbers
            return results
        if bad:
            _Replay(graph, load).explain(arrays)
        return results

    return run


@dataclass(frozen=True)
class _Counts:
    """How much of a value is not finite, and the largest of what is."""

    nans: int = 0
    infinities: int = 0
    size: int = 0
    largest: float = 0.0

    @property
    def finite(self) -> bool:
        return not self.nans and not self.infinities


def _counts(arrays: Sequence[mx.array]) -> _Counts:
    floats = [x for x in arrays if x.size and (mx.issubdtype(x.dtype, mx.inexact))]
    nans = infinities = 0
    largest = 0.0
    for x in floats:
        whole = mx.abs(x) if x.dtype == mx.complex64 else x
        finite = mx.where(mx.isfinite(whole), mx.abs(whole), 0)
        found = mx.isnan(whole).sum(), mx.isinf(whole).sum(), finite.max()
        mx.eval(*found)
        nans, infinities = nans + int(found[0].item()), infinities + int(found[1].item())  # pyright: ignore[reportArgumentType]
        largest = max(largest, float(found[2].item()))  # pyright: ignore[reportArgumentType]
    return _Counts(nans, infinities, sum(x.size for x in floats), largest)


class _Replay:
    """The graph run node by node; only the counts of every value are kept."""

    def __init__(self, graph: Graph, load: Load) -> None:
        self.graph = graph
        self.load = load
        self.counts: dict[Value, _Counts] = {}
        self.constant: set[Value] = set()  # made of constants alone

    def explain(self, arrays: Sequence[mx.array]) -> None:
        """Raise NonFiniteError for the first node at fault, if there is one."""
        self.run(arrays)
        nodes = self.blamed()
        if nodes:
            first = min(nodes, key={n: i for i, n in enumerate(self.graph.nodes)}.__getitem__)
            raise self.error(first)
        if all(self.counts[v].finite for v in self.graph.outputs):
            raise NonFiniteError(
                "the program returned NaN or infinities, its nodes one by one do not",
                fix="run it with QGRAPH_COMPILE=0; if that is finite, report it with the output of f.source",
            )

    def run(self, arrays: Sequence[mx.array]) -> None:
        """Count in every value; arrays are dropped behind their last use."""
        left = iter(arrays)
        held: dict[Value, tuple[mx.array, ...]] = {}
        for v in self.graph.inputs:
            held[v] = tuple(next(left) for _ in range(components(v.type)))
            self.counts[v] = _counts(held[v])
        last = {v: node for node in self.graph.nodes for v in node.inputs}
        for node in self.graph.nodes:
            if isinstance(node.op, Input):
                continue
            flat = self.program(node)(*(x for v in node.inputs for x in held[v]))
            if all(v in self.constant for v in node.inputs):
                self.constant.update(node.outputs)
            at = 0
            for v in node.outputs:
                held[v] = flat[at : at + components(v.type)]
                at += components(v.type)
                self.counts[v] = _counts(held[v])
            for v in node.inputs:
                if last[v] is node:
                    held.pop(v, None)

    def program(self, node: Node) -> Flat:
        """The program of one node."""
        types = tuple(v.type for v in node.inputs)
        found = _programs.get((node.op, types))
        if found is None:
            builder = Builder()
            inputs = [builder.input(f"x{i}", t) for i, t in enumerate(types)]
            found = self.load(emit(Graph(inputs, builder.add(node.op, inputs).outputs, builder)))
            if len(_programs) >= LIMIT:
                _programs.clear()
            _programs[node.op, types] = found
        return found

    def blamed(self) -> list[Node]:
        """The nodes that made what is not finite in an output, by way of values that are not finite."""
        found: list[Node] = []
        waiting = [v for v in self.graph.outputs if not self.counts[v].finite]
        seen: set[Value] = set(waiting)
        while waiting:
            v = waiting.pop()
            if v in self.constant:
                continue
            node, here = v.node, self.counts[v]
            operands = [(x, self.counts[x]) for x in node.inputs]
            made_nan = here.nans and not any(c.nans for x, c in operands if x not in self.constant)
            made_infinity = not here.nans and all(c.finite for _, c in operands)
            if isinstance(node.op, Input):
                found += [node] if here.nans else []
            elif made_nan or made_infinity:
                found.append(node)
            new = [x for x, c in operands if not c.finite and x not in seen]
            seen.update(new)
            waiting += new
        return found

    def error(self, node: Node) -> NonFiniteError:
        """What `node` did."""
        here = self.counts[node.outputs[0]]
        what = (
            f"{here.nans or here.infinities} of {here.size} numbers are {'NaN' if here.nans else 'infinite'}"
        )
        if isinstance(node.op, Input):
            return NonFiniteError(
                f"input {node.op.label!r}: {what} when it comes in", fix="look at where it is made or loaded"
            )
        names = names_of(self.graph)
        scope, source = node.origin.scope, node.origin.source
        operands = ", ".join(
            f"%{names[v]} up to {self.counts[v].largest:.3g}"
            + ("" if self.counts[v].finite else " and not finite")
            for v in node.inputs
            if v.type.dtype.is_float and v not in self.constant
        )
        guarded = [step.rule for step in node.origin.steps if step.pass_name == PASS]
        name = guarded[0] if guarded else node.op.name
        return NonFiniteError(
            f"{name}{f' in {scope}' if scope else ''}: {what}"
            + (f"; its operands: {operands}" if operands else ""),
            node=print_node(node, names),
            where=source.sentence() if source.known else None,
            fix=self.fix(node, bool(guarded) or isinstance(node.op, Indexed)),
        )

    def fix(self, node: Node, indexes: bool) -> str:
        """What to look at."""
        if indexes:
            return "an index is out of range, where reading gives NaN: check the indices"
        t = node.outputs[0].type
        if t.dtype.name == "f16" and not self.counts[node.outputs[0]].nans:
            return "float16 ends at 65504: compute this in float32 or bfloat16"
        return "see which operand the op has no number for: too large, 0 under a log, a row all masked"
