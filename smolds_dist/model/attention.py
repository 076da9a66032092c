"""Attention: grouped-query and multi-head latent, both with rotary position embedding.

Shape letters: B batch, S sequence, H hidden, N query heads, G key/value heads, D head dimension,
P rotary dimensions, R latent (compressed key/value) rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smolds_dist.model import device
from smolds_dist.model.causal_attention import ATTENTION_BLOCK, Documents, causal_attention
from smolds_dist.model.configuration import DeepSeekV3Config
from smolds_dist.model.norm import RMSNorm
from smolds_dist.model.rotary import apply_rotary, score_factor

LOGITS_BLOCK = 256  # queries per block when the largest logits are recorded


class DeepSeekV3Attention(nn.Module):
    """Causal self-attention over [B, S, H], grouped-query or latent (`config.attention`).

    Grouped-query: N query heads share G key/value heads (arXiv 2305.13245).
    Latent: keys and values are rebuilt from one vector of rank R per token; all heads share one rotary key of P
    dimensions (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19). The cache holds these two, R + P elements per token.
    """

    def __init__(self, config: DeepSeekV3Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.latent = config.attention == "latent"
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.qk_norm = config.qk_norm
        if self.latent:
            eps = config.rms_norm_eps if config.latent_norm_eps is None else config.latent_norm_eps
            self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
            self.num_key_value_groups = 1
            if config.q_lora_rank is None:
                self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=False)
            else:
                self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
                self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
                self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.qk_head_dim, bias=False)
            self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
            self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps)
            kv_head_dim = config.qk_nope_head_dim + config.v_head_dim
            self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * kv_head_dim, bias=False)
            self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)
        else:
            self.qk_head_dim = config.head_dim
            self.num_key_value_groups = heads // config.num_key_value_heads
            self.q_proj = nn.Linear(hidden, heads * config.head_dim, bias=False)
            self.k_proj = nn.Linear(hidden, config.num_key_value_heads * config.head_dim, bias=False)
            self.v_proj = nn.Linear(hidden, config.num_key_value_heads * config.head_dim, bias=False)
            self.o_proj = nn.Linear(heads * config.head_dim, hidden, bias=False)
            if self.qk_norm:
                together = (heads, config.num_key_value_heads) if self.qk_norm == "all" else (1, 1)
                self.q_norm, self.k_norm = (RMSNorm(n * config.head_dim, config.rms_norm_eps) for n in together)
        self.largest_logits: Tensor | None = None
        """[N], fp32: running maximum of each head's logits over training's forward passes, if recorded."""
        self.set_scaling(config.rope_scaling)

    def set_scaling(self, yarn: dict[str, Any] | None) -> None:
        """Set the factor of the logits for `DeepSeekV3Config.rope_scaling`."""
        self.scaling = self.qk_head_dim**-0.5 * (score_factor(yarn) if self.latent else 1.0)

    def forward(
        self,
        x_BSH: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
        documents: Documents | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, S, H], and the weights [B, N, S, S'] if `output_attentions` is set or the implementation
        is eager, else None. `documents` replaces the mask on the fast path and is set on no other."""
        project = self._latent_qkv if self.latent else self._grouped_query_qkv
        query, key, value = project(x_BSH, *rotary, cache)
        if self.largest_logits is not None and self.training:
            found_N = largest_logits(query, key, self.scaling, attention_mask, documents)
            self.largest_logits.copy_(torch.maximum(self.largest_logits, found_N))
        weights = None
        if output_attentions or self.config._attn_implementation == "eager":
            out, weights = eager_attention(query, key, value, attention_mask, self.scaling)
        elif documents is not None or self._has_fast_path(query, key, attention_mask):
            out = causal_attention(query, key, value, self.scaling, documents).transpose(1, 2)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
            out, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*x_BSH.shape[:-1], -1)), weights

    def _has_fast_path(self, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> bool:
        """Return True for full sequences without padding on the CPU, with `attn_implementation` sdpa."""
        return (
            device.family(query) == "cpu"
            and not device.is_exported()
            and query.dtype in ATTENTION_BLOCK
            and attention_mask is None
            and query.shape[2] == key.shape[2] > 1
            and self.config._attn_implementation == "sdpa"
        )

    def _grouped_query_qkv(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None):
        """Return query [B, N, S, D], key and value [B, G, S', D]; S' includes cached tokens."""
        per_head = (*x_BSH.shape[:-1], -1, self.qk_head_dim)
        value = self.v_proj(x_BSH).view(per_head).transpose(1, 2)
        if device.is_fused(x_BSH) and type(self.q_proj) is type(self.k_proj) is nn.Linear and not self.qk_norm:
            # One matmul and one rotation, also in the backward pass.
            both = F.linear(x_BSH, torch.cat((self.q_proj.weight, self.k_proj.weight)))
            both = apply_rotary(both.view(per_head).transpose(1, 2), cos, sin)
            query, key = both.split([self.config.num_attention_heads, self.config.num_key_value_heads], dim=1)
            return query, *(cache.update(key, value, self.layer_idx) if cache is not None else (key, value))
        query, key = self.q_proj(x_BSH), self.k_proj(x_BSH)
        if self.qk_norm == "all":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(per_head), key.view(per_head)
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return query, key, value

    def _latent_qkv(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None):
        """Return query and key [B, N, S', nope + P], value [B, N, S', v], rebuilt from the cached latent and rotary key."""
        config = self.config
        B, S, _ = x_BSH.shape
        if config.q_lora_rank is None:
            query = self.q_proj(x_BSH)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSH)))
        query = query.view(B, S, -1, self.qk_head_dim).transpose(1, 2)
        q_nope, q_rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)

        latent, k_rope = self.kv_a_proj_with_mqa(x_BSH).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        # One "head" each, so that any transformers cache can hold them: [B, 1, S, R] and [B, 1, S, P].
        latent = self.kv_a_layernorm(latent)[:, None]
        k_rope = apply_rotary(k_rope[:, None], cos, sin)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer_idx)

        kv = self.kv_b_proj(latent.squeeze(1))
        kv = kv.view(B, latent.shape[2], config.num_attention_heads, -1).transpose(1, 2)
        k_nope, value = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        query = torch.cat((q_nope, apply_rotary(q_rope, cos, sin)), dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, config.num_attention_heads, -1, -1)), dim=-1)
        return query, key, value


