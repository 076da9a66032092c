"""The decoder's blocks: of the model, and of multi-token prediction.

Shape letters: B batch, S sequence, H hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from smolds_dist.model.attention import DeepSeekV3Attention
from smolds_dist.model.configuration import DeepSeekV3Config
from smolds_dist.model.moe import DeepSeekMoE, SwiGLU
from smolds_dist.model.norm import RMSNorm

# Nothing in the model is random, and reading a GPU's random state would wait for it.
CHECKPOINTING: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


class DeepSeekV3Block(GradientCheckpointingLayer):
    """Pre-norm residual block: attention, then the mixture of experts, or in the first layers one SwiGLU."""

    def __init__(self, config: DeepSeekV3Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DeepSeekV3Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = config.dense_intermediate_size if layer_idx < config.first_k_dense_replace else None
        self.mlp: Any = SwiGLU(config.hidden_size, dense) if dense else DeepSeekMoE(config)

        self.compiled_attend: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.compiled_layer: Callable[..., tuple[Tensor, ...]] | None = None
        self.recomputed = "none"  # or attention, or experts: recomputed in the backward pass

    def forward(self, x_BSH: Tensor, **attention_inputs) -> Tensor:
        if self.compiled_layer and self.training and attention_inputs.get("documents") is None:
            x_BSH, *routing = self.compiled_layer(x_BSH, **attention_inputs)
            if routing:
                self.mlp.record(*routing)
            return x_BSH
        attend: Callable[..., tuple[Tensor, Tensor]] = self.attend
        feed_forward: Callable[[Tensor], Tensor] = self.mlp
        if self.compiled_attend and self.training and attention_inputs.get("documents") is None:
            attend = self.compiled_attend
        if self.recomputed == "attention" and self.training:
            attend = partial(checkpoint, attend, **CHECKPOINTING)
        if self.recomputed == "experts" and self.training:
            feed_forward = partial(checkpoint, feed_forward, **CHECKPOINTING)
        x_BSH, normed_BSH = attend(x_BSH, **attention_inputs)
        return x_BSH + feed_forward(normed_BSH)

    def attend(self, x_BSH: Tensor, **attention_inputs) -> tuple[Tensor, Tensor]:
        """Run the block up to its feed-forward layer; return the residual stream and the layer's input."""
        attended, _ = self.self_attn(self.input_layernorm(x_BSH), **attention_inputs)
        x_BSH = x_BSH + attended
        return x_BSH, self.post_attention_layernorm(x_BSH)

    def layer(self, x_BSH: Tensor, **attention_inputs) -> tuple[Tensor, ...]:
        """Compute `forward` without its side effects; return its output and what `DeepSeekMoE.record` takes, if any."""
        x_BSH, normed_BSH = self.attend(x_BSH, **attention_inputs)
        if isinstance(self.mlp, SwiGLU):
            return (x_BSH + self.mlp(normed_BSH),)
        out_BSH, *routing = self.mlp.mix(normed_BSH)
        return x_BSH + out_BSH, *routing


class NextTokenBlock(DeepSeekV3Block):
    """Block of depth k of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21 to 23), after the
    model's last block. Its projection takes the embedding first, as in the published weights.

    All hidden states are normalized: the first depth's input by the model's last norm, the others' by the norm of the depth
    before.
    """

    def __init__(self, config: DeepSeekV3Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(  # type: ignore[override]
        self, hidden_BSH: Tensor, embedded_BSH: Tensor, **attention_inputs
    ) -> Tensor:
        """Return the normalized hidden states of depth k.

        Args:
            hidden_BSH: those of depth k - 1.
            embedded_BSH: at position i, the embedding of token i + k.
        """
        both = torch.cat((self.enorm(embedded_BSH), self.hnorm(hidden_BSH)), dim=-1)
        return self.shared_head["norm"](super().forward(self.eh_proj(both), **attention_inputs))
