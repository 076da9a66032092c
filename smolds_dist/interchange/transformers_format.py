"""The same model in transformers' own classes: which class and configuration, and the weights renamed; there and back.

Grouped-query attention with softmax scores is `Ernie4_5_MoeForCausalLM`; latent attention with sigmoid scores and a
shared expert is `DeepseekV3ForCausalLM`.
"""

from typing import Any

from torch import Tensor
from transformers import DeepseekV3Config, Ernie4_5_MoeConfig, PreTrainedConfig

from smolds_dist.model import DeepSeekV3Config

_SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads hidden_act max_position_embeddings initializer_range "
    "rms_norm_eps tie_word_embeddings pad_token_id bos_token_id eos_token_id"
).split()

_TURNED = ("q_proj.weight", "k_proj.weight")


def transformers_config(config: DeepSeekV3Config) -> PreTrainedConfig:
    """The configuration of the transformers model that computes the same function.

    Raises:
        ValueError: where there is none, naming the setting that stands in the way.
    """
    theirs = _counterpart(config)
    # transformers 4 and mlx-lm look for it here alone, and take a default of their own where they don't find it.
    theirs.rope_theta = config.rope_theta
    return theirs


def _counterpart(config: DeepSeekV3Config) -> PreTrainedConfig:
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


def to_transformers(name: str, tensor: Tensor, config: DeepSeekV3Config) -> tuple[str, Tensor]:
    """A logical tensor or selection bias of ours (`parallel.fragments`) under the name and in the row order of transformers'
    files, in which too every matrix of every expert stands on its own."""
    if config.attention == "latent":
        return name, tensor
    if name.endswith(".gate.e_score_correction_bias"):
        return name.replace(".gate.", ".moe_statics."), tensor[None]
    if name.endswith(_TURNED):
        # We turn the pairs (i, i + D/2), ERNIE the pairs (2 i, 2 i + 1).
        halves = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[-1])
        return name, halves.transpose(1, 2).reshape(tensor.shape)
    return name, tensor


def from_transformers(name: str, tensor: Tensor, config: DeepSeekV3Config) -> tuple[str, Tensor]:
    """The way back of `to_transformers`."""
    if config.attention == "latent":
        return name, tensor
    if name.endswith(".moe_statics.e_score_correction_bias"):
        return name.replace(".moe_statics.", ".gate."), tensor[0]
    if name.endswith(_TURNED):
        pairs = tensor.view(-1, config.head_dim // 2, 2, tensor.shape[-1])
        return name, pairs.transpose(1, 2).reshape(tensor.shape)
    return name, tensor


def transformers_state_dict(state: dict[str, Tensor], config: DeepSeekV3Config) -> dict[str, Tensor]:
    """Our parameters and selection biases, experts stacked, under the names of `transformers_config(config)`'s model."""
    renamed = dict(to_transformers(name, tensor, config) for name, tensor in state.items())
    return {name.replace(".mlp.moe_statics.", ".mlp.gate.moe_statics."): tensor for name, tensor in renamed.items()}


def our_config(theirs: Any) -> DeepSeekV3Config:
    """Our configuration of the same function as an ERNIE or DeepSeek-V3 model's.

    Raises:
        ValueError: where there is none, naming the setting that stands in the way.
    """
    kind = theirs.model_type
    if kind not in ("ernie4_5_moe", "deepseek_v3"):
        raise ValueError(f"model_type {kind!r} is neither ernie4_5_moe nor deepseek_v3.")
    values = {name: getattr(theirs, name) for name in _SHARED_FIELDS}
    rope = dict(theirs.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} has no counterpart; only plain rotary embedding has.")
    values["rope_theta"] = float(rope["rope_theta"])
    if kind == "ernie4_5_moe":
        values |= {
            "attention": "gqa",
            "scoring_func": "softmax",
            "num_key_value_heads": theirs.num_key_value_heads,
            "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
            "intermediate_size": theirs.moe_intermediate_size,
            "num_experts": theirs.moe_num_experts,
            "num_experts_per_tok": theirs.moe_k,
            "n_shared_experts": theirs.moe_num_shared_experts,
        }
    else:
        values |= {"attention": "latent", "scoring_func": "sigmoid"} | {
            name: getattr(theirs, name)
            for name in (
                "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim num_experts_per_tok n_shared_experts "
                "norm_topk_prob routed_scaling_factor"
            ).split()
        }
        values |= {"intermediate_size": theirs.moe_intermediate_size, "num_experts": theirs.n_routed_experts}
    ours = DeepSeekV3Config(**values)
    # What our configuration cannot say must be as our way back would say it.
    expected = transformers_config(ours).to_dict()
    ignored = {
        "dtype",
        "architectures",
        "transformers_version",
        "intermediate_size",
        "use_cache",
        "router_aux_loss_coef",
    }
    ignored |= {"output_router_logits", "_name_or_path", "pretraining_tp", "torch_dtype", "moe_layer_end_index"}
    for name, value in theirs.to_dict().items():
        if name in expected and name not in ignored and expected[name] != value:
            raise ValueError(f"{name}={value!r} has no counterpart; only {expected[name]!r} has.")
    return ours
