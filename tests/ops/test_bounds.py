"""Intervals of integer values: what they hold is always inside, and known cases are tight."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from qgraph.execute.reference import evaluate, to_numpy
from qgraph.ir.dtypes import I8, I32, I64, U8, U32
from qgraph.ops.bounds import Bounds
from tests.ops.cases import data, seeds

DTYPES = (I8, U8, I32, U32, I64)
STEPS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": qg.maximum,
    "minimum": qg.minimum,
    "and": qg.bitwise_and,
    "quotient": lambda a, b: a // (qg.minimum(qg.maximum(b, 1), 5)),
    "remainder": lambda a, b: a % (qg.minimum(qg.maximum(b, 1), 5)),
    "where": lambda a, b: qg.where(a > b, a, b),
    "join": lambda a, b: qg.concatenate([a, b])[1:5],
    "reverse": lambda a, b: a[::-1],
    "sort": lambda a, b: qg.sort(a),
    "top": lambda a, b: qg.concatenate([qg.topk(a, 2)] * 2),
    "scan": lambda a, b: qg.ops.cummax(a),
    "order": lambda a, b: qg.argsort(a),
    "take": lambda a, b: qg.take(a, qg.argsort(b)),
    "choose": lambda a, b: qg.take(a, b),
    "narrow": lambda a, b: a.astype(mx.int8),
    "widen": lambda a, b: a.astype(mx.int64),
    "unsigned": lambda a, b: a.astype(mx.uint32),
    "constant": lambda a, b: a + qg.array([3, 1, 4, 1]),
    "fixed": lambda a, b: qg.minimum(a, 3),
    "floor": lambda a, b: qg.maximum(a, 2),
    "clipped": lambda a, b: qg.clip(a, 1, 6),
    "range": lambda a, b: qg.arange(20, 4, -4),
    "put": lambda a, b: qg.slice_update(a, b[:1].astype(a.dtype), qg.array([1]), [0]),
    "best": lambda a, b: qg.argmax(qg.stack([a, b]), axis=0),
    "float": lambda a, b: (a.astype(mx.float32) * 0.5).astype(mx.int32),
}


def check(steps, arrays):
    """Run the steps on two arrays and what came of them; every integer must be in its interval."""

    def f(x, y):
        values = [x, y]
        for name, i, j in steps:
            values.append(STEPS[name](values[i % len(values)], values[j % len(values)]))
        return values[2:]

    graph = qg.jit(f).graph(*arrays)
    bounds = Bounds()
    kept = [v for node in graph.nodes for v in node.outputs if v.type.dtype.is_int]
    intervals = [bounds.of(v) for v in kept]
    found = evaluate(graph.with_outputs(kept), [to_numpy(a) for a in arrays], "faithful")
    for (low, high), numbers, v in zip(intervals, found, kept, strict=True):
        held = numbers.astype(v.type.dtype.mlx_name)
        if held.size:
            assert low <= held.min() <= held.max() <= high, (str(graph), v)


@pytest.mark.parametrize("step", STEPS)
def test_every_number_of_one_step_is_inside(step):
    for seed in range(4):
        for x in (I8, U8, I32):
            for y in (I32, U32):
                check([("clipped", 0, 0), ("narrow", 1, 1), (step, 2, 3), (step, 0, 1)], draw(seed, x, y))


def draw(seed, *dtypes):
    return [data(seed + i, (4,), dtype) for i, dtype in enumerate(dtypes)]


chains = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1)


@given(chains, seeds, st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_every_number_of_a_chain_is_inside(steps, seed, x, y):
    check(steps[:8], draw(seed, x, y))


def bound(f, *arrays):
    graph = qg.jit(f).graph(*arrays)
    bounds = Bounds()
    for node in graph.nodes:
        for v in node.outputs:
            if v.type.dtype.is_int:
                bounds.of(v)
    return bounds.of(graph.outputs[0])


X, SCORES = mx.array([5, 6, 7, 8]), mx.ones((3, 8))
TIGHT = {
    "an input": (lambda i, s: i, (-(2**31), 2**31 - 1)),
    "a remainder": (lambda i, s: i % 6, (0, 5)),
    "a clip": (lambda i, s: qg.clip(i, 2, 9), (2, 9)),
    "a mask of bits": (lambda i, s: qg.bitwise_and(i, 7), (0, 7)),
    "argmax": (lambda i, s: qg.argmax(s, axis=-1), (0, 7)),
    "argmax of all": (lambda i, s: qg.argmax(s), (0, 23)),
    "the top k": (lambda i, s: qg.argpartition(s, 5, axis=-1)[..., 5:], (0, 7)),
    "tokens in the order of their experts": (
        lambda i, s: qg.argsort(qg.flatten(qg.argsort(s, axis=1)[:, :2])) // 2,
        (0, 2),
    ),
    "a position and an offset": (lambda i, s: qg.arange(4) + 3, (3, 6)),
    "a cast that holds it": (lambda i, s: qg.clip(i, 0, 100).astype(mx.uint8), (0, 100)),
    "a cast that does not": (lambda i, s: qg.clip(i, 0, 300).astype(mx.uint8), (0, 255)),
    "a sum beyond the dtype": (lambda i, s: i + 1, (-(2**31), 2**31 - 1)),
    "a draw": (lambda i, s: qg.random.categorical(s, key=qg.random.key(1)), (0, 7)),
    "a permutation": (lambda i, s: qg.random.permutation(9, key=qg.random.key(1)), (0, 8)),
}


@pytest.mark.parametrize("case", TIGHT)
def test_known_cases_are_tight(case):
    f, expected = TIGHT[case]
    assert bound(f, X, SCORES) == expected


def test_a_long_chain_needs_no_deep_stack():
    def f(x):
        for _ in range(5000):
            x = x % 7 + 1
        return qg.take(mx.ones((9, 2)), x, axis=0)

    g = qg.jit(f, pipeline="guard-indices,legalize")
    assert np.array(g(mx.array([3]))).shape == (1, 2)
    assert "where" not in g.optimized(mx.array([3])).histogram()
