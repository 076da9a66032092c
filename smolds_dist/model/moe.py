"""The mixture of experts: router, experts, and the layer that combines them.

Shape letters: B batch, S sequence, T = B x S tokens, K experts per token, M = T x K routed rows, P the same with padding,
H hidden, E experts, I expert width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolds_dist.model import device
from smolds_dist.model.configuration import DeepSeekV3Config
from smolds_dist.model.kernels import expert_ffn, gated, row_multiple
from smolds_dist.model.regions import region


class TopKRouter(nn.Module):
    """Score every expert for every token and select the best K.

    The bias affects the selection only; the weights come from the unbiased scores (DeepSeek-V3, arXiv 2412.19437,
    equation 16). Logits and scores are fp32 for any model dtype. With groups, experts are selected from the `topk_group`
    groups whose two best experts have the largest sum (section 2.1.2).
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: DeepSeekV3Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights [T, K] (fp32), selected experts [T, K] and logits [T, E] (fp32), before softmax or sigmoid."""
        with torch.autocast(x_TH.device.type, enabled=False):
            logits = F.linear(x_TH.float(), self.weight.float())
        config, bias = self.config, self.e_score_correction_bias
        how = config.scoring_func, config.num_experts_per_tok, config.norm_topk_prob
        weights, chosen = select_experts(logits, bias, *how, (config.n_group, config.topk_group))
        return weights * config.routed_scaling_factor, chosen, logits


@region
def select_experts(
    logits_TE: Tensor,
    bias_E: Tensor,
    scoring_func: str,
    top_k: int,
    normalized: bool,
    groups: tuple[int | None, int | None],
) -> tuple[Tensor, Tensor]:
    """Return each token's weights [T, K] and experts [T, K]; `groups` is (`n_group`, `topk_group`)."""
    scores = router_scores(logits_TE, scoring_func)
    biased = scores + bias_E
    if groups[0] is not None and groups[1] is not None:
        biased = within_best_groups(biased, groups[0], groups[1])
    if device.is_fused(logits_TE):
        weights, chosen = _best_in_turn(scores, biased, top_k)
    else:
        chosen = biased.topk(top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
    if normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights, chosen


def _best_in_turn(scores_TE: Tensor, biased_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return scores and experts [T, K] of the `top_k` largest biased scores, whose gradients need no scatter."""
    places_E = torch.arange(scores_TE.shape[-1], device=scores_TE.device)
    weights, chosen = [], []
    for _ in range(top_k):
        best = biased_TE.argmax(-1, keepdim=True)
        is_best = places_E == best
        weights.append((scores_TE * is_best).sum(-1, keepdim=True))
        chosen.append(best)
        biased_TE = biased_TE.masked_fill(is_best, -torch.inf)
    return torch.cat(weights, -1), torch.cat(chosen, -1)


def router_scores(logits_TE: Tensor, scoring_func: str) -> Tensor:
    """Return every expert's score for every token, [T, E]; `scoring_func` is softmax or sigmoid."""
    return logits_TE.softmax(-1) if scoring_func == "softmax" else logits_TE.sigmoid()


def within_best_groups(biased_TE: Tensor, groups: int, kept: int) -> Tensor:
    """Return the scores [T, E], with -inf outside each token's `kept` best groups."""
    grouped = biased_TE.unflatten(-1, (groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1, sorted=False).indices
    outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(outside[..., None], -torch.inf).view_as(biased_TE)


def balance_loss(logits_BSE: Tensor, scoring_func: str, top_k: int) -> Tensor:
    """Return the balance loss: 1 if every expert is selected equally often within each of B sequences, more if experts
    selected more often also score higher (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20). Over one sequence of all
    tokens it is Switch Transformer's (arXiv 2101.03961, equations 4 to 6). Ignores the selection bias."""
    scores_BSE = router_scores(logits_BSE, scoring_func)
    chosen_BM = scores_BSE.topk(top_k, dim=-1).indices.flatten(1)
    ones = torch.ones_like(chosen_BM, dtype=scores_BSE.dtype)
    share_BE = torch.zeros_like(scores_BSE[:, 0]).scatter_add_(1, chosen_BM, ones) / chosen_BM.shape[1]
    mean_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
    return logits_BSE.shape[-1] * (share_BE * mean_BE).sum(-1).mean()


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of the squared log of the softmax's denominator (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


class DeepSeekExpertLayer(nn.Module):
    """E SwiGLU experts in two stacked weights, in the layout that transformers and DeepSpeed AutoEP expect."""

    def __init__(self, config: DeepSeekV3Config):
        super().__init__()
        E, H, width = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, width))

    def forward(self, x_TH: Tensor, weights_TK: Tensor, chosen_TK: Tensor, counts_E: Tensor) -> Tensor:
        """Return the weighted sum over each token's selected experts, [T, H]. Dropless: no expert has a capacity."""
        if device.is_exported():
            return every_expert(x_TH, weights_TK, chosen_TK, self.gate_up_proj, self.down_proj)
        if len(self.down_proj) == 1:  # a dense model: nothing to dispatch
            inner = gated(F.linear(x_TH, self.gate_up_proj.squeeze(0)))
            out_TH = F.linear(inner, self.down_proj.squeeze(0))
            return out_TH * weights_TK.to(out_TH.dtype)
        sort = place_by_expert if device.is_fused(x_TH) else sort_by_expert
        padded_E, token_P, row_TK = sort(chosen_TK, counts_E, row_multiple(x_TH))
        dispatch = _traced_dispatch if device.is_traced() else _Dispatch.apply
        rows_PH = expert_ffn(dispatch(x_TH, token_P, row_TK), padded_E, (self.gate_up_proj,), self.down_proj)
        if device.is_traced():
            return _weighted_sum(rows_PH, weights_TK, row_TK)
        return _Combine.apply(rows_PH, weights_TK, token_P, row_TK)


def every_expert(x_TH: Tensor, weights_TK: Tensor, chosen_TK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor) -> Tensor:
    """Compute `DeepSeekExpertLayer.forward` with every expert for every token, weighted by 0 where it is not selected: E / K
    times the FLOPs, in plain operations that any runtime has, with shapes independent of the routing."""
    gate_ETI, up_ETI = (x_TH @ gate_up_EJH.mT).chunk(2, dim=-1)
    out_ETH = (F.silu(gate_ETI) * up_ETI) @ down_EHI.mT
    weights_TE = weights_TK.new_zeros(x_TH.shape[0], gate_up_EJH.shape[0]).scatter(1, chosen_TK, weights_TK)
    return (out_ETH * weights_TE.T[..., None]).sum(0).to(out_ETH.dtype)


def sort_by_expert(chosen_TK: Tensor, counts_E: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort tokens into rows by expert.

    On the CPU, P is the number of rows needed. Elsewhere, and if the code is traced, it is the upper bound: the exact number
    would need host synchronization.

    Args:
        multiple: each expert's rows are padded to a multiple of it, with rows of token 0 that are never read.

    Returns:
        Rows of each expert, padding included [E]; the token of each row [P]; the row of each token and slot [T, K].
    """
    padded_E = (counts_E + multiple - 1) // multiple * multiple
    chosen_M = chosen_TK.flatten()
    if device.family(chosen_TK) == "cuda" and counts_E.shape[0] <= 256:
        chosen_M = chosen_M.to(torch.uint8)  # a radix sort passes over the rows once per byte of the keys
    order_M = chosen_M.argsort(stable=True)
    # Offset of an expert's rows by the padding before them.
    shift_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
    shift_M = shift_E.repeat_interleave(counts_E, output_size=order_M.shape[0])
    row_M = torch.arange(order_M.shape[0], device=order_M.device) + shift_M
    most = order_M.shape[0] + counts_E.shape[0] * (multiple - 1)
    rows = int(padded_E.sum()) if device.family(chosen_TK) == "cpu" and not device.is_traced() else most
    token_P = order_M.new_zeros(rows).index_copy_(0, row_M, order_M // chosen_TK.shape[1])
    row_TK = torch.empty_like(order_M).index_copy_(0, order_M, row_M).view_as(chosen_TK)
    return padded_E, token_P, row_TK


def running_counts(chosen_TK: Tensor, experts: int) -> Tensor:
    """Return, for each expert and routed row in the tokens' order, the expert's rows up to this one: [E, M]."""
    places_E = torch.arange(experts, device=chosen_TK.device)
    return (places_E[:, None] == chosen_TK.flatten()).to(torch.int32).cumsum(1, dtype=torch.int32)


def place_by_expert(chosen_TK: Tensor, counts_E: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `sort_by_expert` with a scan in place of a sort and scatters; the token of each row is left undefined."""
    M, E = chosen_TK.numel(), counts_E.shape[0]
    running_EM = running_counts(chosen_TK, E)
    padded_E = (counts_E + multiple - 1) // multiple * multiple
    places_E = torch.arange(E, device=chosen_TK.device)
    start_E = (padded_E * (places_E < places_E[:, None])).sum(1)  # a cumulative sum of few would be a kernel of its own
    chosen_M = chosen_TK.flatten()
    row_M = start_E[chosen_M] + running_EM.gather(0, chosen_M[None])[0] - 1
    return padded_E, chosen_M.new_empty(M + E * (multiple - 1)), row_M.view_as(chosen_TK)


class _Dispatch(torch.autograd.Function):
    """Gather x [T, H] into rows [P, H]. The gradient is gathered by token, without zeroing and scatter-adds."""

    @staticmethod
    def forward(ctx, x_TH: Tensor, token_P: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TH.index_select(0, token_P)

    @staticmethod
    def backward(ctx, grad_PH: Tensor):
        (row_TK,) = ctx.saved_tensors
        return _sum_of_rows(grad_PH, row_TK), None, None


@region
def _sum_of_rows(rows_PH: Tensor, row_TK: Tensor) -> Tensor:
    return rows_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1).sum(1)


def _traced_dispatch(x_TH: Tensor, token_P: Tensor, row_TK: Tensor) -> Tensor:
    """Compute `_Dispatch` in plain operations. Scatters rather than gathers, so that the gradient is gathered by token here
    too and that of padding, which is undefined, is not read."""
    rows_PH = x_TH.new_zeros(token_P.shape[0], x_TH.shape[1])
    return rows_PH.index_copy(0, row_TK.flatten(), x_TH.repeat_interleave(row_TK.shape[1], 0))


@region
def _weighted_sum(rows_PH: Tensor, weights_TK: Tensor, row_TK: Tensor) -> Tensor:
    """Return each token's weighted sum of its rows, [T, H]."""
    rows_TKH = rows_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)
    return (rows_TKH * weights_TK[..., None]).sum(1).to(rows_PH.dtype)


class _Combine(torch.autograd.Function):
    """Combine rows [P, H] into each token's weighted sum [T, H], in fp32 and rounded once."""

    @staticmethod
    def forward(ctx, rows_PH: Tensor, weights_TK: Tensor, token_P: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_PH, weights_TK, token_P, row_TK)
        return _weighted_sum(rows_PH, weights_TK, row_TK)

    @staticmethod
    def backward(ctx, grad_TH: Tensor):
        rows_PH, weights_TK, token_P, row_TK = ctx.saved_tensors
        grad_rows, grad_weights = _gradients_of_weighted_sum(grad_TH, rows_PH, weights_TK, token_P, row_TK)
        return grad_rows, grad_weights, None, None


@region
def _gradients_of_weighted_sum(
    grad_TH: Tensor, rows_PH: Tensor, weights_TK: Tensor, token_P: Tensor, row_TK: Tensor
) -> tuple[Tensor, Tensor]:
    # Padding has weight 0, hence no gradient.
    weights_P = weights_TK.new_zeros(token_P.shape[0]).index_copy_(0, row_TK.flatten(), weights_TK.flatten())
    grad_rows = grad_TH.index_select(0, token_P) * weights_P[:, None]
    rows_TKH = rows_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)
    grad_weights = (rows_TKH.float() * grad_TH[:, None]).sum(-1)
    return grad_rows.to(rows_PH.dtype), grad_weights


