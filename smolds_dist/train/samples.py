"""Text from the model, while it trains and afterwards."""

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase


@torch.no_grad()
def sample(
    model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    seed: int,
    temperature: float = 0.8,
    stop_at_end: bool = False,
) -> str:
    """Continues `prompt` by `tokens` tokens among the best 50; temperature 0 takes the best. Collective.

    Without `stop_at_end` the length is exact. Expert-parallel ranks need that, because they have to run the same number
    of forward passes. The random state is the same on all ranks, and the training's is left as it was.
    """
    device = next(model.parameters()).device
    ids, first = _encode(tokenizer, prompt)
    ids = ids.to(device)
    # The vocabulary may have rows that no token uses: an untrained model would sample them.
    unused = list(range(len(tokenizer), model.config.vocab_size))
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=[FirstToken(first.to(device), ids.shape[1])] if len(first) else [],
            suppress_tokens=unused or None,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=min(50, model.config.vocab_size) if temperature else None,
            max_new_tokens=tokens,
            eos_token_id=tokenizer.eos_token_id if stop_at_end else None,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    return str(tokenizer.decode(output[0])).removeprefix(tokenizer.eos_token).removesuffix(tokenizer.eos_token)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[Tensor, Tensor]:
    """Ids [1, S] of `prompt` without a space at its end, and the ids that can follow then: those that begin with it.

    Tokenizers put a space at the beginning of the next word: after one on its own, text goes on as the model never saw.
    """
    first = torch.tensor([], dtype=torch.long)
    if prompt.endswith(" "):
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        first = torch.tensor([i for i, text in enumerate(texts) if text.startswith(" ")], dtype=torch.long)
        if len(first):
            prompt = prompt[:-1]
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return torch.tensor([ids or [tokenizer.eos_token_id]]), first


class FirstToken(LogitsProcessor):
    """Takes the first new token from `allowed`."""

    def __init__(self, allowed: Tensor, prompt_length: int):
        self.allowed = allowed
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.prompt_length:
            return scores
        return torch.full_like(scores, -torch.inf).index_copy(-1, self.allowed, scores[:, self.allowed])
