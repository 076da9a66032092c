"""`smolds data prepare|show|stats|order`: prepare and inspect the training data of a run."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from smolds_dist.config import load_config
from smolds_dist.data.batch import Sample, TrainingData, batch_digest, search_sorted
from smolds_dist.data.cores import free_cores
from smolds_dist.data.prepare import epoch_summary, find_data, prepare_data
from smolds_dist.data.rows import ROW_NAMES
from smolds_dist.data.sharded_source import ShardedSource
from smolds_dist.data.workers import Workers
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.observe.rows import read_rows
from smolds_dist.progress import ProgressBar, Reporter
from smolds_dist.settings import RunConfig

BAR = 40  # characters of the longest bar
MAX_SAMPLES = 50_000  # inspected for the statistics of packing
POLL_SECONDS = 0.5  # seconds between checks of the workers' progress


def data(args: list[str]) -> int:
    """Run a subcommand and return its exit code; raise a `ConfigError` for an unknown one."""
    commands = {"prepare": prepare, "show": show, "stats": stats, "order": order}
    if args and args[0] in commands:
        return commands[args[0]](args[1:])
    if args and args[0] in ("-h", "--help"):
        print(
            "usage: smolds data {prepare,show,stats,order} [options]\n\n"
            "  prepare  tokenize a run's data in advance, in any number of processes\n"
            "  show     print the documents of a training step, each with its file and row\n"
            "  stats    print files, documents, tokens, lengths, copies and epochs of each source\n"
            "  order    print where a run's samples begin, as JSON lines\n\n"
            "example: smolds data show runs/first --step 100"
        )
        return 0
    raise ConfigError(f"smolds data {' '.join(args[:1])!r} is not a command; use prepare, show, stats or order.")


def prepare(args: list[str]) -> int:
    """Tokenize a run's data in advance."""
    parser = OptionParser(
        prog="smolds data prepare",
        description="Tokenize a run's data in advance. Any number of processes on any number of machines divide the work "
        "and continue where others stopped.",
        example="smolds data prepare --workers 8 -- --preset smollm2-deepseek-255m",
    )
    parser.add_argument("--workers", type=int, help="worker processes; default: one per core, up to 16")
    options, settings = parser.parse_before_training(args)
    config = load_config(settings, prog="smolds data prepare --")
    reporter = Reporter(shown=config.log.level != "quiet")
    data = find_data(config, reporter=reporter)
    reporter.close_bars()
    samples = data.stages.samples(config.train.steps)
    if not data.has_samples(samples):
        with Workers(config, data, options.workers or free_cores(0), background=False) as workers:
            watch(config, data, samples, workers)
    for name, source in data.sources.items():
        source.count_cached()
        tokenized = f"{source.num_found:,} of {len(source.shards):,} shards tokenized, {source.tokens_found:,} tokens"
        print(f"{name}: {tokenized}", *source.describe_skipped(), sep="\n  ")
    return 0


def watch(config: RunConfig, data: TrainingData, samples: int, workers: Workers) -> None:
    """Show the workers' progress until the run's data is complete."""
    sources = data.sources.values()
    files = sum(len(source.files) for source in sources)
    for source in sources:
        source.count_cached()
    began, before = time.monotonic(), sum(source.tokens_found for source in sources)
    with closing(ProgressBar("Tokenizing: token", done=before, shown=config.log.level != "quiet")) as bar:
        while workers.are_running() and not data.has_samples(samples):
            time.sleep(POLL_SECONDS)
            for source in sources:
                source.count_cached()
            found, ready = sum(source.tokens_found for source in sources), sum(source.files_found for source in sources)
            rate = (found - before) / (time.monotonic() - began)
            bar.total = wanted_tokens(data, samples)
            bar.show(found, f"{ready:,} of {files:,} files, {rate:,.0f} tokens/s")


def wanted_tokens(data: TrainingData, samples: int) -> int | None:
    """Return about how many tokens the run needs; None until there are some of each source."""
    total = 0.0
    for name, needed in zip(data.sources, data.mixture.tokens(samples).tolist(), strict=True):
        source = data.sources[name]
        if not source.num_found:
            return None
        all_tokens = source.tokens_found / source.num_found * len(source.shards)
        total += max(source.tokens_found, min(all_tokens, needed))
    return round(total)