class SwiGLU(nn.Module):
    """Dense feed-forward layer (arXiv 2002.05202, equation 6)."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows_TH = x.reshape(-1, x.shape[-1])
        return self.down_proj(gated(self.gate_proj(rows_TH), self.up_proj(rows_TH))).view_as(x)


class DeepSeekMoE(nn.Module):
    """Router, experts and optional shared expert (DeepSeekMoE, arXiv 2401.06066, section 3.2) over [B, S, H].

    `tokens_per_expert` sums the routed rows of every forward pass; its readers decide which passes count.
    `router_logits` collects a pass's logits [T, E] for the router losses, if the model has set it to an empty list;
    `observe` is called with them, if set.
    """

    tokens_per_expert: Tensor

    def __init__(self, config: DeepSeekV3Config):
        super().__init__()
        self.config = config
        self.gate = TopKRouter(config)
        self.experts = DeepSeekExpertLayer(config)
        shared_width = config.n_shared_experts * config.intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared_width) if shared_width else None
        self.register_buffer("tokens_per_expert", torch.zeros(config.num_experts), persistent=False)
        self.router_logits: list[Tensor] | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self.compiled_mix: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None

    def forward(self, x_BSH: Tensor) -> Tensor:
        mix = self.compiled_mix if self.compiled_mix and self.training else self.mix
        out_BSH, counts_E, logits_TE = mix(x_BSH)
        self.record(counts_E, logits_TE)
        return out_BSH

    def mix(self, x_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output [B, S, H], the routed rows of each expert [E] and the router's logits [T, E], without side
        effects, so that a compiler can take all of it as one region."""
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        weights, chosen, logits = self.gate(x_TH)
        if device.is_fused(x_TH):
            counts = running_counts(chosen, self.config.num_experts)[:, -1].long()
        else:  # not bincount, which synchronizes with the host
            ones = torch.ones_like(chosen).flatten()
            counts = ones.new_zeros(self.config.num_experts).index_add_(0, chosen.flatten(), ones)
        out = self.experts(x_TH, weights, chosen, counts)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x_TH)
        return out.view_as(x_BSH), counts, logits

    def record(self, counts_E: Tensor, logits_TE: Tensor) -> None:
        """Keep a pass's counts and logits for their readers."""
        if not device.is_exported():  # an exported graph has no use for counts and must not mutate state
            self.tokens_per_expert.add_(counts_E)
        if self.router_logits is not None:  # not during recomputation, whose graph would never be freed
            self.router_logits.append(logits_TE)
        if self.observe is not None:
            self.observe(logits_TE)
