"""Emission: what the flat source says, and what the reference interpreter makes of a graph."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.execute.emit import emit
from qgraph.execute.program import Program
from qgraph.execute.reference import evaluate, round_to, to_numpy
from qgraph.ir import parse_graph
from qgraph.ir.dtypes import BF16, F16, F32, F64
from tests.agree import agree, assert_close, normal


def test_the_source_is_one_flat_function_of_mlx_calls():
    f = qg.jit(lambda x, w: qg.exp(x @ w.T) + 1.0)
    source = f.source(normal(2, 64), qg.quantize(normal(8, 64)))
    assert "def program(x, w_packed, w_scales, w_biases):" in source
    assert "transpose=True, group_size=64, bits=4, mode='affine')" in source
    assert "# test_emit.py:" in source


def test_a_result_without_elements_is_zeros_outright():
    graph = parse_graph("graph(%x: f32[0,3]) {\n %y = exp(%x) : f32[0,3]\n return %y\n}")
    assert "mx.zeros((0, 3), mx.float32)" in emit(graph).source


@pytest.mark.parametrize("value", [-0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 2**31 - 1, True])
def test_constants_arrive_as_they_were_written(value):
    f = qg.jit(lambda x: x * 0 + qg.full((), value, mx.float32))
    found = f(mx.ones((1,))).item()
    assert np.array(found, np.float32).tobytes() == np.array(np.float32(0.0) + np.float32(value)).tobytes()
    g = qg.jit(lambda: qg.full((), value, mx.float32))
    assert np.array(g().item(), np.float32).tobytes() == np.float32(value).tobytes()


def test_names_that_python_reserves_are_no_obstacle():
    graph = parse_graph(
        "graph(%lambda: f32[2], %1.x: f32[2]) {\n %a = add(%lambda, %1.x) : f32[2]\n return %a\n}"
    )
    [out] = Program(graph).run(mx.ones(2), mx.ones(2))
    assert out.tolist() == [2.0, 2.0]


def test_a_graph_that_was_not_legalized_is_refused_with_the_way_out():
    text = "graph(%w: f32[8,64]:affine4g64) {\n %y = exp(%w) : f32[8,64]\n return %y\n}"
    with pytest.raises(qg.QGraphError, match="exp cannot read the packed operand"):
        emit(parse_graph(text))


def test_faithful_mode_rounds_every_result_and_ideal_mode_none():
    f = qg.jit(lambda x: (x + 1.0) - 1.0)
    x = mx.full((4,), 1e-3, mx.bfloat16)
    graph = f.graph(x)
    [ideal] = evaluate(graph, [to_numpy(x)])
    [faithful] = evaluate(graph, [to_numpy(x)], "faithful")
    assert_close(ideal, x, F64, path="reference")
    assert faithful.tolist() == to_numpy(f(x)).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_round_to_is_mlxs_rounding(dtype):
    x = np.random.default_rng(0).standard_normal(4096) * 10.0 ** np.arange(-8, 4).repeat(342)[:4096]
    narrow = mx.array(x.astype(np.float32)).astype(dtype.mlx)
    assert np.array_equal(round_to(dtype, x.astype(np.float32)), to_numpy(narrow))


def test_the_starts_of_blocks_are_clamped_once_for_all_buffers_and_by_their_own_limits():
    @qg.jit
    def f(a, b, wide, x, at):
        return [qg.slice_update(buffer, x, at, (0,)) for buffer in (a, b, wide)]

    a, b, wide, x = normal(5, 2, seed=1), normal(5, 2, seed=2), normal(9, 2), normal(3, 2)
    for start in (0, 2, 4, -1, 100):
        at = mx.array([start])
        agree(f, a, b, wide, x, at)
    assert f.source(a, b, wide, x, at).count("mx.clip(") == 2


def test_a_block_is_read_and_written_at_one_clamped_start():
    @qg.jit
    def f(a, x, at):
        return qg.slice(qg.slice_update(a, x, at, (0,)), at, (0,), (3, 2))

    a, x, at = normal(5, 2), normal(3, 2), mx.array([7])
    agree(f, a, x, at)
    assert f.source(a, x, at).count("mx.clip(") == 1
