"""Causal attention within full sequences and within packed documents, faster than PyTorch's on the CPU.

Tests compare output and gradients with the plain formula.

Shape letters: B batch, N query heads, G key/value heads, S sequence, D head dimension.
"""

import inspect
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolds_dist.model import device

# Queries per block, the fastest of those tried at 256 and 1,024 tokens.
ATTENTION_BLOCK = {torch.bfloat16: 128, torch.float32: 64}
HALF = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256  # FlashAttention's limit


class Documents:
    """Start positions of the documents in packed sequences, for `causal_attention`.

    Letters: B batch, S sequence, C queries of a block, Z keys that it reads.

    Args:
        position_ids: [B, S], starting from 0 in each document.
        bounds: as `bounds` below, if the caller knows them.
    """

    def __init__(self, position_ids: Tensor, bounds: Tensor | None = None):
        if bounds is not None:
            self.bounds = bounds
        places_S = torch.arange(position_ids.shape[1], device=position_ids.device)
        self.first_BS = places_S - position_ids  # start of each token's document
        self._blocks: dict[torch.dtype, list[tuple[slice, slice, Tensor]]] = {}

    @cached_property
    def bounds(self) -> Tensor:
        """Start of each document among all B x S tokens, and the end (int32), as variable-length kernels take it.
        Unless given, they synchronize with the host, once for all layers."""
        first = torch.arange(self.first_BS.shape[1], device=self.first_BS.device) == self.first_BS
        return F.pad(first.flatten().nonzero().flatten(), (0, 1), value=first.numel()).to(torch.int32)

    def blocks(self, dtype: torch.dtype) -> list[tuple[slice, slice, Tensor]]:
        """Return each block's queries, the keys that it reads, and the mask added to its scores [B, C, Z]: 0, or -inf for
        a key of another document or after the query. Built once for all layers."""
        if dtype not in self._blocks:
            self._blocks[dtype] = [self._block(queries, dtype) for queries in _blocks(self.first_BS.shape[1], dtype)]
        return self._blocks[dtype]

    def _block(self, queries: slice, dtype: torch.dtype) -> tuple[slice, slice, Tensor]:
        first_BC = self.first_BS[:, queries]
        keys = slice(int(first_BC.min()), queries.stop)
        places_Z, places_C = (torch.arange(part.start, part.stop) for part in (keys, queries))
        hidden_BCZ = (places_Z < first_BC[..., None]) | (places_Z > places_C[:, None])
        return queries, keys, torch.zeros(hidden_BCZ.shape, dtype=dtype).masked_fill_(hidden_BCZ, -torch.inf)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Documents | None = None
) -> Tensor:
    """Compute softmax(query key^T scale + causal mask) value, on the CPU faster than PyTorch's fused kernel.

    Documents on CUDA use `varlen_attention`. On the CPU, a block of queries reads only keys up to its end, and none before
    its first document; heads that share keys and values are rows of one matmul, so these are never repeated.
    The backward pass recomputes the attention weights and sums the gradients of keys and values in fp32.

    Args:
        query: [B, N, S, D], fp32 or bf16.
        key: [B, G, S, D], G dividing N.
        value: [B, G, S, D'].
        documents: attention stays within them; None: each sequence is one.

    Returns:
        [B, N, S, D']. Second derivatives are not supported.
    """
    if documents is not None and device.family(query) == "cuda":
        return varlen_attention(query, key, value, scale, documents)
    query = query * scale
    if documents is None and device.calls_operators():
        return _opaque_attention(query, key, value)
    return _CausalAttention.apply(query, key, value, documents)


def supports_documents(x_BSH: Tensor, widest_head: int) -> bool:
    """Return True if attention can take `Documents` on the device and in the dtype of `x_BSH`; else it needs a mask."""
    if device.family(x_BSH) == "cuda":
        return x_BSH.dtype in HALF and widest_head <= WIDEST_HEAD and x_BSH.shape[1] > 1
    return device.family(x_BSH) == "cpu" and x_BSH.dtype in ATTENTION_BLOCK and x_BSH.shape[1] > 1


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Documents) -> Tensor:
    """Compute `causal_attention` within documents by PyTorch's variable-length kernel (FlashAttention), which runs on CUDA
    in half precision only.

    All three need the same width, a multiple of 8: narrower ones are padded with zeros, which change nothing.
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
    """Return PyTorch's function, and True if it takes fewer key than query heads (torch 2.12 and later)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        ctx.blocks = documents.blocks(query.dtype) if documents else _full_blocks(query.shape[2], query.dtype)
        # Copies, so that the tensors that they are views of are not kept for the backward pass.
        key, value = key.contiguous(), value.contiguous()
        out = _attention(query, key, value, ctx.blocks)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out = ctx.saved_tensors
        return *_attention_gradients(grad, query, key, value, out, ctx.blocks), None


