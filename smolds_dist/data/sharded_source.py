"""A source whose shards are tokenized when needed: by background workers, in advance by `smolds data prepare`, or by the
process that needs them."""

import contextlib
import hashlib
import time
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from smolds_dist.data.cache import try_build
from smolds_dist.data.order import Epoch, SampleOrder, TokenSpan
from smolds_dist.data.packing import best_fit
from smolds_dist.data.rows import rows_before
from smolds_dist.data.shards import DOCUMENT, Corpus, ShardMeta, read_meta, shard_damage, write_shard
from smolds_dist.data.staged_order import StagedOrder
from smolds_dist.data.text import ReadStats
from smolds_dist.data.validation import ValidationSet
from smolds_dist.errors import ConfigError
from smolds_dist.progress import Reporter, SourceProgress

LOOKAHEAD = 16  # shards, from the next one needed, among which a process looks for work
OPEN_SHARDS = 1024


class ShardedSource:
    """The shards of a source; call `open` before use.

    Args:
        skip: digests of documents that are in some source's validation set although `val_fraction` would not put
            them there; they are not trained on.
        reporter: receives progress while shards are tokenized or waited for.
        limit: tokens after which no further shards are used; the last shard is truncated after a document.
    """

    def __init__(
        self, corpus: Corpus, cache: Path, val: ValidationSet, skip: list[int], reporter: Reporter, limit: int | None
    ):
        self.name, self.files, self.shards = corpus.name, corpus.files, corpus.shards
        self.validation = val
        self._corpus, self._reporter, self._limit = corpus, reporter, limit
        self._limits = {0: limit} if corpus.endless else {}  # of single shards
        self._cache = cache
        self.folders = [self._folder_of(shard) for shard in range(len(self.shards))]
        self._excluded = np.array(skip, dtype=np.uint64)
        self._found: dict[int, ShardMeta] = {}
        self._checked = set[int]()  # shards whose checksums were compared
        self._spans: dict[int, list[TokenSpan]] = {}  # of known shards
        self.tokens_found = 0  # of known shards, for training and validation
        self.tokens = lru_cache(OPEN_SHARDS)(self._tokens)
        self.table = lru_cache(OPEN_SHARDS)(self._table)
        self._rows_before = lru_cache(OPEN_SHARDS)(
            lambda chunk: rows_before(self.files[chunk.file], corpus.source, (chunk.number, chunk.of))
        )

    def _folder_of(self, shard: int) -> Path:
        key = self._corpus.key(shard, self._limits.get(shard))
        return self._cache / "units" / key[:2] / key

    def open(self) -> "ShardedSource":
        """Return the source itself; with a limit, first tokenize the shards up to it.

        Raises:
            ConfigError: if a file cannot be read and bad files are not skipped.
        """
        if self._limit is None or self._corpus.endless:
            return self
        for shard in range(len(self.shards)):
            self._wait_until_ready(np.arange(shard, len(self.shards)))
            meta = self._found[shard]
            if self.tokens_before(shard) + meta.all_tokens >= self._limit:
                self._truncate_at(shard, self._limit - self.tokens_before(shard))
                break
        return self

    def tokens_before(self, shard: int) -> int:
        """Return the tokens of all shards before this one, which must be known."""
        return sum(self._found[before].all_tokens for before in range(shard))

    def _truncate_at(self, shard: int, limit: int) -> None:
        """Use no further shards, and of this one the documents up to `limit` tokens."""
        self.shards, self.folders, self._limits = self.shards[: shard + 1], self.folders[: shard + 1], {shard: limit}
        self._found = {before: self._found[before] for before in range(shard)}
        self.tokens_found = self.tokens_before(shard)
        self.folders[shard] = self._folder_of(shard)
        self._wait_until_ready(np.array([shard]))

    def has_meta(self, shard: int) -> bool:
        """Return True if a shard's metadata is known, because its tokens are in the cache."""
        folder = self.folders[shard]
        if shard not in self._found and folder.is_dir() and not shard_damage(folder, content=False):
            self._found[shard] = read_meta(folder)
            self.tokens_found += self._found[shard].all_tokens
        return shard in self._found

    def tokenize_shard(self, shard: int) -> bool:
        """Tokenize a shard unless another process is doing so; return True if its tokens are now in the cache.

        Raises:
            ConfigError: if a file or row cannot be read and is not skipped.
        """
        write = partial(
            write_shard,
            shard=self.shards[shard],
            corpus=self._corpus,
            limit=self._limits.get(shard),
            report=self._report,
        )
        with self._reporter.active():
            return try_build(self.folders[shard], write, shard_damage) and self.has_meta(shard)

    def _report(self, tokens: int) -> None:
        """Report `tokens` tokens so far of the shard being tokenized here."""
        found, shards = self.tokens_found + tokens, (len(self._found), len(self.shards))
        self._reporter.update(SourceProgress(self.name, self._corpus.label, found, *shards))

    def spans_in(self, following: np.ndarray, wait: bool) -> list[TokenSpan] | None:
        """See `order.SpansIn`."""
        shard = int(following[0])
        if not self.has_meta(shard):
            if not wait:
                return None
            self._wait_until_ready(following)
        return self._training_spans(shard)

    def _training_spans(self, shard: int) -> list[TokenSpan]:
        """Return a known shard's tokens without validation documents; each span holds whole documents."""
        if shard not in self._spans:
            bounds, kept = np.array([0, self._found[shard].tokens]), np.array([self._found[shard].tokens > 0])
            if len(self._excluded):
                table = self.table(shard)
                bounds = np.append(table["start"].astype(np.int64), bounds[-1])
                kept = ~np.isin(table["text"], self._excluded)
            ends = bounds[np.flatnonzero(np.diff(kept, prepend=False, append=False))].reshape(-1, 2)
            self._spans[shard] = [TokenSpan(shard, start, end - start) for start, end in ends.tolist()]
        return self._spans[shard]

    def _wait_until_ready(self, following: np.ndarray) -> None:
        """Wait for the first of these shards and tokenize any that no other process is tokenizing."""
        shard = int(following[0])
        while not self.has_meta(shard):
            if not self.tokenize_shard(shard) and not self._tokenize_any(following[1:LOOKAHEAD].tolist()):
                time.sleep(0.05)
            self._report(0)

    def _tokenize_any(self, shards: list[int]) -> bool:
        """Tokenize one free shard; return True on success. Errors are raised later, when the shard is needed."""
        with contextlib.suppress(ConfigError):
            return any(not self.has_meta(shard) and self.tokenize_shard(shard) for shard in shards)
        return False

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all text of the known shards; 0 for a `tokens` source."""
        return sum(meta.text_bytes for meta in self._found.values())

    def count_cached(self) -> int:
        """Return how many shards are in the cache now."""
        return sum(self.has_meta(shard) for shard in range(len(self.shards)))

    @property
    def files_found(self) -> int:
        """Files whose chunks are all in the cache, as far as this process knows."""
        missing = {one.file for shard, chunks in enumerate(self.shards) if shard not in self._found for one in chunks}
        return len(self.files) - len(missing)

    @property
    def num_found(self) -> int:
        """Shards that this process knows to be tokenized."""
        return len(self._found)

    def describe_skipped(self) -> list[str]:
        """Return messages about rows and files skipped in the known shards."""
        metas = self._found.values()
        stats = ReadStats(read=sum(m.rows for m in metas), without_text=sum(m.rows_without_text for m in metas))
        stats.bad = sum((Counter(meta.bad_rows) for meta in metas), Counter())
        return stats.describe(self._corpus.label)

    def location(self, shard: int, row: np.void) -> tuple[str, int]:
        """Return the file of a row of a shard's document table, and the row's number in that file."""
        chunk = self.shards[shard][int(row["file"])]
        return self.files[chunk.file].path, int(row["number"]) + self._rows_before(chunk)

    def order(self, lengths: list[tuple[int, int]], seed: int, window_tokens: int, packing: str) -> StagedOrder:
        """Return the order of the source's samples.

        Args:
            lengths: the source's first sample of each sequence length, and that length.
        """

        def make(seq_len: int, rest: tuple[int, Epoch] | None = None) -> SampleOrder:
            pack = partial(best_fit, table=self.table, seq_len=seq_len) if packing == "best_fit" else None
            return SampleOrder(len(self.shards), self.spans_in, seq_len, seed, window_tokens, pack, rest)

        return StagedOrder(lengths, make)

    def _tokens(self, shard: int) -> np.ndarray:
        """Return a shard's training tokens [tokens]: concatenated documents, each ending with the end-of-text token."""
        self._check(shard)
        meta = self._found[shard]
        return _memmap(self.folders[shard] / "tokens.bin", np.dtype(meta.dtype), meta.tokens)

    def _check(self, shard: int) -> None:
        """Tokenize a shard again if its cached files are damaged; each process checks it once."""
        while shard not in self._checked and not self.tokenize_shard(shard):
            time.sleep(0.05)
        self._checked.add(shard)

    def _table(self, shard: int) -> np.ndarray:
        """Return a shard's document table [documents] of `DOCUMENT`, in token order."""
        self._check(shard)
        return _memmap(self.folders[shard] / "documents", DOCUMENT, self._found[shard].texts)

    def content(self, shards: np.ndarray) -> str:
        """Return a digest of the training documents of these shards."""
        found = hashlib.sha256()
        for shard in shards.tolist():
            spans = [span[1:] for span in self._training_spans(shard)]
            found.update(f"{self._found[shard].content} {spans}\n".encode())
        return found.hexdigest()[:32]


def _memmap(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    return np.memmap(path, dtype, "r") if length else np.zeros(0, dtype)
