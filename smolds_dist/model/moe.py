"""The mixture of experts: router, experts, and the block that joins them.

Shape letters: B batch, S sequence, T = B x S tokens, K experts per token, M = T x K routed rows, P the same with padding,
H hidden, E experts, I expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolds_dist.model import device
from smolds_dist.model.configuration import DeepSeekV3Config
from smolds_dist.model.kernels import expert_ffn, row_multiple


class TopKRouter(nn.Module):
    """Scores every expert for every token and picks the best K.

    The selection bias is added for the choice only; the weights come from the unbiased scores (DeepSeek-V3, arXiv
    2412.19437, equation 16). Products and scores are fp32 whatever the model's dtype.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: DeepSeekV3Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns weights [T, K] (fp32), chosen experts [T, K] and logits [T, E] (fp32), before softmax or sigmoid."""
        with torch.autocast(x_TH.device.type, enabled=False):
            logits = F.linear(x_TH.float(), self.weight.float())
        scores = router_scores(logits, self.config.scoring_func)
        chosen = (scores + self.e_score_correction_bias).topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.config.routed_scaling_factor, chosen, logits


def router_scores(logits_TE: Tensor, scoring_func: str) -> Tensor:
    """Every expert's score for every token, [T, E]; `scoring_func` is softmax or sigmoid."""
    return logits_TE.softmax(-1) if scoring_func == "softmax" else logits_TE.sigmoid()


class DeepSeekExpertLayer(nn.Module):
    """E SwiGLU experts in two stacked weights, in the layout that transformers and DeepSpeed AutoEP expect."""

    def __init__(self, config: DeepSeekV3Config):
        super().__init__()
        E, H, width = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, width))

    def forward(self, x_TH: Tensor, weights_TK: Tensor, chosen_TK: Tensor, counts_E: Tensor) -> Tensor:
        """Weighted sum over each token's chosen experts, [T, H]. Dropless: no expert has a capacity."""
        padded_E, token_P, row_TK = sort_by_expert(chosen_TK, counts_E, row_multiple(x_TH))
        rows_PH = expert_ffn(_Dispatch.apply(x_TH, token_P, row_TK), padded_E, (self.gate_up_proj,), self.down_proj)
        return _Combine.apply(rows_PH, weights_TK, token_P, row_TK)


def sort_by_expert(chosen_TK: Tensor, counts_E: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each token goes among rows that are sorted by expert.

    On the CPU there are as many rows as are needed. Elsewhere the host would have to wait to learn how many these are, so
    there are as many as could be.

    Args:
        multiple: each expert's rows are padded to a multiple of it, with rows of token 0 that nobody reads.

    Returns:
        Rows of each expert, padding included [E]; the token of each row [P]; the row of each token and place [T, K].
    """
    padded_E = (counts_E + multiple - 1) // multiple * multiple
    order_M = chosen_TK.flatten().argsort(stable=True)
    # What padding before it moves an expert's rows by.
    shift_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
    shift_M = shift_E.repeat_interleave(counts_E, output_size=len(order_M))
    row_M = torch.arange(len(order_M), device=order_M.device) + shift_M
    most = len(order_M) + len(counts_E) * (multiple - 1)
    rows = int(padded_E.sum()) if device.family(chosen_TK) == "cpu" else most
    token_P = order_M.new_zeros(rows).index_copy_(0, row_M, order_M // chosen_TK.shape[1])
    row_TK = torch.empty_like(order_M).index_copy_(0, order_M, row_M).view_as(chosen_TK)
    return padded_E, token_P, row_TK


class _Dispatch(torch.autograd.Function):
    """x [T, H] to rows [P, H]. The gradient is gathered by token, which needs no zeros and no scattered additions."""

    @staticmethod
    def forward(ctx, x_TH: Tensor, token_P: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TH.index_select(0, token_P)

    @staticmethod
    def backward(ctx, grad_PH: Tensor):
        (row_TK,) = ctx.saved_tensors
        return grad_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1).sum(1), None, None


class _Combine(torch.autograd.Function):
    """Rows [P, H] to each token's weighted sum [T, H], in fp32 and rounded once."""

    @staticmethod
    def forward(ctx, rows_PH: Tensor, weights_TK: Tensor, token_P: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_PH, weights_TK, token_P, row_TK)
        rows_TKH = rows_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)
        return (rows_TKH * weights_TK[..., None]).sum(1).to(rows_PH.dtype)

    @staticmethod
    def backward(ctx, grad_TH: Tensor):
        rows_PH, weights_TK, token_P, row_TK = ctx.saved_tensors
        # Padding has the weight 0, hence no gradient.
        weights_P = weights_TK.new_zeros(len(token_P)).index_copy_(0, row_TK.flatten(), weights_TK.flatten())
        grad_rows = grad_TH.index_select(0, token_P) * weights_P[:, None]
        rows_TKH = rows_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)
        grad_weights = (rows_TKH.float() * grad_TH[:, None]).sum(-1)
        return grad_rows.to(rows_PH.dtype), grad_weights, None, None


class SharedExpert(nn.Module):
    """The SwiGLU that every token passes, `n_shared_experts` wide (DeepSeekMoE, arXiv 2401.06066, section 3.2)."""

    def __init__(self, config: DeepSeekV3Config):
        super().__init__()
        width = config.intermediate_size * config.n_shared_experts
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DeepSeekMoE(nn.Module):
    """Router, experts and optional shared expert over [B, S, H].

    `tokens_per_expert` adds up the routed rows of every forward pass; whoever reads it decides which passes count.
    `aux_loss` is the last training pass's load-balancing loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6),
    set only where `router_aux_loss_coef` asks for it.
    """

    tokens_per_expert: Tensor

    def __init__(self, config: DeepSeekV3Config):
        super().__init__()
        self.config = config
        self.gate = TopKRouter(config)
        self.experts = DeepSeekExpertLayer(config)
        self.shared_experts = SharedExpert(config) if config.n_shared_experts else None
        self.register_buffer("tokens_per_expert", torch.zeros(config.num_experts), persistent=False)
        self.aux_loss: Tensor | None = None

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        weights, chosen, logits = self.gate(x_TH)
        # Not bincount, for which the host would have to wait.
        ones = torch.ones_like(chosen).flatten()
        counts = ones.new_zeros(self.config.num_experts).index_add_(0, chosen.flatten(), ones)
        self.tokens_per_expert += counts
        if self.training and self.config.router_aux_loss_coef:
            share = counts / chosen.numel()
            scores = router_scores(logits, self.config.scoring_func)
            self.aux_loss = self.config.num_experts * (share * scores.mean(0)).sum()
        out = self.experts(x_TH, weights, chosen, counts)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x_TH)
        return out.view_as(x_BSH)
