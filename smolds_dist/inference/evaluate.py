"""`smolds eval MODEL`: perplexity and bits per byte on a run's validation set or any source; or lm-evaluation-harness.

Every token but the first of a sequence is predicted from those before it in the sequence. Documents are concatenated, or
masked from each other, as in training (`data.document_mask`).
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.inference.generate import load_model
from smolds_dist.settings import RunConfig
from smolds_dist.stages import resolve_stages


def evaluate_model(args: list[str]) -> None:
    """Print loss, perplexity and bits per byte, or the table of tasks; with --json also write them.

    Raises:
        ConfigError: if the model, text or task is missing, or an option is out of range.
    """
    options, settings = _parse(args)
    result = _evaluate_tasks(options, settings) if options.tasks else _evaluate_texts(options, settings)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _parse(args: list[str]) -> tuple[Any, list[str]]:
    """Return the command's own options, and the data settings."""
    parser = OptionParser(
        prog="smolds eval",
        description="Perplexity and bits per byte of a model on its run's validation set or, with options of smolds train "
        "that begin with --data., on all of --data.source. With --tasks, runs tasks of lm-evaluation-harness instead.",
        example="smolds eval runs/first --data.source text:'corpus/*.txt' --max-tokens 100000",
    )
    parser.add_argument("model", type=Path, help="folder of a run (runs/NAME), a checkpoint or an exported model")
    parser.add_checkpoint_options(default="the final model")
    parser.add_argument("--max-tokens", type=int, default=1_000_000, help="tokens to evaluate per source")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per batch")
    parser.add_argument("--json", type=Path, help="output file for the results")
    tasks = parser.add_argument_group("lm-evaluation-harness (pip install 'smolds-dist[eval]')")
    tasks.add_argument("--tasks", nargs="+", default=[], help="names or patterns of tasks")
    tasks.add_argument("--include-path", type=Path, help="folder with YAML files of your own tasks")
    tasks.add_argument("--num-fewshot", type=int, help="examples before each question; default: the task's own number")
    tasks.add_argument("--limit", type=int, help="questions per task; default: all")
    options, settings = parser.parse_known_args(args)
    if not options.tasks and (options.include_path, options.num_fewshot, options.limit) != (None, None, None):
        raise ConfigError("--include-path, --num-fewshot and --limit need --tasks; add --tasks or remove them.")
    return options, settings


def _evaluate_texts(options: Any, settings: list[str]) -> dict[str, Any] | list[dict[str, Any]]:
    from smolds_dist.data.batch import document_separator

    config, is_validation = data_config("smolds eval", options.model, options.step, settings)
    model, tokenizer = load_model(options.model, options.step, options.weights)
    results, end_of_text = [], document_separator(config.data, tokenizer)
    for name, ids, num_bytes in read_sources(config, is_validation, tokenizer, options.max_tokens):
        begin, used = time.perf_counter(), ids[: options.max_tokens]
        loss, counted = mean_loss(model, used, config.data.seq_len, options.batch_size, end_of_text)
        result = {
            "text": f"{config.data.mixed[name].source}{', validation set' if is_validation else ''}",
            "tokens": counted,
            "sequence_length": config.data.seq_len,
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": loss / math.log(2) * len(ids) / num_bytes,
        }
        results.append(result)
        print(
            f"{result['text']}: {counted:,} tokens in sequences of {config.data.seq_len:,}\n"
            f"loss {loss:.4f} nats per token, perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.4f} bits per "
            f"byte ({time.perf_counter() - begin:.1f} s)",
            flush=True,
        )
    return results[0] if len(results) == 1 else results


def _evaluate_tasks(options: Any, settings: list[str]) -> dict[str, Any]:
    from smolds_dist.inference.harness import evaluate_tasks, load_tasks

    if settings:
        raise ConfigError(
            f"{settings[0]} cannot be combined with --tasks, which have their own text; remove one of them."
        )
    tasks = load_tasks(options.tasks, options.include_path)
    model, tokenizer = load_model(options.model, options.step, options.weights)
    result, table = evaluate_tasks(model, tokenizer, tasks, options.num_fewshot, options.limit, options.batch_size)
    print(table)
    return result


