"""`qg.inspect`, and why and why not."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph import RuleError
from qgraph.inspector import inspect
from tests.agree import ops
from tests.inspector.programs import adapter, adapter_arguments, layers, layers_arguments, quantized


def test_inspect_takes_jitted_and_plain_functions() -> None:
    def plain(x, w):
        return x @ w.T

    args = mx.ones((1, 64)), quantized(32, 64)
    for function in (plain, qg.jit(plain)):
        found = inspect(function, *args)
        assert found.report().counts() == {"quantized_matmul": 1}
        assert found.graph().histogram() == {"quantized_matmul": 1}
        assert found.graph("trace").histogram() == {"dot": 1, "transpose": 1}
        assert found.dump(after="trace") == str(found.graph("trace"))
        assert str(found.summary()) == repr(found)
    with pytest.raises(qg.QGraphError, match="cannot inspect a int"):
        inspect(3)


def test_inspect_does_not_run_the_function() -> None:
    huge = mx.broadcast_to(mx.array(1.0), (1 << 25, 1 << 25))
    assert ops(inspect(lambda x: qg.sum(qg.exp(x)), huge).graph()) == {"exp": 1, "sum": 1}


def test_a_pass_that_did_not_run_is_refused_with_those_that_did() -> None:
    with pytest.raises(RuleError, match="no pass 'nosuch' ran") as info:
        inspect(layers, *layers_arguments()).graph("nosuch")
    assert "trace, canonicalize" in str(info.value)


def test_why_lists_the_unpacked_uses_first_and_layers_once() -> None:
    lines = inspect(layers, *layers_arguments()).why().splitlines()
    assert lines[0] == "6 uses of quantized values: 3 × quantized_matmul, 3 × dequantize"
    assert re.fullmatch(r"3 × dot at programs\.py:\d+ in layers\.\* → dequantize", lines[1])
    assert "cuts groups of 64" in lines[2]
    assert re.fullmatch(r"3 × dot at programs\.py:\d+ in layers\.\* → quantized_matmul", lines[-1])


def test_why_in_one_scope() -> None:
    found = inspect(layers, *layers_arguments())
    one = found.why(scope="layers.1")
    assert one.splitlines()[0].startswith("2 uses")
    assert "in layers.1 → dequantize" in one
    assert found.why(scope="head") == "no operation in head reads a quantized value"
    assert inspect(lambda x: x, mx.ones(2)).why() == "no operation reads a quantized value"


def test_why_a_rule_did_not_fire_names_node_line_and_reason() -> None:
    text = inspect(adapter, *adapter_arguments()).why("fuse-lora")
    pattern = (
        r"lora-branch did not fire at %layers\.3\.attn\.add \(programs\.py:\d+, layers\.3\.attn\) — "
        r"matched \d of \d nodes: .*x is already another value"
    )
    assert re.search(pattern, text), text
    assert re.search(r"at %other: f32\[2,64\]", text), text


def test_why_a_rule_that_fired() -> None:
    text = inspect(adapter, *adapter_arguments()).why("right-operand")
    assert text.startswith("right-operand fired 1 times")


def test_why_of_a_rule_that_had_nothing_to_do() -> None:
    text = inspect(lambda x: qg.exp(x), mx.ones(2)).why("quantize-take")
    assert text == "take-rows was never tried: no node of the graph is one that it starts from"


def test_why_of_an_unknown_rule_lists_those_there_are() -> None:
    with pytest.raises(RuleError, match="no rule or pass is named 'fuse-lore'") as info:
        inspect(adapter, *adapter_arguments()).why("fuse-lore")
    assert "fuse-lora" in str(info.value)
    assert "right-operand" in str(info.value)


def test_misses_in_other_scopes_are_left_out() -> None:
    found = inspect(adapter, *adapter_arguments())
    assert "did not fire" not in found.why("lora-branch", scope="layers.4")
    assert "did not fire" in found.why("lora-branch", scope="layers.*")
