"""The checklist of a jit's correctness, items 30–32: passes that misbehave, a full cache, three ways."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import RuleError, VerifyError
from qgraph.execute.eager import stored
from qgraph.execute.program import Program
from qgraph.ir import Graph
from qgraph.ir.digest import digest
from qgraph.ir.text import parse_graph
from qgraph.ir.types import TensorType
from tests.agree import agree, close, leaves_of
from tests.jit.data import normal, together, weight

X = mx.array([[1.0, 2.0, 3.0, 4.0]])


# 30. Passes that misbehave.


class Misbehaves(qg.Pass):
    name = "misbehaves"
    how: Any = None

    def run(self, graph: Graph, context: Any) -> Any:
        return type(self).how(graph)


def run_misbehaving(how: Any, monkeypatch: Any, rules: tuple[Any, ...] = ()) -> Any:
    """The error of a pipeline with a pass that does `how`; its input graph is as it was."""
    if rules:
        kind: Any = type("Rules", (qg.Pass,), {"name": "misbehaves", "rules": rules})
    else:
        monkeypatch.setattr(Misbehaves, "how", staticmethod(how))
        kind = Misbehaves
    graph = qg.jit(lambda x, w: (qg.exp(x @ w.T), qg.sum(x))).graph(normal(2, 64), weight())
    before = str(graph), digest(graph), graph.nodes, graph.inputs, graph.outputs
    with pytest.raises(Exception) as info:  # noqa: PT011  (the callers look at it)
        qg.Pipeline((qg.Pipeline.parse("canonicalize").passes[0], kind())).run(graph)
    assert (str(graph), digest(graph), graph.nodes, graph.inputs, graph.outputs) == before
    text = "\n".join([str(info.value), *getattr(info.value, "__notes__", ())])
    assert "misbehaves" in text
    return info.value, text


def test_j30_a_pass_that_raises_is_named(monkeypatch) -> None:
    error, text = run_misbehaving(lambda graph: {}["missing"], monkeypatch)
    assert isinstance(error, KeyError)
    assert "in pass misbehaves; passes before it: canonicalize" in text


def test_j30_a_rule_that_raises_is_named_with_the_node_and_the_line(monkeypatch) -> None:
    class Divides(qg.Rule):
        def pattern(self, x: Any) -> Any:
            return qg.exp(x)

        def rewrite(self, m: Any, x: Any) -> Any:
            raise ZeroDivisionError("in the rule")

    error, text = run_misbehaving(None, monkeypatch, (Divides,))
    assert isinstance(error, ZeroDivisionError)
    assert "in rule divides at <exp" in text
    assert "test_checklist_passes.py:" in text


def wrong_type(graph: Graph) -> Graph:
    exp, sin = graph.find("exp")[0], qg.jit(qg.sin).graph(X).find("sin")[0].op
    made = type(exp)(sin, exp.inputs, (TensorType((7, 7), exp.types[0].dtype),), exp.origin)
    return graph.with_outputs([made.outputs[0], graph.outputs[1]])


def foreign_value(graph: Graph) -> Graph:
    other = qg.jit(lambda x: qg.exp(x)).graph(normal(2, 32))
    return graph.with_outputs([other.outputs[0], graph.outputs[1]])


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        (lambda g: None, RuleError, "pass misbehaves returned NoneType"),
        (wrong_type, VerifyError, "sin has type f32[7,7], its rule gives f32[2,32]"),
        (foreign_value, VerifyError, "is read but is not an input of the graph"),
        (lambda g: g.with_outputs(g.outputs[:1]), VerifyError, "changed the types of the outputs"),
        (lambda g: g.with_outputs(reversed(g.outputs)), VerifyError, "changed the types of the outputs"),
        (lambda g: Graph(g.inputs[:1], g.outputs[1:], g.builder), VerifyError, "changed the inputs"),
        (
            lambda g: Graph([*g.inputs, g.inputs[0]], g.outputs, g.builder),
            VerifyError,
            "two inputs are named",
        ),
    ],
)
def test_j30_a_graph_that_is_not_valid(how: Any, kind: Any, says: str, monkeypatch) -> None:
    error, text = run_misbehaving(how, monkeypatch)
    assert isinstance(error, kind)
    assert says in text


@pytest.mark.parametrize("name", ["inputs", "outputs", "builder"])
def test_j30_a_pass_cannot_change_its_input(name: str, monkeypatch) -> None:
    def change(graph: Graph) -> Graph:
        setattr(graph, name, ())
        return graph

    error, text = run_misbehaving(change, monkeypatch)
    assert isinstance(error, AttributeError)
    assert "immutable" in text
    for part in ("op", "inputs", "outputs", "origin"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(qg.jit(qg.exp).graph(X).nodes[-1], part, ())


class NegateTwice(qg.Rule):
    """Matches its own result."""

    def pattern(self, x: Any) -> Any:
        return qg.exp(x)

    def rewrite(self, m: Any, x: Any) -> Any:
        return qg.exp(-(-x))


class ToSquare(qg.Rule):
    def pattern(self, x: Any) -> Any:
        return qg.exp(x)

    def rewrite(self, m: Any, x: Any) -> Any:
        return qg.sin(x)


class ToExp(qg.Rule):
    def pattern(self, x: Any) -> Any:
        return qg.sin(x)

    def rewrite(self, m: Any, x: Any) -> Any:
        return qg.exp(x)


@pytest.mark.parametrize("rules", [(NegateTwice,), (ToSquare, ToExp)], ids=["grows", "cycles"])
def test_j30_rules_without_an_end_are_stopped(rules: Any, monkeypatch) -> None:
    error, text = run_misbehaving(None, monkeypatch, rules)
    assert isinstance(error, RuleError)
    assert "pass misbehaves does not come to an end; its last rewrites: " in text
    assert f"{rules[0].name} at exp" in text


def test_j30_a_misbehaving_pass_leaves_the_function_usable(monkeypatch) -> None:
    f = qg.JitFunction(lambda x: x + 1, qg.Pipeline((Misbehaves(),)), 256)
    monkeypatch.setattr(Misbehaves, "how", staticmethod(lambda graph: None))
    for _ in range(2):
        with pytest.raises(RuleError):
            f(X)
    monkeypatch.setattr(Misbehaves, "how", staticmethod(lambda graph: graph))
    assert f(X).tolist() == (X + 1).tolist()
    assert f.cache_info() == (0, 1, 256, 1)


# 31. A full cache.


@pytest.mark.parametrize("maxsize", [0, 1, 2])
def test_j31_results_of_programs_that_were_dropped_are_evaluated_afterwards(maxsize: int) -> None:
    w = weight()
    f = qg.jit(maxsize=maxsize)(lambda x: qg.silu(x @ w.T) + 0.5)
    f.warns = False
    waiting = [(n, f(mx.full((n, 64), 0.25))) for n in range(1, 9)]
    assert f.cache_info().currsize == min(maxsize, 8)
    expected = np.array(f.eager(mx.full((1, 64), 0.25)))
    for n, y in waiting:
        assert close(y, expected.repeat(n, 0), k=64)


def test_j31_threads_with_more_signatures_than_entries() -> None:
    w = weight()
    mx.eval(w.components())
    f = qg.jit(maxsize=2)(lambda x: qg.silu(x @ w.T))
    f.warns = False
    expected = np.array(f.eager(mx.full((1, 64), 0.5)))

    def work(number: int) -> Any:
        wrong = 0
        for i in range(12):
            n = 1 + (number + i) % 5
            wrong += not close(np.array(f(mx.full((n, 64), 0.5))), expected.repeat(n, 0), k=64)
        return wrong

    assert together([lambda n=n: work(n) for n in range(8)]) == [0] * 8
    assert f.cache_info().currsize == 2


def test_j31_a_program_that_is_dropped_while_it_runs(monkeypatch) -> None:
    f = qg.jit(maxsize=1)(lambda x: x + 1)
    original = f._entry

    def drop(*call: Any) -> Any:
        entry = original(*call)  # as it is found, before it runs
        if call[0][0] is X:
            f(mx.ones(3))  # takes the only place
            f.clear_cache()
            gc.collect()
        return entry

    monkeypatch.setattr(f, "_entry", drop)
    for _ in range(3):
        assert f(X).tolist() == (X + 1).tolist()


# 32. Three ways, and through the text.


def attention(x: Any, w: Any, wo: Any) -> Any:
    q = x @ w.T
    y = qg.softmax(q @ q.T * 0.125, axis=-1) @ q
    return qg.where(y > 0, y, 0.1 * y) @ wo, [y[..., :2].sum()]


def lora(x: Any, w: Any, a: Any, b: Any) -> Any:
    return qg.silu(x @ w.T + 2.0 * ((x @ a) @ b)), w


def embedding(ids: Any, w: Any) -> Any:
    x = qg.take(w, ids, axis=0)
    return qg.rms_norm(x, None, 1e-5) @ w.T


PROGRAMS = {
    "attention": (attention, lambda o: (normal(3, 64), weight(**o), normal(32, 8))),
    "lora": (lora, lambda o: (normal(3, 64), weight(**o), normal(64, 4), normal(4, 32))),
    "embedding": (embedding, lambda o: (mx.array([[1, 5, 31]]), weight(**o))),
    "elementwise": (lambda x: qg.exp(x) / (x * -0.0 + 1.5) - True, lambda o: (normal(3, 4),)),
}


@pytest.mark.parametrize("options", [{}, {"bits": 8, "group_size": 32}, {"mode": "mxfp4"}], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_j32_all_passes_no_pass_and_eager_agree_and_the_text_runs_bit_for_bit(
    name: str, options: Any
) -> None:
    body, make = PROGRAMS[name]
    args = make(options)
    f, off = qg.jit(body), qg.jit(pipeline="legalize")(body)
    graph = agree(f, *args)
    found = leaves_of(f(*args))
    for other in (off(*args), f.eager(*args)):
        for a, b in zip(found, leaves_of(other), strict=True):
            a, b = (qg.dequantize(y) if qg.is_quantized(y) else y for y in (a, b))
            assert close(a, b, k=64)
    again = parse_graph(str(graph))
    assert digest(again) == digest(graph)
    flat = stored(leaves_of(args))
    for a, b in zip(stored(found), Program(again).run(*flat), strict=True):
        assert np.array(a).tobytes() == np.array(b).tobytes()
