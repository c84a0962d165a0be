"""The pass as a whole: its place, its reasons, its counts, and graphs where there is nothing to raise."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
import qgraph_passes
from qgraph.inspector.why import explain
from qgraph.ir import parse_graph
from qgraph.rewrite import Context
from qgraph_passes.raise_fast import SWEEPS, RaiseFast
from tests.agree import agree, normal
from tests.passes.raise_fast.raised import PIPELINE

EPS = 1e-3


def norm(x):
    return x * qg.rsqrt(qg.mean(x * x, axis=-1, keepdims=True) + EPS)


def test_packed_weights_are_raised_before_the_products_look_for_them():
    names = [p.name for p in qg.Pipeline.parse(qg.rewrite.DEFAULT).passes]
    assert names == [p.name for p in qgraph_passes.ALL]
    assert names.index("canonicalize") < names.index("raise-fast") < names.index("fold-transpose")
    with pytest.raises(qg.RuleError, match="stands before raise-fast"):
        qg.Pipeline.parse("canonicalize,fold-transpose,raise-fast")


def test_why_knows_every_form_and_tells_what_it_lacks():
    result = qg.jit(lambda x: x * qg.rsqrt(qg.mean(x * x, axis=0, keepdims=True) + EPS)).result(normal(4, 8))
    text = explain(result, "raise-rms-norm")
    assert "raise-rms-norm fired 0 times; tried at 1 nodes, of which 1 matched and were refused" in text
    assert "the mean is over axes (0,), not the last one" in text
    assert "test_pass.py" in text
    for form in (f for sweep in SWEEPS for f in sweep):
        assert explain(result, form.name)
        assert form.__doc__
        assert "→" in form.__doc__
    assert "raise-softmax was never tried" in explain(result, "raise-fast")


def test_a_form_that_fired_is_counted_and_its_miss_forgotten():
    result = qg.jit(norm).result(normal(4, 8))
    statistics = result.context.statistics["raise-rms-norm"]
    assert (statistics.candidates, statistics.applied, statistics.refused) == (1, 1, 0)
    assert not any(name == "raise-rms-norm" for name, _ in result.context.misses)


def test_fuel_stops_the_raising():
    graph = qg.jit(lambda x, y: (norm(x), norm(y))).graph(normal(4, 8), normal(3, 8))
    passes = qg.Pipeline.parse(PIPELINE)
    for fuel, raised in ((0, 0), (1, 1), (2, 2), (9, 2)):
        counts = passes.run(graph, Context(fuel=fuel)).graph.histogram()
        assert counts.get("rms_norm", 0) == raised


def test_the_op_knows_every_line_that_it_stands_for():
    def f(x):
        squares = x * x
        root = qg.rsqrt(qg.mean(squares, axis=-1, keepdims=True) + EPS)
        return x * root

    with qg.scope("outer"):
        (node,) = qg.jit(f).result(normal(4, 8)).after("raise-fast").find("rms_norm")
    lines = {source.line for source in node.origin.sources}
    assert len(lines) == 3
    (step,) = node.origin.steps
    assert (step.pass_name, step.rule) == ("raise-fast", "raise-rms-norm")


def test_a_whole_attention_layer_in_plain_code_becomes_the_ops_that_mlx_has_kernels_for():
    """What a researcher writes: a Llama layer of 4-bit weights, in arrays."""
    heads, served, d, length = 4, 2, 16, 5

    def rope(x):
        angles = qg.arange(length, dtype=mx.float32)[:, None] * 1e4 ** (
            -qg.arange(0, d, 2, dtype=mx.float32) / d
        )
        cos, sin = (qg.concatenate([t, t], axis=-1) for t in (qg.cos(angles), qg.sin(angles)))
        return x * cos + qg.concatenate([-x[..., d // 2 :], x[..., : d // 2]], axis=-1) * sin

    def layer(x, w):
        y = norm(x) * w["norm"]

        def split(t, n):
            return qg.swapaxes(qg.reshape(t, (1, length, n, d)), 1, 2)

        q, k, v = split(y @ w["q"].T, heads), split(y @ w["k"].T, served), split(y @ w["v"].T, served)
        k, v = qg.repeat(rope(k), 2, axis=1), qg.repeat(v, 2, axis=1)
        scores = rope(q) @ qg.swapaxes(k, -1, -2) / d**0.5 + qg.triu(qg.full((length, length), -1e9), k=1)
        out = qg.reshape(qg.swapaxes(qg.softmax(scores, axis=-1) @ v, 1, 2), (1, length, heads * d))
        return x + out @ w["o"].T

    sizes = {"q": heads * d, "k": served * d, "v": served * d, "o": heads * d}
    w = {n: qg.quantize(normal(size, heads * d, seed=i), bits=4) for i, (n, size) in enumerate(sizes.items())}
    w["norm"] = normal(heads * d)
    x = normal(1, length, heads * d)
    pipeline = "canonicalize,raise-fast,fold-transpose,quantize-dot,legalize"
    counts = agree(qg.jit(layer, pipeline=pipeline), x, w).histogram()
    named = {op: n for op, n in counts.items() if op not in ("reshape", "transpose", "add")}
    assert named == {"quantized_matmul": 4, "rms_norm": 1, "rope": 2, "scaled_dot_product_attention": 1}


def test_nothing_to_raise_is_the_same_graph():
    graph = qg.jit(lambda x, w: qg.silu(x @ w) * 2).graph(normal(2, 4), normal(4, 4))
    assert RaiseFast().run(graph, Context()) is graph


def test_a_raised_graph_has_nothing_to_raise():
    result = qg.jit(norm, pipeline=PIPELINE).result(normal(4, 8))
    assert RaiseFast().run(result.graph, Context()) is result.graph


def test_a_chain_of_a_hundred_thousand_nodes_is_no_recursion():
    lines = ["graph(%x: f32[2]) {", "  %v0 = exp(%x) : f32[2]"]
    lines += [f"  %v{i} = sin(%v{i - 1}) : f32[2]" for i in range(1, 100_000)]
    graph = parse_graph("\n".join([*lines, "  return %v99999", "}"]))
    assert RaiseFast().run(graph, Context()) is graph


def test_verification_of_a_pass_allows_numbers_that_float32_rounded(monkeypatch):
    """1 / 96 is not a number of float32: the raised norm divides by 96."""
    monkeypatch.setenv("QGRAPH_VERIFY", "3")
    f = qg.optimize(lambda x, w: mx.fast.rms_norm(x, w, EPS))
    assert f.optimized(normal(3, 96), normal(96)).find("rms_norm")
    g = qg.optimize(
        lambda x: mx.fast.rope(x, 64, traditional=False, base=1e6, scale=1.0, offset=0), pipeline=PIPELINE
    )
    assert g.optimized(normal(1, 1, 64, 64)).find("rope")
