"""The Rule API: what the author of a rule may rely on."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.rewrite import Context
from qgraph.rewrite.driver import apply_rules
from tests.agree import normal, ops


def graph_of(f, *args):
    return qg.jit(f).graph(*args)


def apply(graph, *rules, **options):
    context = Context(**options)
    return apply_rules(graph, rules, "test", context), context


class DoubleNegation(qg.Rule):
    def pattern(self, x):
        return -(-x)

    def rewrite(self, m, x):
        return x


def test_a_rule_is_pattern_and_rewrite():
    after, context = apply(graph_of(lambda x: qg.exp(-(-x)), normal(3)), DoubleNegation())
    assert ops(after) == {"exp": 1}
    assert context.of("double-negation").applied == 1


def test_rules_apply_until_none_fires():
    after, context = apply(graph_of(lambda x: -(-(-(-(-x)))), normal(3)), DoubleNegation())
    assert ops(after) == {"negative": 1}
    assert context.ordinal == 2


def test_the_graph_given_is_not_changed():
    graph = graph_of(lambda x: -(-x), normal(3))
    before = str(graph)
    apply(graph, DoubleNegation())
    assert str(graph) == before


def test_commutative_operands_match_in_both_orders():
    class FindsExpTimes(qg.Rule):
        def pattern(self, x, y):
            return qg.exp(x) * y + 1.0

        def rewrite(self, m, x, y):
            return qg.sin(y)

    for f in (
        lambda x, y: qg.exp(x) * y + 1.0,
        lambda x, y: y * qg.exp(x) + 1.0,
        lambda x, y: 1.0 + qg.exp(x) * y,
        lambda x, y: 1 + y * qg.exp(x),
    ):
        assert ops(apply(graph_of(f, normal(3), normal(3)), FindsExpTimes())[0]) == {"sin": 1}


def test_backtracking_finds_the_operand_order_that_fits_a_repeated_variable():
    class Square(qg.Rule):
        def pattern(self, x, y):
            return qg.exp(x) * y + x

        def rewrite(self, m, x, y):
            return x

    f = lambda x, y: qg.exp(x) * qg.exp(y) + y  # noqa: E731  (exp(y) must be the one that binds)
    after, _ = apply(graph_of(f, normal(3), normal(3)), Square())
    assert ops(after) == {}


def test_the_same_operand_twice_matches_the_same_variable():
    class Twice(qg.Rule):
        def pattern(self, x):
            return x + x

        def rewrite(self, m, x):
            return qg.sin(x)

    assert ops(apply(graph_of(lambda x: x + x, normal(3)), Twice())[0]) == {"sin": 1}
    assert ops(apply(graph_of(lambda x, y: x + y, normal(3), normal(3)), Twice())[0]) == {"add": 1}


def test_keywords_in_a_pattern_must_give_the_same_op():
    class LastAxis(qg.Rule):
        def pattern(self, x):
            return qg.sum(x, axis=-1)

        def rewrite(self, m, x):
            return qg.max(x, axis=-1)

    after, _ = apply(graph_of(lambda x: (qg.sum(x, 1), qg.sum(x, 0)), normal(3, 3)), LastAxis())
    assert ops(after) == {"max": 1, "sum": 1}


class ExpOfSum(qg.Rule):
    def pattern(self, x, y):
        return qg.exp((x + y).named("sum"))

    def check(self, m, x, y):
        m.require(x.ndim == 2, f"x has {x.ndim} axes, expected 2", x)

    def rewrite(self, m, x, y):
        return qg.exp(x) * qg.exp(y)


def test_a_refusal_keeps_its_reason_and_its_node():
    graph = graph_of(lambda x, y: qg.exp(x + y), normal(3), normal(3))
    after, context = apply(graph, ExpOfSum())
    assert after is graph
    [miss] = context.misses.values()
    assert miss.reason == "x has 1 axes, expected 2"
    assert context.of("exp-of-sum").refused == 1


def test_the_nearest_miss_says_what_was_expected_and_found():
    graph = graph_of(lambda x, y: qg.exp(x * y), normal(3), normal(3))
    _, context = apply(graph, ExpOfSum())
    [miss] = context.misses.values()
    assert "expected add, found multiply" in miss.text(graph)
    assert "test_rules.py:" in miss.text(graph)
    assert (miss.matched, miss.total) == (1, 2)


def test_a_foreign_user_refuses_and_recompute_allows():
    class Recompute(ExpOfSum):
        shared = "recompute"

    def f(x, y):
        total = x + y
        return qg.exp(total), qg.sin(total)

    args = normal(2, 3), normal(2, 3)
    after, context = apply(graph_of(f, *args), ExpOfSum())
    assert "multiply" not in ops(after)
    assert "sum has a foreign user: sin (test_rules.py:" in next(iter(context.misses.values())).reason
    assert ops(apply(graph_of(f, *args), Recompute())[0]) == {"add": 1, "exp": 2, "multiply": 1, "sin": 1}


def test_a_shared_view_does_not_refuse():
    class DotOfTranspose(qg.Rule):
        def pattern(self, x, w):
            return qg.dot(x, qg.transpose(w))

        def rewrite(self, m, x, w):
            return qg.einsum("ab,cb->ac", x, w)

    def f(x, w):
        wt = w.T
        return qg.sin(x @ wt), qg.cos((x + 1.0) @ wt)

    _, context = apply(graph_of(f, normal(2, 3), normal(4, 3)), DotOfTranspose(), fuel=2)
    assert context.of("dot-of-transpose").refused == 0
    assert context.of("dot-of-transpose").candidates >= 2


def test_through_looks_past_a_cast_and_must_ask_for_it():
    class Keeps(qg.Rule):
        through = ("cast",)

        def pattern(self, x):
            return qg.exp(qg.sin(x).named("inner"))

        def rewrite(self, m, x):
            [cast] = m.skipped("inner")
            return qg.cos(x).astype(cast.dtype.mlx)

    class Forgets(Keeps):
        def rewrite(self, m, x):
            return qg.cos(x).astype(mx.float32)

    graph = graph_of(lambda x: qg.exp(qg.sin(x).astype(mx.float32)), normal(3, dtype=mx.bfloat16))
    assert ops(apply(graph, Keeps())[0]) == {"cos": 1, "cast": 1}
    with pytest.raises(qg.RuleError, match=r"looked through cast.* and did not use it"):
        apply(graph, Forgets())


def test_another_type_than_the_replaced_one_is_an_error_that_names_both():
    class Wrong(DoubleNegation):
        def rewrite(self, m, x):
            return x.astype(mx.float16)

    with pytest.raises(qg.RuleError, match=r"replaces a f32\[3\] by a f16\[3\]") as error:
        apply(graph_of(lambda x: -(-x), normal(3)), Wrong())
    assert "test_rules.py:" in str(error.value)


def test_two_rules_that_undo_each_other_end_in_an_error_that_names_them():
    class There(qg.Rule):
        def pattern(self, x):
            return qg.sin(x)

        def rewrite(self, m, x):
            return qg.cos(x)

    class Back(qg.Rule):
        def pattern(self, x):
            return qg.cos(x)

        def rewrite(self, m, x):
            return qg.sin(x)

    with pytest.raises(qg.RuleError, match=r"does not come to an end.*there at sin.*back at cos"):
        apply(graph_of(lambda x: qg.sin(x), normal(3)), There(), Back())


def test_a_rule_that_returns_what_it_matched_did_not_match():
    class Same(qg.Rule):
        def pattern(self, x):
            return qg.sin(x)

        def rewrite(self, m, x):
            return qg.sin(x)

    graph = graph_of(lambda x: qg.sin(x), normal(3))
    after, context = apply(graph, Same())
    assert after is graph
    assert context.ordinal == 0


@pytest.mark.parametrize(("fuel", "left"), [(0, 4), (1, 3), (2, 2), (None, 0)])
def test_fuel_stops_after_the_nth_rewrite(fuel, left):
    class SinToCos(qg.Rule):
        def pattern(self, x):
            return qg.sin(x)

        def rewrite(self, m, x):
            return qg.cos(x)

    f = lambda x: tuple(qg.sin(x * float(i)) for i in range(2, 6))  # noqa: E731
    after, context = apply(graph_of(f, normal(3)), SinToCos(), fuel=fuel)
    assert ops(after).get("sin", 0) == left
    assert context.ordinal == 4 - left


def test_new_nodes_know_their_lines_their_scope_and_the_rewrite():
    def f(x):
        with qg.scope("layers.1.mlp"):
            y = -x
        with qg.scope("layers.1.attn"):
            return qg.exp(-y)

    class NegNeg(qg.Rule):
        def pattern(self, x):
            return qg.exp(-(-x))

        def rewrite(self, m, x):
            return qg.exp(x)

    after, _ = apply(graph_of(f, normal(3)), NegNeg())
    [node] = after.find("exp")
    assert node.origin.scope == "layers.1"
    assert len(node.origin.sources) == 3
    assert [str(s) for s in node.origin.steps] == ["test#1"]


def test_any_of_matches_either_form():
    class Either(qg.Rule):
        def pattern(self, x):
            return qg.exp(qg.any_of(qg.sin(x), qg.cos(x)))

        def rewrite(self, m, x):
            return qg.tan(x)

    assert ops(
        apply(graph_of(lambda x: (qg.exp(qg.sin(x)), qg.exp(qg.cos(x + 1))), normal(3)), Either())[0]
    ) == {
        "tan": 2,
        "add": 1,
    }


def test_hints_match_quantized_values_and_single_numbers_only():
    class Hinted(qg.Rule):
        def pattern(self, x, w: qg.Quantized, s: qg.Scalar):
            return s * qg.dot(x, w)

        def rewrite(self, m, x, w, s):
            return qg.dot(x, w) * s * 1.5

    w = qg.quantize(normal(64, 32), group_size=32)
    f = lambda x, w, s: s * (x @ w)  # noqa: E731
    for args, fires in [
        ((normal(2, 64), w, mx.array(2.0)), True),
        ((normal(2, 64), normal(64, 32), mx.array(2.0)), False),
        ((normal(2, 64), w, normal(32)), False),
    ]:
        _, context = apply(graph_of(f, *args), Hinted(), fuel=1)
        assert context.ordinal == fires


def test_a_pattern_that_needs_shapes_says_so():
    class Shaped(qg.Rule):
        def pattern(self, x):
            return qg.swapaxes(x, 0, 1)

        def rewrite(self, m, x):
            return x

    with pytest.raises(qg.RuleError, match="is part of a pattern: it has no shape yet"):
        apply(graph_of(lambda x: x.T, normal(2, 3)), Shaped())


def test_a_cast_of_what_a_variable_matches_may_be_shared():
    class SinAndCos(qg.Rule):
        through = ("cast",)

        def pattern(self, x):
            return qg.sin(x) + qg.cos(x)

        def rewrite(self, m, x):
            assert {op.dtype for op in m.all_skipped()} == {m.type.dtype}
            return qg.tan(x).astype(m.type.dtype.mlx)

    def shared_below(x):
        wide = x.astype(mx.float32)
        return qg.sin(x).astype(mx.float32) + qg.cos(wide), qg.exp(wide)

    def shared_inside(x):
        sine = qg.sin(x).astype(mx.float32)
        return sine + qg.cos(x.astype(mx.float32)), qg.exp(sine)

    x = normal(3).astype(mx.float16)
    after, _ = apply(graph_of(shared_below, x), SinAndCos())
    assert ops(after) == {"cast": 2, "exp": 1, "tan": 1}
    assert "tan" not in ops(apply(graph_of(shared_inside, x), SinAndCos())[0])
