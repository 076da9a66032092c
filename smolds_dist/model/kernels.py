"""The two expensive products of the model, one function each: the experts' FFN and the linear + cross-entropy loss.

Shape letters: T tokens, M routed rows (T x top-k), H hidden, E experts, I expert width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN compiles a kernel for every new matrix shape, which costs tens of milliseconds: rounding each expert's rows up
# keeps the number of shapes small on CPU in bf16. fp32 products go to a library that has no such cost.
CPU_ROW_MULTIPLE = 64


def expert_ffn(x_MH: Tensor, counts: list[int], gate_up_EJH: Tensor, down_EHI: Tensor) -> Tensor:
    """SwiGLU of each expert over its own rows: down(silu(gate(x)) * up(x)).

    Args:
        x_MH: rows sorted by expert.
        counts: rows of each expert, summing to M; zeros are allowed.
        gate_up_EJH: [E, 2 I, H], gate rows first, then up rows.
        down_EHI: [E, H, I].

    Returns:
        [M, H], in the order of `x_MH`.
    """
    pad_rows = x_MH.device.type == "cpu" and x_MH.dtype != torch.float32
    outputs = []
    # unbind, not indexing: its backward stacks the experts' gradients once, indexing would fill E full-size zeros.
    for rows, gate_up, down in zip(x_MH.split(counts), gate_up_EJH.unbind(), down_EHI.unbind(), strict=True):
        count = rows.shape[0]
        if pad_rows and count % CPU_ROW_MULTIPLE:
            rows = F.pad(rows, (0, 0, 0, -count % CPU_ROW_MULTIPLE))
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down)[:count])
    return torch.cat(outputs)


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
