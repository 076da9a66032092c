"""From a run's settings to its `TrainingData`: tokenizer, tokens and order of every source."""

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
from smolds_dist.stages import Stages, resolve_stages

INTERLEAVE = 16  # chunks that a tokenizer is trained on in turn
TOKENIZER_FORMAT = 4  # raise it when training on the same text gives another tokenizer


def prepare_data(
    config: RunConfig,
    tokenizer: Path | None = None,
    limits: dict[str, int | None] | None = None,
    samples: int = 0,
) -> TrainingData:
    """Find the run's data and tokenize what the first step needs: the validation set and the first window, or everything up
    to a later window. Safe to call from many processes and nodes simultaneously; they divide the work.

    Args:
        tokenizer: folder of the tokenizer that the run started with; default: from the settings.
        limits: by source, tokens after which its reading stopped when the run started.
        samples: consumed samples of the run.

    Raises:
        ConfigError: if a source is missing, or too small for one sequence in either split, or for the run (`max_epochs`).
    """
    reporter = Reporter(shown=config.log.level != "quiet")
    try:
        data = find_data(config, tokenizer, limits, reporter)
        for name, taken in data.taken(samples).items():
            limited = config.data.mixed[name].max_epochs
            data.orders[name].extend(None if limited else taken)  # completely if epochs are limited
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
    """Find the run's data like `prepare_data`, without waiting for training tokens."""
    reporter = reporter or Reporter()
    cache = cache_folder(config.data.cache_dir)
    read_as, files = dict[str, Source](), dict[str, list[File]]()
    for name, one in config.data.mixed.items():
        read_as[name], files[name] = resolve(one, cache)
    tokenizer = tokenizer or _tokenizer_folder(config, cache, read_as, files)
    loaded = load_tokenizer(str(tokenizer) if tokenizer else config.data.tokenizer)
    stages = resolve_stages(config)
    mixture = mixture_of(config)
    limits = {name: _token_limit(config, one, name, mixture, stages) for name, one in read_as.items()} | (limits or {})
    seed, window, packing = config.train.seed, config.data.window_tokens, config.data.packing
    corpora = [
        Corpus(name, config.data.mixed[name].source, one, files[name], config.data, loaded)
        for name, one in read_as.items()
    ]
    sources = _open_sources(corpora, cache, limits, reporter)
    orders = {name: one.order(mixture.lengths(name), seed, window, packing) for name, one in sources.items()}
    return TrainingData(loaded, sources, orders, mixture, stages, limits, reporter)


def epoch_summary(config: RunConfig, data: TrainingData) -> list[str]:
    """Return one line per source with the tokens and epochs that the run takes of it."""
    samples = data.stages.samples(config.train.steps)
    totals, epochs = data.mixture.tokens(samples).tolist(), data.epochs(samples)
    lines = []
    for (name, source), total in zip(data.sources.items(), totals, strict=True):
        tokens = f"{name}: {total:,} tokens"
        if name in epochs:
            lines.append(f"{tokens}, {epochs[name]:.3g} epochs of {data.orders[name].num_tokens:,}")
        else:
            lines.append(f"{tokens}; {source.num_found:,} of {len(source.shards):,} shards tokenized so far")
    return lines


def _check_sizes(config: RunConfig, data: TrainingData) -> None:
    longest = max(span.seq_len for span in data.stages.spans)
    for name, source in data.sources.items():
        order = data.orders[name]
        for split, tokens in (("training", order.num_tokens), ("validation", len(source.validation.tokens))):
            if tokens < longest:
                raise ConfigError(
                    f"the {split} split of {config.data.mixed[name].source!r} has {tokens} tokens, fewer than one sequence "
                    f"of --data.seq_len {longest}; use more text or shorter sequences."
                )


def _check_epochs(config: RunConfig, data: TrainingData) -> None:
    for name, epochs in data.epochs(data.stages.samples(config.train.steps)).items():
        most = config.data.mixed[name].max_epochs
        if most is not None and epochs > most:
            has = data.orders[name].tokens_per_epoch
            raise ConfigError(
                f"the run takes {epochs * has:,.0f} tokens of the source {name!r}, which has {has:,}: {epochs:.2f} epochs, "
                f"more than its max_epochs {most:g}; add text, lower its weight, or train fewer steps."
            )


def _tokenizer_folder(
    config: RunConfig, cache: Path, sources: dict[str, Source], files: dict[str, list[File]]
) -> Path | None:
    """Return the folder of the tokenizer trained on the sources, or None if the settings name a tokenizer."""
    data, progress = config.data, config.log.level != "quiet"
    if data.tokenizer != "train":
        return None

    def train(folder: Path) -> None:
        if progress:
            names = ", ".join(one.source for one in data.mixed.values())
            size = data.tokenizer_vocab_size
            print_line(f"Training a byte-level BPE tokenizer of {size} tokens on {names}", sys.stdout)
        texts = {
            name: _interleaved_texts(one, files[name], data, TRAINING_CHARACTERS // len(sources))
            for name, one in sources.items()
        }
        train_tokenizer(texts, data.tokenizer_vocab_size, folder)

    fingerprints = [fingerprint(one, files[name], data) for name, one in data.mixed.items()]
    key = key_of(TOKENIZER_FORMAT, fingerprints, data.tokenizer_vocab_size)
    return build_once(cache / "tokenizers" / key, train, json_damage("tokenizer.json"))


def _interleaved_texts(source: Source, files: list[File], data: Data, characters: int) -> Iterator[str]:
    """Yield documents from `INTERLEAVE` chunks of different files in turn, truncated to an equal number of characters."""
    readers = (
        documents(source, files, data, chunks=[chunk]) for shard in group_files(source, files) for chunk in shard
    )
    active = deque(islice(readers, INTERLEAVE))
    most = characters // max(1, len(active))
    while active:
        one = active.popleft()
        if document := next(one, None):
            yield str(document.text)[:most]
            active.append(one)
        else:
            active.extend(islice(readers, 1))


def _open_sources(
    corpora: list[Corpus], cache: Path, limits: dict[str, int | None], reporter: Reporter
) -> dict[str, ShardedSource]:
    """Open all sources; a document in any validation set is excluded from training in every source."""
    with reporter.active():
        validation = [load_validation_set(corpus, cache, limits[corpus.name]) for corpus in corpora]
    excluded = sorted({text for one in validation for text in one.beyond})
    return {
        corpus.name: ShardedSource(corpus, cache, one, excluded, reporter, limits[corpus.name]).open()
        for corpus, one in zip(corpora, validation, strict=True)
    }


def _token_limit(config: RunConfig, source: Source, name: str, mixture: Mixture, stages: Stages) -> int | None:
    """Return the tokens after which reading stops: for a stream, which may be endless, what the run consumes."""
    if config.data.max_tokens or not source.source.startswith("hf:"):
        return config.data.max_tokens
    tokens = mixture.tokens(stages.samples(config.train.steps))[mixture.names.index(name)]
    return int(int(tokens) / (1 - config.data.val_fraction) * 1.02) + MIN_VALIDATION_BYTES
