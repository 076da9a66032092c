"""The model's configuration. `DeepSeekV3Config()` is the reference model of 254,896,512 parameters."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from smolds_dist.architecture import contradictions


@strict
class DeepSeekV3Config(PreTrainedConfig):
    """Shape of a SmolLM2-DeepSeek model; every layer is attention followed by a mixture of experts, but for the first
    `first_k_dense_replace`, which have one SwiGLU of `dense_intermediate_size` in its place.

    `attention` picks between grouped-query attention (`gqa`; arXiv 2305.13245) and multi-head latent attention
    (`latent`; DeepSeek-V2, arXiv 2405.04434, section 2.1), which reads the fields `q_lora_rank` to `v_head_dim`
    instead of `num_key_value_heads` and `head_dim`, and gives the norms of its latents an epsilon of their own,
    `latent_norm_eps`, where that is not None. `intermediate_size` is the width of one expert.

    `n_group` and `topk_group` limit a token's experts to the best `topk_group` of `n_group` groups (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2). `qk_norm` norms queries and keys before they are turned: each "head" by itself (Qwen3), or
    "all" of a token's heads together (OLMoE). `rope_scaling` is YaRN's settings under transformers' names (arXiv
    2309.00071). `sequence_balance_coef` and `z_loss_coef` weigh losses of the routers in training, as
    `router_aux_loss_coef` does.

    Raises:
        ValueError: where two fields contradict each other.
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
    dense_intermediate_size: int | None = None
    n_group: int | None = None
    topk_group: int | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_aux_loss_coef: float = 0.0
    sequence_balance_coef: float = 0.0
    z_loss_coef: float = 0.0
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
        """Refuses contradictions; `strict` calls every `validate_*` method once the fields are set."""
        super().validate_architecture()
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; only 'silu' is there.")
        if self.attention not in ("gqa", "latent"):
            raise ValueError(f"attention={self.attention!r} is unknown; use 'gqa' or 'latent'.")
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func={self.scoring_func!r} is unknown; use 'softmax' or 'sigmoid'.")
        if self.qk_norm not in (None, "head", "all"):
            raise ValueError(f"qk_norm={self.qk_norm!r} is unknown; use 'head', 'all' or None.")
        if (self.rope_scaling or {}).get("rope_type", "yarn") != "yarn":
            raise ValueError(f"rope_scaling={self.rope_scaling} is unknown; only rope_type 'yarn' is there.")
        if found := next(contradictions(self), None):
            raise ValueError(found)

    @property
    def has_router_losses(self) -> bool:
        """Whether training adds losses of the routers' own to that of the tokens."""
        return bool(self.router_aux_loss_coef or self.sequence_balance_coef or self.z_loss_coef)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that rotary position embedding turns."""
        return self.qk_rope_head_dim if self.attention == "latent" else self.head_dim

    @property
    def widest_head(self) -> int:
        """Dimensions of a query, key or value, whichever has most."""
        if self.attention == "latent":
            return max(self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim)
        return self.head_dim
