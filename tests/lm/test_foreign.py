"""Checkpoints in the words of other libraries: what mlx-lm reads of them, read the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

import qgraph as qg
from qgraph.lm.architecture import build, slots
from qgraph.lm.bitnet import with_dense_layers
from tests.agree import assert_close
from tests.lm.peer import greedy, write
from tests.lm.test_architectures import MXFP4, PROMPT
from tests.lm.test_architectures import write as write_zoo
from tests.quant.hostile.craft import Stored, file_of
from tests.zoo.build import build as zoo
from tests.zoo.configs import config

NAMES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.uint8: "U8", mx.uint32: "U32", mx.int32: "I32"}


def store(
    folder: Path, name: str, block: dict[str, Any], weights: dict[str, mx.array], dtypes: dict[str, str]
) -> Path:
    """A checkpoint; `dtypes` are the names of dtypes in the file where they are not those of the arrays."""
    folder.mkdir(exist_ok=True)
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "config.json").write_text(json.dumps(config(name) | {"quantization_config": block}))
    stored = {
        n: Stored(dtypes.get(n, NAMES[x.dtype]), x.shape, np.array(x.view(mx.uint8)).tobytes())
        for n, x in weights.items()
    }
    (folder / "model.safetensors").write_bytes(file_of(stored))
    return folder


def assert_as_mlx_lm(folder: Path, dense: Any = None) -> qg.lm.LanguageModel:
    model = qg.lm.load(folder)
    logits = greedy(model.model, PROMPT, 3)[1]
    for peer in filter(None, (mlx_lm.utils.load_model(folder)[0], dense)):
        assert_close(logits, greedy(peer, PROMPT, 3)[1], path="model")
    return model


def awq(words: mx.array) -> mx.array:
    """Eight numbers of 4 bits in the order of AutoAWQ, along the last axis."""
    order = mx.array([0, 2, 4, 6, 1, 3, 5, 7])
    return in_words(words.reshape(*words.shape[:-1], -1, 8)[..., order])


def in_words(numbers: mx.array) -> mx.array:
    """(..., 8) numbers of 4 bits, the first one lowest."""
    return mx.sum(numbers.astype(mx.uint32) << (mx.arange(8, dtype=mx.uint32) * 4), axis=-1).astype(mx.uint32)


def test_awq(tmp_path: Path) -> None:
    """Words along the outputs, transposed, with zero points: the numbers are kept."""
    group = 32
    model = zoo("llama")
    weights: dict[str, mx.array] = {}
    for path, place in slots(model).items():
        array = place.value
        module, _, leaf = path.rpartition(".")
        if leaf != "weight" or "proj" not in module:
            weights[path] = array
            continue
        rows, columns = array.shape
        key = mx.random.key(len(weights))
        numbers = mx.random.randint(0, 16, (columns, rows), key=key)
        zeros = mx.random.randint(4, 12, (columns // group, rows), key=key)
        weights[f"{module}.qweight"] = awq(numbers)
        weights[f"{module}.qzeros"] = awq(zeros)
        weights[f"{module}.scales"] = mx.full(zeros.shape, columns**-0.5 / 4)
        place.fill(((numbers - mx.repeat(zeros, group, axis=0)) * (columns**-0.5 / 4)).T)
    block = {"quant_method": "awq", "bits": 4, "group_size": group}
    loaded = assert_as_mlx_lm(store(tmp_path / "model", "llama", block, weights, {}), model)
    assert loaded.report().counts()["quantized_matmul"] >= 7 * config("llama")["num_hidden_layers"]


def test_the_experts_of_gpt_oss_as_they_were_published(tmp_path: Path) -> None:
    """mxfp4 blocks of bytes, gate and up in turns, all else dense; no quantization block of MLX's."""
    weights: dict[str, mx.array] = {}
    experts: dict[str, dict[str, mx.array]] = {}
    for name, place in slots(zoo("gpt_oss")).items():
        prefix, found, rest = name.partition(".experts.")
        layer, _, leaf = rest.partition(".")
        if not found:
            weights[name] = place.value
        elif leaf == "bias":
            experts.setdefault(f"{prefix}.experts", {})[f"{layer}_bias"] = place.value
        else:
            words, scales = mx.quantize(place.value, **MXFP4)
            blocks = words.view(mx.uint8).reshape(*words.shape[:-1], -1, 16)
            experts.setdefault(f"{prefix}.experts", {}).update(
                {f"{layer}_blocks": blocks, f"{layer}_scales": scales}
            )
    for prefix, parts in experts.items():
        for end in ("blocks", "scales", "bias"):
            both = mx.stack([parts[f"gate_proj_{end}"], parts[f"up_proj_{end}"]], axis=2)
            weights[f"{prefix}.gate_up_proj_{end}"] = mx.flatten(both, 1, 2)
            weights[f"{prefix}.down_proj_{end}"] = parts[f"down_proj_{end}"]
    folder = tmp_path / "model"
    folder = store(folder, "gpt_oss", {"quant_method": "mxfp4"}, weights, {})
    model = assert_as_mlx_lm(folder)
    assert model.report().counts()["gather_qmm"] == 3 * config("gpt_oss")["num_hidden_layers"]


