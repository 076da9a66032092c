"""Selective activation checkpointing: what is kept of a block, and what computed again in the backward pass."""

from contextlib import AbstractContextManager

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from smolds_dist.model import device


def save_products() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint.checkpoint`'s `context_fn`: of its function's forward pass, and of the second one.

    Kept are the results of the operators below; batched products are not among them, since those of attention written out
    are as large as all its weights. So where attention runs as such, within documents on a CPU, it is computed again.
    """
    kept = [
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.smolds.causal_attention.default,
        torch.ops.smolds.expert_ffn.default,
    ]
    first, again = create_selective_checkpoint_contexts(kept)
    return device.as_operators(first), device.as_operators(again)
