"""Qwen3 in plain qg code through `qg.jit`: mlx-lm's logits, and every projection on packed words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.quant import load_adapter, merge_adapter
from qgraph_examples import qwen3
from tests.agree import assert_close
from tests.lm.peer import MEDIUM, TINY, Peer, mixed, write, write_adapter

PROMPT = [3, 41, 17, 88, 5, 60, 22, 9, 71, 33, 50]
LAYERS = MEDIUM["num_hidden_layers"]
CASES: dict[str, dict[str, Any]] = {
    "dense": {"size": TINY, "tied": False},
    "4bit": {"size": MEDIUM, "quantization": {"bits": 4}},
    "mixed": {"size": MEDIUM, "tied": False, "quantization": {"bits": 4, "quant_predicate": mixed}},
    "mxfp4": {"size": MEDIUM, "quantization": {"mode": "mxfp4"}},
}


class Plain:
    """The example's step and fill, with the tree of a checkpoint."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        self.config = qwen3.Config.from_dict(qg.load_config(folder))
        self.params = qg.load(folder)
        if adapter is not None:
            self.params = merge_adapter(self.params, load_adapter(adapter))
        self.step = qg.jit(lambda p, t, kv, at: qwen3.forward(p, t, kv, at, self.config))
        self.fill = qg.jit(lambda p, t, kv, at: qwen3.backbone(p, t, kv, at, self.config)[1])

    def arguments(self, length: int, dtype: mx.Dtype = mx.float32) -> tuple[Any, ...]:
        cache = qwen3.make_cache(self.config, 1, 64, dtype)
        return self.params, mx.zeros((1, length), mx.uint32), cache, mx.array(0)

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
        cache = qwen3.make_cache(self.config, 1, 64, mx.float32)
        step, offset, tokens, rows = mx.array([prompt], mx.uint32), 0, list[int](), []
        for _ in range(count):
            logits, cache = self.step(self.params, step, cache, mx.array(offset))
            offset += step.shape[1]
            rows.append(np.array(logits[0, -1]))
            tokens.append(int(rows[-1].argmax()))
            step = mx.array([[tokens[-1]]], mx.uint32)
        return tokens, np.stack(rows)


def assert_same(plain: Plain, peer: Peer, count: int) -> None:
    tokens, logits = plain.greedy(PROMPT, count)
    expected_tokens, expected_logits = peer.greedy(PROMPT, count)
    assert tokens == expected_tokens
    assert_close(logits, expected_logits, path="model")
    assert plain.step.cache_info().misses == 2, "a prompt, and the tokens after it"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens_equal_mlx_lms(case: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", **CASES[case])
    assert_same(Plain(folder), Peer(folder), 24)


@pytest.mark.parametrize("quantization", [None, {"bits": 4}], ids=["dense", "4bit"])
def test_lora_equals_mlx_lm(tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    folder = write(tmp_path / "model", MEDIUM, quantization=quantization)
    adapter = write_adapter(tmp_path / "adapter", folder, layers=3)
    assert_same(Plain(folder, adapter), Peer(folder, adapter), 12)


def test_it_runs_without_the_compiler_too(tmp_path: Path) -> None:
    plain = Plain(write(tmp_path / "model", quantization={"bits": 4}))
    compiled, eager = plain.step(*plain.arguments(4))[0], plain.step.eager(*plain.arguments(4))[0]
    assert compiled.shape == eager.shape == (1, 4, 96)
    assert_close(compiled, np.array(eager), path="model")


@pytest.mark.parametrize("length", [1, 7], ids=["decode", "prefill"])
def test_every_projection_the_embedding_and_the_head_are_quantized(tmp_path: Path, length: int) -> None:
    plain = Plain(write(tmp_path / "model", MEDIUM, quantization={"bits": 4}))
    result = plain.step.result(*plain.arguments(length))
    before, after = result.before.histogram(), result.graph.histogram()
    assert (before["dot"], before["take"]) == (7 * LAYERS + 1, 1)
    assert (after["quantized_matmul"], after["quantized_take"]) == (7 * LAYERS + 1, 1)
    assert not {"dot", "take", "dequantize"} & set(after)
    projections = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    projections += "mlp.gate_proj mlp.up_proj mlp.down_proj"
    wanted = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in projections.split()]
    assert {site.scope for site in result.report} == {"model.embed_tokens", *wanted}
    assert result.report.missed == ()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_lora_is_one_op_with_its_base(tmp_path: Path, dtype: mx.Dtype) -> None:
    folder = write(tmp_path / "model", MEDIUM, quantization={"bits": 4}, dtype=dtype)
    plain = Plain(folder, write_adapter(tmp_path / "adapter", folder, layers=2))
    after = plain.step.optimized(*plain.arguments(1, dtype)).histogram()
    assert after["quantized_lora_matmul"] == 7 * 2
    assert after["quantized_matmul"] == 7 * (LAYERS - 2) + 1
    assert not {"dot", "dequantize"} & set(after)


def test_filling_the_cache_leaves_out_what_only_logits_need(tmp_path: Path) -> None:
    plain = Plain(write(tmp_path / "model", MEDIUM, quantization={"bits": 4}))
    keys_and_values_of_the_last_layer = 2
    matmuls = plain.fill.optimized(*plain.arguments(5)).histogram()["quantized_matmul"]
    assert matmuls == 7 * (LAYERS - 1) + keys_and_values_of_the_last_layer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": None}, "head_dim missing or no number"),
        ({"num_hidden_layers": True}, "num_hidden_layers missing or no number"),
        ({"rope_theta": "x"}, "rope_theta missing or no number"),
        ({"rope_scaling": "linear"}, "rope_scaling '?' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling 'yarn' is not supported"),
    ],
)
def test_a_config_that_it_cannot_run_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = qg.load_config(write(tmp_path / "model")) | changes
    with pytest.raises(qg.CheckpointError, match=message.replace("?", r"\?")):
        qwen3.Config.from_dict(config)


def test_newer_configs_nest_rope_theta() -> None:
    config = {f: 1 for f in qwen3.Config.__dataclass_fields__ if f != "rope_theta"}
    nested = {"rope_theta": 5e5, "rope_type": "default"}
    read = qwen3.Config.from_dict(config | {"rope_parameters": nested, "tie_word_embeddings": False})
    assert read.rope_theta == 5e5
