"""The experts' FFN and the linear + cross-entropy loss; attention, the third costly kernel, is in `causal_attention`.

Tests compare output and gradients of each with the plain formula.

Shape letters: T tokens, K experts per token, P rows sorted by expert and padded, H hidden, E experts, I expert width,
V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from smolds_dist.architecture import LOGITS_CHUNK
from smolds_dist.model import device
from smolds_dist.model.regions import region

# oneDNN compiles a kernel for every new matrix shape, which costs tens of milliseconds: rounding each expert's rows up
# keeps the number of shapes small on CPU in bf16. fp32 matmuls use a library without this cost.
CPU_ROW_MULTIPLE = 64
# CUDA's grouped matmul needs groups aligned to 16 bytes, also when it sums over rows.
CUDA_ROW_MULTIPLE = 8
SOFTMAX_SIZE = 1 << 20  # probabilities per fp32 softmax block: a few megabytes, about a CPU's cache


def row_multiple(x: Tensor) -> int:
    """Return the multiple to which each expert's rows are padded.

    Args:
        x: tokens [T, H] or routed rows [P, H]; an expert gets at most as many rows.
    """
    kind = device.family(x)
    if kind == "cuda":
        return CUDA_ROW_MULTIPLE
    if kind != "cpu" or x.dtype == torch.float32:
        return 1
    if device.is_traced():
        return CPU_ROW_MULTIPLE
    # Generation token by token has few rows: powers of two are also few shapes.
    return min(CPU_ROW_MULTIPLE, 1 << (len(x) - 1).bit_length()) if len(x) else 1


def _in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """Cast a matmul's inputs as autocast would, if enabled: it does not reach into custom autograd functions."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def expert_ffn(x_PH: Tensor, counts_E: Tensor, gate_up: Sequence[Tensor], down_EHI: Tensor) -> Tensor:
    """Apply each expert's SwiGLU to its own rows: down(silu(gate(x)) * up(x)).

    On CUDA in bf16 by grouped matmuls without host synchronization; elsewhere expert by expert.

    Args:
        x_PH: rows sorted by expert; on CUDA each expert's begin at a multiple of `row_multiple`.
        counts_E: rows of each expert; zeros are allowed. Rows after these are unused.
        gate_up: one weight [E, 2 I, H] with the gate's rows first, or gate and up [E, I, H] each.
        down_EHI: [E, H, I].

    Returns:
        [P, H], in the order of `x_PH`, unused rows undefined. Second derivatives are not supported.
    """
    x_PH, down_EHI, *gate_up = _in_autocast_dtype(x_PH, down_EHI, *gate_up)
    with torch.autocast(x_PH.device.type, enabled=False):
        if device.family(x_PH) == "cuda" and x_PH.dtype == torch.bfloat16:
            return grouped_expert_ffn(x_PH, counts_E, gate_up, down_EHI)
        if device.calls_operators():
            return _opaque_expert_ffn(x_PH, counts_E, down_EHI, gate_up)[0]
        return _ExpertFFN.apply(x_PH, tuple(counts_E.tolist()), down_EHI, *gate_up)


def grouped_expert_ffn(x_PH: Tensor, counts_E: Tensor, gate_up: Sequence[Tensor], down_EHI: Tensor) -> Tensor:
    """Compute `expert_ffn` as two or three grouped matmuls."""
    if device.is_fused(x_PH):
        places_E = torch.arange(len(counts_E), device=x_PH.device)
        ends_E = (counts_E * (places_E <= places_E[:, None])).sum(1).to(torch.int32)
    else:
        ends_E = counts_E.cumsum(0).to(torch.int32)
    inner = [F.grouped_mm(x_PH, weight.mT, offs=ends_E) for weight in gate_up]
    return F.grouped_mm(gated(*inner), down_EHI.mT, offs=ends_E)


@region
def gated(*inner: Tensor) -> Tensor:
    """Return silu(gate) * up of gate and up, [n, I] each or concatenated [n, 2 I]."""
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
    return F.silu(gate) * up


