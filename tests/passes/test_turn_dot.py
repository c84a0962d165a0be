"""turn-dot: on a CPU dense weights are multiplied by activations, with the same sums."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.execute.program import Program
from qgraph.ir import parse_graph
from qgraph.rewrite import Context, Pipeline
from tests.agree import agree, assert_close, magnitude_of, normal, ops

# The native kernels multiply either way.
pytestmark = pytest.mark.usefixtures("mlx_alone")
X, W, C = normal(12, 96), normal(40, 96), normal(40)


def turned(graph):
    """How many products are turned, and how many are not."""
    dots = graph.find("dot", "addmm")
    ours = [n for n in dots if n.inputs[-1].op.name == "contiguous"]
    return len(ours), len(dots) - len(ours)


@pytest.mark.parametrize("shape", [(12, 96), (1, 8, 96), (2, 3, 5, 96), (8, 1, 96)])
def test_products_of_many_rows_are_turned(shape):
    f = qg.jit(lambda x, w: x @ w.T)
    x = normal(*shape)
    graph = agree(f, x, W)
    assert turned(graph) == (1, 0)
    assert_close(f(x, W), x @ W.T, k=96, path="P2", magnitude=magnitude_of(x, W))


def test_a_bias_is_added_after_the_product():
    f = qg.jit(lambda x, w, c: qg.addmm(c, x, w.T))
    assert turned(agree(f, X, W, C)) == (1, 0)
    bound = magnitude_of(X, W) + abs(C)
    assert_close(f(X, W, C), mx.addmm(C, X, W.T), k=97, path="P2", magnitude=bound)


def test_activations_are_copied_once_for_all_weights_and_weights_never():
    f = qg.jit(lambda x, w, v: (x @ w.T, x @ v.T))
    graph = agree(f, X, W, normal(8, 96))
    assert turned(graph) == (2, 0)
    (copy,) = graph.find("contiguous")
    assert copy.types[0].shape == (96, 12)


@pytest.mark.parametrize(
    ("why", "f", "x", "w"),
    [
        ("few rows", lambda x, w: x @ w.T, normal(7, 96), W),
        ("a vector", lambda x, w: x @ w.T, normal(96), W),
        ("no transposed weight", lambda x, w: x @ w, normal(12, 40), W),
        ("a factor", lambda x, w: qg.addmm(x[:, :40], x, w.T, alpha=2.0), X, W),
        ("16 bit", lambda x, w: x @ w.T, X.astype(mx.bfloat16), W.astype(mx.bfloat16)),
        ("16 bit times 32", lambda x, w: x @ w.T, X, W.astype(mx.float16)),
        ("a stack of weights", lambda x, w: x @ qg.swapaxes(w, -1, -2), X, normal(3, 40, 96)),
        ("packed", lambda x, w: x @ w.T, X, qg.quantize(W, group_size=32)),
        ("no rows", lambda x, w: x @ w.T, normal(0, 96), W),
        ("no terms", lambda x, w: x @ w.T, normal(12, 0), normal(40, 0)),
    ],
)
def test_what_stays(why, f, x, w):
    assert turned(agree(qg.jit(f), x, w))[0] == 0, why


@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_a_gpu_keeps_its_products(device):
    text = """graph(%x: f32[12,96], %w: f32[40,96]) {
        %t = transpose{axes=(1, 0)}(%w) : f32[96,40]
        %y = dot(%x, %t) : f32[12,40]
        return %y
    }"""
    for kind, found in ((device, (0, 1)), ("cpu", (1, 0))):
        result = Pipeline.parse("turn-dot").run(parse_graph(text), Context(device=kind))
        assert turned(result.graph) == found
    native = Context(device="cpu", native=True)
    assert turned(Pipeline.parse("turn-dot").run(parse_graph(text), native).graph) == (0, 1)
    assert turned(Pipeline.parse("turn-dot").run(parse_graph(text), Context(device="cpu", fuel=0)).graph) == (
        0,
        1,
    )


def test_turned_products_have_gradients_and_vmaps():
    f = qg.jit(lambda x, w: x @ w.T)
    assert turned(f.optimized(X, W)) == (1, 0)
    for argnums in (0, 1):
        found = mx.grad(lambda x, w: (f(x, w) * mx.sin(f(x, w))).sum(), argnums)(X, W)
        exact = mx.grad(lambda x, w: ((x @ w.T) * mx.sin(x @ w.T)).sum(), argnums)(X, W)
        assert_close(found, exact, k=96)
    assert_close(mx.vmap(f, (0, None))(normal(2, 12, 96), W), normal(2, 12, 96) @ W.T, k=96)


def test_the_line_and_the_module_stay():
    @qg.jit
    def f(x, w):
        with qg.scope("layers.0.up"):
            return x @ w.T

    (dot,) = f.optimized(X, W).find("dot")
    assert dot.origin.scope == "layers.0.up"
    assert dot.origin.source.text == "return x @ w.T"
    assert [s.pass_name for s in dot.origin.steps] == ["turn-dot"]
    assert ops(f.graph(X, W)) == {"transpose": 1, "dot": 1}
    before = Program(f.graph(X, W)).run(X, W)[0]
    assert_close(f(X, W), before, k=96, path="P2", magnitude=magnitude_of(X, W))
