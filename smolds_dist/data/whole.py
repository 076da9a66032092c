"""Sources that are tokenised whole before the first step, as the orders 1 and 2 want them: for runs that began in these.

A shard folder holds a source's tokens as two flat arrays, training and held-out, and a table of the documents in each.

Layout: `<cache>/shards/<key>/{train.bin, train.docs, val.bin, val.docs, meta.json}`, and `bad_rows.jsonl` where rows were
skipped.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.cache import key_of, written_once
from smolds_dist.data.held_out import HeldOut
from smolds_dist.data.order import FirstOrder, Piece, SourceOrder
from smolds_dist.data.parts import units_of
from smolds_dist.data.source import File, fingerprint
from smolds_dist.data.text import Tally, documents, look_ahead
from smolds_dist.data.tokenizer import tokenizer_digest
from smolds_dist.data.tokens import Tokenized, WrongIdError, decoded_bytes, is_held_out, tokenize
from smolds_dist.data.units import DOCUMENT, DocumentWriter
from smolds_dist.errors import ConfigError
from smolds_dist.progress import ProgressBar
from smolds_dist.settings import Data, RunConfig, Source

FORMAT = 3  # part of every key: raise it when the layout or the meaning of a file changes
SMALLEST_VAL_TOKENS = 16_384  # or a tenth of the source, whichever is less


@dataclass(frozen=True)
class Meta:
    """What a shard folder says of itself."""

    dtype: str
    train_tokens: int
    val_tokens: int
    train_texts: int  # documents
    val_texts: int
    val_bytes: int  # UTF-8 bytes of the held-out text
    val_unigram_entropy: float  # nats per token: the loss of the best model that ignores context
    text_bytes: int  # UTF-8 bytes of all text; 0 for a `tokens` source
    files: list[str]
    ranges: list[tuple[int, int, int]]  # start, length and unit (`units_of`) of each file's training tokens
    content: str  # digest of the training texts in their order, and of the ranges
    left_out: list[str]  # sentences about rows that are no documents
    moved: list[int]  # digests of texts whose end was moved to the held-out side, because else there was too little


@dataclass(frozen=True)
class WholeSource:
    """A source that was tokenised whole; it has one unit. As `UnitSource` where both are asked."""

    name: str
    folder: Path

    @cached_property
    def meta(self) -> Meta:
        return _read_meta(self.folder)

    @cached_property
    def _train(self) -> np.ndarray:
        return np.memmap(self.folder / "train.bin", dtype=self.meta.dtype, mode="r")

    def tokens(self, _unit: int) -> np.ndarray:
        """[train_tokens], documents one after the other, each closed by the end-of-text token."""
        return self._train

    @cached_property
    def _table(self) -> np.ndarray:
        return np.memmap(self.folder / "train.docs", dtype=DOCUMENT, mode="r")

    def table(self, _unit: int) -> np.ndarray:
        """[documents] of `DOCUMENT`, in the order of their tokens."""
        return self._table

    def place(self, _unit: int, row: np.void) -> tuple[str, int]:
        """The file of a row of the table, and the number of the row there."""
        return self.meta.files[int(row["file"])], int(row["number"])

    @cached_property
    def held_out(self) -> HeldOut:
        """Documents that are not trained on; where the end of a text was moved there, it counts as one."""
        meta = self.meta
        tokens = np.memmap(self.folder / "val.bin", dtype=meta.dtype, mode="r")
        documents = np.memmap(self.folder / "val.docs", dtype=DOCUMENT, mode="r")
        return HeldOut(tokens, documents, meta.val_bytes, meta.val_unigram_entropy, meta.moved)

    def order(self, seq_len: int, seed: int, window_tokens: int, version: int) -> SourceOrder | FirstOrder:
        """That of version 1 or 2."""
        if version == 1:
            return FirstOrder(self.meta.train_tokens, seq_len, seed)
        starts, lengths, units = np.asarray(self.meta.ranges, dtype=np.int64).reshape(-1, 3).T
        _, units = np.unique(units, return_inverse=True)  # some may have no training tokens

        def pieces_of(following: np.ndarray, _wait: bool) -> list[Piece]:
            here = np.flatnonzero(units == following[0])
            return [Piece(0, int(starts[at]), int(lengths[at])) for at in here]

        return SourceOrder(int(units.max()) + 1, pieces_of, seq_len, seed, window_tokens, version=2)


def whole_sources(
    config: RunConfig,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    limits: dict[str, int | None],
    files: dict[str, list[File]],
) -> dict[str, WholeSource]:
    """Each source, tokenised, or found so. A text whose end one source holds out is held out in the others too."""
    data, progress, digest = config.data, config.log.level != "quiet", tokenizer_digest(tokenizer)

    def prepared(name: str, also: list[int]) -> WholeSource:
        """With the texts of these digests held out in any case."""
        source, limit = data.mixed[name], limits[name]
        described = fingerprint(source, files[name], data)
        parts = [FORMAT, described, digest, limit, data.val_fraction, data.allow_control_tokens]
        folder = written_once(
            cache / "shards" / key_of(*parts, also),
            lambda folder: _write_shards(folder, source, files[name], data, tokenizer, limit, also, progress),
            _shards_damage,
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


def _read_meta(folder: Path) -> Meta:
    return Meta(**json.loads((folder / "meta.json").read_text()))


def _shards_damage(folder: Path) -> str | None:
    """By sizes alone: every start of a run reads this."""
    try:
        meta = _read_meta(folder)
    except (OSError, ValueError, TypeError):
        return "meta.json cannot be read"
    token = np.dtype(meta.dtype).itemsize
    for name, expected in (
        ("train.bin", meta.train_tokens * token),
        ("val.bin", meta.val_tokens * token),
        ("train.docs", meta.train_texts * DOCUMENT.itemsize),
        ("val.docs", meta.val_texts * DOCUMENT.itemsize),
    ):
        size = (folder / name).stat().st_size if (folder / name).exists() else 0
        if size != expected:
            return f"{name} has {size:,} bytes instead of {expected:,}"
    return None


def _write_shards(
    folder: Path,
    source: Source,
    files: list[File],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    held_out: Collection[int],
    progress: bool,
) -> None:
    """Tokenises a source into `folder`.

    Args:
        limit: stop after so many tokens.
        held_out: digests of further texts to hold out, because another source does.

    Raises:
        ConfigError: for a file or row that cannot be read and is not to be skipped.
    """
    look_ahead(source, files, data)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    bar = ProgressBar(f"Tokenising {source.source}: token", shown=progress)
    tally = Tally(say=lambda text: bar.write(text, sys.stderr), bad_rows=folder / "bad_rows.jsonl")
    split = _Split(folder, dtype, tokenizer)
    also, stop = frozenset(held_out), False
    try:
        for batch in tokenize(documents(source, files, data, tally), tokenizer, data.allow_control_tokens):
            if limit:
                batch, stop = _up_to(batch, limit - split.tokens)
            split.add(batch, lambda text: is_held_out(text, data.val_fraction) or text in also)
            bar.show(split.tokens)
            if stop:
                break
    except WrongIdError as error:
        raise ConfigError(f"{files[error.part].path} {error}; give the tokenizer that made them.") from None
    finally:
        split.close()
    left_out = tally.lines(source.source)
    for line in left_out:
        bar.write(line, sys.stderr)
    bar.close()
    meta = split.finish(data.val_fraction, files, left_out)
    (folder / "meta.json").write_text(json.dumps(asdict(meta)))


class _Split:
    """Both sides of a source while they are written."""

    def __init__(self, folder: Path, dtype: np.dtype, tokenizer: PreTrainedTokenizerBase):
        self._folder, self._dtype, self._tokenizer = folder, dtype, tokenizer
        self._train, self._val = (
            DocumentWriter(folder / f"{side}.bin", folder / f"{side}.docs", dtype) for side in ("train", "val")
        )
        self._content = hashlib.sha256()
        self._text_bytes = self._val_bytes = 0

    @property
    def tokens(self) -> int:
        return self._train.tokens + self._val.tokens

    def add(self, documents: list[Tokenized], is_aside: Callable[[int], bool]) -> None:
        """The next documents; those whose text's digest says so are held out."""
        sides = [is_aside(one.text) for one in documents]
        kept = [one for one, aside in zip(documents, sides, strict=True) if not aside]
        held_out = [one for one, aside in zip(documents, sides, strict=True) if aside]
        self._train.add(kept)
        self._val.add(held_out)
        self._content.update(b"".join(one.text.to_bytes(8, "big") for one in kept))
        self._text_bytes += sum(one.length for one in documents)
        self._val_bytes += sum(one.length or decoded_bytes(one, self._tokenizer) for one in held_out)

    def close(self) -> None:
        self._train.close()
        self._val.close()

    def finish(self, val_fraction: float, files: list[File], left_out: list[str]) -> Meta:
        """What there is to say of the two, once enough is held out."""
        wanted = max(int(val_fraction * self.tokens), min(SMALLEST_VAL_TOKENS, self.tokens // 10))
        train_tokens, val_tokens, moved = self._train.tokens, self._val.tokens, list[int]()
        if val_tokens < wanted / 2:
            # A few long documents may all fall on the training side: its last tokens become held-out text.
            tail, moved = _move_tail(self._folder, self._dtype, wanted - val_tokens, val_tokens)
            self._val_bytes += len(str(self._tokenizer.decode(tail, skip_special_tokens=True)).encode())
            train_tokens, val_tokens = train_tokens - len(tail), val_tokens + len(tail)
        counts = np.bincount(np.fromfile(self._folder / "val.bin", dtype=self._dtype), minlength=len(self._tokenizer))
        frequency = counts[counts > 0] / max(val_tokens, 1)
        table = np.fromfile(self._folder / "train.docs", DOCUMENT)
        numbers, first = np.unique(table["file"], return_index=True)
        starts = dict(zip(numbers.tolist(), table["start"][first].tolist(), strict=True))
        lengths = np.diff([*starts.values(), train_tokens]).tolist()
        units = units_of([file.size for file in files])
        ranges = [(start, length, units[file]) for (file, start), length in zip(starts.items(), lengths, strict=True)]
        self._content.update(json.dumps(ranges).encode())
        return Meta(
            dtype=self._dtype.name,
            train_tokens=train_tokens,
            val_tokens=val_tokens,
            train_texts=(self._folder / "train.docs").stat().st_size // DOCUMENT.itemsize,
            val_texts=(self._folder / "val.docs").stat().st_size // DOCUMENT.itemsize,
            val_bytes=self._val_bytes,
            val_unigram_entropy=float(-(frequency * np.log(frequency)).sum()),
            text_bytes=self._text_bytes,
            files=[file.path for file in files],
            ranges=ranges,
            content=self._content.hexdigest(),
            left_out=left_out,
            moved=moved,
        )


def _up_to(batch: list[Tokenized], limit: int) -> tuple[list[Tokenized], bool]:
    """The documents until there are `limit` tokens, and whether there are."""
    for at, document in enumerate(batch):
        limit -= len(document.ids) // 4
        if limit <= 0:
            return batch[: at + 1], True
    return batch, False


def _move_tail(folder: Path, dtype: np.dtype, count: int, val_tokens: int) -> tuple[np.ndarray, list[int]]:
    """Moves the last training tokens to the held-out side; returns them, and the digests of their texts."""
    with open(folder / "train.bin", "r+b") as train, open(folder / "val.bin", "ab") as val:
        kept = max(0, os.fstat(train.fileno()).st_size // dtype.itemsize - count)
        train.seek(kept * dtype.itemsize)
        tail = train.read()
        train.truncate(kept * dtype.itemsize)
        val.write(tail)
    table = np.fromfile(folder / "train.docs", DOCUMENT)
    first = max(0, int(np.searchsorted(table["start"], kept, "right")) - 1)
    moved = table[first:].copy()
    moved["start"] = np.maximum(moved["start"], kept) - kept + val_tokens
    table[: first + (first < len(table) and table["start"][first] < kept)].tofile(folder / "train.docs")
    with open(folder / "val.docs", "ab") as out:
        out.write(moved.tobytes())
    return np.frombuffer(tail, dtype=dtype), moved["text"].tolist()
