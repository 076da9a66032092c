"""Speculative decoding (arXiv 2211.17192) with the model's own first layer of multi-token prediction as the draft.

Every token is chosen from the model's probabilities with the same random numbers as without drafts, so the text is the same,
unless rounding in a pass over two tokens instead of one changes a choice.

Shape letters: B = 1 batch, S tokens of a pass, H hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList


@dataclass
class DraftCounts:
    """Numbers of a generated text."""

    tokens: int = 0
    drafted: int = 0
    accepted: int = 0  # of the drafted tokens

    def __str__(self) -> str:
        share = self.accepted / max(1, self.drafted)
        return f"{self.accepted} of {self.drafted} drafted tokens accepted ({share:.0%})"


def decode_with_drafts(
    model: Any,
    ids_BS: Tensor,
    logits_processor: Callable[[Tensor, Tensor], Tensor],
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    counts: DraftCounts,
    streamer: Any = None,
    **_unused: Any,
) -> Tensor:
    """Continue one prompt, as transformers' `custom_generate`: each pass computes the last token and a draft of the next.

    Args:
        model: `DeepSeekV3ForCausalLM` with `num_nextn_predict_layers`, in evaluation mode.
        ids_BS: the prompt.
        counts: is added to.
        streamer: receives each token.

    Returns:
        The prompt with its continuation, [B, S].
    """
    cache: Any = DynamicCache()
    block = model.model.layers[model.config.num_hidden_layers]
    pass_BS, draft, finished = ids_BS, None, False
    while not finished:
        shared: dict[str, Any] = {}
        hidden_BSH = model.model(input_ids=pass_BS, cache=cache, shared=shared).last_hidden_state
        known, first = ids_BS.shape[1], hidden_BSH.shape[1] - (1 if draft is None else 2)
        for logits_BV in model.lm_head(hidden_BSH[:, first:]).unbind(1):
            token = choose(logits_processor(ids_BS, logits_BV.float()), generation_config.do_sample)
            ids_BS = torch.cat((ids_BS, token[:, None]), dim=1)
            if streamer is not None:
                streamer.put(token.cpu())
            finished = bool(stopping_criteria(ids_BS, logits_BV).all())
            if finished or draft is None or token != draft:
                break
            counts.accepted += ids_BS.shape[1] == known + 1
        new = ids_BS.shape[1] - known
        counts.tokens += new
        if not finished:
            kept = first + new
            for layer in cache.layers[: model.config.num_hidden_layers] if kept < hidden_BSH.shape[1] else ():
                layer.crop(-1)  # the rejected draft
            draft = draft_token(model, block, hidden_BSH[:, :kept], ids_BS[:, -kept:], shared)
            counts.drafted += 1
            pass_BS = torch.stack((ids_BS[:, -1], draft), dim=1)
    if streamer is not None:
        streamer.end()
    return ids_BS


def choose(scores_BV: Tensor, do_sample: bool) -> Tensor:
    """Return the next token [B], as transformers chooses it."""
    if do_sample:
        return torch.multinomial(scores_BV.softmax(-1), num_samples=1).squeeze(1)
    return scores_BV.argmax(-1)


def draft_token(model: Any, block: Any, hidden_BSH: Tensor, next_BS: Tensor, shared: dict[str, Any]) -> Tensor:
    """Return the most likely token [B] after the next, and add the positions to the block's cache.

    Args:
        hidden_BSH: of the model's pass, without a rejected draft.
        next_BS: the token after each position.
        shared: the blocks' inputs in that pass.
    """
    S = hidden_BSH.shape[1]
    rejected = shared.pop("embedded_BSH").shape[1] > S
    shared["rotary"] = tuple(angles[..., :S, :] for angles in shared["rotary"])
    if rejected:  # one position, which can attend to all before
        shared["attention_mask"] = None
    hidden_BSH = block(hidden_BSH, model.model.embed_tokens(next_BS), **shared)
    return model.lm_head(hidden_BSH[:, -1]).argmax(-1)
