"""The sweep: every op, on drawn shapes and dtypes, means the same in its rule, in MLX and in NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from qgraph.execute.reference import evaluate, to_numpy
from qgraph.ir import Builder, Graph, digest, parse_graph, print_graph, verify
from qgraph.ir.op import Op
from qgraph.numeric import tolerance
from qgraph.ops.dispatch import apply, type_of
from tests.ops.cases import Case, packed, seeds, turned
from tests.ops.table import TABLE

NOT_RUN = {"input", "constant"}
# MLX's CPU code computes these in steps, each of which rounds 16-bit operands to 16 bit.
COMPOSED = {
    "dequantize",
    "elementwise",
    "erfinv",
    "gelu",
    "layer_norm",
    "logaddexp",
    "logsumexp",
    "mean",
    "quantized_take",
    "rms_norm",
    "rope",
    "rsqrt",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "std",
    "var",
}


def test_the_table_has_every_op():
    assert set(TABLE) == set(Op.registry) - NOT_RUN


@pytest.mark.parametrize("name", sorted(TABLE))
def test_op(name):
    @given(TABLE[name])
    def check(case):
        graph = one_op(case)
        made = apply(case.op, *case.operands)
        results = made if isinstance(made, tuple) else (made,)
        assert [type_of(r) for r in results] == [v.type for v in graph.outputs], case
        for result in results:
            mx.eval(*result.components() if qg.is_quantized(result) else [result])
        assert [r.shape for r in results] == [v.type.shape for v in graph.outputs]
        same_after_printing(graph)
        if case.compare == "parts":
            compare_parts(case, graph, results)
        else:
            compare(case, graph, results[0])

    check()


def one_op(case: Case) -> Graph:
    builder = Builder()
    inputs = [builder.input(f"x{i}", type_of(x)) for i, x in enumerate(case.operands)]
    graph = Graph(inputs, builder.add(case.op, inputs).outputs, builder)
    verify(graph)
    assert case.op.flops(tuple(v.type for v in inputs), graph.nodes[-1].types) >= 0
    return graph


def same_after_printing(graph: Graph) -> None:
    text = print_graph(graph)
    assert digest(parse_graph(text)) == digest(graph), text


def compare(case: Case, graph: Graph, result) -> None:
    """Values, within the rounding of the coarsest float there is."""
    if case.compare == "type":
        return
    inputs = [to_numpy(x) for x in case.operands]
    (expected,) = evaluate(graph, inputs)
    found = to_numpy(result)
    assert found.shape == np.shape(expected), case
    if case.compare in ("sorted", "positions"):
        expected, found = ordered(case, expected, found, inputs[0])
    if found.dtype.kind == "c" and case.compare == "sum":
        found, expected = (np.stack([x.real, x.imag]) for x in (found, np.asarray(expected)))
    if case.compare in ("exact", "sorted", "positions") or found.dtype.kind != "f":
        np.testing.assert_array_equal(found, expected, str(case))
        return
    magnitude = np.max([np.max(np.abs(x), initial=1.0) for x in inputs if x.dtype.kind == "f"], initial=1.0)
    path = "elementwise"
    if case.compare == "sum":
        path = "P2"
        magnitude = case.magnitude if case.magnitude else evaluate(graph, [magnitudes(x) for x in inputs])[0]
    coarsest = max((type_of(x).dtype for x in (*case.operands, result)), key=lambda d: d.unit_roundoff)
    if coarsest.size == 2 and case.op.name in COMPOSED:
        path = "composed"
    near = tolerance(coarsest, case.k, path).allows(found, expected, magnitude)
    assert np.all(near), (case, found[~near][:4], np.asarray(expected)[~near][:4])


def compare_parts(case, graph, results):
    """Each result on its own, all of them exact."""
    for want, found in zip(evaluate(graph, [to_numpy(x) for x in case.operands]), results, strict=True):
        np.testing.assert_array_equal(to_numpy(found), want, str(case))


def magnitudes(x):
    return np.abs(x) if x.dtype.kind in "fic" else x


def ordered(case, expected, found, x):
    """Both in one order: elements in place of positions, sorted where the order is free."""
    axis = case.op.axis
    if case.compare == "positions":
        assert np.array_equal(np.sort(found, axis), np.sort(expected, axis))  # a permutation
        expected, found = (np.take_along_axis(x, np.asarray(i, np.int64), axis) for i in (expected, found))
        if case.op.name == "argsort":
            return expected, found
    kth = getattr(case.op, "kth", None)
    if kth is not None:
        np.testing.assert_array_equal(np.take(found, kth, axis), np.take(expected, kth, axis))
        np.testing.assert_array_equal(
            np.sort(np.take(found, range(kth), axis), axis), np.take(expected, range(kth), axis)
        )
    return np.sort(expected, axis), np.sort(found, axis)


# Views of packed values


def permutation(draw, w):
    return qg.transpose, {"axes": draw(st.permutations(range(w.ndim)))}


def any_reshape(draw, w):
    shape = list(w.shape)
    i = draw(st.integers(0, len(shape) - 1))
    merged = [*shape[:i], int(np.prod(shape[i : i + 2])), *shape[i + 2 :]]
    factor = draw(st.sampled_from([f for f in (1, 2, 3, 32, 64) if shape[i] % f == 0]))
    parts = [*shape[:i], shape[i] // factor, factor, *shape[i + 1 :]]
    return qg.reshape, {"shape": draw(st.sampled_from([merged, parts, [1, *shape], [*shape, 1]]))}


def any_slice(draw, w):
    g = w.quantization.group_size
    bounds = [
        (draw(st.integers(0, n - 1)), draw(st.integers(1, n)), draw(st.sampled_from([1, 2, -1])))
        for n in w.shape
    ]
    i = w.ndim + w.axis
    if draw(st.booleans()):  # whole groups
        bounds[i] = (bounds[i][0] // g * g, -(-bounds[i][1] // g) * g, 1)
    return (lambda x: x[tuple(slice(*b) for b in bounds)]), {}


def joined(draw, w):
    other = [w] * draw(st.integers(1, 2))
    return (
        lambda x, axis: qg.concatenate(
            [x, *(other if qg.is_quantized(x) else map(qg.dequantize, other))], axis
        )
    ), {"axis": draw(st.integers(0, w.ndim - 1))}


def wider(draw, w):
    return qg.broadcast_to, {"shape": (draw(st.integers(1, 2)), *w.shape)}


def copied(draw, w):
    return qg.ops.quantized.contiguous, {}


@pytest.mark.parametrize("view", [permutation, any_reshape, any_slice, joined, wider])
def test_a_view_of_a_packed_value_is_the_view_of_its_numbers(view):
    @given(st.data())
    def check(source):
        draw = source.draw
        w = draw(packed())
        w = turned(w) if draw(st.booleans()) else w
        function, arguments = view(draw, w)
        found, expected = function(w, **arguments), function(qg.dequantize(w), **arguments)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        dense = qg.dequantize(found) if qg.is_quantized(found) else found
        assert mx.array_equal(dense, expected), (w, arguments)

    check()


@given(packed(), seeds)
def test_a_view_that_cannot_stay_packed_says_why(w, seed):
    builder = Builder()
    x = builder.input("x", type_of(w))
    cut = [(0, n, 1) for n in w.shape]
    cut[w.ndim + w.axis] = (1, w.shape[w.axis], 1)
    cut_op = Op.registry["slice"](*zip(*cut, strict=True))
    for op in (cut_op, Op.registry["broadcast_to"]((2, *w.shape)), Op.registry["reshape"]((x.type.size,))):
        assert op.infer(x.type).packing is None
        reason = op.carry(x.type)
        assert isinstance(reason, str)
        assert len(reason.split()) > 3
