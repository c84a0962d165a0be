"""Checkpoints of many architectures that mlx-lm wrote, loaded as dense models with packed words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten

import qgraph as qg
from tests.agree import assert_close
from tests.lm.peer import greedy, tokenizer, write_adapter
from tests.zoo.build import build
from tests.zoo.configs import config

PROMPT = [3, 41, 17, 88, 5, 60, 22, 9, 71, 33, 50]
STEPS = 8
AFFINE = {"group_size": 32, "bits": 4}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
# What each is quantized with, and the ops that run its packed words.
PARITY: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": (AFFINE, {"quantized_matmul", "quantized_take"}),
    "qwen3": (AFFINE, {"quantized_matmul", "quantized_take"}),
    "gemma3_text": (AFFINE, {"quantized_matmul", "quantized_take"}),
    "phi3": (AFFINE, {"quantized_matmul", "quantized_take"}),
    "mixtral": (AFFINE, {"quantized_matmul", "quantized_take", "gather_qmm"}),
    "qwen3_moe": (AFFINE, {"quantized_matmul", "quantized_take", "gather_qmm"}),
    "gpt_oss": (MXFP4, {"quantized_matmul", "quantized_take", "gather_qmm"}),
    "deepseek_v2": (AFFINE, {"quantized_matmul", "quantized_take", "gather_qmm"}),
    "deepseek_v3": (AFFINE, {"quantized_matmul", "quantized_take", "gather_qmm"}),
    "qwen3_next": (AFFINE, {"quantized_matmul", "quantized_take", "gather_qmm"}),
}


def write(folder: Path, name: str, quantization: dict[str, Any] | None = AFFINE) -> Path:
    """A checkpoint of the zoo's model of an architecture, as mlx-lm saves it."""
    model, found = build(name), config(name)
    if quantization is not None:
        settings = {"mode": "affine", **quantization}
        model, found = mlx_lm.utils.quantize_model(model, found, **settings)
    mlx_lm.utils.save(folder, folder.parent, model, tokenizer(), found)
    return folder


def unpacked(model: qg.lm.LanguageModel) -> list[str]:
    return [str(site) for site in model.report() if not site.quantized]


@pytest.mark.parametrize("name", PARITY)
def test_logits_and_tokens_equal_mlx_lms(name: str, tmp_path: Path) -> None:
    quantization, kernels = PARITY[name]
    folder = write(tmp_path / "model", name, quantization)
    model, (peer, _) = qg.lm.load(folder), mlx_lm.utils.load_model(folder)
    tokens, logits = greedy(model.model, PROMPT, STEPS)
    expected_tokens, expected_logits = greedy(peer, PROMPT, STEPS)
    assert tokens == expected_tokens
    assert_close(logits, expected_logits, path="model")
    assert set(model.report().counts()) == kernels
    assert unpacked(model) == []


def write_by_hand(
    folder: Path,
    name: str,
    *,
    block: dict[str, Any] | None = None,
    scheme: Callable[[str], dict[str, Any]],
    without: str = "nothing",
) -> Any:
    """A checkpoint of packed words for every layer that has them, and the dense model of the same numbers.

    For what mlx-lm cannot quantize, or not run when quantized. `scheme` gives that of a layer, by path;
    the layer `without` is left out.
    """
    model = build(name)
    modules = dict(model.named_modules())
    weights = dict(tree_flatten(model.parameters()))
    for path, layer in modules.items():
        if hasattr(layer, "to_quantized"):
            settings = scheme(path)
            words, scales, *biases = mx.quantize(layer.weight, **settings)
            weights |= {f"{path}.weight": words, f"{path}.scales": scales}
            weights |= {f"{path}.biases": b for b in biases}
            layer.weight = mx.dequantize(words, scales, *biases, **settings, dtype=mx.float32)
    folder.mkdir()
    block = block or scheme("")
    (folder / "config.json").write_text(json.dumps({**config(name), "quantization": block}))
    kept = {name: array for name, array in weights.items() if not name.startswith(without)}
    mx.save_safetensors(str(folder / "model.safetensors"), kept)
    tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["seed_oss", "afm7"])
def test_what_mlx_lm_cannot_run_quantized_runs(name: str, tmp_path: Path) -> None:
    """There seed_oss's tied head multiplies by the embedding's words, afm7's fused layers have no mode."""
    assert name != "seed_oss" or config(name).get("tie_word_embeddings", True)
    peer = write_by_hand(tmp_path / "model", name, scheme=lambda _: AFFINE)
    model = qg.lm.load(tmp_path / "model")
    tokens, logits = greedy(model.model, PROMPT, STEPS)
    expected_tokens, expected_logits = greedy(peer, PROMPT, STEPS)
    assert tokens == expected_tokens
    assert_close(logits, expected_logits, path="model")
    assert unpacked(model) == []
    if name == "seed_oss":
        labels = [value.op.label for value in model.graph().inputs]
        assert [label for label in labels if "embed_tokens" in label] == ["model.embed_tokens.weight"]
        assert model.report().counts()["quantized_take"] == 1


