"""Random models of mlx-lm's architectures, of sizes that two cores generate with in seconds."""

from __future__ import annotations

from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

VOCAB = 4096
BASE = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
ARCHITECTURES = {
    "qwen3": {},
    "llama": {"tie_word_embeddings": False},
    # Two windows of 32 for every layer that sees all, so that a text outgrows them.
    "gemma3_text": {"sliding_window": 32, "sliding_window_pattern": 3, "query_pre_attn_scalar": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 512},
    "phi3": {"tie_word_embeddings": False},
}


def random_model(name, dtype=mx.float32, seed=0):
    """A model with activations and logits of order one, evaluated."""
    module = import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **BASE, **ARCHITECTURES[name]}))
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(path, w):
        noise = mx.random.normal(w.shape, key=next(keys))
        if w.ndim == 1:
            # Gemma adds one to its norms' weights. Sharp attention: soft, greedy texts run into a loop.
            center = 0 if name.startswith("gemma") else 1
            return center + 0.1 * noise + ("q_norm" in path or "k_norm" in path)
        return noise * w.shape[-1] ** -0.5

    model.update(tree_map_with_path(draw, model.parameters()))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def quantized_model(name, dtype=mx.float32, seed=0):
    """The same with 4 bits in groups of 64, as `mlx_lm.convert` leaves it."""
    model = random_model(name, dtype, seed)
    nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    return model


def tokenizer():
    """One word for every id, so that equal texts are equal tokens."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=inner), eos_token_ids=[VOCAB + 1])
