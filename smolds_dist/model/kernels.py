"""What the model spends its time on: the experts' FFN, attention, and the linear + cross-entropy loss.

Tests hold each to the plain formula, forward and in its gradients.

Shape letters: T tokens, K experts per token, P rows sorted by expert and padded, H hidden, E experts, I expert width,
V vocabulary; B batch, N query heads, G key/value heads, S sequence, D head dimension.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolds_dist.model import device

# oneDNN compiles a kernel for every new matrix shape, which costs tens of milliseconds: rounding each expert's rows up
# keeps the number of shapes small on CPU in bf16. fp32 products go to a library that has no such cost.
CPU_ROW_MULTIPLE = 64
# CUDA's grouped product wants groups that begin at multiples of 16 bytes, also where rows are what is summed over.
CUDA_ROW_MULTIPLE = 8
ATTENTION_BLOCK = {
    torch.bfloat16: 128,
    torch.float32: 64,
}  # queries, the fastest of those tried at 256 and 1,024 tokens
HALF = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256  # that FlashAttention takes
SOFTMAX_SIZE = 1 << 20  # probabilities of an fp32 softmax that are held at once: a few megabytes, near a CPU's cache


def row_multiple(x: Tensor) -> int:
    """What each expert's rows should be padded to a multiple of."""
    kind = device.family(x)
    if kind == "cuda":
        return CUDA_ROW_MULTIPLE
    return CPU_ROW_MULTIPLE if kind == "cpu" and x.dtype != torch.float32 else 1


def _in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """What autocast would do to a product's inputs, where it is on: it does not look into functions of our own."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def expert_ffn(x_PH: Tensor, counts_E: Tensor, gate_up: Sequence[Tensor], down_EHI: Tensor) -> Tensor:
    """SwiGLU of each expert over its own rows: down(silu(gate(x)) * up(x)).

    On CUDA in bf16 by grouped products, which the host does not wait for; elsewhere expert by expert.

    Args:
        x_PH: rows sorted by expert; on CUDA each expert's begin at a multiple of `row_multiple`.
        counts_E: rows of each expert; zeros are allowed. Rows after these are nobody's.
        gate_up: one weight [E, 2 I, H] with the gate's rows first, or gate and up [E, I, H] each.
        down_EHI: [E, H, I].

    Returns:
        [P, H], in the order of `x_PH`, nobody's rows undefined. Second derivatives are not supported.
    """
    x_PH, down_EHI, *gate_up = _in_autocast_dtype(x_PH, down_EHI, *gate_up)
    with torch.autocast(x_PH.device.type, enabled=False):
        if device.family(x_PH) == "cuda" and x_PH.dtype == torch.bfloat16:
            return grouped_expert_ffn(x_PH, counts_E, gate_up, down_EHI)
        return _ExpertFFN.apply(x_PH, tuple(counts_E.tolist()), down_EHI, *gate_up)


def grouped_expert_ffn(x_PH: Tensor, counts_E: Tensor, gate_up: Sequence[Tensor], down_EHI: Tensor) -> Tensor:
    """`expert_ffn` as two or three grouped products."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    inner = [F.grouped_mm(x_PH, weight.mT, offs=ends_E) for weight in gate_up]
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down_EHI.mT, offs=ends_E)


def expert_ffn_reference(x_PH: Tensor, counts_E: Tensor, gate_up: Sequence[Tensor], down_EHI: Tensor) -> Tensor:
    """The same function in plain operations, where all rows are somebody's."""
    gate_EIH, up_EIH = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=1)
    outputs = []
    for rows, gate, up, down in zip(x_PH.split(counts_E.tolist()), gate_EIH, up_EIH, down_EHI, strict=True):
        outputs.append(F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down))
    return torch.cat(outputs)


class _ExpertFFN(torch.autograd.Function):
    """Gradients of all experts are written into one buffer per weight. SwiGLU's own values are computed again in the
    backward pass, expert by expert, while they are in the cache."""

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
        kept_T = labels_T >= 0
        on_cpu = device.family(hidden_TH) == "cpu"
        ctx.num_labels = kept_T.sum().clamp(min=1)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        grad_hidden = torch.empty_like(hidden_TH) if needs_grad else None
        grad_weight: Tensor | None = None
        room = hidden_TH.new_empty(min(chunk_size, len(hidden_TH)), len(weight_VH))
        for start in range(0, len(hidden_TH), chunk_size):
            part = slice(start, start + chunk_size)
            hidden = hidden_TH[part]
            logits = torch.mm(hidden, weight_VH.T, out=room[: len(hidden)])
            at_once = max(1, SOFTMAX_SIZE // len(weight_VH)) if on_cpu else chunk_size
            pieces = (tensor.split(at_once) for tensor in (logits, kept_T[part], labels_T[part]))
            for rows, kept, labels in zip(*pieces, strict=True):
                labels = labels[:, None].clamp(min=0)
                share, losses = _softmax_and_loss(rows.float(), labels)
                loss += (losses * kept[:, None]).sum()
                if grad_hidden is not None:
                    # d loss / d logits = softmax - one_hot, but for the division by the number of labels, which is left to
                    # backward.
                    share.scatter_add_(1, labels, torch.full_like(losses, -1.0))
                    if not on_cpu or not kept.all():  # a GPU would have to wait for the answer
                        share *= kept[:, None]
                    rows.copy_(share)
            if grad_hidden is None:
                continue
            torch.mm(logits, weight_VH, out=grad_hidden[part])
            of_chunk = logits.T @ hidden
            if grad_weight is None:
                grad_weight = of_chunk if len(hidden_TH) <= chunk_size else of_chunk.float()
            else:
                grad_weight += of_chunk
        if grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VH.dtype))
        return loss / ctx.num_labels

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.num_labels
        return grad_hidden * scale, grad_weight * scale, None, None


