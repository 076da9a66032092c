"""Logits and tokens that transformers gets from exports: imported by test_export.py, also run under another version of it.

Usage: read_exports.py RESULT MODEL TOKENIZER...
"""

import sys

import torch
import transformers

TEXTS = ["def add(first): äöü and 😀 of the quick brown fox", "a<|endoftext|>b<|im_start|>"]


def logits_and_tokens(model: str, tokenizers: list[str]) -> tuple[torch.Tensor, list[list[list[int]]], list[int]]:
    """Return logits of the first text by the first tokenizer; tokens of all texts by each, and the last's control tokens."""
    loaded = [transformers.AutoTokenizer.from_pretrained(folder) for folder in tokenizers]
    tokens = [tokenizer(TEXTS).input_ids for tokenizer in loaded]
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([tokens[0][0]]), use_cache=False).logits
    return logits, tokens, loaded[-1].convert_tokens_to_ids(loaded[-1].all_special_tokens)


if __name__ == "__main__":
    result, *folders = sys.argv[1:]
    read = [logits_and_tokens(model, [model, other]) for model, other in zip(folders[::2], folders[1::2], strict=True)]
    torch.save((transformers.__version__, read), result)