@torch.no_grad()
def largest_logits(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, documents: Documents | None = None
) -> Tensor:
    """Return the largest unmasked logit, before softmax, of each head: [N], fp32.

    Args:
        query: [B, N, S, D].
        key: [B, G, S, D].
        mask: as in `eager_attention`.
        documents: attention stays within them.
    """
    B, N, S, D = query.shape
    grouped = query.view(B, key.shape[1], -1, S, D)
    places_S = torch.arange(S, device=query.device)
    largest_N = torch.full((N,), -torch.inf, device=query.device)
    for begin in range(0, S, LOGITS_BLOCK):
        end = min(begin + LOGITS_BLOCK, S)
        scores = (grouped[:, :, :, begin:end] @ key[:, :, None, :end].mT).float()  # [B, G, N / G, C, Z]
        if mask is not None:
            part = mask[:, :, None, begin:end, :end]
            hidden = ~part if part.dtype == torch.bool else part < 0
        else:
            hidden = places_S[:end] > places_S[begin:end, None]
            if documents is not None:
                hidden = (hidden | (places_S[:end] < documents.first_BS[:, begin:end, None]))[:, None, None]
        largest_N = torch.maximum(
            largest_N, scores.masked_fill_(hidden, -torch.inf).amax((0, 3, 4)).flatten() * scaling
        )
    return largest_N


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute attention and its full weights; the reference for the other implementations.

    Args:
        query: [B, N, S, D].
        key, value: [B, G, S', D] and [B, G, S', D']; S' includes cached tokens.
        mask: [B, 1, S, S'], True or 0 where a token is visible; None: causal.

    Returns:
        [B, S, N, D'] and the weights [B, N, S, S'].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
    mask = mask[..., : key.shape[2]]
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights
