"""`smolds generate`: continue a prompt with the model that a run exported."""

from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError, OptionParser


def generate(args: list[str]) -> None:
    """Prints the prompt and its continuation.

    Raises:
        ConfigError: where the run has exported no model yet.
    """
    parser = OptionParser(prog="smolds generate", description="Continue a prompt with a trained model.")
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
    import transformers

    import smolds_dist.model  # noqa: F401  registers the architecture
    from smolds_dist.train.samples import sample

    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = sample(
        model.to(device), tokenizer, options.prompt, options.tokens, options.seed, options.temperature, stop_at_end=True
    )
    print(text)
