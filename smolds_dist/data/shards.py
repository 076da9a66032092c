"""Shards: the units of tokenization of a source. Each has its own folder, written completely or not at all by one of any
number of processes and machines.

A shard is the smallest unit of work: one process reads it, and the sample order is made of shards. Large files are split
into several shards; small files share one.

Layout: `<cache>/units/<xx>/<key>/{tokens.bin, documents, meta.json}`, and `bad_rows.jsonl` if rows were skipped.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.cache import checksums, file_damage, key_of
from smolds_dist.data.order import permute_index, round_keys
from smolds_dist.data.source import COMPRESSED, File, FileChunk, settings_of
from smolds_dist.data.text import (
    Document,
    ReadStats,
    Tokenized,
    WrongIdError,
    documents,
    is_validation,
    single_documents,
    tokenize,
)
from smolds_dist.data.tokenizer import tokenizer_digest
from smolds_dist.errors import ConfigError
from smolds_dist.settings import Data, Source

FORMAT = 6  # in every key; raise it when the layout or the meaning of a file changes
SHARD_BYTES = 2**20  # small files share a shard up to this size
CHUNK_BYTES = 2**24  # larger files are split if their format allows it
SPLITTABLE = ("jsonl", "parquet")
# A row of a document table: start of its tokens, its chunk of the shard and number there, digests of its text and of its
# first tokens.
DOCUMENT = np.dtype([("start", "<u8"), ("file", "<u4"), ("number", "<u4"), ("text", "<u8"), ("beginning", "<u8")])


@dataclass(frozen=True)
class Corpus:
    """The text of one of a run's sources, and the settings of its tokenization."""

    name: str  # of the source in the run
    label: str  # the source as in the settings
    source: Source  # as it is read
    files: list[File]
    data: Data
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def shards(self) -> list[list[FileChunk]]:
        return group_files(self.source, self.files)

    @property
    def endless(self) -> bool:
        """True if it is one shard that may have no end."""
        return self.source.source.startswith("hf:")

    @property
    def dtype(self) -> np.dtype:
        """Of stored tokens."""
        return np.dtype(np.uint16 if len(self.tokenizer) <= 2**16 else np.uint32)

    @cached_property
    def _made_with(self) -> list:
        settings = settings_of(self.source, self.data)
        return [
            FORMAT, settings, tokenizer_digest(self.tokenizer), self.data.val_fraction, self.data.allow_control_tokens
        ]  # fmt: skip

    def key(self, shard: int, limit: int | None = None) -> str:
        """Return the folder name of a shard, or of its first `limit` tokens."""
        described = []
        for chunk in self.shards[shard]:
            file = self.files[chunk.file]
            # Machines with the same Python share these.
            path = Path(file.path).name if self.source.source == "stdlib" else file.path
            described.append((path, file.size, file.version, chunk.number, chunk.of))
        return key_of(self._made_with, limit, described)

    def documents(self, chunks: list[FileChunk] | None = None, stats: ReadStats | None = None) -> Iterator[Document]:
        """Yield the documents of all files, or of these chunks, one by one.

        Raises:
            ConfigError: see `text.documents`; also if ids of a `tokens` source do not fit the tokenizer.
        """
        chunks = chunks or [FileChunk(number, 0, 1) for number in range(len(self.files))]
        try:
            yield from single_documents(documents(self.source, self.files, self.data, stats, chunks), self.tokenizer)
        except WrongIdError as error:
            path = self.files[chunks[error.chunk].file].path
            raise ConfigError(f"{path} {error}; use the tokenizer that produced it.") from None

    def tokenize(self, found: Iterable[Document]) -> Iterator[list[Tokenized]]:
        """Tokenize these documents in batches."""
        return tokenize(found, self.tokenizer, self.data.allow_control_tokens)


