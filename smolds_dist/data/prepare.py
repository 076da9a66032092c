"""From a run's settings to its `TrainingData`: tokenizer, tokens of every source, and their order."""

import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from smolds_dist.data.batch import TrainingData
from smolds_dist.data.cache import build_once, cache_folder, json_damage, key_of
from smolds_dist.data.mixture import Mixture, mixture_of
from smolds_dist.data.sharded_source import ShardedSource
from smolds_dist.data.shards import Corpus, group_files
from smolds_dist.data.source import File, fingerprint, resolve
from smolds_dist.data.text import documents
from smolds_dist.data.tokenizer import TRAINING_CHARACTERS, load_tokenizer, train_tokenizer
from smolds_dist.data.validation import MIN_VALIDATION_BYTES, load_validation_set
from smolds_dist.errors import ConfigError
from smolds_dist.progress import Reporter, print_line
from smolds_dist.settings import Data, RunConfig, Source

INTERLEAVE = 16  # parts that a tokenizer learns from at once
TOKENIZER_FORMAT = 4  # raise it when training on the same text comes to another tokenizer


def prepare_data(
    config: RunConfig,
    tokenizer: Path | None = None,
    limits: dict[str, int | None] | None = None,
    samples: int = 0,
) -> TrainingData:
    """Finds the run's data, and tokenises what of it is not tokenised yet and is wanted at once: held-out text and the first
    window, or all up to a later one. Safe to call from many processes and nodes at the same time; they share the work.

    Args:
        tokenizer: folder of the tokenizer that the run began with; what the settings say where not given.
        limits: tokens after which the reading of a source stopped when the run began, by name.
        samples: of the run, that have been trained on.

    Raises:
        ConfigError: where a source is missing, or too small for one sequence in either split, or for the run
            (`max_epochs`).
    """
    reporter = Reporter(shown=config.log.level != "quiet")
    try:
        data = find_data(config, tokenizer, limits, reporter)
        for name, taken in data.taken(samples).items():
            # all where epochs are limited
            data.orders[name].extend(None if config.data.mixed[name].max_epochs else taken)
        for name in reporter.names:
            for line in data.sources[name].describe_skipped():
                print_line(line, sys.stderr)
    finally:
        reporter.close_bars()
    _check_sizes(config, data)
    _check_epochs(config, data)
    return data


def find_data(
    config: RunConfig,
    tokenizer: Path | None = None,
    limits: dict[str, int | None] | None = None,
    reporter: Reporter | None = None,
) -> TrainingData:
    """As `prepare_data`, but waits for no training text."""
    reporter = reporter or Reporter()
    cache = cache_folder(config.data.cache_dir)
    read_as, files = dict[str, Source](), dict[str, list[File]]()
    for name, one in config.data.mixed.items():
        read_as[name], files[name] = resolve(one, cache)
    tokenizer = tokenizer or _tokenizer_folder(config, cache, read_as, files)
    loaded = load_tokenizer(str(tokenizer) if tokenizer else config.data.tokenizer)
    mixture = mixture_of(config)
    limits = {name: _token_limit(config, one, name, mixture) for name, one in read_as.items()} | (limits or {})
    seq_len, seed, window = config.data.seq_len, config.train.seed, config.data.window_tokens
    corpora = [
        Corpus(name, config.data.mixed[name].source, one, files[name], config.data, loaded)
        for name, one in read_as.items()
    ]
    sources = _open_sources(corpora, cache, limits, reporter)
    orders = {name: one.order(seq_len, seed, window, config.data.packing) for name, one in sources.items()}
    return TrainingData(loaded, sources, orders, mixture, seq_len, limits, reporter)


def epoch_summary(config: RunConfig, data: TrainingData) -> list[str]:
    """What the run will take of each source, a sentence for each."""
    samples = config.train.steps * config.train.global_batch
    totals, epochs = data.taken(samples), data.epochs(samples)
    lines = []
    for name, source in data.sources.items():
        tokens = f"{name}: {totals[name] * data.seq_len:,} tokens"
        if name in epochs:
            lines.append(f"{tokens}, {epochs[name]:.3g} epochs of {data.orders[name].num_tokens:,}")
        else:
            lines.append(f"{tokens}; {source.num_found:,} of {len(source.shards):,} parts are tokenised so far")
    return lines


