"""Adapters on packed weights: LoRA and DoRA of mlx-lm and PEFT, computed beside the words."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers

import qgraph as qg
from qgraph import kernels
from tests.agree import assert_close
from tests.lm.peer import MEDIUM, Peer, greedy, relative_error, write, write_adapter
from tests.lm.test_architectures import AFFINE, PROMPT, write_by_hand
from tests.lm.test_architectures import write as write_zoo
from tests.zoo.configs import config

LAYERS = MEDIUM["num_hidden_layers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("adapters") / "model", MEDIUM, quantization={"bits": 4})


def assert_same(model: Any, peer: Any, plain: Any = None) -> None:
    """Logits and tokens; those of the `plain` model without the adapter are others."""
    tokens, logits = greedy(model, PROMPT, 6)
    expected_tokens, expected_logits = greedy(peer, PROMPT, 6)
    assert tokens == expected_tokens
    assert_close(logits, expected_logits, path="model")
    if plain is not None:
        assert relative_error(greedy(plain, PROMPT, 1)[1], expected_logits[:1]) > 0.1, "it must matter"


def test_the_words_are_those_of_the_checkpoint_and_shared(folder: Path, tmp_path: Path) -> None:
    model = qg.lm.load(folder)
    adapted = model.with_adapter(write_adapter(tmp_path / "adapter", folder, layers=2))
    base = model.model.layers[-1].mlp.up_proj["weight"]
    assert adapted.model.layers[-1].mlp.up_proj.linear["weight"] is base
    assert "lora_a" not in model.model.layers[-1].mlp.up_proj
    stored = mx.load(str(folder / "model.safetensors"))
    assert (base.packed == stored[f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"]).all()


def test_rounded_activations_stay_rounded_with_an_adapter(folder: Path, tmp_path: Path) -> None:
    if kernels.library() is None:
        with pytest.raises(qg.QGraphError, match="needs the native CPU kernels"):
            qg.lm.load(folder, activations="int8")
        return
    model = qg.lm.load(folder, activations="int8")
    for each in (model, model.with_adapter(write_adapter(tmp_path / "adapter", folder, layers=2))):
        graph = each.model.qgraph.result(mx.array([PROMPT])).graph
        assert {node.op.kernel for node in graph.find("quantized_matmul")} == {"int8"}


def test_another_adapter_of_the_same_shapes_runs_the_same_programs(folder: Path, tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "first", folder, layers=2)
    second = write_adapter(tmp_path / "second", folder, layers=2, seed=8, scale=3.0)
    model = qg.lm.load(folder, first)
    assert_same(model.model, Peer(folder, first).model)
    made = model.model.qgraph.cache_info().misses
    model.swap_adapter(second)
    assert model.adapter is not None
    assert model.adapter.scale == 3.0
    assert_same(model.model, Peer(folder, second).model, Peer(folder, first).model)
    assert model.model.qgraph.cache_info().misses == made
    model.swap_adapter(first)
    assert_same(model.model, Peer(folder, first).model)


def test_an_adapter_that_cannot_take_the_place_changes_nothing(folder: Path, tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "first", folder, layers=1)
    model = qg.lm.load(folder, first)
    for name, options in {
        "layers": {"layers": 2},
        "keys": {"layers": 1, "keys": ["self_attn.q_proj"]},
        "rank": {"layers": 1, "rank": 8},
        "dora": {"layers": 1, "kind": "dora"},
    }.items():
        with pytest.raises(qg.CheckpointError):
            model.swap_adapter(write_adapter(tmp_path / name, folder, **options))
    assert_same(model.model, Peer(folder, first).model)
    with pytest.raises(qg.CheckpointError, match="make a model with with_adapter"):
        qg.lm.load(folder).swap_adapter(first)


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_dora_runs_on_every_width(bits: int, tmp_path: Path) -> None:
    """mlx-lm's own DoRA takes the wrong input size from words of 3, 5 and 6 bits."""
    scheme = {"group_size": 32, "bits": bits}
    dense = write_by_hand(tmp_path / "model", "llama", scheme=lambda _: scheme)
    adapter = write_adapter(tmp_path / "adapter", tmp_path, 2, kind="dora", model=dense)
    peer = mlx_lm.utils.load_adapters(
        write_by_hand(tmp_path / "again", "llama", scheme=lambda _: scheme), str(adapter)
    )
    peer.eval()
    model = qg.lm.load(tmp_path / "model", adapter)
    assert_same(model.model, peer, qg.lm.load(tmp_path / "model").model)
    unpacked = [str(site) for site in model.report() if not site.quantized]
    assert len(unpacked) == 2 * 7, "the norm of the adapted weight is that of its numbers"
    assert all("add is not a view" in text for text in unpacked)
    assert model.report().counts()["quantized_lora_matmul"] == 2 * 7


