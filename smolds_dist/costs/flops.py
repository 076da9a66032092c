"""How much a token costs.

All functions take the model's configuration, `settings.Model` with its vocabulary filled in or `DeepSeekV3Config`.
"""

from typing import Any

# Tokens whose logits exist at a time: `linear_cross_entropy`'s chunk.
LOGITS_CHUNK = 1024


def layers_of(model: Any) -> tuple[int, int]:
    """How many layers have one SwiGLU, and how many after these a mixture of experts."""
    return model.first_k_dense_replace, model.num_hidden_layers - model.first_k_dense_replace


def product_weights(model: Any) -> tuple[int, int]:
    """Weights that a token meets in matrix products: outside the routed experts, and in those that it chose."""
    hidden = model.hidden_size
    expert = 3 * hidden * model.intermediate_size
    dense, mixtures = layers_of(model)
    outside = mixtures * (hidden * model.num_experts + model.n_shared_experts * expert)
    outside += dense * 3 * hidden * (model.dense_intermediate_size or 0)
    routed = mixtures * model.num_experts_per_tok * expert
    return attention_weights(model) + outside + hidden * model.vocab_size, routed


def attention_weights(model: Any) -> int:
    """Of all layers' projections."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.attention == "latent":
        key, value = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
        rank = model.q_lora_rank
        attention = hidden * heads * key if rank is None else rank * (hidden + heads * key)
        attention += hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
        attention += model.kv_lora_rank * heads * (model.qk_nope_head_dim + value)
    else:
        value = model.head_dim
        attention = hidden * value * (heads + 2 * model.num_key_value_heads)
    return model.num_hidden_layers * (attention + heads * value * hidden)


def attention_flops(model: Any, seq_len: int) -> float:
    """Of scores and their products with values, forward, for an average token.

    2 x heads x (dimensions of a key + of a value) for each of the (seq_len + 1) / 2 keys that the causal mask leaves."""
    if model.attention == "latent":
        dims = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    else:
        dims = 2 * model.head_dim
    return model.num_hidden_layers * 2 * model.num_attention_heads * dims * (seq_len + 1) / 2


def flops_per_token(model: Any, seq_len: int) -> float:
    """Floating-point operations that the model needs for one training token, of sequences of `seq_len` tokens.

    Two for every weight that a token meets in a matrix product, and those of attention; three times that, because the
    backward pass needs twice the forward's (PaLM, arXiv 2204.02311, appendix B, which counts masked keys too). What is
    computed again under activation checkpointing does not count, nor do norms and softmax.
    """
    return 3 * (2 * sum(product_weights(model)) + attention_flops(model, seq_len))


def largest_products(model: Any, tokens: int) -> tuple[tuple[int, int, int], ...]:
    """(M, K, N) of the products [M, K] x [K, N] that most of the model's FLOPs are in, for a forward pass over `tokens`: an
    average expert's first, and the vocabulary's, which is made in chunks."""
    rows = max(1, tokens * model.num_experts_per_tok // model.num_experts)
    hidden = model.hidden_size
    return (rows, hidden, 2 * model.intermediate_size), (min(tokens, LOGITS_CHUNK), hidden, model.vocab_size)