def _softmax_and_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and -log of the labels' share [n, 1], in fp32."""
    if device.family(logits) == "cpu":
        share = torch.softmax(logits, dim=-1)
        of_label = share.gather(1, labels)
        if (of_label > 1e-30).all():  # a smaller one has lost digits, or is 0
            return share, -of_label.log()
    log_norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    losses = log_norm - logits.gather(1, labels)
    return logits.sub_(log_norm).exp_(), losses


class Documents:
    """Where the documents of packed sequences begin, as `causal_attention` wants it.

    Letters: B batch, S sequence, C queries of a block, Z keys that it meets.

    Args:
        position_ids: [B, S], each document's own, from 0.
    """

    def __init__(self, position_ids: Tensor):
        places_S = torch.arange(position_ids.shape[1], device=position_ids.device)
        self._first_BS = places_S - position_ids  # where each token's document begins
        self._blocks: dict[torch.dtype, list[tuple[slice, slice, Tensor]]] = {}

    @cached_property
    def bounds(self) -> Tensor:
        """Where each document begins among all B x S tokens, and the end (int32), as kernels for sequences of many lengths
        want it. The host waits for their number, once for all layers."""
        first = torch.arange(self._first_BS.shape[1], device=self._first_BS.device) == self._first_BS
        return F.pad(first.flatten().nonzero().flatten(), (0, 1), value=first.numel()).to(torch.int32)

    def blocks(self, dtype: torch.dtype) -> list[tuple[slice, slice, Tensor]]:
        """Each block's queries, the keys that it meets, and what is added to its scores [B, C, Z]: 0, or -inf for a key of
        another document or after the query. Made once for all layers."""
        if dtype not in self._blocks:
            self._blocks[dtype] = [self._block(queries, dtype) for queries in _blocks(self._first_BS.shape[1], dtype)]
        return self._blocks[dtype]

    def _block(self, queries: slice, dtype: torch.dtype) -> tuple[slice, slice, Tensor]:
        first_BC = self._first_BS[:, queries]
        keys = slice(int(first_BC.min()), queries.stop)
        places_Z, places_C = (torch.arange(part.start, part.stop) for part in (keys, queries))
        hidden_BCZ = (places_Z < first_BC[..., None]) | (places_Z > places_C[:, None])
        return queries, keys, torch.zeros(hidden_BCZ.shape, dtype=dtype).masked_fill_(hidden_BCZ, -torch.inf)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Documents | None = None
) -> Tensor:
    """softmax(query key^T scale + causal mask) value, on the CPU faster than PyTorch's fused kernel there.

    Documents on CUDA by `varlen_attention`. On the CPU blocks of queries meet only keys up to their end, and none before the
    first of their documents; heads that share keys and values are rows of one product, so these are never repeated.
    Shares are computed again in the backward pass, in which keys' and values' gradients add up in fp32.

    Args:
        query: [B, N, S, D], fp32 or bf16.
        key: [B, G, S, D], G dividing N.
        value: [B, G, S, D'].
        documents: attention stays within them; without, a sequence is one.

    Returns:
        [B, N, S, D']. Second derivatives are not supported.
    """
    if documents is not None and device.family(query) == "cuda":
        return varlen_attention(query, key, value, scale, documents)
    return _CausalAttention.apply(query, key, value, scale, documents)


