"""Our expert kernel under DeepSpeed's AutoEP, on the CPU.

Shape letters: P rows sorted by expert, H hidden, E experts of this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolds_dist.model.kernels import expert_ffn, row_multiple
from smolds_dist.parallel.expert_parallel import autoep_layers


class CpuExperts(nn.Module):
    """AutoEP's experts with our kernel, sharing their parameters.

    Args:
        experts: DeepSpeed's `GroupedExperts`, whose loop does not pad and makes autograd fill a full weight per expert.
    """

    def __init__(self, experts: Any):
        super().__init__()
        self.w1, self.w2, self.w3 = experts.w1, experts.w2, experts.w3

    def forward(self, x_PH: Tensor, counts_E: Tensor) -> Tensor:
        """Compute like `GroupedExperts.forward`: rows [P, H] sorted by expert, P >= the sum of counts [E]."""
        counts = counts_E.tolist()
        *rows, rest = x_PH.split([*counts, len(x_PH) - sum(counts)])
        multiple = row_multiple(x_PH)
        padded = [F.pad(one, (0, 0, 0, -len(one) % multiple)) for one in rows] if multiple > 1 else rows
        sizes = [len(one) for one in padded]
        out_PH = expert_ffn(torch.cat(padded), torch.tensor(sizes), (self.w1, self.w3), self.w2)
        kept = [one[:count] for one, count in zip(out_PH.split(sizes), counts, strict=True)]
        return torch.cat([*kept, torch.zeros_like(rest)])


def patch_cpu_experts(model: nn.Module) -> None:
    """Replace AutoEP's loop over experts by `CpuExperts`; call after AutoEP creates its layers and before ZeRO inspects
    modules. Experts with grouped matmuls, which a user's file may set, stay."""
    for layer in autoep_layers(model).values():
        if not layer.experts.use_grouped_mm:
            layer.experts = CpuExperts(layer.experts)
