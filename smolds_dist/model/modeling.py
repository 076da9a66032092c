"""The decoder and the causal language model, as transformers models.

Shape letters: B batch, S sequence, H hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from smolds_dist.model import device
from smolds_dist.model.attention import DeepSeekV3Attention
from smolds_dist.model.blocks import CHECKPOINTING, DeepSeekV3Block, NextTokenBlock
from smolds_dist.model.causal_attention import Documents, supports_documents
from smolds_dist.model.configuration import DeepSeekV3Config
from smolds_dist.model.kernels import linear_cross_entropy
from smolds_dist.model.moe import DeepSeekExpertLayer, DeepSeekMoE, TopKRouter, balance_loss, z_loss
from smolds_dist.model.norm import RMSNorm
from smolds_dist.model.rotary import rotary_angles
from smolds_dist.model.selective import save_matmuls


class LMHead(nn.Linear):
    """Map hidden states to logits, or, given labels, to the loss without holding all logits.

    The loss is in this module so that engines that gather weights around a module's forward (ZeRO 3) include it.
    """

    def __init__(self, config: DeepSeekV3Config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return F.linear(hidden, self.weight)
        # Position t predicts token t + 1.
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        return linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), self.weight, labels.flatten())


class DeepSeekV3PreTrainedModel(PreTrainedModel):
    config_class = DeepSeekV3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepSeekV3Block", "NextTokenBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    # Outputs that transformers' `output_...` arguments collect, by hooks that it installs at their first use.
    _can_record_outputs = {
        "hidden_states": DeepSeekV3Block,
        "attentions": OutputRecorder(DeepSeekV3Attention, index=1),
        "router_logits": OutputRecorder(TopKRouter, index=2),
    }

    def _cache_for(self, cache: Cache | None, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """Return the caller's key/value cache, or a new one if `use_cache` is set.

        transformers calls it `past_key_values` until 5.23 and `cache` from 5.24: forwards take both. Remove the old name
        when `setup.cfg` requires 5.24.
        """
        cache = past_key_values if cache is None else cache
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not self.training
        return DynamicCache(config=self.config) if use_cache and cache is None else cache

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, DeepSeekExpertLayer):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, TopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepSeekMoE):
            init.zeros_(module.tokens_per_expert)


class DeepSeekV3Model(DeepSeekV3PreTrainedModel):
    """Embedding, blocks and final norm: token ids [B, S] to hidden states [B, S, H]."""

    def __init__(self, config: DeepSeekV3Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks: list[nn.Module] = [DeepSeekV3Block(config, i) for i in range(config.num_hidden_layers)]
        ahead = range(len(blocks), len(blocks) + config.num_nextn_predict_layers)
        self.layers = nn.ModuleList([*blocks, *(NextTokenBlock(config, i) for i in ahead)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        shared: dict[str, Any] | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Return hidden states [B, S, H], and the outputs that transformers' `output_hidden_states`, `output_attentions`
        and `output_router_logits` select.

        `cu_seq_lens_q`, as transformers' collators make it for packed documents, has the start of each document of
        `position_ids` among all B x S tokens, and the end (int32). Without it, they are looked up: a GPU and the host wait.
        `shared`, if set, receives the embeddings and the blocks' other inputs, for `NextTokenBlock`.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache_for(cache, past_key_values, use_cache)
        # Only the caller's positions can mark packed documents; checking our own would synchronize with the GPU.
        # The cache is passed by position, here and in the outputs, because its keyword depends on transformers' version.
        documents = mask = None
        attentions = kwargs.get("output_attentions", config.output_attentions)
        if attentions and config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} has no attention weights; use 'eager'."
            )
        if position_ids is not None and attention_mask is None and cache is None and not attentions:
            documents = self._documents(x_BSH, position_ids, cu_seq_lens_q)
        if documents is None:
            mask = create_causal_mask(config, x_BSH, attention_mask, cache, position_ids)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(past, past + x_BSH.shape[1], device=x_BSH.device)[None]
        rotary = rotary_angles(position_ids, config.rotary_dim, config.rope_theta, config.rope_scaling)
        inputs = dict(
            rotary=rotary, attention_mask=mask, cache=cache, output_attentions=attentions, documents=documents
        )
        if shared is not None:
            shared.update(inputs, embedded_BSH=x_BSH)
        for block in self.layers[: config.num_hidden_layers]:
            x_BSH = block(x_BSH, **inputs)
        return MoeModelOutputWithPast(self.norm(x_BSH), cache)

    def _documents(self, x_BSH: Tensor, position_ids: Tensor, bounds: Tensor | None) -> Documents | None:
        """Return the documents, whose positions each start at 0, or None if there is one or no fast path."""
        fast = supports_documents(x_BSH, self.config.widest_head) and not device.is_traced()
        if not fast or self.config._attn_implementation != "sdpa" or position_ids.shape != x_BSH.shape[:2]:
            return None
        if bounds is not None:
            return Documents(position_ids, bounds)
        begins = position_ids[:, 1:] == 0
        whole = (position_ids[:, 0] == 0).all() and (begins | (position_ids.diff() == 1)).all()
        return Documents(position_ids) if whole and begins.any() else None


class DeepSeekV3ForCausalLM(DeepSeekV3PreTrainedModel, GenerationMixin):
    """Causal language model. With `labels` it returns the loss and no logits, since training never needs all of them."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeepSeekV3Config):
        super().__init__(config)
        self.model = DeepSeekV3Model(config)
        self.lm_head = LMHead(config)
        self.mtp_loss: Tensor | None = None
        """fp32 scalar: running sum of the loss of multi-token prediction over training's forward passes, if recorded."""
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take the weight and keep the module: transformers' resized head would have no loss."""
        self.lm_head.weight = new_embeddings.weight
        self.lm_head.out_features = new_embeddings.weight.shape[0]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits [B, S, V], or with `labels` [B, S] (negative entries ignored) the mean loss over the next tokens.

        `num_items_in_batch`, set by transformers' Trainer, replaces the number of labels that divides the loss: the labels
        of all micro batches and ranks of a step.
        `aux_loss` is the sum of the router losses, weighted; it is part of `loss`, in training as is the loss of multi-token
        prediction (`config.mtp_coef`).
        `output_hidden_states`, `output_attentions`, `output_router_logits` and `return_dict` are transformers': hidden
        states [B, S, H] of the embedding and after every layer, the last one normalized; attention weights [B, N, S, S'],
        which switch to eager attention; and router logits [B x S, E], each a tuple over layers.
        """
        cache = self._cache_for(cache, past_key_values, use_cache)
        has_router_losses = labels is not None and self.training and self.config.has_router_losses
        for block in self.model.layers[self.config.first_k_dense_replace :] if has_router_losses else ():
            block.mlp.router_logits = []
        predicts_further = labels is not None and self.training and self.config.num_nextn_predict_layers > 0
        shared: dict[str, Any] | None = {} if predicts_further else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=False,  # `cache` decides
            return_dict=True,
            shared=shared,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = aux_loss = None
        if labels is not None:
            loss, aux_loss = self._losses(hidden, labels, position_ids, num_items_in_batch, shared)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return MoeCausalLMOutputWithPast(
            loss,
            aux_loss,
            logits,
            cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _losses(
        self,
        hidden_BSH: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor | None,
        num_items: int | Tensor | None,
        shared: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the complete loss, and the part of it that is the routers', if any."""
        loss = self.lm_head(hidden_BSH, labels_BS)
        if num_items is not None:
            loss = loss * num_labels_of(labels_BS) / num_items
        if shared is not None:
            divisor = num_labels_of(labels_BS).clamp(min=1) if num_items is None else num_items
            mtp_loss = self._mtp_loss(hidden_BSH, labels_BS, positions_BS, divisor, **shared)
            if self.mtp_loss is not None:
                self.mtp_loss.add_(mtp_loss.detach())
            loss = loss + self.config.mtp_coef * mtp_loss
        if not (self.training and self.config.has_router_losses):
            return loss, None
        aux_loss = self._router_losses(*labels_BS.shape)
        return loss + aux_loss, aux_loss

    def _mtp_loss(
        self,
        hidden_BSH: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor | None,
        divisor: Tensor | int,
        embedded_BSH: Tensor,
        **attention_inputs,
    ) -> Tensor:
        """Return the mean over depths of the summed cross-entropy of the tokens after the next, divided by `divisor`
        (DeepSeek-V3, arXiv 2412.19437, equations 24 and 25, without their coefficient).

        Depth k predicts token i + 1 + k from position i, if both are in one document. Embeddings past the end wrap around,
        which only positions without a label can attend to.
        """
        losses, places_S = [], torch.arange(labels_BS.shape[1], device=labels_BS.device)
        for depth, block in enumerate(self.model.layers[self.config.num_hidden_layers :], 1):
            hidden_BSH = block(hidden_BSH, embedded_BSH.roll(-depth, 1), **attention_inputs)
            other_document = (places_S if positions_BS is None else positions_BS.minimum(places_S)) <= depth
            labels = labels_BS.masked_fill(other_document, -100).roll(-depth, 1)
            losses.append(self.lm_head(hidden_BSH, labels) * num_labels_of(labels) / divisor)
        return torch.stack(losses).mean()

    def _router_losses(self, B: int, S: int) -> Tensor:
        """Return the mean over layers of the router losses, weighted by their coefficients."""
        config = self.config
        scoring, top_k = config.scoring_func, config.num_experts_per_tok
        losses, layers = [], self.model.layers[config.first_k_dense_replace :]
        for block in layers:
            (logits_TE,), block.mlp.router_logits = block.mlp.router_logits, None
            logits_TE = logits_TE.float()
            if config.router_aux_loss_coef:
                losses.append(config.router_aux_loss_coef * balance_loss(logits_TE[None], scoring, top_k))
            if config.sequence_balance_coef:
                in_each = balance_loss(logits_TE.view(B, S, -1), scoring, top_k)
                losses.append(config.sequence_balance_coef * in_each)
            if config.z_loss_coef:
                losses.append(config.z_loss_coef * z_loss(logits_TE))
        return torch.stack(losses).sum() / len(layers)


def empty_model(config: DeepSeekV3Config) -> DeepSeekV3ForCausalLM:
    """Build a model with uninitialized parameters: their memory is not touched before they are loaded."""
    with init.no_init_weights():
        model = DeepSeekV3ForCausalLM(config)
    model.tie_weights()  # skipped together with the initialization
    return model


def num_labels_of(labels_BS: Tensor) -> Tensor:
    return (labels_BS[:, 1:] >= 0).sum()


def change_rotary(model: nn.Module, config: DeepSeekV3Config) -> None:
    """Take the rotary embedding of `config`, for a stage of training with another base or YaRN scaling."""
    of_model: Any = model.config
    of_model.rope_theta, of_model.rope_scaling = config.rope_theta, config.rope_scaling
    for module in model.modules():
        if isinstance(module, DeepSeekV3Attention):
            module.set_scaling(config.rope_scaling)


def enable_activation_checkpointing(model: DeepSeekV3ForCausalLM, mode: str = "full") -> None:
    """Recompute activations in the backward pass instead of saving them.

    Args:
        mode: none; attention (with its norms: a block saves its input and its feed-forward layer's input); experts (of a
            block's feed-forward layer only the input is saved); full (a block saves its input); or selective: a block saves
            its input and the results of matmuls and attention, and recomputes what is cheap: norms, rotary embedding,
            activations, dispatch and combine; under expert parallelism also all-to-all.
    """
    if mode in ("attention", "experts"):
        for block in model.model.layers:
            block.recomputed = mode
    elif mode != "none":
        # The method's name from transformers 5.23 on, and the older one.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(CHECKPOINTING | ({"context_fn": save_matmuls} if mode == "selective" else {}))
