"""The two expensive products of the model: the experts' FFN and the linear + cross-entropy loss.

Each has a fast path and, beside it, the plain one that it must agree with.

Shape letters: T tokens, K experts per token, P rows sorted by expert and padded, H hidden, E experts, I expert width,
V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN compiles a kernel for every new matrix shape, which costs tens of milliseconds: rounding each expert's rows up
# keeps the number of shapes small on CPU in bf16. fp32 products go to a library that has no such cost.
CPU_ROW_MULTIPLE = 64


def row_multiple(x: Tensor) -> int:
    """What each expert's rows should be padded to a multiple of."""
    return CPU_ROW_MULTIPLE if x.device.type == "cpu" and x.dtype != torch.float32 else 1


def expert_ffn(x_PH: Tensor, counts: Sequence[int], gate_up: Sequence[Tensor], down_EHI: Tensor) -> Tensor:
    """SwiGLU of each expert over its own rows: down(silu(gate(x)) * up(x)).

    Gradients of all experts are written into one buffer per weight; SwiGLU's own values are computed again in the backward
    pass, expert by expert, while they are in the cache.

    Args:
        x_PH: rows sorted by expert.
        counts: rows of each expert, summing to P; zeros are allowed.
        gate_up: one weight [E, 2 I, H] with the gate's rows first, or gate and up [E, I, H] each.
        down_EHI: [E, H, I].

    Returns:
        [P, H], in the order of `x_PH`. Second derivatives are not supported.
    """
    return _ExpertFFN.apply(x_PH, tuple(counts), down_EHI, *gate_up)


def expert_ffn_reference(x_PH: Tensor, counts: Sequence[int], gate_up: Sequence[Tensor], down_EHI: Tensor) -> Tensor:
    """The same function in plain operations."""
    gate_EIH, up_EIH = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=1)
    outputs = []
    for rows, gate, up, down in zip(x_PH.split(list(counts)), gate_EIH, up_EIH, down_EHI, strict=True):
        outputs.append(F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down))
    return torch.cat(outputs)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_PH: Tensor, counts: tuple[int, ...], down_EHI: Tensor, *gate_up: Tensor) -> Tensor:
        inner = sum(weight.shape[1] for weight in gate_up)  # 2 I
        inner_PJ = x_PH.new_empty(len(x_PH), inner)
        out_PH = torch.empty_like(x_PH)
        width = inner // len(gate_up)
        for e, rows in _experts(counts):
            for part, weight in enumerate(gate_up):
                torch.mm(x_PH[rows], weight[e].T, out=inner_PJ[rows, part * width : (part + 1) * width])
            gate, up = inner_PJ[rows].chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), down_EHI[e].T, out=out_PH[rows])
        ctx.counts = counts
        ctx.save_for_backward(x_PH, inner_PJ, down_EHI, *gate_up)
        return out_PH

    @staticmethod
    def backward(ctx, grad_PH: Tensor):
        x_PH, inner_PJ, down_EHI, *gate_up = ctx.saved_tensors
        grad_PH = grad_PH.contiguous()
        grad_x = torch.empty_like(x_PH)
        grad_down = torch.empty_like(down_EHI)
        grad_gate_up = [torch.empty_like(weight) for weight in gate_up]
        width = inner_PJ.shape[1] // len(gate_up)
        for e, count in enumerate(ctx.counts):
            if not count:
                for gradient in (grad_down, *grad_gate_up):
                    gradient[e].zero_()
        for e, rows in _experts(ctx.counts):
            gate, up = inner_PJ[rows].chunk(2, dim=-1)
            activated = F.silu(gate)
            grad_hidden = grad_PH[rows] @ down_EHI[e]
            torch.mm(grad_PH[rows].T, activated * up, out=grad_down[e])
            grad_inner = torch.empty_like(inner_PJ[rows])
            grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
            torch.mul(grad_hidden, activated, out=grad_up)
            torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate, grad_input=grad_gate)
            for part, weight in enumerate(gate_up):
                gradient = grad_inner[:, part * width : (part + 1) * width]
                torch.mm(gradient.T, x_PH[rows], out=grad_gate_up[part][e])
                if part == 0:
                    torch.mm(gradient, weight[e], out=grad_x[rows])
                else:
                    grad_x[rows].addmm_(gradient, weight[e])
        return grad_x, None, grad_down, *grad_gate_up


def _experts(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Experts that have rows, each with its rows."""
    found, start = [], 0
    for e, count in enumerate(counts):
        if count:
            found.append((e, slice(start, start + count)))
        start += count
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes both gradients chunk by chunk during the forward pass, so no chunk's logits outlive it."""

    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk_size: int) -> Tensor:
        needs_grad = hidden_TH.requires_grad or weight_VH.requires_grad
        kept = labels_T >= 0
        num_labels = kept.sum().clamp(min=1)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        if needs_grad:
            grad_hidden = torch.empty_like(hidden_TH)
            grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        for start in range(0, hidden_TH.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            hidden, labels, keep = hidden_TH[part], labels_T[part].clamp(min=0), kept[part]
            logits = (hidden @ weight_VH.T).float()
            log_norm = torch.logsumexp(logits, dim=-1)
            picked = logits.gather(1, labels[:, None])[:, 0]
            loss += ((log_norm - picked) * keep).sum()
            if needs_grad:
                # d loss / d logits = softmax - one_hot, written over the logits.
                grad = logits.sub_(log_norm[:, None]).exp_()
                grad.scatter_add_(1, labels[:, None], torch.full_like(picked, -1.0)[:, None])
                grad = (grad * (keep / num_labels)[:, None]).to(hidden.dtype)
                grad_hidden[part] = grad @ weight_VH
                grad_weight += grad.T @ hidden
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VH.dtype))
        return loss / num_labels

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss.to(grad_weight.dtype), None, None


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk_size: int = 1024) -> Tensor:
    """Mean of cross_entropy(hidden @ weight.T, labels) over labels >= 0, holding logits of `chunk_size` tokens only.

    Gradients are those of the mean; second derivatives are not supported. fp32 statistics whatever the inputs' dtype.

    Returns:
        An fp32 scalar; 0 where every label is negative.
    """
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T, chunk_size)
