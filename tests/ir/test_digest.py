"""Digests: equal for equal computations, different for any other, the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.ir import Builder, Graph, TensorType, digest, parse_graph
from qgraph.ir.dtypes import BF16, F32
from qgraph.ir.op import Constant, Op
from qgraph.ir.origin import Origin
from tests.fuzz.graphs import graphs

BASE = """graph(%x: f32[2,3], %y: f32[2,3]) {
  %exp = exp(%x) : f32[2,3]
  %subtract = subtract(%exp, %y) : f32[2,3]
  %sum = sum{axes=(0,), keepdims=False}(%subtract) : f32[3]
  return %sum, %exp
}"""


@given(graphs(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_construction_does_not_count(graph: Graph, random: object) -> None:
    """Rebuild the nodes in another topological order, with other scopes."""
    builder = Builder()
    new = {v: builder.input(v.op.label, v.type) for v in graph.inputs}  # pyright: ignore[reportAttributeAccessIssue]
    waiting = [n for n in graph.nodes if n.op.name != "input"]
    while waiting:
        ready = [n for n in waiting if all(v in new for v in n.inputs)]
        node = random.choice(ready)  # pyright: ignore[reportAttributeAccessIssue]
        waiting.remove(node)
        made = builder.add(node.op, [new[v] for v in node.inputs], Origin(scope="elsewhere"))
        new.update(zip(node.outputs, made.outputs, strict=True))
    again = Graph([new[v] for v in graph.inputs], [new[v] for v in graph.outputs], builder)
    assert digest(again) == digest(graph)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("exp(%x)", "sin(%x)"),
        ("exp(%x)", "exp(%y)"),
        ("subtract(%exp, %y)", "subtract(%y, %exp)"),
        ("subtract(%exp, %y)", "add(%exp, %y)"),
        ("axes=(0,), keepdims=False}(%subtract) : f32[3]", "axes=(1,), keepdims=False}(%subtract) : f32[2]"),
        ("keepdims=False}(%subtract) : f32[3]", "keepdims=True}(%subtract) : f32[1,3]"),
        ("return %sum, %exp", "return %exp, %sum"),
        ("return %sum, %exp", "return %sum"),
        ("return %sum, %exp", "return %sum, %exp, %exp"),
        ("%x: f32[2,3], %y: f32[2,3]", "%y: f32[2,3], %x: f32[2,3]"),
        ("%x: f32[2,3], %y: f32[2,3]", "%x: f32[2,3], %y: f32[2,3], %z: f32[2,3]"),
        ("f32", "f16"),
        ("2,3", "4,3"),
    ],
)
def test_any_change_of_meaning_changes_it(old: str, new: str) -> None:
    assert old in BASE
    assert digest(parse_graph(BASE.replace(old, new))) != digest(parse_graph(BASE))


def test_a_packing_counts() -> None:
    packings = ["", ":affine4g64", ":affine4g64@-2", ":affine4g64/bf16", ":affine8g64", ":affine4g32"]
    types = [f"f32[64,64]{p}" for p in [*packings, ":mxfp4", ":nvfp4", ":nvfp4*"]] + [
        "bf16[64,64]:affine4g64"
    ]
    digests = {digest(parse_graph(f"graph(%w: {t}) {{\n return %w\n}}")) for t in types}
    assert len(digests) == len(types)


def test_it_is_the_same_in_every_process() -> None:
    program = (
        "import sys; from qgraph.ir import digest, parse_graph; print(digest(parse_graph(sys.stdin.read())))"
    )
    found = {digest(parse_graph(BASE))}
    for seed in ("0", "1", "12345"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], input=BASE, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert len(found) == 1


def test_which_result_of_an_op_is_read_counts() -> None:
    class Pair(Op):
        name = ""

        def infer(self, t: TensorType) -> tuple[TensorType, TensorType]:
            return t, t

        def __str__(self) -> str:
            return "pair"

    builder = Builder()
    x = builder.input("x", TensorType((2,), F32))
    pair = builder.add(Pair(), [x])
    exp = Op.registry["exp"]()
    first, second = (Graph([x], builder.add(exp, [v]).outputs, builder) for v in pair.outputs)
    assert digest(first) != digest(second)
    assert digest(Graph([x], pair.outputs, builder)) != digest(Graph([x], pair.outputs[::-1], builder))


def test_what_is_an_input_and_what_an_output_counts() -> None:
    builder = Builder()
    x, y = (builder.input(n, TensorType((2,), F32)) for n in "xy")
    assert digest(Graph([x, y], [], builder)) != digest(Graph([x], [y], builder))


CONSTANTS = [
    Constant((0.0,), (), F32),
    Constant((-0.0,), (), F32),
    Constant((1.0,), (), F32),
    Constant((1,), (), F32),
    Constant((True,), (), F32),
    Constant((1.0,), (1,), F32),
    Constant((1.0,), (), BF16),
    Constant((float("nan"),), (), F32),
    Constant((float("inf"),), (), F32),
]


def test_constants_that_are_equal_in_python_stay_apart() -> None:
    builder = Builder()
    nodes = [builder.add(c) for c in CONSTANTS]
    assert len(set(map(id, nodes))) == len(CONSTANTS)
    assert len({digest(Graph([], n.outputs, builder)) for n in nodes}) == len(CONSTANTS)


def test_equal_constants_are_one_node_nan_too() -> None:
    builder = Builder()
    for number in (0.0, float("nan"), -1.5):
        one, two = (builder.add(Constant((number,), (), F32)) for _ in range(2))
        assert one is two
