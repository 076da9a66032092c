"""`smolds generate`: continue prompts with the model of a run, a checkpoint or an export."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError, OptionParser, first_line
from smolds_dist.inputs import ROWS_BYTES, read_text
from smolds_dist.progress import print_line


def generate(args: list[str]) -> None:
    """Print the prompt and its continuation, token by token; for a file of prompts, print one JSON line each."""
    parser = OptionParser(
        prog="smolds generate",
        description="Continue prompts with a trained model.",
        example="smolds generate runs/first --prompt 'def ' --max-new-tokens 50 --temperature 0.7",
    )
    parser.add_argument("source", type=Path, help="folder of a run (runs/NAME), a checkpoint or an exported model")
    parser.add_checkpoint_options(default="the final model")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--prompts", type=Path, help="file with one prompt per line; prints JSON lines")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="maximum number of tokens to add")
    parser.add_argument(
        "--temperature", type=float, default=0.6, help="sampling temperature; 0 = always the most likely token"
    )
    parser.add_argument("--top-k", type=int, default=50, help="most likely tokens to sample from; 0 = all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="probability of the smallest set of tokens to sample from"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts of a file per batch")
    parser.add_argument(
        "--draft",
        choices=("mtp",),
        help="speculative decoding with the model's layer of multi-token prediction: the same text",
    )
    options = parser.parse_args(args)
    if options.draft and options.prompts and options.batch_size != 1:
        raise ConfigError(f"--draft mtp continues one prompt at a time; set --batch-size 1, not {options.batch_size}.")
    prompts = [options.prompt]
    if options.prompts is not None:
        text = read_text(options.prompts, "use a UTF-8 text file", ROWS_BYTES)
        prompts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    model, tokenizer = load_model(options.source, options.step, options.weights)
    if options.draft:
        check_drafts(options.source, model)
    longest = max((len(tokenizer(prompt).input_ids) for prompt in prompts), default=0)
    if longest + options.max_new_tokens > (positions := model.config.max_position_embeddings):
        text = f"a prompt of {longest} tokens and --max-new-tokens {options.max_new_tokens} exceed the model's {positions} "
        print_line(f"smolds: {text}positions; its text is likely to be worse", sys.stderr)

    from transformers import TextStreamer

    from smolds_dist.inference.drafts import DraftCounts
    from smolds_dist.inference.samples import continue_prompts

    drafts, began = DraftCounts() if options.draft else None, time.perf_counter()
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        streamer = None if options.prompts else TextStreamer(tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
        texts = continue_prompts(
            model, tokenizer, batch, options.max_new_tokens, options.seed, options.temperature, options.top_k, options.top_p,
            streamer=streamer, drafts=drafts,
        )  # fmt: skip
        if options.prompts:
            for prompt, text in zip(batch, texts, strict=True):
                print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
            sys.stdout.flush()
    if drafts is not None:
        print_line(f"smolds: {drafts.tokens / (time.perf_counter() - began):,.0f} tokens/s, {drafts}", sys.stderr)


def check_drafts(source: Path, model: Any) -> None:
    """Raise a `ConfigError` if the model has no layer of multi-token prediction that smolds can run."""
    from smolds_dist.model import DeepSeekV3ForCausalLM

    if not isinstance(model, DeepSeekV3ForCausalLM):
        raise ConfigError(f"--draft mtp needs a model in smolds' format, and {source} is not; use its run's folder.")
    if not model.config.num_nextn_predict_layers:
        raise ConfigError(
            f"--draft mtp needs a layer of multi-token prediction, and the model in {source} has none; train one with "
            "--model.num_nextn_predict_layers 1, or unset --draft."
        )


def load_model(source: Path, step: int | None = None, weights: str = "trained") -> tuple[Any, Any]:
    """Return model, on the fastest local device, and tokenizer of a run, a checkpoint or an export; of a finished run, its
    export, unless a step or averaged weights are requested.

    Args:
        weights: "trained" or "ema", as in `open_model`.

    Raises:
        ConfigError: if there is none.
    """
    folder = source / "export" if (source / "export" / "config.json").is_file() else source
    exists = (folder / "config.json").is_file()
    is_export = exists and step is None and weights == "trained"
    if not is_export and not (source / "checkpoints").is_dir() and not (source / "manifest.json").is_file():
        if exists:
            raise ConfigError(f"{source} is an export, without steps or moving averages; name its run or a checkpoint.")
        raise ConfigError(f"{source} contains no model; use the folder of a run, a checkpoint or an exported model.")

    if is_export:
        from smolds_dist.interchange.model_folder import check_settings, check_sizes

        check_sizes(folder, check_settings(folder))

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
                f"{folder} cannot be loaded ({first_line(error)}); use a model of transformers' own classes, with its "
                "tokenizer and safetensors files."
            ) from None
    else:
        from smolds_dist.interchange.export import build_model, find_checkpoint, open_model

        reader, config, tokenizer = open_model(find_checkpoint(source, step), weights)
        model = build_model(reader, config)
    return for_inference(model), tokenizer


def for_inference(model: Any) -> Any:
    """Return the model in evaluation mode on the fastest local device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(device).eval()