Blocks = list[tuple[slice, slice, Tensor | None]]  # as `Documents.blocks`, without a mask for one document


def _attention(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> Tensor:
    """Attend with scaled queries. X = B x G groups, R = N / G heads per group, C queries of a block, Z keys it reads."""
    B, N, S, D = query.shape
    X, R = B * key.shape[1], N // key.shape[1]
    query_XRSD = query.reshape(X, R, S, D)
    key_XSD, value_XSD = key.reshape(X, S, D), value.reshape(X, S, -1)
    out_XRSD = query.new_empty(X, R, S, value.shape[-1])
    for block, keys, mask in blocks:
        share = _attention_shares(query_XRSD[:, :, block], key_XSD[:, keys], mask)
        out_XRSD[:, :, block] = torch.bmm(share, value_XSD[:, keys]).view(X, R, -1, value.shape[-1])
    return out_XRSD.view(B, N, S, -1)


def _attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, blocks: Blocks
) -> list[Tensor]:
    """Return the gradients of query, key and value."""
    B, N, S, D = query.shape
    X, R = B * key.shape[1], N // key.shape[1]
    query_XRSD = query.reshape(X, R, S, D)
    key_XSD, value_XSD = key.reshape(X, S, D), value.reshape(X, S, -1)
    out_XRSD, grad_XRSD = out.reshape(X, R, S, -1), grad.reshape(X, R, S, -1)
    # Softmax's gradient is share * (grad - sum(share * grad)), and that sum is grad * out, summed over D'.
    inner_XRS = (grad_XRSD.float() * out_XRSD).sum(-1).to(grad.dtype)
    # Contiguous for any layout of the inputs: a compiler relies on it.
    grad_query = query.new_empty(query_XRSD.shape)
    grad_key, grad_value = (one.new_zeros(one.shape, dtype=torch.float32) for one in (key_XSD, value_XSD))
    for block, keys, mask in blocks:
        seen = query_XRSD[:, :, block]
        share = _attention_shares(seen, key_XSD[:, keys], mask)
        grad_out = grad_XRSD[:, :, block].reshape(X, share.shape[1], -1)
        grad_value[:, keys] += torch.bmm(share.mT, grad_out)
        grad_share = torch.bmm(grad_out, value_XSD[:, keys].mT)
        grad_scores = grad_share.sub_(inner_XRS[:, :, block].reshape(X, -1, 1)).mul_(share)
        grad_query[:, :, block] = torch.bmm(grad_scores, key_XSD[:, keys]).view(seen.shape)
        grad_key[:, keys] += torch.bmm(grad_scores.mT, seen.reshape(X, -1, D))
    gradients = (grad_query, grad_key.to(grad.dtype), grad_value.to(grad.dtype))
    return [one.view(like.shape) for one, like in zip(gradients, (query, key, value), strict=True)]


@torch.library.custom_op("smolds::causal_attention", mutates_args=())
def _opaque_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run `_attention` over full sequences as one operator, for torch.compile and selective checkpointing. Not for other
    callers: it hides its matmuls from FLOP counters."""
    return _attention(query, key, value, _full_blocks(query.shape[2], query.dtype))


@_opaque_attention.register_fake
def _(query, key, value):
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("smolds::causal_attention_gradients", mutates_args=())
def _opaque_attention_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> list[Tensor]:
    return _attention_gradients(grad, query, key, value, out, _full_blocks(query.shape[2], query.dtype))


@_opaque_attention_gradients.register_fake
def _(grad, query, key, value, out):
    return [one.new_empty(one.shape) for one in (query, key, value)]


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


def _gradients_of_attention(ctx, grad: Tensor):
    return tuple(_opaque_attention_gradients(grad, *ctx.saved_tensors))


_opaque_attention.register_autograd(_gradients_of_attention, setup_context=_save_for_backward)


def _blocks(length: int, dtype: torch.dtype) -> list[slice]:
    size = ATTENTION_BLOCK[dtype]
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _full_blocks(length: int, dtype: torch.dtype) -> Blocks:
    """Return what `Documents.blocks` returns for one document."""
    return [(block, slice(0, block.stop), None) for block in _blocks(length, dtype)]


def _attention_shares(query_XRCD: Tensor, key_XZD: Tensor, mask_BCZ: Tensor | None) -> Tensor:
    """Return the softmax of a block's scores, [X, R x C, Z]. The last C keys are the block's own."""
    X, R, C, D = query_XRCD.shape
    scores = torch.bmm(query_XRCD.reshape(X, R * C, D), key_XZD.mT)
    # Addition is vectorized, masked_fill is not.
    if mask_BCZ is None:
        scores.view(X, R, C, -1)[..., -C:] += scores.new_full((C, C), -torch.inf).triu_(1)
    else:
        scores.view(len(mask_BCZ), -1, *mask_BCZ.shape[1:]).add_(mask_BCZ[:, None])
    return torch.softmax(scores, dim=-1)
