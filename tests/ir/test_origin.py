"""Provenance: where a node came from; and that unknown is said, not guessed."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.ir.origin import NOWHERE, UNKNOWN, Origin, Source, Step, merge_origins

X = mx.ones((2, 2))


def origins(function, *args) -> dict[str, Origin]:
    return {n.op.name: n.origin for n in qg.jit(function).graph(*args).nodes}


def helper(x):
    return qg.tanh(x)


def test_a_node_has_the_line_of_the_user_that_made_it() -> None:
    def f(x):
        y = qg.exp(x)
        return helper(
            y,
        )

    found = origins(f, X)
    first = f.__code__.co_firstlineno
    assert found["exp"].source.line == first + 1
    assert found["exp"].source.file == __file__
    assert found["exp"].source.text == "y = qg.exp(x)"
    assert found["tanh"].source.line == helper.__code__.co_firstlineno + 1
    assert found["tanh"].source.function == "helper"
    assert str(found["exp"].source) == f"test_origin.py:{first + 1}"


def test_operators_methods_and_composite_functions_have_the_users_line() -> None:
    def f(x):
        return (x @ x.T).sum() + qg.einsum("ij,jk->ik", x, x)[0]

    found = origins(f, X)
    line = f.__code__.co_firstlineno + 1
    assert {o.source.line for name, o in found.items() if name != "input"} == {line}


def test_a_statement_over_several_lines_points_at_the_line_of_the_call() -> None:
    def f(x):
        return qg.add(
            qg.exp(x),
            qg.sin(x),
        )

    found = origins(f, X)
    first = f.__code__.co_firstlineno
    assert (found["exp"].source.line, found["sin"].source.line) == (first + 2, first + 3)
    assert found["add"].source.line == first + 1


def test_scopes_nest_and_end() -> None:
    def f(x):
        with qg.scope("layers.3"):
            x = qg.exp(x)
            with qg.scope("attn"):
                x = qg.sin(x)
            x = qg.cos(x)
        return qg.tanh(x)

    found = {name: o.scope for name, o in origins(f, X).items()}
    assert found == {"input": "", "exp": "layers.3", "sin": "layers.3.attn", "cos": "layers.3", "tanh": ""}


def test_a_scope_ends_when_an_exception_leaves_it() -> None:
    def f(x):
        try:
            with qg.scope("broken"):
                raise ValueError
        except ValueError:
            return qg.exp(x)

    assert origins(f, X)["exp"].scope == ""


def test_code_without_a_file_is_the_users_too() -> None:
    namespace = {"qg": qg}
    exec("def f(x):\n    return qg.exp(x)", namespace)
    source = origins(namespace["f"], X)["exp"].source
    assert str(source) == "<string>:2"
    assert source.sentence() == "<string>:2 in f"


def test_an_unknown_origin_says_so() -> None:
    assert not UNKNOWN.known
    assert str(UNKNOWN) == UNKNOWN.sentence() == "unknown line"
    assert NOWHERE.source is UNKNOWN
    assert (UNKNOWN.line, UNKNOWN.file, UNKNOWN.text) == (0, "", "")


def test_a_rewrite_keeps_all_lines_the_common_scope_and_adds_a_step() -> None:
    a, b = Source(helper.__code__, 0), Source(helper.__code__, 2)
    step = Step("fuse-lora", "lora-branch", 7)
    old = Step("quantize-dot", "right-operand", 3)
    merged = merge_origins(
        [Origin((a,), "layers.3.attn.q", (old,)), Origin((b, a), "layers.3.attn.k", (old,)), Origin((), "")],
        step,
    )
    assert merged == Origin((a, b), "layers.3.attn", (old, step))
    assert str(step) == "fuse-lora#7"


@pytest.mark.parametrize(
    ("scopes", "common"), [(["a.b", "a.c"], "a"), (["a", "b"], ""), (["layers.1", "layers.10"], "layers")]
)
def test_common_scopes_are_whole_parts(scopes: list[str], common: str) -> None:
    assert merge_origins([Origin(scope=s) for s in scopes], Step("p", "r", 1)).scope == common


def test_a_quantized_product_knows_the_line_and_the_rewrites_that_made_it() -> None:
    def f(x, w):
        return x @ w.T

    w = qg.quantize(mx.ones((8, 64)))
    node = qg.jit(f).optimized(mx.ones((1, 64)), w).find("quantized_matmul")[0]
    assert node.origin.source.line == f.__code__.co_firstlineno + 1
    steps = [(s.pass_name, s.rule) for s in node.origin.steps]
    chosen = [("legalize", "quantized_matmul")] if node.op.kernel else []
    assert steps == [("quantize-dot", "right-operand"), *chosen]


def test_equal_nodes_keep_the_first_line() -> None:
    def f(x):
        a = qg.exp(x)
        return a + qg.exp(x)

    assert origins(f, X)["exp"].source.line == f.__code__.co_firstlineno + 1
