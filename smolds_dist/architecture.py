"""What settings, costs and the model share: contradictions between a model's fields, and the size of a chunk of logits."""

import math
from collections.abc import Iterator
from typing import Any

# Tokens whose logits exist at a time in `model.kernels.linear_cross_entropy`, by device family. A GPU starts fewer kernels
# for larger chunks.
LOGITS_CHUNK = {"cpu": 1024, "mps": 1024, "cuda": 2048}


def contradictions(m: Any, option: str = "") -> Iterator[str]:
    """Yield a sentence for each contradiction, with the valid values.

    Args:
        m: `settings.Model` or `DeepSeekV3Config`.
        option: prefix of a field's name, such as "--model.".
    """

    def value(name: str) -> str:
        return f"{option}{name} {getattr(m, name)}"

    if m.attention == "gqa" and m.num_attention_heads % m.num_key_value_heads:
        yield (
            f"{value('num_key_value_heads')} does not divide {value('num_attention_heads')}; "
            f"valid values: {', '.join(map(str, divisors(m.num_attention_heads)))}."
        )
    if not 1 <= m.num_experts_per_tok <= m.num_experts:
        yield f"{value('num_experts_per_tok')} is not between 1 and {value('num_experts')}; lower it."
    name = "head_dim" if m.attention == "gqa" else "qk_rope_head_dim"
    if getattr(m, name) % 2:
        even = getattr(m, name) + 1
        yield f"{value(name)} is odd, and rotary embedding rotates pairs of channels; use {even}."
    if not 0 <= m.first_k_dense_replace < m.num_hidden_layers:
        yield f"{value('first_k_dense_replace')} leaves no layer of {value('num_hidden_layers')} with experts; lower it."
    if m.first_k_dense_replace and m.dense_intermediate_size is None:
        together = m.intermediate_size * (m.num_experts_per_tok + m.n_shared_experts)
        yield (
            f"{value('first_k_dense_replace')} needs {option}dense_intermediate_size, the width of these layers; for "
            f"instance {together}, the total width of a token's experts."
        )
    if m.qk_norm and m.attention == "latent":
        yield f"{option}qk_norm is for {option}attention gqa; latent attention normalizes its latents already."
    if (m.n_group is None) != (m.topk_group is None):
        yield f"{option}n_group and {option}topk_group go together; set both, or neither."
    if m.n_group is None or m.topk_group is None:
        return
    if m.num_experts % m.n_group or m.num_experts // m.n_group < 2:
        fitting = ", ".join(str(n) for n in divisors(m.num_experts)[:-1])
        yield (
            f"{value('n_group')} does not split {value('num_experts')} into groups of at least 2; valid values: "
            f"{fitting or 'none, unset it'}."
        )
    within = m.topk_group * (m.num_experts // m.n_group)
    if not 1 <= m.topk_group <= m.n_group or within < m.num_experts_per_tok:
        yield (
            f"{value('topk_group')} of {value('n_group')} leaves {min(within, m.num_experts)} experts to choose "
            f"{value('num_experts_per_tok')} from; it must leave enough, and be at most n_group."
        )


def divisors(number: int) -> list[int]:
    """Return a number's divisors, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
