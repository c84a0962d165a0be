"""The default pipeline on random graphs: every pass keeps the meaning, and what comes out can be emitted."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings

import qgraph as qg
from qgraph.execute.emit import emit
from qgraph.numeric import compare
from qgraph.rewrite import Context
from tests.agree import agree, normal, ops
from tests.ir.random_graphs import graphs


@pytest.mark.parametrize("device", ["cpu", "metal", "cuda"])
def test_every_pass_keeps_the_meaning_of_random_graphs(device):
    pipeline = qg.Pipeline.parse(qg.rewrite.DEFAULT)

    @settings(max_examples=100, deadline=None)
    @given(graphs())
    def check(graph):
        result = pipeline.run(graph, Context(device=device))
        emit(result.graph)
        before = result.before
        for stage in result.history:
            try:
                mismatch = compare(before, stage.graph)
            except TypeError:  # NumPy has no - for bool, MLX has
                assume(False)
            assert mismatch is None, (stage.name, str(before), str(stage.graph))
            before = stage.graph

    check()


def test_packed_activations_are_dequantized_for_a_kernel_that_the_user_called():
    f = qg.jit(lambda q: qg.quantized_matmul(q, q) + qg.dequantize(q).sum())
    q = qg.quantize(normal(64, 64))
    graph = agree(f, q)
    assert (ops(graph)["quantized_matmul"], ops(graph)["dequantize"]) == (1, 1)
