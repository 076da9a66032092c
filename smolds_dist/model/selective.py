"""Selective activation checkpointing: which activations of a block are saved and which are recomputed."""

from contextlib import AbstractContextManager

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from smolds_dist.model import device


def save_matmuls() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and of recomputation, for `torch.utils.checkpoint.checkpoint`'s `context_fn`.

    Saves the results of the operators below. Batched matmuls are not among them, since in unfused attention they are as
    large as all its weights: attention within documents on a CPU, which is unfused, is recomputed.
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
