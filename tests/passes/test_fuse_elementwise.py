"""fuse-elementwise: element-wise ops become one op with a native kernel, and the numbers stay."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
import qgraph_passes.fuse_elementwise as module
from qgraph import kernels
from qgraph._errors import QGraphError, RuleError
from qgraph.execute.program import Program
from qgraph.execute.reference import evaluate, to_numpy
from qgraph.ir import Builder, Graph, Op, TensorType, parse_graph, print_graph
from qgraph.ir.dtypes import BF16, BOOL, F16, F32
from qgraph.ir.op import Constant
from qgraph.ops.chain import Chain
from qgraph.rewrite import Context, Pipeline
from qgraph_passes.fuse_elementwise import FuseElementwise
from qgraph_passes.legalize import Legalize
from tests.agree import assert_close

R = Op.registry


def fused(graph, **options):
    return FuseElementwise().run(graph, Context(**{"device": "cpu", "native": True, **options}))


def traced(function, *args):
    return qg.jit(function, pipeline="canonicalize").result(*args).graph


def chains(graph):
    """The ops of every chain, constants left out, in order."""
    return [[s[0] for s in n.op.steps if s[0] != "constant"] for n in graph.find("elementwise")]


def normal(*shape, dtype=BF16, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype.mlx)


def inputs_of(graph, seed=0):
    return [
        normal(*v.type.shape, dtype=v.type.dtype, seed=seed + i)
        if v.type.dtype is not BOOL
        else normal(*v.type.shape, seed=seed + i) > 0
        for i, v in enumerate(graph.inputs)
    ]


def run(graph, inputs):
    """The program of a graph with native kernels; skips where there are none."""
    if kernels.library() is None:
        pytest.skip("no native kernels")
    return Program(graph).run(*inputs)


X, Y, ROW, COLUMN = normal(4, 96), normal(4, 96, seed=1), normal(96, seed=2), normal(4, 1, seed=3)

CASES = {
    "swiglu": (lambda x, y, row, column: qg.swiglu(x, y), [["silu", "multiply"]]),
    "a residual": (lambda x, y, row, column: x + y, [["add"]]),
    "a scaled residual": (lambda x, y, row, column: x + y * 0.5, [["multiply", "add"]]),
    "a bias": (lambda x, y, row, column: x + row, [["add"]]),
    "a bias and gelu": (lambda x, y, row, column: qg.gelu(x + row), [["add", "gelu"]]),
    "a factor for each row": (lambda x, y, row, column: x * column * row, [["multiply", "multiply"]]),
    "gelu by tanh": (
        lambda x, y, row, column: qg.gelu_approx(x),
        [["multiply", "power", "multiply", "add", "multiply", "tanh", "add", "multiply"]],
    ),
    "a soft cap": (lambda x, y, row, column: qg.tanh(x / 30) * 30, [["divide", "tanh", "multiply"]]),
    "softplus": (lambda x, y, row, column: qg.softplus(x), [["logaddexp"]]),
    "a mask": (lambda x, y, row, column: qg.where(x > y, x, -1e4), [["greater", "where"]]),
    "in float32 between": (
        lambda x, y, row, column: (x.astype(mx.float32) * y.astype(mx.float32)).astype(mx.bfloat16),
        [["cast", "cast", "multiply", "cast"]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_fused(name):
    function, expected = CASES[name]
    args = (X, Y, ROW, COLUMN)
    graph = traced(function, *args)
    after = fused(graph)
    assert [sorted(c) for c in chains(after)] == [sorted(c) for c in expected]
    assert after.outputs[0].type == graph.outputs[0].type
    exact = evaluate(graph, [to_numpy(a) for a in args])[0]
    assert np.array_equal(evaluate(after, [to_numpy(a) for a in args])[0], exact)
    assert_close(run(after, args)[0], exact, path="graph")
    assert_close(Program(graph).run(*args)[0], exact, path="graph")


@pytest.mark.parametrize(
    ("why", "function", "expected"),
    [
        ("read twice inside", lambda x, y: (x + y) * (x + y), [["add", "multiply"]]),
        ("the sum is returned", lambda x, y: (x + y, qg.exp(x + y)), [["add"], ["exp"]]),
        ("a product reads the sum", lambda x, y: (qg.exp(x + y), (x + y) @ y.T), [["add"], ["exp"]]),
        (
            "a reduction between",
            lambda x, y: qg.sum(x * y, -1, keepdims=True) * x,
            [["multiply"], ["multiply"]],
        ),
        (
            "a way out and back in",
            lambda x, y: qg.exp(x) + qg.cumsum(qg.exp(x), -1) * y,
            [["exp"], ["multiply", "add"]],
        ),
        ("another shape", lambda x, y: qg.exp(x[:1]) + y, [["exp"], ["add"]]),
        ("integers", lambda x, y: qg.argmax(x, -1) + 1, []),
        ("float32 alone", lambda x, y: x.astype(mx.float32).T, []),
    ],
)
def test_where_groups_end(why, function, expected):
    graph = traced(function, X, Y)
    after = fused(graph)
    assert [sorted(c) for c in chains(after)] == [sorted(c) for c in expected], why
    for found, exact in zip(
        evaluate(after, [to_numpy(X), to_numpy(Y)]), evaluate(graph, [to_numpy(X), to_numpy(Y)]), strict=True
    ):
        assert np.array_equal(found, exact)


def test_one_op_alone_is_taken_where_it_is_not_small_and_of_floats():
    whole = mx.arange(80)
    for x, fires in ((normal(8), False), (normal(80), True), (normal(80, dtype=F32), True), (whole, False)):
        assert chains(fused(traced(lambda x: x + x, x))) == [["add"]] * fires
    assert chains(fused(traced(lambda x: x + x * x, normal(8)))) == [["multiply", "add"]]


def test_a_long_chain_is_several():
    def long(x, *others):
        for y in others:
            x = x * y + 1
        return x

    args = [normal(2, 70, seed=i) for i in range(20)]
    graph = traced(long, *args)
    after = fused(graph)
    assert len(chains(after)) > 2
    assert all(len(n.inputs) <= module.OPERANDS for n in after.find("elementwise"))
    assert sum(map(len, chains(after))) == 38
    exact = evaluate(graph, [to_numpy(a) for a in args])[0]
    assert np.array_equal(evaluate(after, [to_numpy(a) for a in args])[0], exact)


def test_fires_only_for_native_kernels_and_with_fuel():
    graph = traced(lambda x, y: (qg.exp(x + y), qg.exp(x - y)), X, Y)
    assert fused(graph, native=False).find("elementwise") == []
    assert [len(fused(graph, fuel=n).find("elementwise")) for n in (0, 1, 2)] == [0, 1, 2]


def test_lines_and_modules_stay():
    @qg.jit
    def f(x, y):
        with qg.scope("layers.0.mlp"):
            return qg.silu(x) * y

    (node,) = fused(f.result(X, Y).graph).find("elementwise")
    assert node.origin.scope == "layers.0.mlp"
    assert node.origin.source.text == "return qg.silu(x) * y"
    assert node.origin.steps[-1].pass_name == "fuse-elementwise"


def test_it_runs_after_legalize():
    Pipeline((Legalize(), FuseElementwise())).check_order()
    with pytest.raises(RuleError, match="stands before legalize"):
        Pipeline((FuseElementwise(), Legalize())).check_order()


# ---- The op ----


def test_the_text_form_names_the_ops_and_is_read_again():
    graph = fused(traced(lambda x, y: qg.where(x > -0.0, qg.silu(x).astype(mx.float32), y * 0.5), X, Y))
    text = print_graph(graph)
    assert "'silu'" in text
    assert "('cast', " in text
    again = parse_graph(text)
    assert [n.op for n in again.find("elementwise")] == [n.op for n in graph.find("elementwise")]


def test_zeros_of_two_signs_are_two_chains():
    plus, minus = (Chain((("constant", (), (c,), (), F32), ("add", (0, 1)))) for c in (0.0, -0.0))
    assert plus != minus
    assert len({plus, minus, Chain(plus.steps)}) == 2


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ((), "no steps"),
        ((("dot", (0, 0)),), "no element-wise op"),
        ((("nothing", (0,)),), "no element-wise op"),
        ((("exp", (1,)),), "made after"),
        ((("exp", (-1,)),), "made after"),
    ],
)
def test_chains_that_are_none(steps, problem):
    with pytest.raises(QGraphError, match=problem):
        Chain(steps).infer(TensorType((2,), F32))


def test_without_a_kernel_a_chain_is_mlx_ops():
    graph = fused(traced(lambda x, y: qg.gelu(x + y) * y, X, Y))
    (node,) = graph.find("elementwise")
    plain = Builder()
    inputs = [plain.input(f"x{i}", v.type) for i, v in enumerate(node.inputs)]
    made = plain.add(Chain(node.op.steps), inputs)
    program = Program(Graph(inputs, made.outputs, plain))
    assert "native" not in program.source
    assert_close(program.run(X, Y)[0], evaluate(graph, [to_numpy(X), to_numpy(Y)])[0], path="graph")
    assert made.op.native(tuple(v.type for v in inputs), made.types) == node.op
    assert Chain((("sign", (0,)),)).native((X_TYPE,), (X_TYPE,)) is None


X_TYPE = TensorType((4, 96), BF16)

# ---- Drawn graphs ----

UNARY = ["negative", "abs", "square", "tanh", "sigmoid", "silu", "erf", "gelu", "sin", "relu"]
BINARY = ["add", "subtract", "multiply", "maximum", "minimum", "logaddexp"]
SHAPES = [(6, 80), (6, 80), (80,), (6, 1), (1, 80), ()]


@st.composite
def graphs(draw, dtypes):
    """Element-wise ops on a few inputs, with some outputs inside."""
    builder = Builder()
    inputs = []
    for i in range(draw(st.integers(1, 4))):
        shape = SHAPES[draw(st.integers(0, len(SHAPES) - 1)) if i else 0]
        inputs.append(builder.input(f"x{i}", TensorType(shape, draw(st.sampled_from(dtypes)))))
    values = list(inputs)

    def pick():
        return values[draw(st.integers(max(0, len(values) - 4), len(values) - 1))]

    for _ in range(draw(st.integers(1, 10))):
        kind = draw(st.integers(0, 6))
        if kind == 0:
            value = draw(st.integers(-8, 8)) / 4
            values.append(builder.add(Constant((value,), (), draw(st.sampled_from(dtypes)))).outputs[0])
        elif kind == 1:
            values.append(builder.add(R["cast"](draw(st.sampled_from(dtypes))), [pick()]).outputs[0])
        elif kind == 2:
            truth = builder.add(R["less"](), [pick(), pick()]).outputs[0]
            values.append(builder.add(R["where"](), [truth, pick(), pick()]).outputs[0])
        elif kind == 3:
            values.append(builder.add(R[draw(st.sampled_from(UNARY))](), [pick()]).outputs[0])
        else:
            values.append(builder.add(R[draw(st.sampled_from(BINARY))](), [pick(), pick()]).outputs[0])
    outputs = [values[-1], *draw(st.lists(st.sampled_from(values), max_size=2))]
    return Graph(inputs, outputs, builder)


@given(graphs((F32, BF16, F16)))
def test_the_bits_of_a_chain_are_those_of_its_ops(graph):
    inputs = inputs_of(graph)
    whole = fused(graph)
    before = module.STEPS
    try:
        module.STEPS = 1
        single = fused(graph)
    finally:
        module.STEPS = before
    numpy = [to_numpy(a) for a in inputs]
    for a, b in zip(evaluate(whole, numpy), evaluate(graph, numpy), strict=True):
        assert np.array_equal(a, b, equal_nan=True)
    for a, b in zip(run(whole, inputs), run(single, inputs), strict=True):
        assert mx.array_equal(a, b, equal_nan=True).item(), (str(graph), str(whole))


@given(graphs((F32,)))
def test_drawn_graphs_keep_their_numbers(graph):
    inputs = inputs_of(graph)
    exact = evaluate(graph, [to_numpy(a) for a in inputs])
    for found, mlx, wanted in zip(run(fused(graph), inputs), Program(graph).run(*inputs), exact, strict=True):
        if not np.all(np.isfinite(wanted)):
            continue
        # MLX's own error is the measure where a difference cancels or a comparison is close.
        error = np.max(np.abs(to_numpy(mlx) - wanted), initial=0.0)
        if error <= np.max(np.abs(wanted), initial=0.0) * 2.0**-16:
            assert_close(found, wanted, path="graph", about=str(graph))


EXACT = ["negative", "abs", "square", "relu"]


@given(st.data())
def test_arithmetic_has_the_bits_of_mlx(data):
    dtype = data.draw(st.sampled_from([BF16, F16, F32]))
    builder = Builder()
    inputs = [builder.input(f"x{i}", TensorType(shape, dtype)) for i, shape in enumerate([(5, 90), (90,)])]
    values = list(inputs)
    for _ in range(data.draw(st.integers(2, 8))):
        pick = st.integers(0, len(values) - 1)
        a, b = values[data.draw(pick)], values[data.draw(pick)]
        name = data.draw(st.sampled_from([*EXACT, "add", "subtract", "multiply", "maximum", "minimum"]))
        values.append(builder.add(R[name](), [a] if name in EXACT else [a, b]).outputs[0])
    graph = Graph(inputs, [builder.add(R["add"](), [values[-1], values[0]]).outputs[0]], builder)
    arrays = inputs_of(graph)
    found, wanted = run(fused(graph), arrays)[0], Program(graph).run(*arrays)[0]
    assert mx.array_equal(found, wanted, equal_nan=True).item(), str(graph)