def group_files(source: Source, files: list[File]) -> list[list[FileChunk]]:
    """Return the shards of a source, in an order independent of the files' names."""
    chunks, sizes = [], []
    for at, file in enumerate(files):
        cut = source.source.partition(":")[0] in SPLITTABLE and not file.path.endswith(COMPRESSED)
        count = -(-file.size // CHUNK_BYTES) if cut and file.size else 1
        chunks += [FileChunk(at, number, count) for number in range(count)]
        sizes += [file.size // count] * count
    shards: dict[int, list[FileChunk]] = {}
    for chunk, shard in zip(chunks, group_into_shards(sizes), strict=True):
        shards.setdefault(shard, []).append(chunk)
    return [shards[shard] for shard in sorted(shards)]


def group_into_shards(sizes: list[int]) -> list[int]:
    """Return the shard of each chunk of a source, from the chunks' sizes in bytes in the order of their names.

    Small chunks share a shard, up to `SHARD_BYTES`, but not with their neighbors: neighbors are often alike, and the first
    window should resemble the whole corpus. So chunks are grouped in a fixed order that is independent of their names.
    """
    key = round_keys("2 0 0 files")[None]
    order = np.argsort(permute_index(np.arange(len(sizes)), np.full(len(sizes), len(sizes)), key))
    shards, shard, size = [0] * len(sizes), -1, SHARD_BYTES
    for chunk in order.tolist():
        if size + sizes[chunk] > SHARD_BYTES:
            shard, size = shard + 1, 0
        size += sizes[chunk]
        shards[chunk] = shard
    return shards


@dataclass(frozen=True)
class ShardMeta:
    """The content of a shard's `meta.json`."""

    dtype: str
    tokens: int  # for training
    texts: int  # documents for training
    aside_tokens: int  # of documents below `val_fraction`, which are not trained on
    text_bytes: int  # UTF-8 bytes of all text; 0 for a `tokens` source
    content: str  # digest of the training documents in order
    rows: int
    rows_without_text: int
    bad_rows: dict[str, int]  # skipped, by kind
    sums: dict[str, int]  # checksums of the other files

    @property
    def token_bytes(self) -> int:
        return self.tokens * np.dtype(self.dtype).itemsize

    @property
    def all_tokens(self) -> int:
        """Tokens for training and of validation documents."""
        return self.tokens + self.aside_tokens


def read_meta(folder: Path) -> ShardMeta:
    return ShardMeta(**json.loads((folder / "meta.json").read_text()))


def shard_damage(folder: Path, content: bool = True) -> str | None:
    """Return a description of damage to a shard's folder, or None; compares sizes, and checksums if `content`."""

    def sizes_of(described: dict) -> dict[str, int]:
        meta = ShardMeta(**described)
        return {"documents": meta.texts * DOCUMENT.itemsize, "tokens.bin": meta.token_bytes}

    return file_damage(folder, sizes_of, content)


class DocumentWriter:
    """Writes concatenated documents: their tokens to one file, the document table to another."""

    def __init__(self, tokens: Path, table: Path, dtype: np.dtype):
        self.tokens = self.texts = 0
        self._dtype, self._tokens, self._table = dtype, tokens.open("wb"), table.open("wb")

    def add(self, documents: list[Tokenized]) -> None:
        rows = np.empty(len(documents), DOCUMENT)
        for at, document in enumerate(documents):
            rows[at] = (self.tokens, document.chunk, document.number, document.text, document.beginning)
            self.tokens += len(document.ids) // 4
        self.texts += len(documents)
        self._table.write(rows.tobytes())
        ids = np.frombuffer(b"".join(document.ids for document in documents), dtype="<u4")
        self._tokens.write(ids.astype(self._dtype).tobytes())

    def close(self) -> None:
        self._tokens.close()
        self._table.close()


def write_shard(
    folder: Path,
    shard: list[FileChunk],
    corpus: Corpus,
    limit: int | None = None,
    report: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Tokenize a shard into `folder`.

    Args:
        limit: stop after the document that reaches this many tokens.
        report: called regularly with the number of tokens so far.

    Raises:
        ConfigError: for a file or row that cannot be read and is not skipped.
    """
    stats = ReadStats(log=lambda text: print(text, file=sys.stderr, flush=True), bad_rows=folder / "bad_rows.jsonl")
    content = hashlib.sha256()
    read = text_bytes = 0
    out = DocumentWriter(folder / "tokens.bin", folder / "documents", corpus.dtype)
    try:
        for batch in corpus.tokenize(corpus.documents(shard, stats)):
            if limit:
                batch = _truncate_batch(batch, limit - read)
            kept = [one for one in batch if not is_validation(one.text, corpus.data.val_fraction)]
            out.add(kept)
            content.update(b"".join(one.text.to_bytes(8, "big") for one in kept))
            read += sum(len(one.ids) // 4 for one in batch)
            text_bytes += sum(one.length for one in batch)
            report(read)
            if limit and read >= limit:
                break
    finally:
        out.close()
    meta = ShardMeta(
        dtype=corpus.dtype.name,
        tokens=out.tokens,
        texts=out.texts,
        aside_tokens=read - out.tokens,
        text_bytes=text_bytes,
        content=content.hexdigest(),
        rows=stats.read,
        rows_without_text=stats.without_text,
        bad_rows=dict(stats.bad),
        sums=checksums(folder, ("tokens.bin", "documents")),
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta)))


def _truncate_batch(batch: list[Tokenized], limit: int) -> list[Tokenized]:
    """Return the documents up to the one that reaches `limit` tokens."""
    ends = np.cumsum([len(document.ids) // 4 for document in batch])
    return batch[: int(np.searchsorted(ends, limit)) + 1]
