"""smolds' configuration for llama.cpp: the equivalent architecture and its settings."""

import math
from typing import Any

import gguf

from smolds_dist.errors import ConfigError
from smolds_dist.model import DeepSeekV3Config


def llama_architecture(config: DeepSeekV3Config) -> str:
    """Return the architecture of llama.cpp that computes the same function.

    Raises:
        ConfigError: if there is none; names the setting without counterpart.
    """
    latent = config.attention == "latent"
    name = "deepseek2" if latent else "ernie4_5-moe"
    latent_eps = config.latent_norm_eps
    no_counterpart = {
        "qk_norm": bool(config.qk_norm),
        "scoring_func": not latent and config.scoring_func != "softmax",
        "norm_topk_prob": not latent and not config.norm_topk_prob,
        "routed_scaling_factor": not latent and config.routed_scaling_factor != 1,
        "n_shared_experts": latent and not config.n_shared_experts,
        "latent_norm_eps": latent and latent_eps is not None and latent_eps != config.rms_norm_eps,
        # By these numbers of layers llama.cpp detects DeepSeek-V2 Lite, which has no such rank.
        "q_lora_rank": latent and config.q_lora_rank is not None and config.num_hidden_layers in (26, 27),
    }
    for field, lacking in no_counterpart.items():
        if lacking:
            raise ConfigError(
                f"llama.cpp's {name} has no counterpart for {field}={getattr(config, field)!r}; use --format smolds."
            )
    return name


def hyperparameters(config: DeepSeekV3Config) -> dict[str, Any]:
    """Return llama.cpp's settings by name, without the architecture's prefix.

    Raises:
        ConfigError: for rotary scaling that llama.cpp does not support.
    """
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "leading_dense_block_count": config.first_k_dense_replace,
        "feed_forward_length": config.dense_intermediate_size or config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.rotary_dim,
    }
    if config.n_group and config.topk_group:
        values |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if config.attention == "latent":
        # llama.cpp computes in latent space, where all heads share one key: latent vector and rotary key [R + P].
        values |= {
            "attention.head_count_kv": 1,
            "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
            "attention.value_length_mla": config.v_head_dim,
            "attention.kv_lora_rank": config.kv_lora_rank,
            "attention.q_lora_rank": config.q_lora_rank or 0,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_gating_func": int(gguf.ExpertGatingFuncType[config.scoring_func.upper()]),
        }
    else:
        values |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "interleave_moe_layer_step": 1,
            "expert_shared_feed_forward_length": config.intermediate_size * config.n_shared_experts,
        }
    return values | _rope_scaling(config)


def _rope_scaling(config: DeepSeekV3Config) -> dict[str, Any]:
    if config.rope_scaling is None:
        return {}
    scaling = {name: value for name, value in config.rope_scaling.items() if value is not None}
    truncated = scaling.pop("truncate", True)
    del scaling["rope_type"]
    factor, length = float(scaling.pop("factor")), scaling.pop("original_max_position_embeddings")
    mscale, all_dim = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
    # For these architectures llama.cpp does not read the limits of the ramp.
    ramp = scaling.pop("beta_fast", 32), scaling.pop("beta_slow", 1)
    if factor <= 1 or ramp != (32, 1) or not truncated or scaling:
        raise ConfigError(
            f"llama.cpp has no counterpart for rope_scaling={config.rope_scaling}, only for yarn with a "
            "factor above 1, beta_fast=32 and beta_slow=1; use --format smolds."
        )
    # As in transformers, rotated values are scaled, and in latent attention also the scores. llama.cpp scales the former by
    # attn_factor, times 1 + log without a multiplier; latent scores by (the former x (1 + multiplier x log))^2.
    log = 0.1 * math.log(factor)
    turned = (1 + mscale * log) / (1 + all_dim * log) if mscale and all_dim else 1 + log
    multiplier = 0.0
    if config.attention == "latent":
        multiplier = ((1 + (all_dim or 0) * log) / turned - 1) / log
    values = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": length,
        "rope.scaling.attn_factor": turned if multiplier else turned / (1 + log),
    }
    if multiplier:
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * multiplier  # llama.cpp divides it by 0.1
    return values