@region
def gated_gradients(grad: Tensor, *inner: Tensor) -> tuple[Tensor, ...]:
    """Recompute `gated`'s result [n, I]; return it and the gradients of `inner`, given the result's gradient."""
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
    activated = F.silu(gate)
    gradients = torch.ops.aten.silu_backward(grad * up, gate), grad * activated
    return activated * up, *(gradients if len(inner) == 2 else (torch.cat(gradients, dim=-1),))


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_PH: Tensor, counts: tuple[int, ...], down_EHI: Tensor, *gate_up: Tensor) -> Tensor:
        out_PH, inner = _ffn_by_expert(x_PH, counts, down_EHI, gate_up)
        ctx.counts, ctx.weights = counts, len(gate_up)
        ctx.save_for_backward(x_PH, down_EHI, *gate_up, *inner)
        return out_PH

    @staticmethod
    def backward(ctx, grad_PH: Tensor):
        x_PH, down_EHI, *others = ctx.saved_tensors
        gate_up, inner = others[: ctx.weights], others[ctx.weights :]
        grad_x, *grad_weights = _ffn_gradients(grad_PH, x_PH, inner, ctx.counts, down_EHI, gate_up)
        return grad_x, None, *grad_weights


def _ffn_by_expert(
    x_PH: Tensor, counts: Sequence[int], down_EHI: Tensor, gate_up: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the output [P, H] and the activation's inputs, as `gated` takes them."""
    out_PH = torch.empty_like(x_PH)
    inner = [x_PH.new_empty(x_PH.shape[0], weight.shape[1]) for weight in gate_up]
    for e, rows in _experts(counts):
        parts = _of_rows(inner, rows)
        for part, weight in zip(parts, gate_up, strict=True):
            torch.mm(x_PH[rows], weight[e].T, out=part)
        torch.mm(gated(*parts), down_EHI[e].T, out=out_PH[rows])
    return out_PH, inner


def _of_rows(tensors: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Return these rows in the same memory; not as views, whose bases a compiler would guard on and find changed."""
    return [one[rows].data for one in tensors]


def _ffn_gradients(
    grad_PH: Tensor,
    x_PH: Tensor,
    inner: Sequence[Tensor],
    counts: Sequence[int],
    down_EHI: Tensor,
    gate_up: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradients of x, down and gate_up, one buffer per weight for all experts. Recomputes SwiGLU's activations
    expert by expert, while they are in the cache."""
    grad_PH = grad_PH.contiguous()
    grad_x = torch.empty_like(x_PH)
    grad_down = torch.empty_like(down_EHI)
    grad_gate_up = [torch.empty_like(weight) for weight in gate_up]
    for e, count in enumerate(counts):
        if not count:
            for gradient in (grad_down, *grad_gate_up):
                gradient[e].zero_()
    for e, rows in _experts(counts):
        hidden, *grad_inner = gated_gradients(grad_PH[rows] @ down_EHI[e], *_of_rows(inner, rows))
        torch.mm(grad_PH[rows].T, hidden, out=grad_down[e])
        for part, (gradient, weight) in enumerate(zip(grad_inner, gate_up, strict=True)):
            torch.mm(gradient.T, x_PH[rows], out=grad_gate_up[part][e])
            if part == 0:
                torch.mm(gradient, weight[e], out=grad_x[rows])
            else:
                grad_x[rows].addmm_(gradient, weight[e])
    return [grad_x, grad_down, *grad_gate_up]


# It reads the counts on the host, which a CUDA graph cannot.
@torch.library.custom_op("smolds::expert_ffn", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _opaque_expert_ffn(
    x_PH: Tensor, counts_E: Tensor, down_EHI: Tensor, gate_up: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Run `_ffn_by_expert` as one operator, for torch.compile, which need not know the counts, and selective
    checkpointing. Not for other callers: it hides its matmuls from FLOP counters. Returns the output and the activation's
    inputs as one tensor [P, 2 I]."""
    out_PH, inner = _ffn_by_expert(x_PH, counts_E.tolist(), down_EHI, gate_up)
    return out_PH, inner[0] if len(inner) == 1 else torch.cat(inner, dim=-1)


@_opaque_expert_ffn.register_fake
def _(x_PH, counts_E, down_EHI, gate_up):
    return torch.empty_like(x_PH), x_PH.new_empty(x_PH.shape[0], sum(weight.shape[1] for weight in gate_up))


@torch.library.custom_op("smolds::expert_ffn_gradients", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _opaque_ffn_gradients(
    grad_PH: Tensor, x_PH: Tensor, inner_PJ: Tensor, counts_E: Tensor, down_EHI: Tensor, gate_up: Sequence[Tensor]
) -> list[Tensor]:
    inner = inner_PJ.chunk(len(gate_up), dim=-1)
    return _ffn_gradients(grad_PH, x_PH, inner, counts_E.tolist(), down_EHI, gate_up)


@_opaque_ffn_gradients.register_fake
def _(grad_PH, x_PH, inner_PJ, counts_E, down_EHI, gate_up):
    return [torch.empty_like(one) for one in (x_PH, down_EHI, *gate_up)]


def _save_for_backward(ctx, inputs, output) -> None:
    x_PH, counts_E, down_EHI, gate_up = inputs
    ctx.save_for_backward(x_PH, output[1], counts_E, down_EHI, *gate_up)


def _gradients_of_ffn(ctx, grad_PH: Tensor, _unused: Tensor | None):
    x_PH, inner_PJ, counts_E, down_EHI, *gate_up = ctx.saved_tensors
    gradients = _opaque_ffn_gradients(grad_PH, x_PH, inner_PJ, counts_E, down_EHI, gate_up)
    return gradients[0], None, gradients[1], gradients[2:]


_opaque_expert_ffn.register_autograd(_gradients_of_ffn, setup_context=_save_for_backward)


def _experts(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Return the experts that have rows, each with its rows."""
    ends = [0, *accumulate(counts)]
    return [(e, slice(start, end)) for e, (start, end) in enumerate(pairwise(ends)) if start < end]


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute both gradients chunk by chunk during the forward pass, so that only one chunk's logits exist at a time."""

    @staticmethod
    def forward(
        ctx, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk_size: int, needs_grad: bool
    ) -> Tensor:
        loss, grad_hidden, grad_weight = _loss_and_gradients(hidden_TH, weight_VH, labels_T, chunk_size, needs_grad)
        ctx.num_labels = (labels_T >= 0).sum().clamp(min=1)
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / ctx.num_labels

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.num_labels
        return grad_hidden * scale, grad_weight * scale, None, None, None


def _loss_and_gradients(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk_size: int, needs_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the summed loss and, if needed, its gradients for hidden states and weight."""
    kept_T = labels_T >= 0
    on_cpu = device.family(hidden_TH) == "cpu"
    loss = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
    grad_hidden = torch.empty_like(hidden_TH) if needs_grad else None
    grad_weight: Tensor | None = None
    room = hidden_TH.new_empty(min(chunk_size, len(hidden_TH)), len(weight_VH))
    for start in range(0, len(hidden_TH), chunk_size):
        part = slice(start, start + chunk_size)
        hidden = hidden_TH[part]
        logits = torch.mm(hidden, weight_VH.T, out=room[: len(hidden)])
        at_once = max(1, SOFTMAX_SIZE // len(weight_VH)) if on_cpu else chunk_size
        pieces = (tensor.split(at_once) for tensor in (logits, labels_T[part, None].clamp(min=0), kept_T[part, None]))
        for rows, labels, kept in zip(*pieces, strict=True):
            if on_cpu:
                loss += _to_gradients_on_cpu(rows, labels, kept, needs_grad).sum()
            else:
                loss += _to_gradients(rows, labels, kept).sum()
        if grad_hidden is None:
            continue
        torch.mm(logits, weight_VH, out=grad_hidden[part])
        of_chunk = logits.T @ hidden
        if grad_weight is None:
            grad_weight = of_chunk if len(hidden_TH) <= chunk_size else of_chunk.float()
        else:
            grad_weight += of_chunk
    return loss, grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype)


@torch.library.custom_op("smolds::linear_cross_entropy", mutates_args=())
def _opaque_loss_and_gradients(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk_size: int, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `_loss_and_gradients` as one operator, for torch.compile and torch.export; plain operations would hold all
    logits. Gradients that are not needed are empty. Not for other callers: it hides its matmuls from FLOP counters."""
    loss, *gradients = _loss_and_gradients(hidden_TH, weight_VH, labels_T, chunk_size, needs_grad)
    grad_hidden, grad_weight = (hidden_TH.new_empty(0) if one is None else one for one in gradients)
    return loss, grad_hidden, grad_weight


@_opaque_loss_and_gradients.register_fake
def _(hidden_TH, weight_VH, labels_T, chunk_size, needs_grad):
    loss = hidden_TH.new_empty((), dtype=torch.float32)
    if not needs_grad:
        return loss, hidden_TH.new_empty(0), hidden_TH.new_empty(0)
    return loss, torch.empty_like(hidden_TH), torch.empty_like(weight_VH)


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx, grad_loss: Tensor, *_unused: Tensor | None):
    grad_hidden, grad_weight = ctx.saved_tensors
    return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None


_opaque_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@region
def _to_gradients(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Overwrite `logits` [n, V] with d loss / d logits = softmax - one_hot; backward divides by the number of labels.
    Statistics in fp32.

    Args:
        labels: [n, 1].
        kept: [n, 1], True if a label counts.

    Returns:
        The losses, -log of the labels' probability [n, 1], 0 where a label does not count.
    """
    share = logits.float()
    log_norm = torch.logsumexp(share, dim=-1, keepdim=True)
    losses = (log_norm - share.gather(1, labels)) * kept
    share = share.sub_(log_norm).exp_()
    if device.is_traced():  # a comparison can be fused, a scatter cannot
        share = share - (torch.arange(share.shape[1], device=share.device) == labels).float()
    else:
        share.scatter_add_(1, labels, torch.full_like(losses, -1.0))
    logits.copy_(share * kept if device.is_traced() else share.mul_(kept))
    return losses


def _to_gradients_on_cpu(logits: Tensor, labels: Tensor, kept: Tensor, needs_grad: bool) -> Tensor:
    """Compute `_to_gradients` by PyTorch's softmax, which is as fast there as compiled code; overwrites `logits` only if
    gradients are needed."""
    share = torch.softmax(logits.float(), dim=-1)
    of_label = share.gather(1, labels)
    if not (of_label > 1e-30).all():  # a smaller one has lost precision, or is 0
        return _to_gradients.plain(logits, labels, kept)
    if needs_grad:
        share.scatter_add_(1, labels, torch.full_like(of_label, -1.0))
        if not kept.all():
            share *= kept
        logits.copy_(share)
    return -of_label.log() * kept


def linear_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Return the mean of cross_entropy(hidden @ weight.T, labels) over labels >= 0, with logits of `chunk_size` tokens at
    a time; default: `LOGITS_CHUNK`.

    Second derivatives are not supported. Statistics are fp32 for any input dtype.

    Returns:
        An fp32 scalar; 0 if every label is negative.
    """
    hidden_TH, weight_VH = _in_autocast_dtype(hidden_TH, weight_VH)
    chunk_size = chunk_size or LOGITS_CHUNK[device.family(hidden_TH)]
    with torch.autocast(hidden_TH.device.type, enabled=False):
        needs_grad = torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad)
        if device.is_traced():
            loss, *_ = _opaque_loss_and_gradients(hidden_TH, weight_VH, labels_T, chunk_size, needs_grad)
            return loss / (labels_T >= 0).sum().clamp(min=1)
        return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T, chunk_size, needs_grad)
