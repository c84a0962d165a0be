"""Tiny configs of mlx-lm's architectures, derived from each one's `ModelArgs`: a new one appears by itself.

A field's size comes from `SIZES` by its name, else from its own default; `OVERRIDES` holds what an
architecture needs beside that, and `ABSENT` why one has no config at all.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
import types
from typing import Any

import mlx_lm.models

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCAB, EXPERTS, WINDOW = 4, 128, 192, 4, 2, 32, 320, 4, 8
FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = [SLIDING, FULL, SLIDING, FULL]
YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LLAMA_4_ROPE = YARN | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}
FACTORS = [1.0 + i / 16 for i in range(16)]
LONGROPE = {
    "type": "longrope",
    "original_max_position_embeddings": 512,
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "short_mscale": 1.2,
    "long_mscale": 1.2,
}
HADAMARD = {  # a pack of 2-bit layers with a rotation of their inputs folded in
    "tensor_namespace": "mlx-vlm-qwen3_5",
    "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
    "modules": [
        {"path": f"model.{path}", "embedding": path == "embed_tokens", "dtype": "float16", "block": block}
        for path, block in {
            "embed_tokens": 512,
            "layers.0.mlp.gate_proj": 512,
            "layers.0.mlp.down_proj": 512,
            "layers.1.self_attn.q_proj": 512,
            "layers.1.self_attn.o_proj": 0,
        }.items()
    ],
}
KDA = {
    "num_heads": 4,
    "head_dim": 32,
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "short_conv_kernel_size": 3,
}

_NAMES: list[tuple[Any, str]] = [
    (LAYERS, "num_hidden_layers num_layers n_layer n_layers num_transformer_layers"),
    (HIDDEN, "hidden_size hidden_dim n_embd d_model model_dim dim_model_base block_dim embedding_size"),
    (
        INNER,
        """intermediate_size ffn_hidden_size mlp_hidden_size n_inner ff_intermediate_size
        intermediate_size_mlp shared_intermediate_size dense_intermediate_size block_ff_dim""",
    ),
    (
        64,
        """moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size share_expert_dim
        moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank o_lora_rank qk_nope_head_dim
        v_head_dim a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim moe_latent_size
        routed_expert_hidden_size hidden_size_per_layer_input laurel_rank moe_hidden_size""",
    ),
    (
        32,
        """qk_rope_head_dim head_dim index_head_dim linear_key_head_dim linear_value_head_dim
        hidden_size_per_head kv_channels swa_head_dim swa_v_head_dim state_size ssm_state_size
        mamba_d_state mamba_head_dim mamba_d_head""",
    ),
    (
        HEADS,
        """num_attention_heads num_heads n_head n_heads swa_num_attention_heads mamba_num_heads
        mamba_n_heads linear_num_value_heads""",
    ),
    (
        KV_HEADS,
        """num_key_value_heads num_kv_heads n_kv_heads swa_num_key_value_heads num_attention_groups
        linear_num_key_heads num_global_key_value_heads index_n_heads""",
    ),
    (VOCAB, "vocab_size num_vocab vocab_size_per_layer_input"),
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (
        2,
        """num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts
        cla_share_factor zero_expert_num n_groups mamba_n_groups mamba_expand num_kv_reuse_layers
        num_kv_shared_layers layer_group_size group_norm_size altup_num_inputs full_attention_interval
        dense_attention_every_n_layers n_group num_expert_group sliding_window_pattern""",
    ),
    (
        1,
        """n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts
        first_k_dense_replace num_dense_layers moe_layer_start_index topk_group decoder_sparse_step
        moe_layer_interval n_shared_head attn_layer_offset expert_layer_offset
        interleave_moe_layer_step moe_layer_freq""",
    ),
    (WINDOW, "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size"),
    (16, "rotary_dim index_topk"),
    (
        1024,
        """max_position_embeddings model_max_length n_positions n_ctx block_size
        original_max_position_embeddings""",
    ),
    (
        1e-5,
        """rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon
        post_norm_eps""",
    ),
    (10000.0, "rope_theta rotary_emb_base swa_rope_theta rope_local_base_freq"),
    (0.5, "partial_rotary_factor rotary_pct"),
    (
        1.5,
        """routed_scaling_factor scale_depth scale_emb logits_scaling embedding_multiplier
        residual_multiplier ffn_dim_divisor_ gegelu_limit altup_coef_clip""",
    ),
    (3, "conv_L_cache conv1d_width conv_kernel linear_conv_kernel_dim conv_window short_conv_kernel_size"),
]
_GIVEN: dict[str, Any] = {
    "layer_types": KINDS,
    "mamba_d_conv": 3,
    "attn_layer_period": 2,
    "expert_layer_period": 2,
    "mlp_only_layers": [0],
    "time_step_rank": 8,
    "time_step_limit": (0.01, 10.0),
    "attention_bias": True,
    "mlp_bias": True,
    "use_bias": True,
    "use_conv_bias": True,
    "use_qkv_bias": True,
    "use_qk_norm": True,
    "norm_topk_prob": True,
    "attention_multiplier": 0.2,
    "final_logit_softcapping": 30.0,
    "logits_soft_cap": 30.0,
    "output_multiplier": 0.5,
    "rope_scaling": None,
    "hidden_act": "silu",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "rope_parameters": {FULL: ROPE, SLIDING: ROPE, "rope_type": "default", "rope_theta": 10000.0},
}
SIZES: dict[str, Any] = {name: size for size, names in _NAMES for name in names.split()} | _GIVEN

# What the text part of a multimodal architecture is, where the module does not say it by a class of its own.
TEXT = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "llama",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "qwen3_5",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5_moe": "qwen3_5",
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": {"n_group": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {"rope_scaling": YARN},
    "deepseek_v32": {"rope_scaling": YARN, "index_topk": 4},
    "deepseek_v41": {
        "compress_ratios": (0, 2, 2, 2),
        "kv_source_layer_ids": (1,),
        "index_source_layer_ids": (1, 3),
        "candidate_source_layer_id": 1,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "index_topk": 3,
        "o_groups": 2,
    },
    "exaone4": {"sliding_window_pattern": "LLGL", "rope_scaling": None},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "falcon_h1": {"mamba_d_ssm": HEADS * HEAD},
    "gemma3n": {
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "altup_correct_scale": True,
        "altup_active_idx": 0,
    },
    "gptj": {"rotary_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "rope_scaling": {"type": "dynamic", "alpha": 100.0, "factor": 1.0},
    },
    "jamba": {"mamba_expand": 1},
    "kimi_k3": {
        "hidden_act": "situ",
        "activation_situ_beta": 1.5,
        "activation_situ_linear_beta": 2.0,
        "attn_res_block_size": 2,
        "linear_attn_config": KDA,
        "num_key_value_heads": HEADS,
    },
    "kimi_linear": {"linear_attn_config": KDA},
    "lfm2": {
        "layer_types": ["conv", FULL, "conv", FULL],
        "conv_bias": True,
        "block_multiple_of": 64,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": {"layer_types": ["conv", FULL, "conv", FULL], "use_expert_bias": True, "conv_bias": True},
    "llama4": {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    "llama4_text": {"no_rope_layers": [0, 0, 1, 1]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "ngram_vocab_size_ratio": 3},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "v_head_dim": HEAD,
    },
    "minicpm3": {"rope_scaling": LONGROPE},
    "minimax_m3_vl": {
        "moe_layer_freq": [0, 1, 1, 1],
        "sparse_attention_freq": [0, 1, 0, 1],
        "layer_types": None,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "rope_parameters": ROPE,
    },
    "ministral3": {"rope_parameters": LLAMA_4_ROPE},
    "mistral4": {"rope_parameters": LLAMA_4_ROPE},
    "muse_spark": {"layer_rope_theta": [10000.0, 0, 10000.0, 0], "num_shared_experts": 0},
    "nanbeige": {"num_loops": 2},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
        ]
    },
    "nemotron_h": {
        "mamba_proj_bias": True,
        "layer_types": None,
        "hybrid_override_pattern": ["*", "M", "E", "-"],
        "n_group": 1,
    },
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", FULL, "linear_attention", FULL],
    },
    "openelm": {
        "ffn_dim_divisor": 64,
        "ffn_multipliers": [0.5, 1.0, 1.5, 2.0],
        "num_query_heads": [4, 4, 8, 8],
        "num_kv_heads": [2, 2, 4, 4],
    },
    "phimoe": {"rope_scaling": LONGROPE},
    "phixtral": {"num_heads": HEADS},
    "prism_hadamard_qwen35": {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "attention_bias": False,
    },
    "qwen3_5": {"num_experts": 0},
    "qwen3_5_moe": {"num_experts": EXPERTS},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "spark2_5": {"hidden_act": "gelu"},
    "step3p5": {"layer_types": KINDS},
}
# What a multimodal architecture needs outside its text part.
OUTSIDE: dict[str, dict[str, Any]] = {"prism_hadamard_qwen35": HADAMARD}
ABSENT: dict[str, str] = {
    "bitnet": "its eager forward is a Metal kernel: it runs on no CPU",
    "muse_spark": "its eager forward is made of Metal kernels: it runs on no CPU",
    "olmo": "its eager forward adds the string 'causal' to an array: it fails in mlx-lm",
}


def architectures() -> list[str]:
    """The names of mlx-lm's modules that hold a `Model` and its `ModelArgs`, in order."""
    names = sorted(info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in names if hasattr(module(name), "Model") and hasattr(module(name), "ModelArgs")]