def deepseek(
    folder: Path, replace: Callable[[str, mx.array], dict[str, mx.array]], block: dict[str, Any], fp8: bool
) -> Path:
    """A dense checkpoint with every matrix of the experts and of o_proj replaced."""
    folder = write_zoo(folder, "deepseek_v3", None)
    weights: dict[str, mx.array] = {}
    dtypes: dict[str, str] = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        if array.ndim != 2 or ("o_proj" not in name and "shared_experts" not in name):
            weights[name] = array
            continue
        made = replace(name.removesuffix(".weight"), array)
        weights |= made
        dtypes |= {n: "F8_E4M3" for n, x in made.items() if fp8 and x.dtype == mx.uint8}
    return store(folder, "deepseek_v3", block, weights, dtypes)


def test_8_bit_floats_in_blocks_become_dense(tmp_path: Path) -> None:
    """As in mlx-lm: MLX has no words for blocks of 128 by 128."""

    def replace(module: str, array: mx.array) -> dict[str, mx.array]:
        rows, columns = (-(-n // 128) for n in array.shape)
        scale = mx.full((rows, columns), 0.01) * (1 + mx.arange(columns))
        return {f"{module}.weight": mx.to_fp8(array * 50), f"{module}.weight_scale_inv": scale}

    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = assert_as_mlx_lm(deepseek(tmp_path / "model", replace, block, fp8=True))
    assert model.report().counts() == {}
    with pytest.raises(qg.CheckpointError, match="F8_E4M3 is not supported"):
        qg.load(tmp_path / "model" / "model.safetensors")  # nothing says here what the bytes are


def test_compressed_tensors_of_4_bits(tmp_path: Path) -> None:
    def replace(module: str, array: mx.array) -> dict[str, mx.array]:
        rows, columns = array.shape
        numbers = mx.random.randint(0, 16, (rows, columns // 8, 8), key=mx.random.key(rows))
        return {
            f"{module}.weight_packed": in_words(numbers).view(mx.int32),
            f"{module}.weight_scale": mx.full((rows, columns // 32), columns**-0.5 / 4),
            f"{module}.weight_shape": mx.array([rows, columns], mx.int32),
        }

    block = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    model = assert_as_mlx_lm(deepseek(tmp_path / "model", replace, block, fp8=False))
    assert model.report().counts()["quantized_matmul"] > 3


@pytest.mark.parametrize("name", ["bitnet", "llama"])
def test_bitnet_runs_without_its_kernels(name: str, tmp_path: Path) -> None:
    """Its own model, and any other: there the scales divide. mlx-lm runs neither on a CPU."""
    model, weights = with_dense_layers(build(config(name))), dict[str, mx.array]()
    divide = name == "llama"
    block = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    for i, (path, place) in enumerate(slots(model).items()):
        key = mx.random.key(i)
        if "_proj.weight" not in path:
            noise = mx.random.normal(place.value.shape, key=key) * place.value.shape[-1] ** -0.5
            weights[path] = noise + (place.value.ndim == 1)
            place.fill(weights[path])
            continue
        rows, columns = place.value.shape
        values = mx.random.randint(0, 3, (rows, columns), key=key)
        scale = mx.array([1.5 * columns**-0.5])
        parts = mx.split(values.astype(mx.uint8), 4)
        weights[path] = parts[0] | (parts[1] << 2) | (parts[2] << 4) | (parts[3] << 6)
        weights[f"{path}_scale"] = 1 / scale if divide else scale
        place.fill((values - 1) * scale)
    loaded = qg.lm.load(store(tmp_path / "model", name, block, weights, {}))
    assert_close(greedy(loaded.model, PROMPT, 3)[1], greedy(model, PROMPT, 3)[1], path="model")
    assert loaded.report().counts()["quantized_matmul"] == 7 * config(name)["num_hidden_layers"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method bitsandbytes is the packing of another library"),
        ({"quant_method": ["awq"]}, "quant_method a list is the packing"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "format float-quantized is not",
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo FP8 is not one that MLX has"),
        ({"quant_method": "awq", "bits": 3}, "Only bits=3 is supported"),
    ],
)
def test_a_packing_that_is_not_known_is_refused(block: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    found = json.loads((folder / "config.json").read_text()) | {"quantization_config": block}
    (folder / "config.json").write_text(json.dumps(found))
    with pytest.raises(qg.CheckpointError) as caught:
        qg.lm.load(folder)
    assert message in str(caught.value)
