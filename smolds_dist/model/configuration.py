"""The model's configuration. `DeepSeekV3Config()` is the reference model of 254,896,512 parameters."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from smolds_dist.architecture import contradictions


@strict
class DeepSeekV3Config(PreTrainedConfig):
    """Shape of a SmolLM2-DeepSeek model. Every layer is attention followed by a mixture of experts, except that the first
    `first_k_dense_replace` layers have one SwiGLU of `dense_intermediate_size` instead.

    `attention` is grouped-query (`gqa`; arXiv 2305.13245) or multi-head latent attention (`latent`; DeepSeek-V2, arXiv
    2405.04434, section 2.1). The latter reads `q_lora_rank` to `v_head_dim` instead of `num_key_value_heads` and
    `head_dim`; `latent_norm_eps`, if set, is the epsilon of its latents' norms. `intermediate_size` is one expert's width.

    `n_group` and `topk_group` limit a token's experts to the best `topk_group` of `n_group` groups (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2). `qk_norm` normalizes queries and keys before rotary embedding: each "head" by itself
    (Qwen3), or "all" of a token's heads together (OLMoE). `rope_scaling` holds YaRN's settings under transformers' names
    (arXiv 2309.00071). `router_aux_loss_coef`, `sequence_balance_coef` and `z_loss_coef` weight the routers' losses.

    `num_nextn_predict_layers` blocks after the last layer predict further tokens in training (DeepSeek-V3, section 2.2);
    `mtp_coef` weights their loss.

    Raises:
        ValueError: if two fields contradict each other.
    """

    model_type = "smolds_deepseek_v3"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"n_routed_experts": "num_experts", "moe_intermediate_size": "intermediate_size"}

    vocab_size: int = 49152
    hidden_size: int = 384
    intermediate_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    attention: str = "gqa"
    q_lora_rank: int | None = None
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    latent_norm_eps: float | None = None
    qk_norm: str | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    num_nextn_predict_layers: int = 0
    dense_intermediate_size: int | None = None
    n_group: int | None = None
    topk_group: int | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_aux_loss_coef: float = 0.0
    sequence_balance_coef: float = 0.0
    z_loss_coef: float = 0.0
    mtp_coef: float = 0.3
    output_router_logits: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rope_theta: float = 100000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def validate_architecture(self) -> None:
        """Reject contradictions; `strict` calls every `validate_*` method once the fields are set."""
        super().validate_architecture()
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; use 'silu'.")
        if self.attention not in ("gqa", "latent"):
            raise ValueError(f"attention={self.attention!r} is unknown; use 'gqa' or 'latent'.")
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func={self.scoring_func!r} is unknown; use 'softmax' or 'sigmoid'.")
        if self.qk_norm not in (None, "head", "all"):
            raise ValueError(f"qk_norm={self.qk_norm!r} is unknown; use 'head', 'all' or None.")
        if (self.rope_scaling or {}).get("rope_type", "yarn") != "yarn":
            raise ValueError(f"rope_scaling={self.rope_scaling} is unknown; use rope_type 'yarn'.")
        if found := next(contradictions(self), None):
            raise ValueError(found)

    @property
    def has_router_losses(self) -> bool:
        """True if training adds router losses to the cross-entropy."""
        return bool(self.router_aux_loss_coef or self.sequence_balance_coef or self.z_loss_coef)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that rotary position embedding rotates."""
        return self.qk_rope_head_dim if self.attention == "latent" else self.head_dim

    @property
    def widest_head(self) -> int:
        """Dimensions of a query, key or value, whichever is largest."""
        if self.attention == "latent":
            return max(self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim)
        return self.head_dim