def module(name: str) -> Any:
    """The module of one architecture."""
    if name == "olmo":  # it only asks whether the package is there, and ends the process if not
        sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    return importlib.import_module(f"mlx_lm.models.{name}")


def config(name: str) -> dict[str, Any]:
    """The tiny config of one architecture, as its `config.json` would hold it."""
    holder = module(name)
    given = fields(holder.ModelArgs) | {"model_type": name}
    names = {field.name for field in dataclasses.fields(holder.ModelArgs)}
    if "text_config" in names:
        given["text_config"] = text(name, holder) | OVERRIDES.get(name, {})
        return given | OUTSIDE.get(name, {})
    return given | OVERRIDES.get(name, {})


def fields(args: Any) -> dict[str, Any]:
    """The fields of a class of arguments that have a size of ours, and those that have no default."""
    given = {}
    for field in dataclasses.fields(args):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        size = SIZES.get(field.name)
        if field.init and (size is not None or required):
            given[field.name] = guess(field) if size is None and field.name not in SIZES else size
    return given


def guess(field: Any) -> Any:
    """A value for a required field of a name that nobody has met yet."""
    kinds = {"bool": False, "int": 64 if field.name.endswith(("size", "dim")) else 2, "float": 1.0}
    return kinds.get(getattr(field.type, "__name__", field.type))


def text(name: str, holder: Any) -> dict[str, Any]:
    """The config of the text part."""
    if name in TEXT:
        return config(TEXT[name]).get("text_config") or config(TEXT[name])
    for kind in ("TextArgs", "TextConfig", "TextModelArgs"):
        if hasattr(holder, kind):
            return fields(getattr(holder, kind)) | {"model_type": name}
    raise LookupError(f"{name}: the class of its text part is unknown; add it to TEXT")
