"""`smolds generate`: continue prompts with a run's model, a checkpoint's or an export's."""

import json
import sys
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError, OptionParser, first_line
from smolds_dist.inputs import ROWS_BYTES, read_text


def generate(args: list[str]) -> None:
    """Prints the prompt and its continuation, token by token; or, for a file of prompts, a line of JSON for each."""
    parser = OptionParser(
        prog="smolds generate",
        description="Continue prompts with a trained model.",
        example="smolds generate runs/first --prompt 'def ' --max-new-tokens 50 --temperature 0.7",
    )
    parser.add_argument("source", type=Path, help="a run's folder (runs/NAME), a checkpoint's, or an exported model's")
    parser.add_argument("--step", type=int, help="of the run's checkpoints; its last model where not given")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--prompts", type=Path, help="file with a prompt in each line; answers are lines of JSON")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.6, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="choose among so many likeliest tokens; 0: among all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the fewest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, help="prompts of a file that are computed together")
    options = parser.parse_args(args)
    prompts = [options.prompt]
    if options.prompts is not None:
        text = read_text(options.prompts, "give a UTF-8 text file", ROWS_BYTES)
        prompts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    model, tokenizer = load_model(options.source, options.step)
    longest = max((len(tokenizer(prompt).input_ids) for prompt in prompts), default=0)
    if longest + options.max_new_tokens > (positions := model.config.max_position_embeddings):
        print(
            f"smolds: a prompt of {longest} tokens and --max-new-tokens {options.max_new_tokens} go beyond the "
            f"{positions} positions of the model, where its text is likely to be worse",
            file=sys.stderr,
        )

    from transformers import TextStreamer

    from smolds_dist.inference.samples import continue_prompts

    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        streamer = None if options.prompts else TextStreamer(tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
        texts = continue_prompts(
            model, tokenizer, batch, options.max_new_tokens, options.seed, options.temperature, options.top_k, options.top_p,
            streamer=streamer,
        )  # fmt: skip
        if options.prompts:
            for prompt, text in zip(batch, texts, strict=True):
                print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
            sys.stdout.flush()


def load_model(source: Path, step: int | None = None) -> tuple[Any, Any]:
    """Model, on the fastest device here, and tokenizer of a run, a checkpoint or an export; of a run that has ended, what it
    exported.

    Raises:
        ConfigError: where there is none.
    """
    folder = source / "export" if (source / "export" / "config.json").is_file() else source
    is_export = (folder / "config.json").is_file() and step is None
    if not is_export and not (source / "checkpoints").is_dir() and not (source / "manifest.json").is_file():
        raise ConfigError(f"{source} holds no model; name a run's folder, a checkpoint's, or an exported model's.")

    if is_export:
        from smolds_dist.interchange.model_folder import check_settings, check_sizes

        check_sizes(folder, check_settings(folder))

    import torch
    import transformers

    import smolds_dist.model  # noqa: F401  registers the architecture

    transformers.logging.disable_progress_bar()
    if is_export:
        safely: dict = {"trust_remote_code": False, "use_safetensors": True}
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **safely)
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, TypeError, RuntimeError, OSError, KeyError, AttributeError, ArithmeticError) as error:
            raise ConfigError(
                f"{folder} cannot be loaded ({first_line(error)}); name a model of transformers' own classes, with its "
                "tokenizer and safetensors files."
            ) from None
    else:
        from smolds_dist.interchange.export import build_model, find_checkpoint, open_model

        reader, config, tokenizer = open_model(find_checkpoint(source, step))
        model = build_model(reader, config)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(device).eval(), tokenizer
