"""QK-clip: attention's logits kept below a limit by what queries and keys are made with (Kimi K2, arXiv 2507.20534, 2.1).

Shape letters: L layers, N query heads.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from smolds_dist.model import DeepSeekV3Config
from smolds_dist.model.attention import DeepSeekV3Attention
from smolds_dist.parallel.engine import Engine


class QkClip:
    """Looks at the largest attention logit of every head in a step's forward passes, over all ranks and micro batches.

    Args:
        limit: what a head's logits may reach; 0 turns all of it off.
    """

    def __init__(self, engine: Engine, config: DeepSeekV3Config, limit: float):
        self.config, self.limit = config, limit
        self.attentions: list[DeepSeekV3Attention] = []
        if not limit:
            return
        self.attentions = [module for module in engine.model.modules() if isinstance(module, DeepSeekV3Attention)]
        self._largest_LN = torch.empty(len(self.attentions), config.num_attention_heads, device=engine.device)
        self._largest_LN.fill_(-torch.inf)
        for attention, largest_N in zip(self.attentions, self._largest_LN, strict=True):
            attention.largest_logits = largest_N

    def take(self) -> Tensor | None:
        """The largest logits since the last call [L, N], fp32 on the CPU; None where nobody looks. Collective."""
        if not self.limit:
            return None
        if dist.is_initialized():
            dist.all_reduce(self._largest_LN, dist.ReduceOp.MAX)
        largest_LN = self._largest_LN.to("cpu", copy=True)
        self._largest_LN.fill_(-torch.inf)
        return largest_LN

    def factors(self, largest_LN: Tensor | None) -> dict[str, Tensor]:
        """What the rows of updated weights are to be multiplied by, by logical tensor, for those that must be."""
        if largest_LN is None:
            return {}
        found: dict[str, Tensor] = {}
        for layer, largest_N in enumerate(largest_LN):
            if (largest_N > self.limit).any():
                by_weight = row_factors(self.config, torch.where(largest_N > self.limit, self.limit / largest_N, 1.0))
                found |= {f"model.layers.{layer}.self_attn.{name}.weight": rows for name, rows in by_weight.items()}
        return found


def row_factors(config: DeepSeekV3Config, shrink_N: Tensor) -> dict[str, Tensor]:
    """Factors of the rows of projections after which each head's logits are `shrink_N` of what they were.

    As the paper has it for latent attention: the root of it for what a head has of its own of query and key, and all of it
    for the query's rotary part, whose key is all heads'. In grouped-query attention keys are several heads': there the query
    takes all.
    """
    if config.attention == "gqa":
        return {"q_proj": shrink_N.repeat_interleave(config.head_dim)}
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    root_N = shrink_N.sqrt()[:, None]
    query = torch.cat((root_N.expand(-1, nope), shrink_N[:, None].expand(-1, rope)), dim=1)
    key_value = torch.cat((root_N.expand(-1, nope), torch.ones_like(root_N).expand(-1, value)), dim=1)
    return {("q_proj" if config.q_lora_rank is None else "q_b_proj"): query.flatten(), "kv_b_proj": key_value.flatten()}
