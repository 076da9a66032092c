"""`smolds generate`: continue a prompt with the model that a run exported."""

import argparse
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError


def generate(args: list[str]) -> None:
    """Prints the prompt and its continuation.

    Raises:
        ConfigError: where the run has exported no model yet.
    """
    parser = argparse.ArgumentParser(prog="smolds generate", description="Continue a prompt with a trained model.")
    parser.add_argument("run", type=Path, help="a run's folder (runs/NAME) or an exported model")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=100, help="most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    folder = options.run / "export" if (options.run / "export").is_dir() else options.run
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{options.run} holds no exported model; let its training end, or name another folder.")
    if options.tokens < 1 or options.temperature < 0:
        raise ConfigError("--tokens must be at least 1 and --temperature not negative.")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import smolds_dist.model  # noqa: F401  registers the architecture

    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    ids = tokenizer(options.prompt or tokenizer.eos_token, return_tensors="pt").to(device)
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    output = model.to(device).generate(
        input_ids=ids.input_ids,
        attention_mask=ids.attention_mask,
        max_new_tokens=options.tokens,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))