def test_dora_equals_mlx_lms_where_that_runs(folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", folder, layers=2, kind="dora")
    assert_same(qg.lm.load(folder, adapter).model, Peer(folder, adapter).model, Peer(folder).model)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_tied_embedding_can_be_adapted(kind: str, folder: Path, tmp_path: Path) -> None:
    """Of packed embeddings mlx-lm has no DoRA, so its model is given their numbers."""

    def dense() -> Any:
        return mlx_lm.utils.dequantize_model(Peer(folder).model)

    keys = ["model.embed_tokens"]
    adapter = write_adapter(tmp_path / "adapter", folder, 0, kind=kind, model=dense(), keys=keys)
    peer = mlx_lm.utils.load_adapters(dense(), str(adapter))
    peer.eval()
    assert_same(qg.lm.load(folder, adapter).model, peer, Peer(folder).model)


def test_layers_with_a_bias_are_one_op_with_it_added(tmp_path: Path) -> None:
    folder = write_zoo(tmp_path / "model", "qwen2")
    adapter = write_adapter(tmp_path / "adapter", folder, layers=2)
    model = qg.lm.load(folder, adapter)
    assert any(name.endswith("q_proj.linear.bias") for name in (v.op.label for v in model.graph().inputs))
    assert_same(model.model, Peer(folder, adapter).model, Peer(folder).model)
    assert model.report().counts()["quantized_lora_matmul"] == 2 * 7


def test_experts_can_be_adapted(tmp_path: Path) -> None:
    folder = write_zoo(tmp_path / "model", "mixtral")
    adapter = write_adapter(tmp_path / "adapter", folder, layers=1)
    assert any("switch_mlp" in name for name in mx.load(str(adapter / "adapters.safetensors")))
    model = qg.lm.load(folder, adapter)
    assert_same(model.model, Peer(folder, adapter).model, Peer(folder).model)
    assert [str(site) for site in model.report() if not site.quantized] == []
    assert model.report().counts()["gather_qmm"] == 3 * config("mixtral")["num_hidden_layers"]


def test_a_layer_that_is_several_in_one_can_be_adapted(tmp_path: Path) -> None:
    """afm7's fused layers have a pair for each part; mlx-lm writes them and refuses to load them."""
    dense = write_by_hand(tmp_path / "model", "afm7", scheme=lambda _: AFFINE)
    adapter = write_adapter(tmp_path / "adapter", tmp_path, 0, model=dense)
    assert any(n.endswith("lora_a.1") for n in mx.load(str(adapter / "adapters.safetensors")))
    peer = write_by_hand(tmp_path / "again", "afm7", scheme=lambda _: AFFINE)
    linear_to_lora_layers(peer, 0, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    peer.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    peer.eval()
    assert_same(qg.lm.load(tmp_path / "model", adapter).model, peer, qg.lm.load(tmp_path / "model").model)


def test_a_full_fine_tune_replaces_what_it_has(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 1}))
    name = f"model.layers.{LAYERS - 1}.input_layernorm.weight"
    norm = 1 + mx.random.normal((MEDIUM["hidden_size"],), key=mx.random.key(1))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {name: norm})
    assert_same(qg.lm.load(folder, adapter).model, Peer(folder, adapter).model, Peer(folder).model)


