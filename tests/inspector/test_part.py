"""One module as a graph of its own: it computes what it computes in the whole."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.execute.program import Program
from qgraph.inspector.part import part_of
from qgraph.ir import parse_graph, verify
from tests.agree import assert_close, normal, ops
from tests.inspector.programs import quantized


@qg.jit
def model(x, w, v):
    with qg.scope("layers.0"):
        x = qg.tanh(x @ w.T)
    skipped = qg.exp(x)
    with qg.scope("layers.1"):
        y = x + 2.0
        low, high = qg.split(qg.sin(y) @ v.T, 2, axis=-1)
    return skipped * y, low, high + x


X, W, V = normal(2, 64), quantized(64, 64), normal(128, 64)


def test_a_part_reads_what_is_made_outside_and_gives_what_is_read_there() -> None:
    part = part_of(model.optimized(X, W, V), "layers.1")
    verify(part)
    made, v = (v.op.label for v in part.inputs)
    assert (made.rpartition(".")[0], v) == ("layers.0", "v")
    assert {n.origin.scope for n in part.nodes} >= {"layers.1"}
    assert ops(part).keys() == {"add", "sin", "transpose", "dot", "slice"}
    x = mx.tanh(qg.dot(X, qg.transpose(W)))
    y, low, high = Program(part).run(x, V)
    for a, b in zip(model(X, W, V), (mx.exp(x) * y, low, high + x), strict=True):
        assert_close(a, b)


def test_a_part_with_packed_weights_parses_back() -> None:
    part = part_of(model.optimized(X, W, V), "layers.*")
    again = parse_graph(str(part))
    assert again.histogram() == part.histogram()
    assert again.find("quantized_matmul")


def test_a_pattern_takes_all_layers() -> None:
    both = part_of(model.optimized(X, W, V), "layers.*")
    assert [v.op.label for v in both.inputs] == ["x", "w", "v"]
    assert len(both.outputs) == 4  # tanh, the sum, and the halves


def test_a_module_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(qg.QGraphError, match=r"no node is in a module 'head'") as error:
        part_of(model.graph(X, W, V), "head")
    assert "the modules: layers.*" in str(error.value)
    with pytest.raises(qg.QGraphError, match="none is known"):
        part_of(qg.jit(lambda x: -x).graph(X), "head")


def test_inspect_shows_a_module_in_every_format() -> None:
    found = qg.inspect(model, X, W, V)
    assert "sin" not in found.dump(scope="layers.0")
    assert '"sin"' in found.dump("json", scope="layers.1")
    assert found.graph("trace", "layers.0").find("dot")
    assert found.dump() == found.dump(scope="")
