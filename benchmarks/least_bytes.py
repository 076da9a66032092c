"""Minimum bytes that a training step moves between its matmuls.

Assumes that all operations between two matmuls are fused: they read their inputs from memory once and write their results
once. Intermediate values stay in registers and caches: attention weights, transposed and converted copies, a norm's
intermediates. Matmuls, with their inputs and outputs, are not counted.

Shape letters: T tokens, M = T x K routed rows, H hidden, I expert width, V vocabulary, E experts.
"""

from typing import Any

from smolds_dist.costs.flops import layers_of
from smolds_dist.costs.memory import parameter_counts

FP32 = 4  # bytes per element


def least_bytes(model: Any, tokens: int, element_bytes: int) -> dict[str, float]:
    """Return the minimum bytes that a step of `tokens` tokens reads and writes, forward and backward, by kind of operation.

    Args:
        model: its configuration, `settings.Model` with its vocabulary size set or `DeepSeekV3Config`.
        element_bytes: per weight or activation, 4 in fp32 and 2 in bf16. The optimizer state is fp32 in both.
    """
    hidden = tokens * model.hidden_size * element_bytes  # bytes of hidden states [T, H]
    layers, (_, mixtures) = model.num_hidden_layers, layers_of(model)
    routed = mixtures * model.num_experts_per_tok * hidden
    attention = layers * model.num_attention_heads * tokens
    return {
        # The sum of each row's exponentials, written and read: a fused kernel keeps the rest.
        "softmax of attention": 2 * FP32 * attention,
        # Logits [T, V] are read and overwritten by their gradient.
        "softmax and loss": 2 * tokens * model.vocab_size * element_bytes,
        # Gate, up -> hidden; gate, up, gradient of hidden -> recomputed hidden, gradients of gate and up.
        "SwiGLU": 9 * swiglu_elements(model) * tokens * element_bytes,
        # x -> y; x, gradient of y -> gradient of x.
        "norms": 5 * normed_elements(model) * tokens * element_bytes,
        # x -> rotated; its gradient -> rotated back.
        "rotary": 4 * rotated_elements(model) * tokens * element_bytes,
        # Tokens -> rows -> tokens; gradient of tokens, rows -> gradient of rows -> gradient of tokens.
        "dispatch and combine": mixtures * 4 * hidden + 5 * routed,
        # Logits [T, E] in fp32 are read; scores, and both gradients.
        "router": 4 * FP32 * mixtures * model.num_experts * tokens,
        # Two residual additions per layer, forward and backward, 3 [T, H] each; the embedding's rows, forward and backward.
        "other elementwise": (12 * layers + 5) * hidden,
        "optimizer": optimizer_bytes(sum(parameter_counts(model)), element_bytes),
    }


def optimizer_bytes(parameters: int, element_bytes: int) -> float:
    """Return the bytes of AdamW with gradient clipping: the gradient is read twice, once for its norm; weight and two
    moments are read and written in fp32; weights of another dtype are written in addition."""
    copies = element_bytes if element_bytes != FP32 else 0
    return parameters * (2 * element_bytes + 6 * FP32 + copies)


def swiglu_elements(model: Any) -> int:
    """Return the feed-forward layers' hidden elements per token."""
    dense, mixtures = layers_of(model)
    width = (model.num_experts_per_tok + model.n_shared_experts) * model.intermediate_size
    return mixtures * width + dense * (model.dense_intermediate_size or 0)


def normed_elements(model: Any) -> int:
    """Return the elements per token that norms read."""
    if model.attention == "latent":
        inner = model.kv_lora_rank + (model.q_lora_rank or 0)
    elif model.qk_norm:
        inner = (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    else:
        inner = 0
    return model.num_hidden_layers * (2 * model.hidden_size + inner) + model.hidden_size


def rotated_elements(model: Any) -> int:
    """Return the elements per token that rotary embedding rotates."""
    if model.attention == "latent":
        return model.num_hidden_layers * (model.num_attention_heads + 1) * model.qk_rope_head_dim
    return model.num_hidden_layers * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
