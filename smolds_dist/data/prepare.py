"""From a run's settings to its `TrainingData`: tokenizer, shards of every source, and their order."""

import json
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from smolds_dist.config import RunConfig
from smolds_dist.data.batch import TrainingData
from smolds_dist.data.cache import cache_folder, key_of, written_once
from smolds_dist.data.mixture import Mixture, mixture_of
from smolds_dist.data.order import VERSION, FirstOrder, SourceOrder
from smolds_dist.data.shards import FORMAT, SMALLEST_VAL_TOKENS, SourceShards, shards_damage, write_shards
from smolds_dist.data.source import files_of, fingerprint
from smolds_dist.data.text import documents
from smolds_dist.data.tokenizer import load_tokenizer, tokenizer_digest, train_tokenizer
from smolds_dist.errors import ConfigError

TOKENIZER_FORMAT = 3  # raise it when training on the same text comes to another tokenizer


def prepare_data(
    config: RunConfig, order: int = VERSION, tokenizer: Path | None = None, limits: dict[str, int | None] | None = None
) -> TrainingData:
    """Tokenises the sources, or finds them already tokenised. Safe to call from many processes and nodes at once.

    Args:
        order: version of the order; that of the checkpoint to continue from.
        tokenizer: folder of the tokenizer that the run began with; what the settings say where not given.
        limits: tokens after which the reading of a source stopped when the run began, by name.

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
    sources = _prepare_sources(config, cache, loaded, limits, fingerprints)
    for name, shards in sources.items():
        for split, tokens in (("training", shards.meta.train_tokens), ("held-out", shards.meta.val_tokens)):
            if tokens < config.data.seq_len:
                raise ConfigError(
                    f"the {split} split of {config.data.mixed[name].source!r} has {tokens} tokens, less than one sequence "
                    f"of --data.seq_len {config.data.seq_len}; use more text or shorter sequences."
                )
    seq_len, seed, window = config.data.seq_len, config.train.seed, config.data.window_tokens
    orders: dict[str, SourceOrder | FirstOrder] = {
        name: FirstOrder(one.meta.train_tokens, seq_len, seed)
        if order == 1
        else SourceOrder(one.meta.ranges, seq_len, seed, window)
        for name, one in sources.items()
    }
    data = TrainingData(loaded, sources, orders, mixture, seq_len, limits)
    _check_epochs(config, data)
    return data


def told_epochs(config: RunConfig, data: TrainingData) -> list[str]:
    """What the run will take of each source, a sentence for each."""
    samples = config.train.steps * config.train.global_batch
    totals = dict(zip(data.sources, data.mixture.totals(samples).tolist(), strict=True))
    return [
        f"{name}: {totals[name] * data.seq_len:,} tokens, {epochs:.3g} epochs of {data.sources[name].meta.train_tokens:,}"
        for name, epochs in data.epochs(samples).items()
    ]


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


def _prepare_sources(
    config: RunConfig,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    limits: dict[str, int | None],
    fingerprints: dict[str, dict],
) -> dict[str, SourceShards]:
    """Each source's shards. A text whose end one source holds out is held out in the others too."""
    data, progress, digest = config.data, config.log.level != "quiet", tokenizer_digest(tokenizer)

    def prepared(name: str, also: list[int]) -> SourceShards:
        """With the texts of these digests held out in any case."""
        source, limit = data.mixed[name], limits[name]
        parts = [FORMAT, fingerprints[name], digest, limit, data.val_fraction, data.allow_control_tokens]
        folder = written_once(
            cache / "shards" / key_of(*parts, also),
            lambda folder: write_shards(folder, source, data, tokenizer, limit, also, progress),
            shards_damage,
        )
        return SourceShards(name, folder)

    plain = {name: prepared(name, []) for name in data.mixed}
    sources = dict(plain)
    moved: dict[int, str] = {}  # digests of such texts, and the content of the source that holds them out
    for _ in range(2):
        for name, shards in plain.items():
            elsewhere = [text for text, content in moved.items() if content != shards.meta.content]
            if elsewhere:
                also = np.intersect1d(np.array(elsewhere, dtype=np.uint64), shards.train_documents["text"]).tolist()
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