def as_peft(folder: Path, adapter: Path, **changes: Any) -> Path:
    """The same adapter in PEFT's files: transposed, and scaled by alpha / r."""
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    parameters = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]
    spelt = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    folder.mkdir()
    found: dict[str, mx.array] = {}
    for name, array in tensors.items():
        module, _, leaf = name.rpartition(".")
        found[f"base_model.model.{module}.{spelt[leaf]}"] = mx.contiguous(array.T)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), found)
    settings = {
        "peft_type": "LORA",
        "r": parameters["rank"],
        "lora_alpha": parameters["scale"] * parameters["rank"],
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 2.0 * 4**0.5},
        {"lora_alpha": 99, "alpha_pattern": {"self_attn.q_proj": 8, "up_proj": 8}},
        {"r": 77, "rank_pattern": {"q_proj": 4, "mlp.up_proj": 4}},
    ],
    ids=["plain", "rslora", "alpha_pattern", "rank_pattern"],
)
def test_an_adapter_of_peft_is_the_same(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    keys = ["self_attn.q_proj", "mlp.up_proj"]
    adapter = write_adapter(tmp_path / "adapter", folder, layers=2, keys=keys)
    model = qg.lm.load(folder, as_peft(tmp_path / "peft", adapter, **settings))
    assert_same(model.model, Peer(folder, adapter).model, Peer(folder).model)
    assert model.report().counts()["quantized_lora_matmul"] == 2 * 2


def test_a_dora_of_peft_is_the_same(folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", folder, layers=1, kind="dora")
    peft = as_peft(tmp_path / "peft", adapter, use_dora=True)
    assert_same(qg.lm.load(folder, peft).model, Peer(folder, adapter).model)


def test_an_embedding_of_peft_is_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", MEDIUM, quantization=None)
    adapter = write_adapter(tmp_path / "adapter", folder, layers=0, keys=["model.embed_tokens"])
    peft = as_peft(tmp_path / "peft", adapter)
    file = str(peft / "adapter_model.safetensors")
    renamed = {
        n.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B"): x
        for n, x in mx.load(file).items()
    }
    mx.save_safetensors(file, renamed)
    assert_same(qg.lm.load(folder, peft).model, Peer(folder, adapter).model, Peer(folder).model)


def test_an_adapter_of_rank_one_and_of_another_dtype(folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", folder, layers=1, rank=1)
    file = str(adapter / "adapters.safetensors")
    mx.save_safetensors(file, {n: x.astype(mx.float16) for n, x in mx.load(file).items()})
    wide = write_adapter(tmp_path / "wide", folder, layers=1, rank=1)
    rounded = {n: x.astype(mx.float16).astype(mx.float32) for n, x in mx.load(file).items()}
    mx.save_safetensors(str(wide / "adapters.safetensors"), rounded)
    logits = [greedy(qg.lm.load(folder, each).model, PROMPT, 2)[1] for each in (adapter, wide)]
    assert_close(logits[0], np.array(logits[1]), path="model")


def test_threads_generate_with_and_without_the_adapter_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", quantization={"bits": 4})
    plain = qg.lm.load(folder)
    models = (plain, plain.with_adapter(write_adapter(tmp_path / "adapter", folder, layers=2)))
    jobs = [(model, prompt) for model in models for prompt in ([3, 41, 17], [5, 9, 22, 31])]

    def text(job: tuple[qg.lm.LanguageModel, list[int]]) -> list[int]:
        return [piece.token for piece in job[0].generate(job[1], max_tokens=12)]

    expected = list(map(text, jobs))
    assert len({tuple(tokens) for tokens in expected}) == len(jobs)
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(text, jobs * 3)) == expected * 3
