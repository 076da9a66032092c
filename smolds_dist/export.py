"""The same model in transformers' own classes: which class and configuration, and the weights renamed.

Grouped-query attention with softmax scores is `Ernie4_5_MoeForCausalLM`; latent attention with sigmoid scores and a
shared expert is `DeepseekV3ForCausalLM`.
"""

from torch import Tensor
from transformers import DeepseekV3Config, Ernie4_5_MoeConfig, PreTrainedConfig

from smolds_dist.model import DeepSeekV3Config

_SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads hidden_act max_position_embeddings initializer_range "
    "rms_norm_eps tie_word_embeddings pad_token_id bos_token_id eos_token_id"
).split()


def transformers_config(config: DeepSeekV3Config) -> PreTrainedConfig:
    """The configuration of the transformers model that computes the same function.

    Raises:
        ValueError: where there is none, naming the setting that stands in the way.
    """
    common = {name: getattr(config, name) for name in _SHARED_FIELDS}
    common["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.attention == "gqa" and config.scoring_func == "softmax":
        if not config.norm_topk_prob or config.routed_scaling_factor != 1.0:
            raise ValueError(
                "ERNIE's router has no counterpart for norm_topk_prob=False or routed_scaling_factor != 1."
            )
        return Ernie4_5_MoeConfig(
            **common,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,  # type: ignore[call-arg]  # read by the model, not declared
            intermediate_size=config.intermediate_size,
            moe_intermediate_size=config.intermediate_size,
            moe_num_experts=config.num_experts,
            moe_k=config.num_experts_per_tok,
            moe_num_shared_experts=config.n_shared_experts,
            moe_layer_start_index=0,
        )
    if config.attention == "latent" and config.scoring_func == "sigmoid":
        if not config.n_shared_experts:
            raise ValueError(
                "transformers' DeepSeek-V3 always has a shared expert; n_shared_experts=0 has no counterpart."
            )
        if config.rms_norm_eps != 1e-6:
            raise ValueError(
                "transformers' DeepSeek-V3 fixes the latent norms' epsilon; only rms_norm_eps=1e-6 matches."
            )
        return DeepseekV3Config(
            **common,
            num_key_value_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            moe_intermediate_size=config.intermediate_size,
            n_routed_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            n_shared_experts=config.n_shared_experts,
            n_group=1,
            topk_group=1,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            first_k_dense_replace=0,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            rope_interleave=False,
            num_mtp_layers=0,
        )
    raise ValueError(
        f"no transformers model has attention={config.attention!r} with scoring_func={config.scoring_func!r}; "
        "gqa needs softmax, latent needs sigmoid."
    )


def transformers_state_dict(state: dict[str, Tensor], config: DeepSeekV3Config) -> dict[str, Tensor]:
    """Our parameters and selection biases under the names and row order of `transformers_config(config)`'s model."""
    if config.attention == "latent":
        return dict(state)
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("gate.e_score_correction_bias"):
            name, tensor = name.replace("gate.e_score", "gate.moe_statics.e_score"), tensor[None]
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            # We turn the pairs (i, i + D/2), ERNIE the pairs (2 i, 2 i + 1).
            halves = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[-1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        renamed[name] = tensor
    return renamed
