"""The summary's numbers, checked by hand; and its two forms."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.inspector import summarize
from qgraph.inspector.layers import collapsed, inside
from qgraph.rewrite import DEFAULT, Context, Pipeline
from tests.inspector.programs import layers, layers_arguments, quantized


def summary_of(function, *args):
    return summarize(qg.jit(function).result(*args))


def summary_on_cpu(function, *args, native):
    context = Context(device="cpu", native=native)
    return summarize(Pipeline.parse(DEFAULT).run(qg.jit(function).graph(*args), context))


def small(x, w):
    return (-(x @ w.T)).astype(mx.float16)


def test_histogram_bytes_flops_and_casts_of_a_small_program() -> None:
    w = quantized(32, 64)
    s = summary_on_cpu(small, mx.ones((2, 64)), w, native=False)
    assert {(c.op, c.before, c.after, c.change) for c in s.ops} == {
        ("quantized_matmul", 0, 1, 1),
        ("dot", 1, 0, -1),
        ("transpose", 1, 0, -1),
        ("negative", 1, 1, 0),
        ("cast", 1, 1, 0),
    }
    assert s.nodes == (4, 3)
    x_bytes = 2 * 64 * 4
    assert s.weight_bytes == w.nbytes + x_bytes
    assert s.unpacked_bytes == 32 * 64 * 4 + x_bytes
    results = 2 * 32 * (4 + 4 + 2)  # dot, negative, cast
    assert s.activation_bytes == (results, results)
    assert s.flops == (2 * 2 * 32 * 64 + 2 * (2 * 32),) * 2
    assert s.casts == (1, 1)
    assert s.sites == (("quantized_matmul", 1),)
    assert s.missed == ()


def test_what_one_kernel_computes_is_one_op_without_results_in_between() -> None:
    s = summary_on_cpu(small, mx.ones((2, 64)), quantized(32, 64), native=True)
    assert {c.op for c in s.ops if c.after} == {"quantized_matmul", "elementwise"}
    assert s.activation_bytes == (2 * 32 * (4 + 4 + 2), 2 * 32 * (4 + 2))
    assert s.flops == (2 * 2 * 32 * 64 + 2 * (2 * 32),) * 2
    assert s.casts == (1, 0)


def test_layers_that_are_alike_are_one_line() -> None:
    s = summarize(layers.result(*layers_arguments()))
    assert dict(s.sites) == {"quantized_matmul": 3, "dequantize": 3}
    assert [(m.count, m.where.partition(" in ")[2]) for m in s.missed] == [(3, "layers.*")]
    assert "cuts groups of 64" in s.missed[0].reasons[0]
    assert "3 × dot at programs.py:" in str(s)


def test_unpacking_shows_as_activations() -> None:
    graph = layers.graph(*layers_arguments())
    s = summarize(Pipeline.parse("quantize-dot,legalize").run(graph))
    assert s.activation_bytes[1] - s.activation_bytes[0] == 3 * 64 * 64 * 4


def test_rules_that_never_fired_and_the_time_of_every_pass() -> None:
    result = layers.result(*layers_arguments())
    s = summarize(result)
    unused = dict(s.unused_rules)
    assert "right-operand" not in unused
    assert unused["both-operands"] > 0
    assert [p.name for p in s.passes] == [stage.name for stage in result.history]
    assert all(p.milliseconds >= 0 for p in s.passes)
    assert {p.name for p in s.passes if p.changed} >= {"quantize-dot", "legalize"}


def test_the_text_is_aligned_and_the_json_has_everything() -> None:
    s = summarize(layers.result(*layers_arguments()))
    lines = str(s).splitlines()
    table = lines[: lines.index("")]
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["op", "before", "after", "change"]
    loaded = json.loads(s.to_json())
    assert loaded["flops"] == list(s.flops)
    assert loaded["missed"][0]["count"] == 3
    assert {c["op"]: c["after"] for c in loaded["ops"]}["quantized_matmul"] == 3


def test_a_graph_that_does_nothing_has_a_summary() -> None:
    s = summary_of(lambda x: x, mx.ones(3))
    assert s.ops == ()
    assert "left unquantized   none" in str(s)


def model(x, buffer, w):
    with qg.scope("embed"):
        x = x + 1.0
    for n in range(5):
        with qg.scope(f"layers.{n}.mlp"):
            x = qg.silu(x @ w.T) if n != 2 else qg.exp(x @ w.T)
    return x, qg.slice_update(buffer, x[None], mx.array([3]), (1,))


def test_layers_that_run_the_same_ops_are_one_line() -> None:
    s = summary_of(model, mx.ones((1, 64)), mx.zeros((1, 8, 64)), quantized(64, 64))
    dot, silu = ("quantized_matmul", 1), (("quantized_matmul", 1), ("silu", 1))
    assert [(m.where, m.count, m.ops) for m in s.modules] == [
        ("embed", 1, (("add", 1),)),
        ("layers.0–1,3–4", 4, silu),
        ("layers.2", 1, (("exp", 1), dot)),
        ("", 1, (("slice_update", 1),)),
    ]
    lines = str(s).splitlines()
    assert "layers.0–1,3–4 (4 alike)  quantized_matmul, silu" in lines
    assert "no module                 slice_update" in lines
    assert json.loads(s.to_json())["modules"][0] == {"where": "embed", "count": 1, "ops": [["add", 1]]}


def test_long_lists_of_ops_are_wrapped_between_ops() -> None:
    names = ["square", "arcsinh", "arctan", "sigmoid", "log1p", "expm1", "negative", "floor"]
    functions = [getattr(qg, name) for name in names]

    def deep(x):
        with qg.scope("block"):
            for f in functions:
                x = f(f(x)) + f(f(f(x)))
        return x

    lines = str(summary_of(deep, mx.ones(3))).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("block"))
    assert max(map(len, lines[start : lines.index("", start)])) <= 110
    assert lines[start + 1] == "        3 × square"


def test_what_is_written_into_is_no_weight() -> None:
    x, buffer, w = mx.ones((1, 64)), mx.zeros((1, 8, 64)), quantized(64, 64)
    s = summary_of(model, x, buffer, w)
    assert (s.weight_bytes, s.state_bytes) == (w.nbytes + x.nbytes, buffer.nbytes)
    assert "caches             2.0 kB" in str(s)
    assert "caches" not in str(summary_of(lambda x: x, mx.ones(3)))


def test_a_graph_without_modules_has_no_such_lines() -> None:
    s = summary_of(lambda x: -x, mx.ones(3))
    assert s.modules == ()
    assert "module" not in str(s)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers.12.attn.dot.3", "layers.*.attn.dot.*"),
        ("dot at model.py:88 in layers.3", "dot at model.py:88 in layers.*"),
        ("1.5 of f32[2,3]", "1.5 of f32[2,3]"),
        ("", ""),
    ],
)
def test_the_numbers_of_layers_collapse_and_others_stay(text: str, expected: str) -> None:
    assert collapsed(text) == expected


def test_scopes_by_name_and_by_pattern() -> None:
    assert inside("layers.3.attn", "layers.3")
    assert inside("model.layers.3.attn", "layers.3")
    assert not inside("mylayers.3", "layers.3")
    assert inside("layers.3.attn", "layers.*.attn")
    assert inside("anything", "")
    assert not inside("layers.31", "layers.3")
    assert not inside("", "layers")
