"""Judged: mlx-lm's architectures through `qg.optimize`. CI runs a spread of them, `-m zoo` the others."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from tests.zoo.build import PROMPT, build, generate
from tests.zoo.configs import ABSENT, architectures
from tests.zoo.quantize import NO_PEER, by_layers, by_weights, weights_of
from tests.zoo.survey import LISTED, PARTS

pytestmark = pytest.mark.slow

# One or more of every kind: plain, tied, mixtures of experts, latent attention, windows, chunks, state
# spaces, convolutions, linear attention, shared and reused keys, multimodal, packed by its own checkpoint.
SPREAD = [
    "afm7",
    "apertus",
    "bailing_hybrid",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "rwkv7",
    "falcon_h1",
    "gemma3",
    "gemma3n",
    "gpt2",
    "gpt_oss",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2",
    "llama",
    "llama4",
    "longcat_flash_ngram",
    "mamba2",
    "minimax_m3_vl",
    "mixtral",
    "nemotron_h",
    "openelm",
    "phi3",
    "phixtral",
    "prism_hadamard_qwen35",
    "qwen3",
    "qwen3_5_moe",
    "qwen3_moe",
    "seed_oss",
]

HERE = [name for name in architectures() if name not in ABSENT]
ZOO = [pytest.param(name, marks=() if name in SPREAD else pytest.mark.zoo) for name in HERE]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ZOO)
def test_an_architecture_runs_or_is_listed_with_the_reason(name, part):
    problem = PARTS[part](name).problem
    if (name, part) in LISTED:
        assert problem, "it runs: take it off the list"
    else:
        assert not problem


def test_the_spread_is_of_thirty_that_are_here():
    assert len(SPREAD) == len(set(SPREAD)) == 30
    assert set(SPREAD) <= set(HERE)


def test_nearly_all_of_the_zoo_runs():
    listed = {part: sum(1 for _, p in LISTED if p == part) for part in PARTS}
    assert len(HERE) - listed["dense"] >= 100
    assert len(HERE) - listed["quantized"] >= 98


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_experts_stay_packed(name):
    weights = weights_of(name, by_layers(name))
    stacks = sum(1 for weight in weights.values() if len(weight.shape) == 3)
    ops = qg.optimize(by_weights(name, weights)).qgraph.optimized(mx.array([PROMPT])).histogram()
    assert stacks > 0
    assert ops["gather_qmm"] == stacks
    assert not {"gather_mm", "dequantize"} & set(ops)


@pytest.mark.parametrize("name", ["llama", "cohere", "seed_oss"])
def test_a_tied_head_and_its_embedding_are_one_packed_buffer(name):
    weights = weights_of(name, None if name in NO_PEER else by_layers(name))
    graph = qg.optimize(by_weights(name, weights)).qgraph.optimized(mx.array([PROMPT]))
    (table,) = (v for v in graph.inputs if "embed" in v.op.label)
    assert table.type.packing
    readers = {node.op.name for node in graph.nodes if table in node.inputs}
    assert readers == {"quantized_take", "quantized_matmul"}


def test_what_cannot_be_captured_runs_as_it_is_when_that_is_asked_for():
    expected, _ = generate(build("dbrx"))
    with pytest.raises(qg.TraceError, match=r"transformer\.blocks\.0\.ffn"):
        generate(qg.optimize(build("dbrx")))
    fast = qg.optimize(build("dbrx"), fallback=True)
    with pytest.warns(UserWarning, match="runs without qgraph") as said:
        found, _ = generate(fast)
    assert found == expected
    assert len(said) == 1
