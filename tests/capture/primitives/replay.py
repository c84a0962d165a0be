"""A function of MLX calls: captured, replayed through the graph, and held against MLX itself, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.capture.capture import capture
from qgraph.capture.records import record
from qgraph.execute.program import Program
from qgraph.execute.reference import evaluate, to_numpy
from qgraph.ir import Builder, Graph, digest, parse_graph, verify
from qgraph.ops.dispatch import type_of
from tests.agree import assert_close


@dataclass(repr=False)
class Case:
    """A function and its operands. `exact`: the replay is MLX's computation itself, in every dtype.

    `reference`: whether the float64 reference must agree as well; it need not where MLX chooses among
    several right answers. `k` and `magnitude` as for `assert_close`.
    """

    function: Callable[..., Any]
    arrays: list[mx.array]
    exact: bool = True
    reference: bool = True
    k: int = 1
    magnitude: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __repr__(self):
        return f"Case({self.notes or self.function}, {[str(type_of(x)) for x in self.arrays]})"


def flat(function):
    """`function` with a list of results."""

    def call(*arrays):
        out = function(*arrays)
        return list(out) if isinstance(out, list | tuple) else [out]

    return call


def names(function, arrays) -> set[str]:
    """The primitives that MLX reports."""
    return {r.name for r in record(flat(function), arrays).records}


def captured(function, arrays) -> tuple[Graph, list[mx.array]]:
    """The graph as captured, and the arrays that it takes."""
    builder = Builder()
    inputs = [builder.input(f"x{i}", type_of(x)) for i, x in enumerate(arrays)]
    found = capture(flat(function), inputs, builder)
    verify(found.graph)
    return found.graph, [*arrays, *found.captures]


def same(found: mx.array, expected: mx.array) -> bool:
    """Equal in type and in every bit, but that NaN is NaN and -0.0 is 0.0."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    floats = mx.issubdtype(found.dtype, mx.floating)
    return bool(mx.array_equal(found, expected, equal_nan=floats).item())


def check(case: Case) -> Graph:
    """Replay equals eager, and both agree with the reference; the graph, for more checks."""
    expected = flat(case.function)(*case.arrays)
    graph, arrays = captured(case.function, case.arrays)
    found = Program(graph).run(*arrays)
    assert digest(parse_graph(str(graph))) == digest(graph)
    half = any(x.dtype in (mx.float16, mx.bfloat16) for x in (*case.arrays, *expected))
    if case.exact or not half:
        for f, e in zip(found, expected, strict=True):
            assert same(f, e), (case, str(graph), f, e)
    if case.reference:
        with np.errstate(all="ignore"):
            numbers = evaluate(graph, [to_numpy(x) for x in arrays])
        for f, n in zip(found, numbers, strict=True):
            assert_close(f, n, k=case.k, magnitude=case.magnitude, about=(case, str(graph)))
    return graph
