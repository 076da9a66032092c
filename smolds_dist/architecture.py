"""Which fields of a model contradict each other, for settings (`rules`) and for `model.DeepSeekV3Config` alike."""

import math
from collections.abc import Iterator
from typing import Any


def contradictions(m: Any, option: str = "") -> Iterator[str]:
    """A sentence for each, with the values that can work.

    Args:
        m: `settings.Model` or `DeepSeekV3Config`.
        option: what stands before a field's name, such as "--model.".
    """

    def value(name: str) -> str:
        return f"{option}{name} {getattr(m, name)}"

    if m.attention == "gqa" and m.num_attention_heads % m.num_key_value_heads:
        yield (
            f"{value('num_key_value_heads')} does not divide {value('num_attention_heads')}; "
            f"valid values: {divisors(m.num_attention_heads)}."
        )
    if not 1 <= m.num_experts_per_tok <= m.num_experts:
        yield f"{value('num_experts_per_tok')} does not lie between 1 and {value('num_experts')}; lower it."
    name = "head_dim" if m.attention == "gqa" else "qk_rope_head_dim"
    if getattr(m, name) % 2:
        even = getattr(m, name) + 1
        yield f"{value(name)} is odd, but rotary embedding turns pairs, an even number of dimensions; use {even}."
    if not 0 <= m.first_k_dense_replace < m.num_hidden_layers:
        yield f"{value('first_k_dense_replace')} leaves none of {value('num_hidden_layers')} a mixture of experts; lower it."
    if m.first_k_dense_replace and m.dense_intermediate_size is None:
        together = m.intermediate_size * (m.num_experts_per_tok + m.n_shared_experts)
        yield (
            f"{value('first_k_dense_replace')} needs {option}dense_intermediate_size, the width of these layers; {together} "
            "is what a token's experts have together."
        )
    if m.qk_norm and m.attention == "latent":
        yield f"{option}qk_norm is for {option}attention gqa; latent attention norms its latents already."
    if (m.n_group is None) != (m.topk_group is None):
        yield f"{option}n_group and {option}topk_group belong together; give both, or neither."
    if m.n_group is None or m.topk_group is None:
        return
    if m.num_experts % m.n_group or m.num_experts // m.n_group < 2:
        fitting = ", ".join(str(n) for n in range(1, m.num_experts // 2 + 1) if m.num_experts % n == 0)
        yield (
            f"{value('n_group')} does not cut {value('num_experts')} into groups of at least 2; valid values: "
            f"{fitting or 'none, leave it out'}."
        )
    within = m.topk_group * (m.num_experts // m.n_group)
    if not 1 <= m.topk_group <= m.n_group or within < m.num_experts_per_tok:
        yield (
            f"{value('topk_group')} of {value('n_group')} leaves {min(within, m.num_experts)} experts to choose "
            f"{value('num_experts_per_tok')} from; it must leave enough, and be at most n_group."
        )


def divisors(number: int) -> str:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return ", ".join(map(str, sorted({*small, *(number // n for n in small)})))
