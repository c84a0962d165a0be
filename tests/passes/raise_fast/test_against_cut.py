"""Raising what MLX wrote out gives what a capture that kept it whole gives; `tests/zoo` asks all models."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from tests.agree import assert_close
from tests.passes.raise_fast.raised import PIPELINE, written_out
from tests.zoo.build import PROMPT, build, caches, generate

SPREAD = [
    "cohere",  # pairs of neighbours, layer norms
    "deepseek_v2",  # latent attention, given frequencies, pairs on a slice
    "gemma3_text",  # 1 + w, windows
    "gpt2",
    "gpt_oss",  # sinks
    "llama",
    "llama4",  # chunks
    "mixtral",
    "phi3",
    "qwen3",
    "qwen3_moe",
    "stablelm",  # some of the features turned
]
WHOLE = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
WRITTEN_OUT = ("rsqrt", "cos", "sin", "right_shift")


def captures(name):
    """The two captures of a model, optimized: (model written out, model kept whole)."""
    model, x = build(name), mx.array([PROMPT])
    kept = qg.optimize(model, pipeline=PIPELINE)
    whole = (kept.qgraph.result(x), kept(x))
    with written_out():
        plain = qg.optimize(model, pipeline=PIPELINE)
        return (plain.qgraph.result(x), plain(x)), whole


@pytest.mark.parametrize("name", SPREAD)
def test_raising_the_plain_capture_gives_what_the_cut_capture_gives(name):
    (plain, found), (whole, expected) = captures(name)
    assert_close(found, expected, path="model", about=name)
    counts, kept = (r.after("raise-fast").histogram() for r in (plain, whole))
    differing = {
        op: (counts.get(op, 0), kept.get(op, 0)) for op in WHOLE if counts.get(op, 0) != kept.get(op, 0)
    }
    assert not differing
    for op in WRITTEN_OUT:  # nothing of the written out forms is left that a whole capture does not have
        assert counts.get(op, 0) <= kept.get(op, 0), op


def test_the_plain_capture_is_written_out():
    with written_out():
        graph = qg.optimize(build("qwen3")).qgraph.graph(mx.array([PROMPT]))
    assert not set(graph.histogram()) & set(WHOLE)


def step_after_a_prompt(model):
    """The ops of a step of decoding after raising."""
    fast, cache = qg.optimize(model, pipeline=PIPELINE), caches(model)
    mx.eval(fast(mx.array([PROMPT]), cache=cache))
    counts = fast.qgraph.result(mx.array([[3]]), cache=cache).after("raise-fast").histogram()
    return {op: counts.get(op, 0) for op in (*WHOLE, *WRITTEN_OUT)}


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "gemma3_text"])
def test_a_step_of_decoding_is_raised_too(name):
    """Offsets are arrays there, and masks depend on them."""
    model = build(name)
    tokens, rows = generate(model, steps=3)
    with written_out():
        found, logits = generate(qg.optimize(model, pipeline=PIPELINE), steps=3)
        counts = step_after_a_prompt(model)
    assert found == tokens
    for a, b in zip(logits, rows, strict=True):
        assert_close(a, b, path="model", about=name)
    assert counts == step_after_a_prompt(model)
    assert all(counts[op] for op in ("rms_norm", "rope", "scaled_dot_product_attention"))
