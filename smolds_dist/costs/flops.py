"""FLOPs per token.

All functions take the model's configuration: `settings.Model` with its vocabulary size set, or `DeepSeekV3Config`.
"""

from typing import Any

from smolds_dist.architecture import LOGITS_CHUNK


def layers_of(model: Any) -> tuple[int, int]:
    """Return the number of dense layers, with one SwiGLU, and of the mixture-of-experts layers after them, of which the last
    `num_nextn_predict_layers` run in training only."""
    dense = model.first_k_dense_replace
    return dense, model.num_hidden_layers + model.num_nextn_predict_layers - dense


def matmul_weights(model: Any) -> tuple[int, int]:
    """Return the matmul weights that one token uses in training: outside the routed experts, and in its selected experts.
    Each depth of multi-token prediction uses the head again."""
    hidden = model.hidden_size
    expert = 3 * hidden * model.intermediate_size
    dense, mixtures = layers_of(model)
    outside = attention_weights(model) + mixtures * (hidden * model.num_experts + model.n_shared_experts * expert)
    outside += dense * 3 * hidden * (model.dense_intermediate_size or 0) + head_weights(model)
    outside += model.num_nextn_predict_layers * 2 * hidden**2
    return outside, mixtures * model.num_experts_per_tok * expert


def head_weights(model: Any) -> int:
    """Return the weights of the LM head, times its uses in training."""
    return (1 + model.num_nextn_predict_layers) * model.hidden_size * model.vocab_size


def attention_weights(model: Any) -> int:
    """Return the number of weights in all layers' attention projections."""
    return sum(layers_of(model)) * sum(rows * columns for rows, columns in attention_matrices(model))


def attention_matrices(model: Any) -> list[tuple[int, int]]:
    """Return the shapes of a layer's attention projections."""
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
    """Return the forward FLOPs of attention scores and their matmul with values, for an average token.

    2 x heads x (dimensions of a key + of a value) for each of the (seq_len + 1) / 2 unmasked keys."""
    if model.attention == "latent":
        dims = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    else:
        dims = 2 * model.head_dim
    return sum(layers_of(model)) * 2 * model.num_attention_heads * dims * (seq_len + 1) / 2


def flops_per_token(model: Any, seq_len: int) -> float:
    """Return the model's training FLOPs per token, for sequences of `seq_len` tokens.

    Two for every matmul weight that a token uses, plus attention's; times three, because the backward pass needs twice the
    forward's (PaLM, arXiv 2204.02311, appendix B, which counts masked keys too). Recomputation, norms and softmax do not
    count.
    """
    return 3 * (2 * sum(matmul_weights(model)) + attention_flops(model, seq_len))


def orthogonalization_flops(model: Any) -> tuple[float, float]:
    """Return the FLOPs of a Muon step, which orthogonalizes every hidden matrix: outside the experts, and of all experts.

    An iteration of Newton-Schulz is two matmuls of a matrix [r, c], r <= c, with a Gram matrix, and one of two Gram
    matrices: 4 r^2 c + 2 r^3 (arXiv 2502.16982, section 2.1); a step has five.
    """

    def flops(*matrices: tuple[int, int]) -> float:
        return sum(5.0 * (4 * min(one) ** 2 * max(one) + 2 * min(one) ** 3) for one in matrices)

    hidden = model.hidden_size
    dense, mixtures = layers_of(model)
    swiglu = flops((model.intermediate_size, hidden)) * 3
    outside = (dense + mixtures) * flops(*attention_matrices(model)) + mixtures * model.n_shared_experts * swiglu
    outside += model.num_nextn_predict_layers * flops((hidden, 2 * hidden))
    outside += dense * flops((model.dense_intermediate_size or 0, hidden)) * 3
    return outside, mixtures * model.num_experts * swiglu


def largest_products(model: Any, tokens: int) -> tuple[tuple[int, int, int], ...]:
    """Return (M, K, N) of the matmuls [M, K] x [K, N] with most of the model's FLOPs, for a forward pass over `tokens`: an
    average expert's first one, and a chunk of the LM head's."""
    rows = max(1, tokens * model.num_experts_per_tok // model.num_experts)
    hidden = model.hidden_size
    return (rows, hidden, 2 * model.intermediate_size), (min(tokens, LOGITS_CHUNK["cpu"]), hidden, model.vocab_size)