def test_schemes_that_the_config_does_not_list_are_inferred(tmp_path: Path) -> None:
    """As in mlx-lm: by path where the config has it, else from the shapes; its default need not fit."""

    def scheme(path: str) -> dict[str, Any]:
        if "v_proj" in path:
            return {"group_size": 64, "bits": 6}
        if "o_proj" in path:  # of the same shapes as 4 bit in groups of 32, for another number of columns
            return {"group_size": 64, "bits": 2}
        return MXFP4 if "gate_proj" in path else {"group_size": 32, "bits": 8}

    listed = {"model.layers.0.self_attn.v_proj": {"group_size": 64, "bits": 6}}
    block = {"group_size": 32, "bits": 4, **listed}
    peer = write_by_hand(tmp_path / "model", "llama", block=block, scheme=scheme)
    model, (theirs, _) = qg.lm.load(tmp_path / "model"), mlx_lm.utils.load_model(tmp_path / "model")
    _, logits = greedy(model.model, PROMPT, 2)
    assert_close(logits, greedy(peer, PROMPT, 2)[1], path="model")
    assert_close(logits, greedy(theirs, PROMPT, 2)[1], path="model")
    found = {str(v.type.packing.quantization) for v in model.graph().inputs if v.type.packing}
    assert found == {"affine6g64", "affine2g64", "mxfp4", "affine8g32"}
    with pytest.raises(qg.CheckpointError, match="is not the declared affine4g32"):
        qg.load(tmp_path / "model")  # which knows no sizes


def test_a_listed_scheme_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    wrong = {"group_size": 32, "bits": 4, "model.layers.0.self_attn.v_proj": {"group_size": 32, "bits": 8}}
    write_by_hand(tmp_path / "model", "llama", block=wrong, scheme=lambda _: AFFINE)
    with pytest.raises(qg.CheckpointError, match=r"v_proj.weight'.* is not the declared affine8g32"):
        qg.lm.load(tmp_path / "model")


def test_a_layer_declared_dense_must_be(tmp_path: Path) -> None:
    block = {**AFFINE, "model.layers.0.self_attn.v_proj": False}
    write_by_hand(tmp_path / "model", "llama", block=block, scheme=lambda _: AFFINE)
    with pytest.raises(qg.CheckpointError, match="packed, but declared false"):
        qg.lm.load(tmp_path / "model")


def test_experts_that_are_stored_one_by_one_become_one_stack(tmp_path: Path) -> None:
    """The model's own sanitize does it, on words, scales and biases."""
    folder = write(tmp_path / "model", "mixtral")
    peer = mlx_lm.utils.load_model(folder)[0]
    file = folder / "model.safetensors"
    weights: dict[str, mx.array] = {}
    spelt = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for name, array in mx.load(str(file)).items():
        prefix, found, rest = name.partition("switch_mlp.")
        layer, _, part = rest.partition(".")
        if not found:
            weights[name] = array
        for i in range(array.shape[0] if found else 0):
            weights[f"{prefix}experts.{i}.{spelt[layer]}.{part}"] = array[i]
    assert any("experts.1.w2.scales" in name for name in weights)
    mx.save_safetensors(str(file), weights)
    (folder / "model.safetensors.index.json").unlink()
    model = qg.lm.load(folder)
    assert_close(greedy(model.model, PROMPT, 3)[1], greedy(peer, PROMPT, 3)[1], path="model")
    assert model.report().counts()["gather_qmm"] == 3 * config("mixtral")["num_hidden_layers"]


def test_a_tied_head_shares_the_words_of_the_embedding(tmp_path: Path) -> None:
    """gemma3's model learns in its sanitize that there is no head of its own, with and without an adapter."""
    folder = tmp_path / "model"
    write_by_hand(folder, "gemma3_text", scheme=lambda _: AFFINE, without="lm_head")
    model, peer = qg.lm.load(folder), mlx_lm.utils.load_model(folder)[0]
    assert_close(greedy(model.model, PROMPT, 3)[1], greedy(peer, PROMPT, 3)[1], path="model")
    for each in (model, model.with_adapter(write_adapter(tmp_path / "adapter", folder, layers=1))):
        graph = each.optimized()
        rows = config("gemma3_text")["vocab_size"]
        [table] = [v for v in graph.inputs if v.type.packing and v.type.shape[0] == rows]
        assert {node.op.name for node in graph.users(table)} == {"quantized_take", "quantized_matmul"}


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma", "falcon_h1"])
def test_states_that_are_no_keys_and_values_generate_too(name: str, tmp_path: Path) -> None:
    """By `generate`, and by mlx-lm's own loop on the model."""
    folder = write(tmp_path / "model", name)
    peer, theirs = mlx_lm.load(str(folder))[:2]
    expected = [r.token for r in mlx_lm.stream_generate(peer, theirs, PROMPT, max_tokens=10)]
    model = qg.lm.load(folder)
    assert [piece.token for piece in model.generate(PROMPT, max_tokens=10)] == expected
    again = mlx_lm.stream_generate(model.model, theirs, PROMPT, max_tokens=10)
    assert [response.token for response in again] == expected
    assert len(set(expected)) > 1
