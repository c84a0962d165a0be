"""Qwen3 parameter trees of any size whose arrays are lazy zeros: shapes without memory."""

from __future__ import annotations

import mlx.core as mx

import qgraph as qg
from qgraph_examples.qwen3 import Config

QWEN3_8B = Config(
    vocab_size=151936,
    num_hidden_layers=36,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
)


def packed(rows, columns, dtype):
    """A 4-bit weight of lazy zeros."""
    scales = mx.zeros((rows, columns // 64), dtype)
    return qg.from_quantized(mx.zeros((rows, columns // 8), mx.uint32), scales, scales, bits=4, group_size=64)


def parameters(c, hidden=4096, heads=32, dtype=mx.bfloat16, linear=packed):
    """The tree that `qg.load` gives for a quantized Qwen3 of config `c`."""
    q, kv, ffn = heads * c.head_dim, c.num_key_value_heads * c.head_dim, 3 * hidden

    def weight(rows, columns):
        return {"weight": linear(rows, columns, dtype)}

    def norm(n):
        return {"weight": mx.ones((n,), dtype)}

    def layer():
        h = hidden
        return {
            "input_layernorm": norm(h),
            "post_attention_layernorm": norm(h),
            "self_attn": {
                "q_proj": weight(q, h),
                "k_proj": weight(kv, h),
                "v_proj": weight(kv, h),
                "o_proj": weight(h, q),
                "q_norm": norm(c.head_dim),
                "k_norm": norm(c.head_dim),
            },
            "mlp": {"gate_proj": weight(ffn, h), "up_proj": weight(ffn, h), "down_proj": weight(h, ffn)},
        }

    model = {
        "embed_tokens": weight(c.vocab_size, hidden),
        "layers": [layer() for _ in range(c.num_hidden_layers)],
        "norm": norm(hidden),
    }
    return {"model": model, "lm_head": weight(c.vocab_size, hidden)}
