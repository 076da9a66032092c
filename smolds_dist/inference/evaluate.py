"""`smolds eval MODEL`: perplexity and bits per byte on a run's held-out text, or on any source; or lm-evaluation-harness.

Every token but the first of a sequence is predicted from those before it in the sequence; documents follow one another or
are kept apart, as in training (`data.document_mask`).
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


def evaluate_model(args: list[str]) -> None:
    """Prints loss, perplexity and bits per byte, or the tasks' table; with --json writes them too.

    Raises:
        ConfigError: where there is no model, no text, no such task, or an option is out of range.
    """
    options, settings = _parse(args)
    result = _evaluate_tasks(options, settings) if options.tasks else _evaluate_texts(options, settings)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _parse(args: list[str]) -> tuple[Any, list[str]]:
    """The command's own options, and the settings of the text."""
    parser = OptionParser(
        prog="smolds eval",
        description="Perplexity and bits per byte of a model. Options of smolds train that begin with --data. say on what: "
        "all of --data.source, or without one the held-out text of the model's run. With --tasks, lm-evaluation-harness's "
        "tasks instead.",
        example="smolds eval runs/first --data.source text:'corpus/*.txt' --max-tokens 100000",
    )
    parser.add_argument("model", type=Path, help="a run's folder (runs/NAME), a checkpoint's, or an exported model's")
    parser.add_argument("--step", type=int, help="of the run's checkpoints; its last model where not given")
    parser.add_argument("--max-tokens", type=int, default=1_000_000, help="stop after so many")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences that are computed together")
    parser.add_argument("--json", type=Path, help="file for the result")
    tasks = parser.add_argument_group("lm-evaluation-harness (pip install 'smolds-dist[eval]')")
    tasks.add_argument("--tasks", nargs="+", default=[], help="of the harness, or of --include-path")
    tasks.add_argument("--include-path", type=Path, help="with YAML files of tasks of your own")
    tasks.add_argument(
        "--num-fewshot", type=int, help="examples before each question; the task's own number where not given"
    )
    tasks.add_argument("--limit", type=int, help="questions of each task")
    options, settings = parser.parse_known_args(args)
    if not options.tasks and (options.include_path, options.num_fewshot, options.limit) != (None, None, None):
        raise ConfigError(
            "--include-path, --num-fewshot and --limit belong to --tasks; name some tasks, or leave them out."
        )
    return options, settings


def _evaluate_texts(options: Any, settings: list[str]) -> dict[str, Any] | list[dict[str, Any]]:
    from smolds_dist.data.batch import document_separator

    config, is_validation = _data_config(options.model, settings)
    model, tokenizer = load_model(options.model, options.step)
    results, end_of_text = [], document_separator(config.data, tokenizer)
    texts = _validation_texts if is_validation else _all_texts
    for source, ids, num_bytes in texts(config, tokenizer, options.max_tokens):
        begin, used = time.perf_counter(), ids[: options.max_tokens]
        loss, counted = mean_loss(model, used, config.data.seq_len, options.batch_size, end_of_text)
        result = {
            "text": f"{source}{', held out' if is_validation else ''}",
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
        raise ConfigError(f"{settings[0]} does not go with --tasks, which bring their own text; leave one of them out.")
    tasks = load_tasks(options.tasks, options.include_path)
    model, tokenizer = load_model(options.model, options.step)
    result, table = evaluate_tasks(model, tokenizer, tasks, options.num_fewshot, options.limit, options.batch_size)
    print(table)
    return result


def _data_config(model: Path, settings: list[str]) -> tuple[RunConfig, bool]:
    """The settings of the text, and whether it is a run's held-out split."""
    run = next((f for f in (model, model.parent, *model.resolve().parents[:2]) if (f / "config.yaml").is_file()), None)
    base = ["--config", str(run / "config.yaml")] if run else ["--run.name=eval"]
    wrong = next((s for s in settings if s.startswith("--") and not s.startswith("--data.")), None)
    if wrong:
        raise ConfigError(f"{wrong} is no option of smolds eval; `smolds eval --help` lists them.")
    own = any(setting.partition("=")[0] in ("--data.source", "--data.sources") for setting in settings)
    if own:  # in place of the run's
        base += ["--data.sources=null", "--data.stages=null", "--data.source=stdlib"]
    config = load_config([*base, *settings], prog="smolds eval")
    if not own and run is None:
        raise ConfigError(f"{model} is no run, so there is no held-out text; say on what with --data.source.")
    return config, not own


def _validation_texts(config: RunConfig, tokenizer: Any, _limit: int) -> Iterator[tuple[str, Any, int]]:
    """Of each source its name, the tokens that the run holds out, and how many bytes of text these stand for."""
    from smolds_dist.data.prepare import prepare_data
    from smolds_dist.data.tokenizer import tokenizer_digest

    data = prepare_data(config)
    if tokenizer_digest(data.tokenizer) != tokenizer_digest(tokenizer):
        raise ConfigError("the run's corpus has changed, and with it its tokenizer; say on what with --data.source.")
    for name, source in data.sources.items():
        yield config.data.mixed[name].source, source.validation.tokens, source.validation.bytes


def _all_texts(config: RunConfig, tokenizer: Any, limit: int) -> Iterator[tuple[str, Any, int]]:
    """The same of a source's documents, each closed by the end-of-text token, until there are `limit` tokens."""
    import numpy as np

    from smolds_dist.data.shards import Corpus
    from smolds_dist.data.source import files_of
    from smolds_dist.data.text import ReadStats, decoded_bytes

    for name, source in config.data.mixed.items():
        stats = ReadStats(log=lambda text: print(text, file=sys.stderr))
        parts, count, num_bytes = [], 0, 0
        corpus = Corpus(name, source.source, source, files_of(source), config.data, tokenizer)
        for batch in corpus.tokenize(corpus.documents(stats=stats)):
            for document in batch:
                if count < limit:
                    parts.append(np.frombuffer(document.ids, "<u4"))
                    count += len(parts[-1])
                    num_bytes += document.length or decoded_bytes(document, tokenizer)
            if count >= limit:
                break
        for line in stats.describe(source.source):
            print(line, file=sys.stderr)
        if count < 2:
            raise ConfigError(f"{source.source!r} has too little text to measure on; give more.")
        yield source.source, np.concatenate(parts), num_bytes


def mean_loss(model: Any, ids: Any, length: int, batch: int, end_of_text: int | None = None) -> tuple[float, int]:
    """Mean loss in nats over all predicted tokens of `ids`, and their number; a last, shorter sequence included.

    Args:
        end_of_text: the token after which another document begins, where they are kept apart.
    """
    import numpy as np
    import torch

    from smolds_dist.data.batch import apply_document_mask

    total, counted = 0.0, 0
    device = next(model.parameters()).device
    ids_S = torch.from_numpy(np.asarray(ids, dtype=np.int64))
    full_length = len(ids_S) // length * length
    for tokens in (*ids_S[:full_length].view(-1, length).split(batch), ids_S[None, full_length:]):
        if not len(tokens) or tokens.shape[1] < 2:
            continue
        labels, positions = tokens, {}
        if end_of_text is not None:
            apart, labels = apply_document_mask(tokens, end_of_text)
            positions["position_ids"] = apart.to(device)
        with torch.no_grad():
            inputs = {"input_ids": tokens.to(device), "labels": labels.to(device)} | positions
            loss = model(**inputs, use_cache=False).loss.item()
        predicted = int((labels[:, 1:] >= 0).sum())
        total, counted = total + loss * predicted, counted + predicted
    return total / counted, counted
