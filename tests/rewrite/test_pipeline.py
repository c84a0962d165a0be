"""Passes and pipelines: their names and texts, what they verify and what they keep."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import qgraph as qg
from qgraph.ir import digest, parse_graph
from qgraph.rewrite import Context
from tests.agree import normal, ops
from tests.rewrite.test_rules import DoubleNegation, graph_of


def test_a_user_pass_runs_in_a_pipeline_by_name():
    @qg.register("test-drop-double-negation")
    class Drop(DoubleNegation):
        """-(-x) → x."""

    f = qg.jit(pipeline="canonicalize,test-drop-double-negation,legalize")(lambda x: -(-x))
    assert ops(f.optimized(normal(3))) == {}


def test_two_passes_of_one_name_are_an_error_that_names_both():
    @qg.register("test-clash")
    class One(DoubleNegation):
        pass

    with pytest.raises(qg.RuleError, match=r"two passes are named 'test-clash': .*One and .*Two"):

        @qg.register("test-clash")
        class Two(DoubleNegation):
            pass


@dataclass(frozen=True)
class Scaled(qg.Pass):
    name = "test-scaled"
    by: float = 2.0
    on: bool = False
    label: str = "a"

    def run(self, graph, context):
        return graph


def test_pipeline_text_parses_back():
    qg.register("test-scaled")(Scaled)
    text = "canonicalize,test-scaled{by=3.5, on=true},legalize{strict=true}"
    pipeline = qg.Pipeline.parse(text)
    assert str(pipeline) == text
    assert pipeline.passes[1] == Scaled(by=3.5, on=True)
    assert qg.Pipeline.parse(str(pipeline)) == pipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no-such-pass", "no pass is named 'no-such-pass'"),
        ("legalize{strict=perhaps}", "strict=perhaps"),
        ("legalize{strikt=true}", "legalize has no option 'strikt=true'"),
        ("legalize,,{", "cannot read the pipeline"),
        ("quantize-dot,canonicalize,fold-transpose", "quantize-dot stands before fold-transpose"),
    ],
)
def test_a_wrong_pipeline_says_what_is_wrong(text, message):
    with pytest.raises(qg.RuleError, match=message):
        qg.Pipeline.parse(text)


def test_digests_and_order_of_rewrites_do_not_depend_on_the_hash_seed():
    import subprocess
    import sys

    script = (
        "import mlx.core as mx, qgraph as qg\n"
        "from qgraph.ir import digest\n"
        "f = qg.jit(lambda x, w, a, b: x @ w.T + 2.0 * ((x @ a) @ b))\n"
        "w = qg.quantize(mx.ones((32, 64)))\n"
        "r = f.result(mx.ones((2, 64)), w, mx.ones((64, 4)), mx.ones((4, 32)))\n"
        "print(digest(r.graph), r.context.ordinal, [n.origin.steps for n in r.graph.nodes], f.source(*[\n"
        "  mx.ones((2, 64)), w, mx.ones((64, 4)), mx.ones((4, 32))]))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "42")
    }
    assert len(outputs) == 1


class Wrong(qg.Pass):
    """Loses the transpose of a square weight: types stay right, numbers do not."""

    name = "test-wrong"

    def run(self, graph, context):
        return graph.rewritten(
            lambda node, inputs: (
                inputs
                if node.op.name == "transpose"
                else graph.builder.add(node.op, inputs, node.origin).outputs
            )
        )


@pytest.mark.parametrize(("level", "caught"), [("0", False), ("1", False), ("2", True), ("3", True)])
def test_verify_levels_two_and_three_catch_a_pass_that_changes_numbers(monkeypatch, level, caught):
    monkeypatch.setenv("QGRAPH_VERIFY", level)
    graph = graph_of(lambda x, w: x @ w.T, normal(4, 4), normal(4, 4, seed=3))
    pipeline = qg.Pipeline((Wrong(),))
    if caught:
        with pytest.raises(qg.VerifyError, match="pass test-wrong changed what output 0 computes"):
            pipeline.run(graph)
    else:
        pipeline.run(graph)


def test_verify_level_one_catches_a_pass_that_changes_a_type():
    class Retypes(qg.Pass):
        name = "test-retypes"

        def run(self, graph, context):
            return graph.with_outputs(graph.inputs[:1])

    with pytest.raises(qg.VerifyError, match="changed the types of the outputs"):
        qg.Pipeline((Retypes(),)).run(graph_of(lambda x: qg.sum(x), normal(3)))


def test_unchanged_is_decided_by_the_digest():
    class Rebuilds(qg.Pass):
        name = "test-rebuilds"

        def run(self, graph, context):
            return parse_graph(str(graph))

    graph = graph_of(lambda x: qg.exp(x), normal(3))
    result = qg.Pipeline((Rebuilds(),)).run(graph)
    assert not result.history[0].changed
    assert digest(result.graph) == digest(graph)


def test_the_graph_after_any_pass_is_kept():
    f = qg.jit(lambda x, w: x @ w.T)
    result = f.result(normal(2, 64), qg.quantize(normal(32, 64)))
    assert ops(result.after("trace")) == {"transpose": 1, "dot": 1}
    assert ops(result.after("quantize-dot")) == {"quantized_matmul": 1}
    with pytest.raises(qg.RuleError, match="no pass 'fuse-loras' ran"):
        result.after("fuse-loras")


@pytest.mark.parametrize("text", ["legalize{strict=false}", "legalize{}", "canonicalize, legalize"])
def test_strict_holds_however_the_pipeline_is_spelled(text):
    f = qg.jit(pipeline=text, strict=True)(lambda x, w: x @ w.T)
    with pytest.raises(qg.StrictError):
        f(normal(2, 64), qg.quantize(normal(32, 64)))


def test_strict_without_a_pass_that_can_be_strict_is_an_error():
    with pytest.raises(qg.RuleError, match="has the option strict"):
        qg.jit(pipeline="canonicalize", strict=True)(lambda x: x)


@pytest.mark.parametrize("cut", [16, 64])
def test_a_pipeline_without_legalize_is_refused_where_it_would_emit_nonsense(cut):
    f = qg.jit(pipeline="canonicalize")(lambda x, w: x @ w[:, :cut].T)
    with pytest.raises(qg.QGraphError, match="put `legalize` into the pipeline"):
        f(normal(2, cut), qg.quantize(normal(32, 64)))


def test_fuel_that_is_no_number_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("QGRAPH_FUEL", "abc")
    with pytest.raises(qg.RuleError, match="QGRAPH_FUEL='abc'"):
        Context()


def test_the_first_use_may_come_from_many_threads_at_once():
    """In a fresh process, where no pass has been loaded yet."""
    import subprocess
    import sys

    script = (
        "import threading, mlx.core as mx, qgraph as qg\n"
        "gate, wrong = threading.Barrier(8), []\n"
        "def go():\n"
        "    gate.wait()\n"
        "    try: qg.quantize(mx.ones((8, 64)))\n"
        "    except Exception as error: wrong.append(error)\n"
        "threads = [threading.Thread(target=go) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(wrong)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
