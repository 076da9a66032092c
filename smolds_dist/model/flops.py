"""How much a token costs."""

from smolds_dist.model.configuration import DeepSeekV3Config


def flops_per_token(config: DeepSeekV3Config, seq_len: int) -> float:
    """Floating-point operations that the model needs for one training token, of sequences of `seq_len` tokens.

    Two for every weight that a token meets in a matrix product, and for attention 2 x heads x (dimensions of a key + of a
    value) for each of the (seq_len + 1) / 2 keys that the causal mask leaves to an average token; three times that, because
    the backward pass needs twice the forward's (PaLM, arXiv 2204.02311, appendix B, which counts masked keys too). What is
    computed again under activation checkpointing does not count, nor do norms and softmax.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.attention == "latent":
        key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        rank = config.q_lora_rank
        attention = hidden * heads * key if rank is None else rank * (hidden + heads * key)
        attention += hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + value)
    else:
        key = value = config.head_dim
        attention = hidden * key * (heads + 2 * config.num_key_value_heads)
    attention += heads * value * hidden
    experts = config.num_experts_per_tok + config.n_shared_experts
    mixture = hidden * config.num_experts + experts * 3 * hidden * config.intermediate_size
    scores = heads * (key + value) * (seq_len + 1) / 2
    forward = 2 * (config.num_hidden_layers * (attention + mixture + scores) + hidden * config.vocab_size)
    return 3 * forward
