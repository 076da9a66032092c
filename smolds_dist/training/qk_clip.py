"""QK-clip: limit attention logits by scaling query and key projections (Kimi K2, arXiv 2507.20534, section 2.1).

Shape letters: L layers, N query heads.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from smolds_dist.model import DeepSeekV3Config
from smolds_dist.model.attention import DeepSeekV3Attention
from smolds_dist.parallel.engine import Engine


class QkClip:
    """Tracks every head's largest attention logit in a step's forward passes, over all ranks and micro batches.

    Args:
        limit: maximum of a head's logits; 0 = off: logits are tracked only on request.
    """

    def __init__(self, engine: Engine, config: DeepSeekV3Config, limit: float):
        self.config, self.limit = config, limit
        self.attentions = [module for module in engine.model.modules() if isinstance(module, DeepSeekV3Attention)]
        self._largest_LN = torch.empty(len(self.attentions), config.num_attention_heads, device=engine.device)
        self._largest_LN.fill_(-torch.inf)
        self.record(bool(limit))

    def record(self, on: bool) -> None:
        """Track logits, or end that if there is no limit."""
        self._recording = on or bool(self.limit)
        for attention, largest_N in zip(self.attentions, self._largest_LN, strict=True):
            attention.largest_logits = largest_N if self._recording else None

    def take(self) -> Tensor | None:
        """Return the largest logits since the last call [L, N], fp32 on the device; None if untracked. Collective."""
        if not self._recording:
            return None
        if dist.is_initialized():
            dist.all_reduce(self._largest_LN, dist.ReduceOp.MAX)
        largest_LN = self._largest_LN.clone()
        self._largest_LN.fill_(-torch.inf)
        return largest_LN

    def factors(self, largest_LN: Tensor | None) -> dict[str, Tensor]:
        """Return row factors for the updated weights, by logical tensor, only for tensors to scale.

        Args:
            largest_LN: from `take`, on the host.
        """
        if largest_LN is None or not self.limit:
            return {}
        found: dict[str, Tensor] = {}
        for layer, largest_N in enumerate(largest_LN):
            if (largest_N > self.limit).any():
                by_weight = row_factors(self.config, torch.where(largest_N > self.limit, self.limit / largest_N, 1.0))
                found |= {f"model.layers.{layer}.self_attn.{name}.weight": rows for name, rows in by_weight.items()}
        return found


def row_factors(config: DeepSeekV3Config, shrink_N: Tensor) -> dict[str, Tensor]:
    """Return row factors of the projections that multiply each head's logits by `shrink_N`.

    As in the paper for latent attention: the square root for a head's own query and key parts, the full factor for the
    query's rotary part, whose key all heads share. In grouped-query attention heads share keys, so the query takes the full
    factor.
    """
    if config.attention == "gqa":
        return {"q_proj": shrink_N.repeat_interleave(config.head_dim)}
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    root_N = shrink_N.sqrt()[:, None]
    query = torch.cat((root_N.expand(-1, nope), shrink_N[:, None].expand(-1, rope)), dim=1)
    key_value = torch.cat((root_N.expand(-1, nope), torch.ones_like(root_N).expand(-1, value)), dim=1)
    return {("q_proj" if config.q_lora_rank is None else "q_b_proj"): query.flatten(), "kv_b_proj": key_value.flatten()}
