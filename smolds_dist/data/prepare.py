"""From a run's settings to its `TrainingData`: tokenizer, tokens of every source, and their order."""

import json
import sys
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from smolds_dist.config import RunConfig
from smolds_dist.data.batch import TrainingData
from smolds_dist.data.cache import cache_folder, key_of, written_once
from smolds_dist.data.mixture import Mixture, mixture_of
from smolds_dist.data.order import VERSION
from smolds_dist.data.source import files_of, fingerprint
from smolds_dist.data.text import documents, look_ahead
from smolds_dist.data.tokenizer import load_tokenizer, tokenizer_digest, train_tokenizer
from smolds_dist.data.unit_source import UnitSource
from smolds_dist.data.whole import FORMAT, SMALLEST_VAL_TOKENS, WholeSource, shards_damage, write_shards
from smolds_dist.errors import ConfigError
from smolds_dist.progress import ProgressBar

TOKENIZER_FORMAT = 3  # raise it when training on the same text comes to another tokenizer


def prepare_data(
    config: RunConfig,
    order: int = VERSION,
    tokenizer: Path | None = None,
    limits: dict[str, int | None] | None = None,
    samples: int = 0,
) -> TrainingData:
    """Finds the run's data, and tokenises what of it is not tokenised yet and is wanted at once: held-out text and the first
    window, or all up to a later one. Safe to call from many processes and nodes at the same time; they share the work.

    Args:
        order: version of the order; that of the checkpoint to continue from.
        tokenizer: folder of the tokenizer that the run began with; what the settings say where not given.
        limits: tokens after which the reading of a source stopped when the run began, by name.
        samples: of the run, that have been trained on.

    Raises:
        ConfigError: where a source is missing, or too small for one sequence in either split, or for the run
            (`max_epochs`).
    """
    cache = cache_folder(config.data.cache_dir)
    fingerprints = {name: fingerprint(one, config.data) for name, one in config.data.mixed.items()}
    tokenizer = tokenizer or _tokenizer_folder(config, cache, fingerprints)
    loaded = load_tokenizer(str(tokenizer) if tokenizer else config.data.tokenizer)
    mixture = mixture_of(config)
    limits = {name: _token_limit(config, name, mixture) for name in config.data.mixed} | (limits or {})
    seq_len, seed, window = config.data.seq_len, config.train.seed, config.data.window_tokens
    if order < VERSION:
        whole = _whole_sources(config, cache, loaded, limits, fingerprints)
        orders = {name: one.order(seq_len, seed, window, order) for name, one in whole.items()}
        data = TrainingData(loaded, dict(whole), orders, mixture, seq_len, limits)
        _begin(config, data, samples)
    else:
        with Bar(config) as bar:
            sources = _unit_sources(config, cache, loaded, limits, bar)
            orders = {name: one.order(seq_len, seed, window) for name, one in sources.items()}
            data = TrainingData(loaded, dict(sources), dict(orders), mixture, seq_len, limits)
            _begin(config, data, samples)
            bar.tell_left_out(sources)
    _check_sizes(config, data)
    _check_epochs(config, data)
    return data


class Bar:
    """Shows how far each source has come, from the moment that there is something to tokenise."""

    def __init__(self, config: RunConfig):
        self._shown = config.log.level != "quiet"
        self._bars: dict[str, ProgressBar] = {}
        self._before: dict[str, int] = {}  # units that were there already

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, source: UnitSource, tokens: int) -> None:
        """As `unit_source.Progress`."""
        if source.name not in self._bars:
            what = f"Tokenising {source.source.source}: token"
            self._bars[source.name] = ProgressBar(what, shown=self._shown)
        self._bars[source.name].show(source.tokens_found + tokens)

    def tell_left_out(self, sources: dict[str, UnitSource]) -> None:
        """What was left out of those sources that were worked on."""
        for name in self._bars:
            for line in sources[name].left_out():
                print(line, file=sys.stderr, flush=True)


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
        elif isinstance(source, UnitSource):
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


