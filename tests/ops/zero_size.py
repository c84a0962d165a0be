"""Run every op of the table with empty operands, in a process that may die: it says what it is about to do.

    python -m tests.ops.zero_size NAME …

From every drawn case come others with an axis of one operand, or all axes of one size, made empty. Each must
be refused by the op's rule, or give what the reference gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

import qgraph as qg
from qgraph.execute.reference import evaluate, to_numpy
from qgraph.ir import Builder, Graph, verify
from qgraph.ops.dispatch import apply, type_of
from tests.ops.cases import Case
from tests.ops.table import TABLE


def emptied(case: Case) -> Iterator[list[Any]]:
    """The operands with some axes empty."""
    shapes = [type_of(x).shape for x in case.operands]
    for i, shape in enumerate(shapes):
        for axis in range(len(shape)):
            one = [list(s) for s in shapes]
            one[i][axis] = 0
            yield from resized(case, one)
        for size in set(shape) - {0}:
            yield from resized(case, [[0 if n == size else n for n in s] for s in shapes])


def resized(case: Case, shapes: list[list[int]]) -> Iterator[list[Any]]:
    """The operands cut to smaller shapes, if packed ones can be."""
    out: list[Any] = []
    for x, shape in zip(case.operands, shapes, strict=True):
        if not qg.is_quantized(x):
            out.append(x[tuple(slice(0, n) for n in shape)] if shape else x)
            continue
        stored = [shape[a] for a in type_of(x).storage_axes]
        if stored[-1] % x.quantization.group_size:
            return
        cut = [
            a if not a.shape else a[tuple(slice(0, n) for n in part)]
            for a, part in zip(
                x.components(), x.quantization.storage_shapes(tuple(stored)).values(), strict=False
            )
        ]
        biases = cut[2] if x.quantization.has_biases else None
        out.append(
            qg.QuantizedTensor(cut[0], cut[1], biases, x.quantization, x.global_scale, x.dtype, x.axis)
        )
    yield out


def check(case: Case, operands: list[Any]) -> str:
    """What is wrong with the op on these operands; empty if nothing is."""
    builder = Builder()
    inputs = [builder.input(f"x{i}", type_of(x)) for i, x in enumerate(operands)]
    try:
        graph = Graph(inputs, builder.add(case.op, inputs).outputs, builder)
    except qg.QGraphError:
        return ""
    verify(graph)
    expected, *_ = evaluate(graph, [to_numpy(x) for x in operands])
    result = apply(case.op, *operands)
    result = result[0] if isinstance(result, tuple) else result
    mx.eval(*(result.components() if qg.is_quantized(result) else [result]))
    if type_of(result) != graph.outputs[0].type:
        return f"its type is {type_of(result)}, its rule says {graph.outputs[0].type}"
    if case.compare == "type":
        return ""
    found = to_numpy(result)
    if found.shape != np.shape(expected):
        return f"its shape is {found.shape}, the reference's {np.shape(expected)}"
    same_zeros = np.array_equal(found == 0, np.asarray(expected) == 0)
    return "" if same_zeros or case.op.name.startswith("random") else f"found {found}, expected {expected}"


QUICK = settings(max_examples=12, phases=[Phase.generate], deadline=None, derandomize=True, database=None)


def run(name: str) -> None:
    tried = 0

    @settings(QUICK, suppress_health_check=list(HealthCheck))
    @given(TABLE[name])
    def body(case: Case) -> None:
        nonlocal tried
        for operands in emptied(case):
            tried += 1
            shown = f"{case.op}({', '.join(str(type_of(x)) for x in operands)})"
            print("about to run", shown, flush=True)
            problem = check(case, operands)
            assert not problem, f"{shown}: {problem}"

    body()
    print("done", name, tried, flush=True)


if __name__ == "__main__":
    for op in sys.argv[1:]:
        run(op)
