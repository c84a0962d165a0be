"""guard-indices: what is not provably in range is made so, in the graph; what is costs nothing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.execute.program import Program
from qgraph.ir import parse_graph
from qgraph.ir.op import Op
from qgraph.ops.indexed import Indexed
from qgraph.rewrite.guard import guard_indices
from tests.agree import agree, normal, ops

PASS = "guard-indices"
EXPERTS = 8


def after(f, *args):
    """The op histogram behind the pass."""
    return qg.jit(f).result(*args).after(PASS).histogram()


def test_every_op_with_indices_says_what_they_index():
    known = {name for name, op in Op.registry.items() if issubclass(op, Indexed)}
    assert known == {
        *("take", "take_along_axis", "gather", "gather_mm", "gather_qmm", "quantized_take"),
        *("put_along_axis", "index_update"),
    }


def test_a_router_pays_nothing():
    """As mlx-lm's experts: the top k, the tokens sorted by expert, and the way back."""

    def moe(x, gate, up, down):
        scores = x @ gate
        chosen = qg.argpartition(-scores, 1, axis=-1)[..., :2]
        weights = qg.softmax(qg.take_along_axis(scores, chosen, axis=-1), axis=-1)
        flat = qg.flatten(chosen)
        order = qg.argsort(flat)
        h = qg.take(x, order // 2, axis=0)[:, None]
        h = qg.gather_mm(h, up.swapaxes(-1, -2), rhs_indices=qg.take(flat, order), sorted_indices=True)
        h = qg.gather_mm(
            qg.silu(h), down.swapaxes(-1, -2), rhs_indices=qg.take(flat, order), sorted_indices=True
        )
        h = qg.take(h[:, 0], qg.argsort(order), axis=0).reshape(*chosen.shape, -1)
        return (h * weights[..., None]).sum(axis=-2)

    up, down = (qg.quantize(normal(EXPERTS, n, k), group_size=32) for n, k in ((64, 32), (32, 64)))
    args = normal(5, 32), normal(32, EXPERTS), up, down
    graph = agree(qg.jit(moe), *args)
    assert not {"where", "equal", "minimum"} & set(ops(graph))
    assert ops(graph)["gather_qmm"] == 2
    assert graph.find("gather_qmm")[0].op.sorted_indices


FREE = {
    "a constant": lambda t, i: qg.take(t, [0, 3, -1], axis=0),
    "a range": lambda t, i: qg.take(t, qg.arange(4), axis=0),
    "a remainder": lambda t, i: qg.take(t, i % 4, axis=0),
    "a clip": lambda t, i: qg.take(t, qg.clip(i, -4, 3), axis=0),
    "a byte of 256 rows": lambda t, i: qg.take(qg.concatenate([t] * 64), i.astype(mx.uint8), axis=0),
    "a sort": lambda t, i: qg.take(t, qg.argsort(t[:, 0]), axis=0),
    "a draw": lambda t, i: qg.random.permutation(t, key=qg.random.key(3)),
}


@pytest.mark.parametrize("case", FREE)
def test_what_is_in_range_for_sure_is_left_alone(case):
    before = qg.jit(FREE[case]).result(normal(4, 3), mx.array([1, 2])).after("fuse-lora")
    assert guard_indices(before) is before
    assert "equal" not in before.histogram()


TOO_FAR = {
    "an input": lambda t, i: qg.take(t, i, axis=0),
    "one more than the rows": lambda t, i: qg.take(t, i % 5, axis=0),
    "a clip one too far": lambda t, i: qg.take(t, qg.clip(i, 0, 4), axis=0),
    "a byte of 252 rows": lambda t, i: qg.take(qg.concatenate([t] * 63), i.astype(mx.uint8), axis=0),
    "argmax of a longer axis": lambda t, i: qg.take(t, qg.argmax(qg.concatenate([t, t]), axis=0), axis=0),
    "a sum that may leave": lambda t, i: qg.take(t, i % 4 + 1, axis=0),
    "along": lambda t, i: qg.take_along_axis(t, i[:, None], axis=0),
    "two arrays": lambda t, i: t[i, i % 3],
    "an update": lambda t, i: t.at[i].add(1.0),
    "a block of experts": lambda t, i: qg.gather_mm(t[None], qg.stack([t.T] * 3), rhs_indices=i),
}


@pytest.mark.parametrize("ids", [[1, 2], [3, 4], [-1, -4], [-5, 9], [251, 300]])
@pytest.mark.parametrize("case", TOO_FAR)
def test_what_may_be_out_of_range_is_guarded_and_means_the_same(case, ids):
    graph = agree(qg.jit(TOO_FAR[case]), normal(4, 3), mx.array(ids))
    assert ops(graph)["equal"] >= 1
    assert guard_indices(graph) is graph  # what the guard made is in range for sure


def test_one_guard_serves_all_that_use_the_index():
    w = qg.quantize(normal(EXPERTS, 64, 32), group_size=32)

    def f(x, w, i):
        return qg.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=i) + qg.gather_mm(
            x * 2, w.swapaxes(-1, -2), rhs_indices=i
        )

    counts = after(f, normal(3, 1, 32), w, mx.array([1, 9, 2]))
    assert (counts["gather_qmm"], counts["equal"], counts["minimum"], counts["where"]) == (2, 1, 1, 2)


def test_the_guard_is_named_in_the_history_of_its_nodes():
    graph = qg.jit(lambda t, i: qg.take(t, i, axis=0)).optimized(normal(4, 3), mx.array([1]))
    [where] = graph.find("where")
    assert [(s.pass_name, s.rule) for s in where.origin.steps] == [(PASS, "take")]
    assert "test_guard_indices.py" in str(where.origin.source)


def test_a_pipeline_without_the_pass_is_safe_too():
    f = qg.jit(pipeline="canonicalize,legalize")(lambda t, i: qg.take(t, i, axis=0))
    t, i = normal(4, 3), mx.array([1, 9])
    assert "where" not in f.optimized(t, i).histogram()
    assert "mx.where" in f.source(t, i)
    found = np.array(f(t, i))
    np.testing.assert_array_equal(found[0], np.array(t)[1])
    assert np.isnan(found[1]).all()


def test_a_graph_written_by_hand_is_safe_too():
    text = """graph(%t: f32[4,3], %i: i32[2]) {
      %take = take{axis=0}(%t, %i) : f32[2,3]
      return %take
    }"""
    (found,) = Program(parse_graph(text)).run(normal(4, 3), mx.array([2, 4]))
    assert np.isnan(np.array(found)[1]).all()


@pytest.mark.parametrize("index", ["(5,)", "((0, 9, 1),)", "(-1,)", '("array", 3)'])
def test_a_written_out_index_of_an_update_is_checked(index):
    arrays = ", %i: i32[2]" if "array" in index else ""
    text = f"""graph(%t: f32[4,3], %v: f32[]{arrays}) {{
      %u = index_update{{kind='set', index={index}}}(%t, %v{", %i" if arrays else ""}) : f32[4,3]
      return %u
    }}"""
    with pytest.raises(qg.ShapeError, match="out of range for axis"):
        parse_graph(text)
