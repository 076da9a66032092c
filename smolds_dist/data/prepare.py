"""From a run's settings to its `TrainingData`: tokenizer, tokens of every source, and their order."""

import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from smolds_dist.data.batch import TrainingData
from smolds_dist.data.cache import cache_folder, json_damage, key_of, written_once
from smolds_dist.data.held_out import SMALLEST_TOKENS
from smolds_dist.data.hub import resolve
from smolds_dist.data.mixture import Mixture, mixture_of
from smolds_dist.data.source import File, fingerprint
from smolds_dist.data.text import documents
from smolds_dist.data.tokenizer import load_tokenizer, train_tokenizer
from smolds_dist.data.unit_source import UnitSource
from smolds_dist.errors import ConfigError
from smolds_dist.progress import ProgressBar
from smolds_dist.settings import RunConfig, Source

TOKENIZER_FORMAT = 3  # raise it when training on the same text comes to another tokenizer


class Bar:
    """Shows how far each source has come, from the moment that there is something to tokenise."""

    def __init__(self, config: RunConfig):
        self._shown = config.log.level != "quiet"
        self._bars: dict[str, ProgressBar] = {}

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, source: UnitSource, tokens: int) -> None:
        """As `unit_source.Progress`."""
        if source.name not in self._bars:
            what = f"Tokenising {source.said}: token"
            self._bars[source.name] = ProgressBar(what, shown=self._shown)
        self._bars[source.name].show(source.tokens_found + tokens)

    def tell_left_out(self, sources: dict[str, UnitSource]) -> None:
        """What was left out of those sources that were worked on."""
        for name in self._bars:
            for line in sources[name].left_out():
                print(line, file=sys.stderr, flush=True)


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
    with Bar(config) as bar:
        data = find_data(config, tokenizer, limits, bar)
        _begin(config, data, samples)
        bar.tell_left_out(data.sources)
    _check_sizes(config, data)
    _check_epochs(config, data)
    return data


def begin_data(config: RunConfig) -> TrainingData:
    """A new run's data, but for training text that is not tokenised yet."""
    with Bar(config) as bar:
        return find_data(config, None, None, bar)


def find_data(
    config: RunConfig,
    tokenizer: Path | None,
    limits: dict[str, int | None] | None,
    bar: Bar,
) -> TrainingData:
    """As `prepare_data`, but waits for no training text."""
    cache = cache_folder(config.data.cache_dir)
    read_as, files = dict[str, Source](), dict[str, list[File]]()
    for name, one in config.data.mixed.items():
        read_as[name], files[name] = resolve(one, cache)
    tokenizer = tokenizer or _tokenizer_folder(config, cache, read_as, files)
    loaded = load_tokenizer(str(tokenizer) if tokenizer else config.data.tokenizer)
    mixture = mixture_of(config)
    limits = {name: _token_limit(config, one, name, mixture) for name, one in read_as.items()} | (limits or {})
    seq_len, seed, window = config.data.seq_len, config.train.seed, config.data.window_tokens
    sources = _unit_sources(config, cache, loaded, limits, read_as, files, bar)
    orders = {name: one.order(seq_len, seed, window, config.data.packing) for name, one in sources.items()}
    return TrainingData(loaded, sources, orders, mixture, seq_len, limits)


def told_epochs(config: RunConfig, data: TrainingData) -> list[str]:
    """What the run will take of each source, a sentence for each."""
    samples = config.train.steps * config.train.global_batch
    totals = dict(zip(data.sources, data.mixture.totals(samples).tolist(), strict=True))
    epochs = data.epochs(samples)
    lines = []
    for name, source in data.sources.items():
        tokens = f"{name}: {totals[name] * data.seq_len:,} tokens"
        if name in epochs:
            lines.append(f"{tokens}, {epochs[name]:.3g} epochs of {data.orders[name].num_tokens:,}")
        else:
            lines.append(f"{tokens}; {source.num_found:,} of {len(source.units):,} parts are tokenised so far")
    return lines


def _begin(config: RunConfig, data: TrainingData, samples: int) -> None:
    """Waits for what the next step needs, and for all of a source whose epochs are limited."""
    for (name, order), taken in zip(data.orders.items(), data.mixture.totals(samples).tolist(), strict=True):
        order.extend(None if config.data.mixed[name].max_epochs else taken)


def _check_sizes(config: RunConfig, data: TrainingData) -> None:
    for name, source in data.sources.items():
        order = data.orders[name]
        for split, tokens in (("training", order.num_tokens), ("held-out", len(source.held_out.tokens))):
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
            print(f"Training a byte-level BPE tokenizer of {data.tokenizer_vocab_size} tokens on {what}", flush=True)
        texts = {
            name: (str(document.text) for document in documents(one, files[name], data))
            for name, one in sources.items()
        }
        train_tokenizer(texts, data.tokenizer_vocab_size, folder)

    fingerprints = [fingerprint(one, files[name], data) for name, one in data.mixed.items()]
    key = key_of(TOKENIZER_FORMAT, fingerprints, data.tokenizer_vocab_size)
    return written_once(cache / "tokenizers" / key, train, json_damage("tokenizer.json"))


def _unit_sources(
    config: RunConfig,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    limits: dict[str, int | None],
    read_as: dict[str, Source],
    files: dict[str, list[File]],
    bar: Bar,
) -> dict[str, UnitSource]:
    """Each source. A text whose end one source holds out is left out of the others."""
    data, sources = config.data, dict[str, UnitSource]()
    for name, source in read_as.items():
        endless = source.source.startswith("hf:")
        limit, stream_limit = (None, limits[name]) if endless else (limits[name], None)
        sources[name] = UnitSource(
            name, data.mixed[name].source, source, files[name], data, tokenizer, cache, bar.show, limit, stream_limit
        )
    for one in sources.values():
        elsewhere = [other.held_out.moved for other in sources.values() if other.held_out.moved != one.held_out.moved]
        one.leave_out([text for moved in elsewhere for text in moved])
    return sources


def _token_limit(config: RunConfig, source: Source, name: str, mixture: Mixture) -> int | None:
    """Tokens after which reading stops: a stream can be endless, so there it is what the run will see."""
    if config.data.max_tokens or not source.source.startswith("hf:"):
        return config.data.max_tokens
    samples = mixture.totals(config.train.steps * config.train.global_batch)[mixture.names.index(name)]
    return int(int(samples) * config.data.seq_len / (1 - config.data.val_fraction) * 1.02) + SMALLEST_TOKENS
