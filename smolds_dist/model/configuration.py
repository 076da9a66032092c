"""The model's configuration. `DeepSeekV3Config()` is the reference model of 254,896,512 parameters."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class DeepSeekV3Config(PreTrainedConfig):
    """Shape of a SmolLM2-DeepSeek model; every layer is attention followed by a mixture of experts.

    `attention` picks between grouped-query attention (`gqa`; arXiv 2305.13245) and multi-head latent attention
    (`latent`; DeepSeek-V2, arXiv 2405.04434, section 2.1), which reads the fields `q_lora_rank` to `v_head_dim`
    instead of `num_key_value_heads` and `head_dim`. `intermediate_size` is the width of one expert.

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
    num_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 0
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rope_theta: float = 100000.0
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
        if self.attention not in ("gqa", "latent"):
            raise ValueError(f"attention={self.attention!r} is unknown; use 'gqa' or 'latent'.")
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func={self.scoring_func!r} is unknown; use 'softmax' or 'sigmoid'.")
        if self.attention == "gqa" and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; choose a divisor."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and num_experts={self.num_experts}."
            )
        if self.rotary_dim % 2:
            raise ValueError(f"the rotary part of a head has {self.rotary_dim} dimensions; it must be even.")

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