def show(args: list[str]) -> int:
    """Print the documents of a training step; return 1 if they differ from those that the run was trained on."""
    parser = OptionParser(
        prog="smolds data show",
        description="Print the documents of a training step, each with its source, file and row.",
        example="smolds data show runs/first --step 100",
    )
    parser.add_argument("run", type=Path, help="folder of a run (runs/NAME)")
    parser.add_argument("--step", type=int, required=True, help="training step")
    parser.add_argument("--rank", type=int, help="print only this rank's samples")
    parser.add_argument("--json", action="store_true", help="print one JSON line per sample")
    options = parser.parse_args(args)
    rows = read_rows(options.run / "metrics.jsonl")
    row = next((row for row in rows if row["step"] == options.step and "loss" in row), None)
    if row is None:
        last = max((row["step"] for row in rows if "loss" in row), default=0)
        raise ConfigError(f"{options.run} has no step {options.step}; it has steps up to {last}.")
    start = [row for row in rows if row.get("event") == "start" and row["step"] < options.step][-1]
    config = load_config(["--config", str(options.run / "config.yaml"), "-q"])
    own = config.data.tokenizer == "train"
    found = prepare_data(config, options.run / "tokenizer" if own else None, start["data"]["limits"])

    rollbacks = [r for r in rows if r.get("event") == "rollback" and r["step"] < options.step]
    indices = found.stages.batch(options.step + (rollbacks[-1]["skipped_steps"] if rollbacks else 0))
    batch = len(indices)
    digest = f"{batch_digest(found.batch(indices), indices):08x}"
    if options.rank is not None:
        ranks = start.get("world_size", 1)
        if not 0 <= options.rank < ranks:
            raise ConfigError(f"--rank {options.rank} is not a rank of this step; choose from 0 to {ranks - 1}.")
        indices = indices[options.rank * batch // ranks : (options.rank + 1) * batch // ranks]
    for index, sample in zip(indices, found.samples(np.asarray(indices)), strict=True):
        documents = list(documents_of(found, sample))
        if options.json:
            print(json.dumps({"index": index, "source": sample.source.name, "parts": documents}))
            continue
        for document in documents:
            print(
                f"== sample {index}, {sample.source.name}: {format_origin(config, sample, document)}\n{document['text']}"
            )
    if not options.json:
        print(f"== batch {digest}, recorded as {row['batch']}")
    if row["batch"] == digest:
        return 0
    print("the run was trained on other documents: the files of its sources have changed")
    return 1


def format_origin(config: RunConfig, sample: Sample, document: dict[str, Any]) -> str:
    """Format a document's file, row and first token in the sample."""
    kind = config.data.mixed[sample.source.name].source.partition(":")[0]
    row = f", {ROW_NAMES[kind]} {document['document']:,}" if kind in ROW_NAMES else ""
    return f"{document['file']}{row}" + (f", from token {document['start']:,}" if document["start"] else "")


def documents_of(found: TrainingData, sample: Sample) -> Iterator[dict[str, Any]]:
    """Yield the documents in a sample: file, number, first token in the sample, and text."""
    source = sample.source
    for shard, start, length in sample.spans:
        table, tokens = np.asarray(source.table(shard)), source.tokens(shard)
        inside = table[slice(*documents_in(table, start + 1, length - 1))]["start"].tolist()  # after the first token
        for at, end in pairwise([start, *inside, start + length]):
            text = str(found.tokenizer.decode(tokens[at:end].tolist(), skip_special_tokens=True))
            yield origin_of(source, shard, at) | {"text": text}


def documents_in(table: np.ndarray, start: int, length: int) -> list[int]:
    """Return the rows of the first document at or after this training token, and of the first one `length` tokens later."""
    return search_sorted(table["start"], np.array([start, start + length], dtype=np.uint64)).tolist()


def origin_of(source: ShardedSource, shard: int, token: int) -> dict[str, Any]:
    """Return a training token's file, its document's number there, and its index in the document."""
    table = np.asarray(source.table(shard))
    row = table[documents_in(table, token + 1, 0)[0] - 1]
    file, number = source.location(shard, row)
    return {"file": file, "document": number, "start": token - int(row["start"])}


def options_and_config(parser: OptionParser, args: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    """Return a subcommand's own options, which may also follow `--`, and the configuration of training."""
    options, settings = parser.parse_known_args([arg for arg in args if arg != "--"])
    return options, load_config([*settings, "-q"], prog=parser.prog)


def order(args: list[str]) -> int:
    """Print where samples begin, as JSON lines."""
    parser = OptionParser(
        prog="smolds data order",
        description="Print where the run's samples begin, one JSON line each: index, stage, seq_len, source, "
        "file, document, start.",
        example="smolds data order --samples 0:100 -- --preset debug",
    )
    parser.add_argument("--samples", default="0:100", metavar="FIRST:END", help="range of samples, end exclusive")
    options, config = options_and_config(parser, args)
    first, _, end = options.samples.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ConfigError(f"--samples {options.samples!r} is not a range; use FIRST:END, such as 0:100.")
    found = prepare_data(config)
    for begin in range(int(first), int(end), 1024):
        indices = range(begin, min(int(end), begin + 1024))
        for index, sample in zip(indices, found.samples(np.asarray(indices)), strict=True):
            origin = origin_of(sample.source, *sample.spans[0][:2])
            stage = found.stages.of_sample(index)
            place = {"index": index, "stage": stage.number, "seq_len": stage.seq_len, "source": sample.source.name}
            print(json.dumps(place | origin))
    return 0


def stats(args: list[str]) -> int:
    """Print statistics of each source and how many epochs the run takes."""
    parser = OptionParser(
        prog="smolds data stats",
        description="Print files, documents, tokens, lengths and duplicates of each source, and the epochs of the run.",
        example="smolds data stats -- --preset debug --data.source text:'corpus/*.txt'",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per source")
    options, config = options_and_config(parser, args)
    found = prepare_data(config)
    for order in found.orders.values():
        order.extend(None)
    epochs = found.epochs(found.stages.samples(config.train.steps))
    for name, source in found.sources.items():
        facts = source_stats(source, found.orders[name].num_tokens)
        row = facts | packing_stats(found, name) | {"epochs": round(epochs[name], 4)}
        if options.json:
            print(json.dumps({"source": name} | row))
            continue
        print(f"{name} ({config.data.mixed[name].source})")
        print("\n".join(format_stats(row, source.describe_skipped())))
    if not options.json:
        print("the run takes", *epoch_summary(config, found), sep="\n  ")
    return 0


def source_stats(source: ShardedSource, train_tokens: int) -> dict[str, Any]:
    """Return statistics of a source's documents, both splits together.

    Args:
        train_tokens: tokens of the training split.
    """
    tables = [(source.validation.documents, len(source.validation.tokens))]
    for shard in range(len(source.shards)):
        table = np.asarray(source.table(shard))
        for _, start, length in source.spans_in(np.array([shard]), True) or []:
            first, end = documents_in(table, start, length)
            tables.append((table[first:end], start + length))
    lengths = np.concatenate([np.diff(table["start"].astype(np.int64), append=end) for table, end in tables])
    texts = np.concatenate([table["text"] for table, _ in tables])
    tokens = train_tokens + len(source.validation.tokens)
    bytes_per_token = source.text_bytes / source.tokens_found or source.validation.bytes / len(source.validation.tokens)
    powers, counts = np.unique(np.floor(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    histogram = dict(zip(powers.tolist(), counts.tolist(), strict=True))
    return {
        "files": len(source.files),
        "documents": len(texts),
        "tokens": tokens,
        "held_out_tokens": len(source.validation.tokens),
        "bytes_per_token": round(bytes_per_token, 3),
        "copies": len(texts) - len(np.unique(texts)),
        "length": {
            "median": float(np.median(lengths)),
            "mean": round(float(lengths.mean()), 1),
            "longest": int(lengths.max()),
        },
        "lengths": {f"{2**p}": histogram.get(p, 0) for p in range(int(powers.min()), int(powers.max()) + 1)},
    }


def packing_stats(found: TrainingData, name: str) -> dict[str, Any]:
    """Return the shares of split documents and of padding in a source's samples, from at most `MAX_SAMPLES`."""
    source, order = found.sources[name], found.orders[name]
    numbers = np.arange(min(order.num_samples, MAX_SAMPLES))
    samples = order.spans(numbers)
    begun = unsplit = tokens = 0
    for shard, start, length in (span for sample in samples for span in sample):
        table = source.table(shard)
        first, end = documents_in(table, start, length)
        ends_here = end == len(table) or int(table["start"][end]) == start + length
        begun += end - first
        unsplit += end - first if ends_here else max(0, end - first - 1)
        tokens += length
    return {
        "cut_documents": round(1 - unsplit / max(1, begun), 4),
        "padding": round(1 - tokens / int(order.lengths_of(numbers).sum()), 4),
    }


def format_stats(row: dict[str, Any], skipped: list[str]) -> list[str]:
    """Format the statistics as lines, with a histogram of lengths."""
    share = row["copies"] / max(1, row["documents"])
    length = row["length"]
    most = max(row["lengths"].values())
    in_sequences = f"{row['cut_documents']:.1%} of documents are split, {row['padding']:.1%} of the tokens are padding"
    lines = [
        f"  {row['files']:,} files, {row['documents']:,} documents, {row['tokens']:,} tokens, "
        f"{row['held_out_tokens']:,} of them for validation; {row['bytes_per_token']:.2f} bytes per token",
        f"  {row['copies']:,} documents ({share:.1%}) are duplicates",
        f"  tokens per document: median {length['median']:,.0f}, mean {length['mean']:,.0f}, longest {length['longest']:,}",
        f"  in sequences {in_sequences}",
    ]
    for begin, count in row["lengths"].items():
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        lines.append(f"  {int(begin):>12,} to {2 * int(begin) - 1:<12,} {bar} {count:,}")
    return lines + [f"  {line}" for line in skipped]
