"""Qwen3 in plain qg ops. The model is dense: no line of it knows whether a weight is packed.

    params = qg.load(FOLDER)                    # the tree of the checkpoint, dense or quantized
    config = Config.from_dict(qg.load_config(FOLDER))
    cache = make_cache(config, batch=1, capacity=256, dtype=mx.float32)
    step = qg.jit(forward)                      # dot on a packed weight becomes a quantized kernel
    logits, cache = step(params, tokens, cache, mx.array(0), config)

A prompt and the single tokens after it run through the same function. The cache has a fixed capacity
and its fill is an array, so one program serves every step. (`qgraph generate` runs mlx-lm's own models; this
shows what a model looks like that is written for qgraph.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import qgraph as qg

Params = dict[str, Any]  # the tensors by name, as in the checkpoint
KV = tuple[qg.Array, qg.Array]  # keys and values, each (batch, kv heads, capacity, head_dim)
Cache = list[KV]  # for every layer


@dataclass(frozen=True)
class Config:
    """The numbers of config.json that the model reads; static arguments of a jitted function."""

    vocab_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a config.json. Errors: CheckpointError for a missing key, or a RoPE that is not here."""
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "?"
        if kind != "default":
            raise qg.CheckpointError(
                f"config.json: rope_scaling {ascii(kind)[:40]} is not supported by qgraph_examples.qwen3",
                fix="use a checkpoint without rope_scaling, or add the scaling to a copy of qwen3.py",
            )
        found = {"rope_theta": rope.get("rope_theta")} | {k: v for k, v in config.items() if v is not None}
        kinds = {int: (int,), float: (int, float), bool: (bool,)}
        bad = [f.name for f in fields(cls) if type(found.get(f.name)) not in kinds[f.type]]
        if bad:
            raise qg.CheckpointError(
                f"config.json: {', '.join(bad)} missing or no number", fix="use the config.json of a Qwen3"
            )
        return cls(**{f.name: found[f.name] for f in fields(cls)})


def make_cache(config: Config, batch: int, capacity: int, dtype: Any) -> Cache:
    """An empty cache for `capacity` positions; `dtype` is that of the activations."""
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    return [(qg.zeros(shape, dtype), qg.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)]


def forward(
    params: Params, tokens: qg.Array, cache: Cache, offset: qg.Array, config: Config
) -> tuple[qg.Array, Cache]:
    """The logits (batch, length, vocab) of `tokens` (batch, length), and the cache with them in it.

    `offset`, an int32 scalar array, is how many positions of the cache are filled; there must be room
    for `length` more. Errors: ShapeError or KeyError for params that are not a Qwen3's.
    """
    x, cache = backbone(params, tokens, cache, offset, config)
    return head(params, x, config), cache


def backbone(
    params: Params, tokens: qg.Array, cache: Cache, offset: qg.Array, config: Config
) -> tuple[qg.Array, Cache]:
    """`forward` before the head: (batch, length, hidden). A prompt needs the head at its end only."""
    p = params["model"]
    with qg.scope("model"):
        length, capacity = tokens.shape[1], cache[0][0].shape[2]
        position = offset + qg.arange(length)
        mask = position[:, None] >= qg.arange(capacity)  # causal; hides what is not filled yet, too
        with qg.scope("embed_tokens"):
            x = qg.take(p["embed_tokens"]["weight"], tokens, axis=0)
        filled: Cache = []
        for i, (layer, kv) in enumerate(zip(p["layers"], cache, strict=True)):
            with qg.scope(f"layers.{i}"):
                h = rms_norm(layer, "input_layernorm", x, config)
                attended, kv = attention(layer["self_attn"], h, kv, offset, mask, config)
                x = x + attended
                x = x + mlp(layer["mlp"], rms_norm(layer, "post_attention_layernorm", x, config))
                filled.append(kv)
        return rms_norm(p, "norm", x, config), filled


def head(params: Params, x: qg.Array, config: Config) -> qg.Array:
    """The logits (..., vocab) of hidden states: by the embedding where it is tied, else by lm_head."""
    if config.tie_word_embeddings:
        with qg.scope("model"):
            return linear(params["model"], "embed_tokens", x)
    return linear(params, "lm_head", x)


def attention(
    p: Params, x: qg.Array, cache: KV, offset: qg.Array, mask: qg.Array, c: Config
) -> tuple[qg.Array, KV]:
    """Grouped-query attention over the cache; queries and keys are normed per head, then rotated."""
    batch, length, _ = x.shape

    def heads(y: qg.Array) -> qg.Array:
        return y.reshape(batch, length, -1, c.head_dim)

    def rotated(y: qg.Array) -> qg.Array:
        return qg.rope(y, c.head_dim, traditional=False, base=c.rope_theta, scale=1.0, offset=offset)

    with qg.scope("self_attn"):
        q = rotated(rms_norm(p, "q_norm", heads(linear(p, "q_proj", x)), c).transpose(0, 2, 1, 3))
        k = rotated(rms_norm(p, "k_norm", heads(linear(p, "k_proj", x)), c).transpose(0, 2, 1, 3))
        v = heads(linear(p, "v_proj", x)).transpose(0, 2, 1, 3)
        start = offset.reshape(1)
        keys = qg.slice_update(cache[0], k.astype(cache[0].dtype), start, axes=[2])
        values = qg.slice_update(cache[1], v.astype(cache[1].dtype), start, axes=[2])
        y = qg.scaled_dot_product_attention(q, keys, values, scale=c.head_dim**-0.5, mask=mask)
        y = y.transpose(0, 2, 1, 3).reshape(batch, length, -1)
        return linear(p, "o_proj", y), (keys, values)


def mlp(p: Params, x: qg.Array) -> qg.Array:
    """SwiGLU."""
    with qg.scope("mlp"):
        return linear(p, "down_proj", qg.silu(linear(p, "gate_proj", x)) * linear(p, "up_proj", x))


def linear(parent: Params, name: str, x: qg.Array) -> qg.Array:
    """``x @ weight.T`` for a weight (out, in), and the LoRA adapter's low-rank term where there is one."""
    p = parent[name]
    with qg.scope(name):
        y = x @ p["weight"].T
        if "lora_a" in p:
            y = y + (p["lora_scale"] * ((x @ p["lora_a"]) @ p["lora_b"])).astype(x.dtype)
        return y


def rms_norm(parent: Params, name: str, x: qg.Array, c: Config) -> qg.Array:
    """Root-mean-square norm over the last axis."""
    with qg.scope(name):
        return qg.rms_norm(x, parent[name]["weight"], c.rms_norm_eps)
