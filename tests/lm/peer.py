"""Checkpoints and adapters that mlx-lm itself writes, and what its own model computes on them."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCAB = [END, *map(chr, range(0x20, 0x7F))]
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "vocab_size")
TINY = dict(zip(SIZES, (64, 128, 2, 32, 96), strict=True))
MEDIUM = dict(zip(SIZES, (256, 512, 4, 64, 1000), strict=True))


def config_of(size: dict[str, int], tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "eos_token_id": 0,
        **size,
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token; ids beyond it have no text."""
    inner = Tokenizer(models.BPE({t.replace(" ", "Ġ"): i for i, t in enumerate(VOCAB)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)


def random_model(config: dict[str, Any], seed: int = 0) -> qwen3.Model:
    """Weights such that activations and logits are of order one."""
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(path: str, w: mx.array) -> mx.array:
        noise = mx.random.normal(w.shape, key=next(keys))
        if w.ndim == 1:  # attention twice as sharp as usual: softer, greedy texts run into a loop
            return (1 + 0.1 * noise) * (2 if "q_norm" in path or "k_norm" in path else 1)
        return noise * w.shape[-1] ** -0.5

    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    model.update(tree_map_with_path(draw, model.parameters()))
    return model


def mixed(path: str, module: Any) -> bool | dict[str, Any]:
    """Another scheme for some layers, and one that stays dense."""
    if "down_proj" in path:
        return {"bits": 8, "group_size": 32, "mode": "affine"}
    if "v_proj" in path:
        return {"bits": 6, "group_size": 64, "mode": "affine"}
    return "layers.1.self_attn.o_proj" not in path


def write(
    folder: Path,
    size: dict[str, int] = TINY,
    *,
    tied: bool = True,
    quantization: dict[str, Any] | None = None,
    dtype: mx.Dtype = mx.float32,
    shards: bool = False,
) -> Path:
    """Save a random Qwen3 as mlx-lm does; `quantization` are arguments of its quantize_model."""
    config = config_of(size, tied)
    model = random_model(config)
    model.set_dtype(dtype)
    if quantization is not None:
        arguments = {"group_size": None, "bits": None, **quantization}
        model, config = mlx_lm.utils.quantize_model(model, config, **arguments)
    whole = mlx_lm.utils.make_shards
    try:
        if shards:  # a limit of 0 GB: every tensor in a file of its own
            mlx_lm.utils.make_shards = lambda weights: whole(weights, 0)
        mlx_lm.utils.save(folder, folder.parent, model, tokenizer(), config)
    finally:
        mlx_lm.utils.make_shards = whole
    return folder


def write_adapter(
    folder: Path,
    model_folder: Path,
    layers: int,
    *,
    kind: str = "lora",
    model: Any = None,
    seed: int = 7,
    **parameters: Any,
) -> Path:
    """An adapter in the files of mlx_lm.lora, with lora_b of order one (a fresh one is zero).

    Made for `model`, which is changed; without one for that of the folder.
    """
    if model is None:
        model, _ = mlx_lm.utils.load_model(model_folder)
    model.freeze()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, **parameters}
    mx.random.seed(seed)
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")

    def drawn(name: str, w: mx.array) -> mx.array:
        if name.endswith(".m"):
            return w * (1 + 0.3 * mx.random.normal(w.shape))
        fresh = "lora_b" in name.rsplit(".", 2)[-2:]
        return mx.random.normal(w.shape) * 0.5 if fresh else mx.random.normal(w.shape) * w.shape[0] ** -0.5

    weights = {name: drawn(name, w) for name, w in tree_flatten(model.trainable_parameters())}
    folder.mkdir()
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder


class Peer:
    """mlx-lm's own model of a folder."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        self.model, _ = mlx_lm.utils.load_model(folder)
        if adapter is not None:
            self.model = mlx_lm.utils.load_adapters(self.model, str(adapter))
        self.model.eval()

    def logits(self, tokens: list[int]) -> np.ndarray:
        return np.array(self.model(mx.array([tokens]))[0])

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
        return greedy(self.model, prompt, count)


def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits that each was chosen from, with mlx-lm's own caches."""
    cache = make_prompt_cache(model)
    step, tokens, rows = mx.array([prompt], mx.uint32), [], []
    for _ in range(count):
        logits = model(step, cache=cache)[:, -1]
        rows.append(np.array(logits[0].astype(mx.float32)))
        tokens.append(int(rows[-1].argmax()))
        step = mx.array([[tokens[-1]]], mx.uint32)
    return tokens, np.stack(rows)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the root mean square of what is expected."""
    return float(np.abs(found - expected).max() / np.sqrt(np.mean(np.square(expected))))
