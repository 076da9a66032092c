"""How few bytes a training step has to move between its matrix products.

What a step would move whose operations were fused: everything between two products reads its inputs from memory once and
writes its results once. What stands within one piece of work stays in registers and caches: probabilities of attention, the
transposed and converted copies, the intermediate values of a norm. Products are not counted here, nor what they read and
write.

Shape letters: T tokens, M = T x K routed rows, H hidden, I expert width, V vocabulary, E experts.
"""

from typing import Any

from smolds_dist.costs.flops import layers_of
from smolds_dist.costs.memory import parameter_counts

FP32 = 4  # bytes of a number


def least_bytes(model: Any, tokens: int, element_bytes: int) -> dict[str, float]:
    """Bytes that a step of `tokens` tokens reads and writes at least, forward and backward, by kind of operation.

    Args:
        model: its configuration, `settings.Model` with its vocabulary filled in or `DeepSeekV3Config`.
        element_bytes: of a weight or an activation, 4 in fp32 and 2 in bf16. The optimizer's state is fp32 in both.
    """
    hidden = tokens * model.hidden_size * element_bytes  # of hidden states [T, H]
    layers, (_, mixtures) = model.num_hidden_layers, layers_of(model)
    routed = mixtures * model.num_experts_per_tok * hidden
    attention = layers * model.num_attention_heads * tokens
    return {
        # The sum of each row's exponentials, written and read again: a fused kernel keeps the rest.
        "softmax of attention": 2 * FP32 * attention,
        # Logits [T, V] are read, and their gradient written in their place.
        "softmax and loss": 2 * tokens * model.vocab_size * element_bytes,
        # Gate, up -> hidden; gate, up, gradient of hidden -> hidden again, gradients of gate and up.
        "SwiGLU": 9 * swiglu_numbers(model) * tokens * element_bytes,
        # x -> y; x, gradient of y -> gradient of x.
        "norms": 5 * normed_numbers(model) * tokens * element_bytes,
        # x -> turned; its gradient -> turned back.
        "rotary": 4 * turned_numbers(model) * tokens * element_bytes,
        # Tokens -> rows -> tokens; gradient of tokens, rows -> gradient of rows -> gradient of tokens.
        "dispatch and combine": mixtures * 4 * hidden + 5 * routed,
        # Logits [T, E] in fp32 are read; scores, and both gradients.
        "router": 4 * FP32 * mixtures * model.num_experts * tokens,
        # Two residual additions of a layer, forward and backward, 3 [T, H] each; the embedding's rows, there and back.
        "other elementwise": (12 * layers + 5) * hidden,
        "optimizer": optimizer_bytes(sum(parameter_counts(model)), element_bytes),
    }


def optimizer_bytes(parameters: int, element_bytes: int) -> float:
    """Of AdamW with a limit on the gradient's norm: the gradient is read for its norm and once more; weight and two moments
    are read and written in fp32; weights of another dtype are written besides."""
    copies = element_bytes if element_bytes != FP32 else 0
    return parameters * (2 * element_bytes + 6 * FP32 + copies)


def swiglu_numbers(model: Any) -> int:
    """Hidden values of the feed-forward layers that one token passes."""
    dense, mixtures = layers_of(model)
    width = (model.num_experts_per_tok + model.n_shared_experts) * model.intermediate_size
    return mixtures * width + dense * (model.dense_intermediate_size or 0)


def normed_numbers(model: Any) -> int:
    """Numbers of one token that some norm reads."""
    if model.attention == "latent":
        inner = model.kv_lora_rank + (model.q_lora_rank or 0)
    elif model.qk_norm:
        inner = (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    else:
        inner = 0
    return model.num_hidden_layers * (2 * model.hidden_size + inner) + model.hidden_size


def turned_numbers(model: Any) -> int:
    """Numbers of one token that rotary embedding turns."""
    if model.attention == "latent":
        return model.num_hidden_layers * (model.num_attention_heads + 1) * model.qk_rope_head_dim
    return model.num_hidden_layers * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