def run_of(model: Path) -> Path | None:
    """Return the run that a folder is, or to which this checkpoint or export belongs."""
    folders = (model, model.parent, *model.resolve().parents[:2])
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def data_config(command: str, model: Path, step: int | None, settings: list[str]) -> tuple[RunConfig, bool]:
    """Return the settings of the run's stage at `step`, or its last, and whether to evaluate on its validation set.

    Raises:
        ConfigError: if a setting is not about data, or neither a run nor a source names the text.
    """
    run = run_of(model)
    base = ["--config", str(run / "config.yaml")] if run else ["--run.name=eval"]
    if run:
        config = load_config(base)
        data = resolve_stages(config).at(step or config.train.steps).config.data
        base += [f"--data.seq_len={data.seq_len}", f"--data.document_mask={data.document_mask}", "--train.stages=null"]
    wrong = next((s for s in settings if s.startswith("--") and not s.startswith("--data.")), None)
    if wrong:
        raise ConfigError(f"{wrong} is not an option of {command}; `{command} --help` lists them.")
    own = any(setting.partition("=")[0] in ("--data.source", "--data.sources") for setting in settings)
    if own:  # replaces the run's sources
        base += ["--data.sources=null", "--data.source=stdlib"]
    config = load_config([*base, *settings], prog=command)
    if not own and run is None:
        raise ConfigError(f"{model} is not a run's, so it has no validation set; choose the text with --data.source.")
    return config, not own


def read_sources(config: RunConfig, is_validation: bool, tokenizer: Any, limit: int) -> Iterator[tuple[str, Any, int]]:
    """Yield each source's name, tokens of whole documents and the bytes of their text.

    Args:
        is_validation: read the run's validation sets; else the sources, up to the document with their token `limit`.

    Raises:
        ConfigError: if a file cannot be read, a source has too little text, or the run's tokenizer is another.
    """
    return _validation_tokens(config, tokenizer) if is_validation else _all_tokens(config, tokenizer, limit)


def _validation_tokens(config: RunConfig, tokenizer: Any) -> Iterator[tuple[str, Any, int]]:
    from smolds_dist.data.prepare import prepare_data
    from smolds_dist.data.tokenizer import tokenizer_digest

    data = prepare_data(config)
    if tokenizer_digest(data.tokenizer) != tokenizer_digest(tokenizer):
        raise ConfigError("the run's corpus and so its tokenizer have changed; choose the text with --data.source.")
    for name, source in data.sources.items():
        yield name, source.validation.tokens, source.validation.bytes


def _all_tokens(config: RunConfig, tokenizer: Any, limit: int) -> Iterator[tuple[str, Any, int]]:
    import numpy as np

    from smolds_dist.data.shards import Corpus
    from smolds_dist.data.source import files_of
    from smolds_dist.data.text import ReadStats, decoded_bytes

    for name, source in config.data.mixed.items():
        stats = ReadStats(log=lambda text: print(text, file=sys.stderr))
        chunks, count, num_bytes = [], 0, 0
        corpus = Corpus(name, source.source, source, files_of(source), config.data, tokenizer)
        for batch in corpus.tokenize(corpus.documents(stats=stats)):
            for document in batch:
                if count < limit:
                    chunks.append(np.frombuffer(document.ids, "<u4"))
                    count += len(chunks[-1])
                    num_bytes += document.length or decoded_bytes(document, tokenizer)
            if count >= limit:
                break
        for line in stats.describe(source.source):
            print(line, file=sys.stderr)
        if count < 2:
            raise ConfigError(f"{source.source!r} has too little text to evaluate on; choose a larger source.")
        yield name, np.concatenate(chunks), num_bytes


def mean_loss(model: Any, ids: Any, length: int, batch: int, end_of_text: int | None = None) -> tuple[float, int]:
    """Return the mean loss in nats over all predicted tokens of `ids`, and their number; includes a shorter last sequence.

    Args:
        end_of_text: token after which another document begins, if documents are masked from each other.
    """
    import numpy as np
    import torch

    from smolds_dist.data.batch import apply_document_mask

    total, counted = 0.0, 0
    device = next(model.parameters()).device
    ids_S = torch.from_numpy(np.asarray(ids, dtype=np.int64))
    full = len(ids_S) // length * length
    for tokens in (*ids_S[:full].view(-1, length).split(batch), ids_S[None, full:]):
        if not len(tokens) or tokens.shape[1] < 2:
            continue
        labels, positions = tokens, {}
        if end_of_text is not None:
            restarting, labels = apply_document_mask(tokens, end_of_text)
            positions["position_ids"] = restarting.to(device)
        with torch.no_grad():
            inputs = {"input_ids": tokens.to(device), "labels": labels.to(device)} | positions
            loss = model(**inputs, use_cache=False).loss.item()
        predicted = int((labels[:, 1:] >= 0).sum())
        total, counted = total + loss * predicted, counted + predicted
    return total / counted, counted