def _tokenizer_folder(config: RunConfig, cache: Path, fingerprints: dict[str, dict]) -> Path | None:
    """Of the tokenizer that is trained on the sources, one after the other; None where the run names one."""
    data, progress = config.data, config.log.level != "quiet"
    if data.tokenizer != "train":
        return None

    def train(folder: Path) -> None:
        if progress:
            what = ", ".join(one.source for one in data.mixed.values())
            print(f"Training a byte-level BPE tokenizer of {data.tokenizer_vocab_size} tokens on {what}", flush=True)
        texts = {
            name: (str(document.text) for document in documents(one, files_of(one), data))
            for name, one in data.mixed.items()
        }
        train_tokenizer(texts, data.tokenizer_vocab_size, folder)

    key = key_of(TOKENIZER_FORMAT, list(fingerprints.values()), data.tokenizer_vocab_size)
    return written_once(cache / "tokenizers" / key, train, _tokenizer_damage)


def _unit_sources(
    config: RunConfig,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    limits: dict[str, int | None],
    bar: Bar,
) -> dict[str, UnitSource]:
    """Each source. A text whose end one source holds out is left out of the others."""
    data, sources = config.data, dict[str, UnitSource]()
    for name, source in data.mixed.items():
        look_ahead(source, files_of(source), data)
        endless = source.source.startswith("hf:")
        limit, stream_limit = (None, limits[name]) if endless else (limits[name], None)
        sources[name] = UnitSource(name, source, data, tokenizer, cache, bar.show, limit, stream_limit)
    for one in sources.values():
        elsewhere = [other.held_out.moved for other in sources.values() if other.held_out.moved != one.held_out.moved]
        one.leave_out([text for moved in elsewhere for text in moved])
    return sources


def _whole_sources(
    config: RunConfig,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    limits: dict[str, int | None],
    fingerprints: dict[str, dict],
) -> dict[str, WholeSource]:
    """Each source's shards. A text whose end one source holds out is held out in the others too."""
    data, progress, digest = config.data, config.log.level != "quiet", tokenizer_digest(tokenizer)

    def prepared(name: str, also: list[int]) -> WholeSource:
        """With the texts of these digests held out in any case."""
        source, limit = data.mixed[name], limits[name]
        parts = [FORMAT, fingerprints[name], digest, limit, data.val_fraction, data.allow_control_tokens]
        folder = written_once(
            cache / "shards" / key_of(*parts, also),
            lambda folder: write_shards(folder, source, data, tokenizer, limit, also, progress),
            shards_damage,
        )
        return WholeSource(name, folder)

    plain = {name: prepared(name, []) for name in data.mixed}
    sources = dict(plain)
    moved: dict[int, str] = {}  # digests of such texts, and the content of the source that holds them out
    for _ in range(2):
        for name, shards in plain.items():
            elsewhere = [text for text, content in moved.items() if content != shards.meta.content]
            if elsewhere:
                also = np.intersect1d(np.array(elsewhere, dtype=np.uint64), shards.table(0)["text"]).tolist()
                sources[name] = prepared(name, also) if also else shards
            moved |= dict.fromkeys(sources[name].meta.moved, sources[name].meta.content)
    return sources


def _token_limit(config: RunConfig, name: str, mixture: Mixture) -> int | None:
    """Tokens after which reading stops: a Hub data set can be endless, so there it is what the run will see."""
    if config.data.max_tokens or not config.data.mixed[name].source.startswith("hf:"):
        return config.data.max_tokens
    samples = mixture.totals(config.train.steps * config.train.global_batch)[mixture.names.index(name)]
    return int(int(samples) * config.data.seq_len / (1 - config.data.val_fraction) * 1.02) + SMALLEST_VAL_TOKENS


def _tokenizer_damage(folder: Path) -> str | None:
    try:
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "tokenizer.json cannot be read"
    return None
