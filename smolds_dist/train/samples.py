"""Text from the model while it trains."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def sample(model, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, seed: int) -> str:
    """Continues `prompt` by exactly `tokens` tokens at temperature 0.8 among the best 50. Collective.

    The length is fixed and the random state the same everywhere, because expert-parallel ranks have to run the same
    number of forward passes; the random state of the training is left as it was.
    """
    device = next(model.parameters()).device
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.shape[1] == 0:
        ids = torch.tensor([[tokenizer.eos_token_id]])
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            ids.to(device),
            attention_mask=torch.ones_like(ids).to(device),
            do_sample=True,
            temperature=0.8,
            top_k=min(50, model.config.vocab_size),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    return str(tokenizer.decode(output[0]))


def append_samples(path: Path, step: int, samples: dict[str, str]) -> None:
    """Adds one JSON object per prompt: step, prompt, text (the prompt included)."""
    with path.open("a", encoding="utf-8") as file:
        for prompt, text in samples.items():
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