def _check_sizes(config: RunConfig, data: TrainingData) -> None:
    for name, source in data.sources.items():
        order = data.orders[name]
        for split, tokens in (("training", order.num_tokens), ("held-out", len(source.validation.tokens))):
            if tokens < config.data.seq_len:
                raise ConfigError(
                    f"the {split} split of {config.data.mixed[name].source!r} has {tokens} tokens, less than one sequence "
                    f"of --data.seq_len {config.data.seq_len}; use more text or shorter sequences."
                )


def _check_epochs(config: RunConfig, data: TrainingData) -> None:
    for name, epochs in data.epochs(config.train.steps * config.train.global_batch).items():
        most = config.data.mixed[name].max_epochs
        if most is not None and epochs > most:
            has = data.orders[name].num_samples * data.seq_len
            raise ConfigError(
                f"the run takes {epochs * has:,.0f} tokens of the source {name!r}, which has {has:,}: {epochs:.2f} epochs, "
                f"more than its max_epochs {most:g}; give it more text, a lower weight, or train fewer steps."
            )


def _tokenizer_folder(
    config: RunConfig, cache: Path, sources: dict[str, Source], files: dict[str, list[File]]
) -> Path | None:
    """Of the tokenizer that is trained on the sources, one after the other; None where the run names one."""
    data, progress = config.data, config.log.level != "quiet"
    if data.tokenizer != "train":
        return None

    def train(folder: Path) -> None:
        if progress:
            what = ", ".join(one.source for one in data.mixed.values())
            print_line(
                f"Training a byte-level BPE tokenizer of {data.tokenizer_vocab_size} tokens on {what}", sys.stdout
            )
        texts = {
            name: _interleaved_texts(one, files[name], data, TRAINING_CHARACTERS // len(sources))
            for name, one in sources.items()
        }
        train_tokenizer(texts, data.tokenizer_vocab_size, folder)

    fingerprints = [fingerprint(one, files[name], data) for name, one in data.mixed.items()]
    key = key_of(TOKENIZER_FORMAT, fingerprints, data.tokenizer_vocab_size)
    return build_once(cache / "tokenizers" / key, train, json_damage("tokenizer.json"))


def _interleaved_texts(source: Source, files: list[File], data: Data, characters: int) -> Iterator[str]:
    """Yield texts from parts spread over all files, `INTERLEAVE` of them in turn, each cut to its share of characters."""
    coming = (documents(source, files, data, chunks=[chunk]) for shard in group_files(source, files) for chunk in shard)
    reading = deque(islice(coming, INTERLEAVE))
    most = characters // max(1, len(reading))
    while reading:
        one = reading.popleft()
        if document := next(one, None):
            yield str(document.text)[:most]
            reading.append(one)
        else:
            reading.extend(islice(coming, 1))


def _open_sources(
    corpora: list[Corpus], cache: Path, limits: dict[str, int | None], reporter: Reporter
) -> dict[str, ShardedSource]:
    """Each source. What one holds out, none is trained on."""
    with reporter.active():
        validation = [load_validation_set(corpus, cache, limits[corpus.name]) for corpus in corpora]
    excluded = sorted({text for one in validation for text in one.beyond})
    return {
        corpus.name: ShardedSource(corpus, cache, one, excluded, reporter, limits[corpus.name]).open()
        for corpus, one in zip(corpora, validation, strict=True)
    }


def _token_limit(config: RunConfig, source: Source, name: str, mixture: Mixture) -> int | None:
    """Tokens after which reading stops: a stream can be endless, so there it is what the run will see."""
    if config.data.max_tokens or not source.source.startswith("hf:"):
        return config.data.max_tokens
    samples = mixture.totals(config.train.steps * config.train.global_batch)[mixture.names.index(name)]
    return int(int(samples) * config.data.seq_len / (1 - config.data.val_fraction) * 1.02) + MIN_VALIDATION_BYTES
