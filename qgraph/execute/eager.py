"""Eager mode: every qg function runs at once, as a program of one node."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from qgraph._fork import refuse_after_fork
from qgraph.execute.emit import components, emit
from qgraph.execute.program import Flat, load
from qgraph.ir.graph import Builder, Graph
from qgraph.ir.op import Op
from qgraph.ir.types import TensorType
from qgraph.ops.dispatch import install_eager, type_of
from qgraph.quant import QuantizedTensor
from qgraph.trace.tracer import refuse_leaks

Legalize = Callable[[Graph], Graph]
LIMIT = 4096  # programs of one node that are kept


class Eager:
    """Runs one op on arrays and QuantizedTensors. `rewrite` makes graphs with packed operands legal."""

    def __init__(self) -> None:
        self.rewrite: Legalize = lambda graph: graph
        self._programs: OrderedDict[Any, tuple[Flat, tuple[TensorType, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def apply(self, op: Op, operands: tuple[Any, ...]) -> Any:
        """The interpreter's side of every qg function outside a trace."""
        refuse_after_fork()
        refuse_leaks(operands)
        types = tuple(type_of(x) for x in operands)
        run, out = self._program(op, types)
        arrays = run(*stored(operands))
        results = collect(out, arrays)
        return results[0] if len(results) == 1 else tuple(results)

    def _program(self, op: Op, types: tuple[TensorType, ...]) -> tuple[Flat, tuple[TensorType, ...]]:
        key = (op, types, mx.default_device().type)  # emission may depend on it
        with self._lock:
            found = self._programs.get(key)
        if found is None:
            builder = Builder()
            inputs = [builder.input(f"x{i}", t) for i, t in enumerate(types)]
            graph = Graph(inputs, builder.add(op, inputs).outputs, builder)
            if any(t.packing for t in (*types, *(v.type for v in graph.outputs))):
                graph = self.rewrite(graph)
            found = load(emit(graph)), tuple(v.type for v in graph.outputs)
            with self._lock:
                self._programs[key] = found
                if len(self._programs) > LIMIT:
                    self._programs.popitem(last=False)
        return found


def stored(values: Iterable[mx.array | QuantizedTensor]) -> list[mx.array]:
    """The flat arrays of values, each in the order of its type's components."""
    out: list[mx.array] = []
    for x in values:
        if isinstance(x, QuantizedTensor):
            out += x._components  # the arrays themselves: a program does not change them
        else:
            out.append(x)
    return out


def collect(types: Sequence[TensorType], arrays: Sequence[mx.array]) -> list[Any]:
    """Values from the flat arrays that a program returned."""
    out: list[Any] = []
    i = 0
    for t in types:
        n = components(t)
        out.append(arrays[i] if t.packing is None else quantized(t, arrays[i : i + n]))
        i += n
    return out


def quantized(t: TensorType, arrays: Sequence[mx.array]) -> QuantizedTensor:
    """A QuantizedTensor of type `t` from its components."""
    assert t.packing is not None
    parts: dict[str, mx.array] = dict(zip(t.packing.components, arrays, strict=True))
    return QuantizedTensor(
        parts["packed"],
        parts["scales"],
        parts.get("biases"),
        t.packing.quantization,
        parts.get("global_scale"),
        t.dtype.mlx,
        t.packing.axis,
    )


EAGER = Eager()
install_eager(EAGER)
