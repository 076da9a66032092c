"""Text from the model, while it trains and afterwards.

Shape letters: B prompts, S tokens of the longest, V vocabulary.
"""

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from smolds_dist.inputs import printable
from smolds_dist.model.regions import eager_regions


def sample(
    model, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, seed: int, temperature: float = 0.6
) -> str:
    """Continues `prompt` by exactly `tokens` tokens: expert-parallel ranks have to run the same number of forward passes."""
    return continue_prompts(model, tokenizer, [prompt], tokens, seed, temperature, stop_at_end=False)[0]


@torch.no_grad()
@eager_regions()
def continue_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    tokens: int,
    seed: int,
    temperature: float = 0.6,
    top_k: int = 50,
    top_p: float = 1.0,
    stop_at_end: bool = True,
    streamer: Any = None,
) -> list[str]:
    """Each prompt with its continuation, all computed together. Collective.

    The random state is the same on all ranks, and the training's is left as it was.

    Args:
        tokens: most tokens to add.
        temperature: 0 takes the best token each time.
        top_k: choose among so many best tokens; 0: among all.
        top_p: choose among the fewest best tokens that have this probability together.
        stop_at_end: end a text at an end-of-text token of the tokenizer or the model.
        streamer: of transformers, told every token of a single prompt.
    """
    device, eos = next(model.parameters()).device, tokenizer.eos_token_id
    named = model.generation_config.eos_token_id
    ends = sorted({eos, *(named if isinstance(named, list) else [eos if named is None else named])})
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    longest = max(len(ids) for ids, _ in encoded)
    ids_BS = torch.tensor([[eos] * (longest - len(ids)) + ids for ids, _ in encoded], device=device)
    mask_BS = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in encoded], device=device)
    first = FirstToken([allowed.to(device) for _, allowed in encoded], longest)
    # The vocabulary may have rows that no token uses: an untrained model would sample them.
    unused = list(range(len(tokenizer), model.config.vocab_size))
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            ids_BS,
            attention_mask=mask_BS,
            logits_processor=[first] if any(len(allowed) for allowed in first.allowed) else [],
            suppress_tokens=unused or None,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=min(top_k, model.config.vocab_size) if temperature else None,
            top_p=top_p if temperature else None,
            max_new_tokens=tokens,
            eos_token_id=ends if stop_at_end else None,
            pad_token_id=eos,
            streamer=streamer,
            remove_invalid_values=True,  # of a model whose training has gone wrong, which is told elsewhere
        )
    model.train(was_training)
    added = [row[longest:] for row in output.tolist()]
    if stop_at_end:
        added = [list(takewhile(lambda token: token not in ends, new)) for new in added]
    sequences = [ids + new for (ids, _), new in zip(encoded, added, strict=True)]
    return [str(text).removeprefix(tokenizer.eos_token) for text in tokenizer.batch_decode(sequences)]


def complete_lines(text: str) -> str:
    """`text` to be shown: control characters escaped, and without an unfinished last line where there are others."""
    lines = (text.rpartition("\n")[0].rstrip() or text).split("\n")
    return "\n".join("    | " + printable(line) for line in lines)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], Tensor]:
    """Ids of `prompt` without a space at its end, and the ids that can follow then: those that begin with it.

    Tokenizers put a space at the beginning of the next word: after one on its own, text goes on as the model never saw.
    """
    first = torch.tensor([], dtype=torch.long)
    if prompt.endswith(" "):
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        first = torch.tensor([i for i, text in enumerate(texts) if text.startswith(" ")], dtype=torch.long)
        if len(first):
            prompt = prompt[:-1]
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return ids or [tokenizer.eos_token_id], first


class FirstToken(LogitsProcessor):
    """Takes each prompt's first new token from its `allowed`, where that names any."""

    def __init__(self, allowed: list[Tensor], prompt_length: int):
        self.allowed = allowed
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of the next tokens."""
        if input_ids.shape[1] > self.prompt_length:
            return scores
        scores = scores.clone()
        for row, allowed in zip(scores, self.allowed, strict=True):
            if len(allowed):
                kept = row[allowed]
                row.fill_(-torch.inf)[allowed] = kept
        return scores