def takes_documents(x_BSH: Tensor, widest_head: int) -> bool:
    """Whether `causal_attention` takes `Documents` on the device and in the dtype of `x_BSH`; else it takes a mask."""
    if device.family(x_BSH) == "cuda":
        return x_BSH.dtype in HALF and widest_head <= WIDEST_HEAD and x_BSH.shape[1] > 1
    return device.family(x_BSH) == "cpu" and x_BSH.dtype in ATTENTION_BLOCK and x_BSH.shape[1] > 1


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Documents) -> Tensor:
    """`causal_attention` within documents by PyTorch's kernel for sequences of many lengths (FlashAttention), which runs on
    CUDA in half precision alone.

    It wants one width for all three, a multiple of 8: narrower ones are filled up with zeros, which change nothing.
    """
    B, N, S, D = query.shape
    width = -(-max(D, value.shape[-1]) // 8) * 8
    attend, takes_groups = _varlen()
    if key.shape[1] < N and not takes_groups:
        key, value = (one.repeat_interleave(N // key.shape[1], 1) for one in (key, value))
    rows = [one.transpose(1, 2).flatten(0, 1) for one in (query, key, value)]
    rows = [one if one.shape[-1] == width else F.pad(one, (0, width - one.shape[-1])) for one in rows]
    options = {"enable_gqa": True} if takes_groups else {}
    bounds = documents.bounds
    out = attend(*rows, bounds, bounds, S, S, scale=scale, window_size=(-1, 0), **options)
    return out[..., : value.shape[-1]].view(B, S, N, -1).transpose(1, 2)


@cache
def _varlen() -> tuple[Callable[..., Any], bool]:
    """PyTorch's function, and whether it takes fewer key than query heads, as it does from torch 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


class _CausalAttention(torch.autograd.Function):
    """Inside: X = B x G groups, R = N / G heads of a group, C queries of a block, Z keys that it meets."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Documents | None) -> Tensor:
        B, N, S, D = query.shape
        X, R = B * key.shape[1], N // key.shape[1]
        query_XRSD = (query * scale).reshape(X, R, S, D)
        key_XSD, value_XSD = key.reshape(X, S, D), value.reshape(X, S, -1)
        out_XRSD = query.new_empty(X, R, S, value.shape[-1])
        ctx.blocks = documents.blocks(query.dtype) if documents else _whole_blocks(S, query.dtype)
        for block, keys, mask in ctx.blocks:
            share = _attention_shares(query_XRSD[:, :, block], key_XSD[:, keys], mask)
            out_XRSD[:, :, block] = torch.bmm(share, value_XSD[:, keys]).view(X, R, -1, value.shape[-1])
        ctx.save_for_backward(query_XRSD, key_XSD, value_XSD, out_XRSD)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return out_XRSD.view(B, N, S, -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query_XRSD, key_XSD, value_XSD, out_XRSD = ctx.saved_tensors
        X, D = len(query_XRSD), query_XRSD.shape[-1]
        grad_XRSD = grad.reshape(out_XRSD.shape)
        # Softmax's gradient is share * (grad - sum(share * grad)), and that sum is grad * out, summed over D'.
        inner_XRS = (grad_XRSD.float() * out_XRSD).sum(-1).to(grad.dtype)
        grad_query = torch.empty_like(query_XRSD)
        grad_key, grad_value = (torch.zeros_like(one, dtype=torch.float32) for one in (key_XSD, value_XSD))
        for block, keys, mask in ctx.blocks:
            seen = query_XRSD[:, :, block]
            share = _attention_shares(seen, key_XSD[:, keys], mask)
            grad_out = grad_XRSD[:, :, block].reshape(X, share.shape[1], -1)
            grad_value[:, keys] += torch.bmm(share.mT, grad_out)
            grad_share = torch.bmm(grad_out, value_XSD[:, keys].mT)
            grad_scores = grad_share.sub_(inner_XRS[:, :, block].reshape(X, -1, 1)).mul_(share)
            grad_query[:, :, block] = torch.bmm(grad_scores, key_XSD[:, keys]).view(seen.shape)
            grad_key[:, keys] += torch.bmm(grad_scores.mT, seen.reshape(X, -1, D))
        gradients = (grad_query.mul_(ctx.scale), grad_key.to(grad.dtype), grad_value.to(grad.dtype))
        return *(gradient.view(shape) for gradient, shape in zip(gradients, ctx.shapes, strict=True)), None, None


def _blocks(length: int, dtype: torch.dtype) -> list[slice]:
    size = ATTENTION_BLOCK[dtype]
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _whole_blocks(length: int, dtype: torch.dtype) -> list[tuple[slice, slice, Tensor | None]]:
    """As `Documents.blocks` of one document."""
    return [(block, slice(0, block.stop), None) for block in _blocks(length, dtype)]


def _attention_shares(query_XRCD: Tensor, key_XZD: Tensor, mask_BCZ: Tensor | None) -> Tensor:
    """Softmax of a block's scores, [X, R x C, Z]. The last C keys are the block's own."""
    X, R, C, D = query_XRCD.shape
    scores = torch.bmm(query_XRCD.reshape(X, R * C, D), key_XZD.mT)
    # Adding is vectorised, filling by a mask is not.
    if mask_BCZ is None:
        scores.view(X, R, C, -1)[..., -C:] += scores.new_full((C, C), -torch.inf).triu_(1)
    else:
        scores.view(len(mask_BCZ), -1, *mask_BCZ.shape[1:]).add_(mask_BCZ[:, None])
    return torch.softmax(scores, dim=-1)


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk_size: int = 1024) -> Tensor:
    """Mean of cross_entropy(hidden @ weight.T, labels) over labels >= 0, holding logits of `chunk_size` tokens only.

    Gradients are those of the mean; second derivatives are not supported. fp32 statistics whatever the inputs' dtype.

    Returns:
        An fp32 scalar; 0 where every label is negative.
    """
    hidden_TH, weight_VH = _in_autocast_dtype(hidden_TH, weight_VH)
    with torch.autocast(hidden_TH.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T, chunk_size)
