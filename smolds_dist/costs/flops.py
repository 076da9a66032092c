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
    outside = attention_weights(model) + mixtures * (hidden * model.num_experts + model.n_shared_experts * expert)
    outside += dense * 3 * hidden * (model.dense_intermediate_size or 0) + hidden * model.vocab_size
    return outside, mixtures * model.num_experts_per_tok * expert


def attention_weights(model: Any) -> int:
    """Of all layers' projections."""
    return model.num_hidden_layers * sum(rows * columns for rows, columns in attention_matrices(model))


def attention_matrices(model: Any) -> list[tuple[int, int]]:
    """Shapes of a layer's projections."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.attention != "latent":
        width, shared = heads * model.head_dim, model.num_key_value_heads * model.head_dim
        return [(width, hidden), (shared, hidden), (shared, hidden), (hidden, width)]
    query, value = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim), heads * model.v_head_dim
    rank = model.q_lora_rank
    return [
        *([(query, hidden)] if rank is None else [(rank, hidden), (query, rank)]),
        (model.kv_lora_rank + model.qk_rope_head_dim, hidden),
        (heads * model.qk_nope_head_dim + value, model.kv_lora_rank),
        (hidden, value),
    ]


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


def orthogonalization_flops(model: Any) -> tuple[float, float]:
    """Of a step of Muon, which orthogonalises every matrix between hidden states: outside the experts, and of all experts.

    A round of Newton-Schulz is two products of a matrix [r, c], r <= c, with a Gram matrix, and one of two Gram matrices:
    4 r^2 c + 2 r^3 (arXiv 2502.16982, section 2.1), five times over.
    """

    def flops(*matrices: tuple[int, int]) -> float:
        return sum(5.0 * (4 * min(one) ** 2 * max(one) + 2 * min(one) ** 3) for one in matrices)

    hidden = model.hidden_size
    dense, mixtures = layers_of(model)
    swiglu = flops((model.intermediate_size, hidden)) * 3
    outside = model.num_hidden_layers * flops(*attention_matrices(model)) + mixtures * model.n_shared_experts * swiglu
    outside += dense * flops((model.dense_intermediate_size or 0, hidden)) * 3
    return outside, mixtures * model.num_experts * swiglu


def largest_products(model: Any, tokens: int) -> tuple[tuple[int, int, int], ...]:
    """(M, K, N) of the products [M, K] x [K, N] that most of the model's FLOPs are in, for a forward pass over `tokens`: an
    average expert's first, and the vocabulary's, which is made in chunks."""
    rows = max(1, tokens * model.num_experts_per_tok // model.num_experts)
    hidden = model.hidden_size
    return (rows, hidden, 2 * model.intermediate_size), (min(tokens, LOGITS_CHUNK), hidden, model.vocab_size)
