"""legalize gives ops native CPU kernels where the context says that there are any, and nowhere else."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.execute.emit import emit
from qgraph.ir import digest, parse_graph
from qgraph.ir.op import KERNEL
from qgraph.rewrite import Context, Pipeline
from qgraph.rewrite.pipeline import DEFAULT
from tests.agree import normal

BF16, F32 = mx.bfloat16, mx.float32


def legal(function, *args, native=True, device="cpu", pipeline=DEFAULT):
    graph = qg.jit(function).graph(*args)
    return Pipeline.parse(pipeline).run(graph, Context(device=device, native=native)).graph


def kernels_of(graph):
    return {n.op.name: getattr(n.op, KERNEL) for n in graph.nodes if hasattr(n.op, KERNEL)}


def packed(n=32, k=64, dtype=BF16, **scheme):
    return qg.quantize(normal(n, k).astype(dtype), **scheme)


def attention(q):
    return qg.scaled_dot_product_attention(q, q, q, scale=0.5, mask="causal")


def rotated(x):
    return qg.rope(x, 4, traditional=False, base=10000.0, scale=1.0, offset=0)


WITH = {
    "quantized_matmul": (lambda x, w: x @ w.T, (2, 64), packed()),
    "quantized_take": (lambda x, w: w[qg.array([1, 2])] + qg.sum(x), (2, 64), packed()),
    "dot": (lambda x, w: x @ w, (2, 64), normal(64, 3).astype(BF16)),
    "addmm": (lambda x, w: qg.addmm(qg.sum(x), x, w), (2, 64), normal(64, 3).astype(BF16)),
    "rms_norm": (lambda x, w: qg.rms_norm(x, w, 1e-5), (2, 64), normal(64).astype(BF16)),
    "layer_norm": (lambda x, w: qg.layer_norm(x, w, None, 1e-5), (2, 64), normal(64).astype(BF16)),
    "softmax": (lambda x, w: qg.softmax(x, -1) * w, (2, 64), normal(64).astype(BF16)),
    "max": (lambda x, w: qg.max(x * w, -1, keepdims=True), (2, 64), normal(64).astype(BF16)),
    "argmax": (lambda x, w: qg.argmax(x * w, -1), (2, 64), normal(64).astype(BF16)),
    "logsumexp": (lambda x, w: qg.logsumexp(x * w, 1), (2, 64), normal(64).astype(BF16)),
    "scaled_dot_product_attention": (lambda x, w: attention(x) * w, (1, 2, 3, 8), normal(8).astype(BF16)),
    "rope": (lambda x, w: rotated(x) * w, (1, 2, 3, 8), normal(8).astype(BF16)),
}


@pytest.mark.parametrize("name", WITH)
def test_ops_of_the_float_types_get_their_kernel(name):
    function, shape, w = WITH[name]
    x = normal(*shape).astype(BF16)
    graph = legal(function, x, w)
    assert kernels_of(graph)[name] == "native"
    assert not graph.find("cast"), "the kernel accumulates in f32 itself"
    assert "kernel='native'" in str(graph)
    assert digest(parse_graph(str(graph))) == digest(graph)
    assert set(kernels_of(legal(function, x, w, native=False)).values()) <= {""}


@pytest.mark.parametrize("name", ["dot", "rms_norm", "softmax", "max", "argmax"])
def test_other_dtypes_are_left_to_mlx(name):
    function, shape, w = WITH[name]
    with mx.stream(mx.cpu):
        x = normal(*shape).astype(mx.float64)
        assert kernels_of(legal(function, x, w.astype(mx.float64)))[name] == ""


def test_gpus_get_none():
    function, shape, w = WITH["quantized_matmul"]
    context = Context(device="metal")
    assert context.native is False
    graph = legal(function, normal(*shape).astype(BF16), w, device="metal", native=False)
    assert kernels_of(graph) == {"quantized_matmul": ""}


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("name", ["softmax", "max", "argmax", "logsumexp"])
def test_what_goes_over_other_axes_is_left_to_mlx(name, axis):
    graph = legal(lambda x: getattr(qg, name)(x, axis), normal(3, 4))
    assert kernels_of(graph) == {name: ""}


def test_int8_activations_are_an_option():
    function, shape, w = WITH["quantized_matmul"]
    pipeline = DEFAULT.replace("legalize", "legalize{activations=int8}")
    graph = legal(function, normal(*shape), w, pipeline=pipeline)
    assert kernels_of(graph)["quantized_matmul"] == "int8"
    assert "activations='int8'" in emit_with_kernels(graph)


def test_int8_activations_without_kernels_are_an_error():
    function, shape, w = WITH["quantized_matmul"]
    pipeline = DEFAULT.replace("legalize", "legalize{activations=int8}")
    with pytest.raises(qg.QGraphError, match="needs the native CPU kernels") as found:
        legal(function, normal(*shape), w, pipeline=pipeline, native=False)
    assert "qgraph doctor" in str(found.value)


def test_another_rounding_is_an_error():
    with pytest.raises(qg.QGraphError, match="int4"):
        qg.jit(lambda x: x, activations="int4")


def emit_with_kernels(graph):
    from unittest.mock import patch

    with patch("qgraph.kernels.library", lambda: True):
        return emit(graph).source


def test_a_graph_with_kernels_runs_where_there_are_none(monkeypatch):
    monkeypatch.setattr("qgraph.kernels.library", lambda: None)
    for name, (function, shape, w) in WITH.items():
        graph = legal(function, normal(*shape).astype(BF16), w)
        source = emit(graph).source
        assert "native." not in source, name
        assert "mx." in source, name
