"""A source whose units are tokenised when they are wanted: by worker processes that run ahead, by `smolds data prepare` long
before, or else by the process that needs them."""

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from smolds_dist.data.cache import try_build
from smolds_dist.data.order import SampleOrder, TokenSpan, best_fit
from smolds_dist.data.rows import rows_before
from smolds_dist.data.shards import DOCUMENT, Corpus, UnitMeta, read_unit, unit_damage, write_unit
from smolds_dist.data.text import ReadStats
from smolds_dist.data.validation import HeldOut
from smolds_dist.errors import ConfigError
from smolds_dist.progress import Reporter, SourceProgress

AT_ONCE = 16  # units that a process looks for work in, from the one that is wanted next
OPEN_UNITS = 1024


class ShardedSource:
    """The units of a source; `open` it before use.

    Args:
        aside: digests of documents that some source of the run holds out though `val_fraction` would not; these are not
            trained on.
        reporter: hears of it while units are made or waited for.
        limit: tokens after which no more units are taken, with the documents of the last one up to there.
    """

    def __init__(
        self, corpus: Corpus, cache: Path, held_out: HeldOut, aside: list[int], reporter: Reporter, limit: int | None
    ):
        self.name, self.files, self.units = corpus.name, corpus.files, corpus.units
        self.held_out = held_out
        self._corpus, self._reporter, self._limit = corpus, reporter, limit
        self._limits = {0: limit} if corpus.endless else {}  # of single units
        self._cache = cache
        self.folders = [self._folder_of(unit) for unit in range(len(self.units))]
        self._aside = np.array(aside, dtype=np.uint64)
        self._found: dict[int, UnitMeta] = {}
        self._checked = set[int]()  # units that hold what was written
        self._trained: dict[int, list[TokenSpan]] = {}  # of units that were found
        self.tokens_found = 0  # of these, for training and aside
        self.tokens = lru_cache(OPEN_UNITS)(self._tokens)
        self.table = lru_cache(OPEN_UNITS)(self._table)
        self._rows_before = lru_cache(OPEN_UNITS)(
            lambda part: rows_before(self.files[part.file], corpus.source, (part.number, part.of))
        )

    def _folder_of(self, unit: int) -> Path:
        key = self._corpus.key(unit, self._limits.get(unit))
        return self._cache / "units" / key[:2] / key

    def open(self) -> "ShardedSource":
        """The source itself, once it is known which units the limit leaves; for that, these are tokenized.

        Raises:
            ConfigError: where the text of a file cannot be read and is not to be skipped.
        """
        if self._limit is None or self._corpus.endless:
            return self
        for unit in range(len(self.units)):
            self._wait_for(np.arange(unit, len(self.units)))
            meta = self._found[unit]
            if self.tokens_before(unit) + meta.all_tokens >= self._limit:
                self._end_with(unit, self._limit - self.tokens_before(unit))
                break
        return self

    def tokens_before(self, unit: int) -> int:
        """Of the units before this one, which are all known."""
        return sum(self._found[before].all_tokens for before in range(unit))

    def _end_with(self, unit: int, limit: int) -> None:
        """Takes no further unit, and of this one the documents until there are so many tokens."""
        self.units, self.folders, self._limits = self.units[: unit + 1], self.folders[: unit + 1], {unit: limit}
        self._found = {before: self._found[before] for before in range(unit)}
        self.tokens_found = self.tokens_before(unit)
        self.folders[unit] = self._folder_of(unit)
        self._wait_for(np.array([unit]))

    def has_meta(self, unit: int) -> bool:
        """Whether it is known what a unit holds: its tokens are there, or have been."""
        if unit not in self._found:
            for folder in (self.folders[unit], self._known(unit)):
                if folder.is_dir() and not unit_damage(folder, content=False):
                    self._found[unit] = read_unit(folder)
                    self.tokens_found += self._found[unit].all_tokens
                    break
        return unit in self._found

    def has_tokens(self, unit: int) -> bool:
        """Whether a unit's tokens are there."""
        return self.has_meta(unit) and (self.folders[unit] / "tokens.bin").exists()

    def _known(self, unit: int) -> Path:
        """Where the rest of a unit stays whose tokens were removed."""
        return self.folders[unit].with_suffix(".known")

    def remove(self, unit: int) -> int:
        """Removes a unit's tokens; what it holds stays known. Returns how many bytes that were."""
        if not self.has_tokens(unit):
            return 0
        folder, known, meta = self.folders[unit], self._known(unit), self._found[unit]
        if not known.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{known.name}.writing-", dir=known.parent))
            for name in ("documents", "meta.json"):
                shutil.copy(folder / name, unfinished / name)
            with contextlib.suppress(OSError):  # another process was faster
                unfinished.rename(known)
            shutil.rmtree(unfinished, ignore_errors=True)
        self.tokens.cache_clear()
        self.table.cache_clear()
        gone = folder.with_suffix(".gone")
        with contextlib.suppress(OSError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        return meta.token_bytes

    def bytes_there(self) -> int:
        """Bytes of the tokens of all units that have some."""
        there = (meta for unit, meta in self._found.items() if (self.folders[unit] / "tokens.bin").exists())
        return sum(meta.token_bytes for meta in there)

    def tokenize_shard(self, unit: int) -> bool:
        """Whether a unit's tokens are there now: made here, if nobody else is making them.

        Raises:
            ConfigError: for a file or row that cannot be read and is not to be skipped.
        """
        write = partial(
            write_unit,
            unit=self.units[unit],
            corpus=self._corpus,
            limit=self._limits.get(unit),
            report=self._report,
        )
        with self._reporter.active():
            return try_build(self.folders[unit], write, unit_damage) and self.has_meta(unit)

    def _report(self, tokens: int) -> None:
        """Of the unit that this process is making there are so many."""
        found, units = self.tokens_found + tokens, (len(self._found), len(self.units))
        self._reporter.update(SourceProgress(self.name, self._corpus.label, found, *units))

    def spans_in(self, following: np.ndarray, wait: bool) -> list[TokenSpan] | None:
        """As `order.SpansIn`."""
        unit = int(following[0])
        if not self.has_meta(unit):
            if not wait:
                return None
            self._wait_for(following)
        return self._trained_on(unit)

    def _trained_on(self, unit: int) -> list[TokenSpan]:
        """A found unit's tokens but for documents that are held out; each piece is of whole documents."""
        if unit not in self._trained:
            bounds, kept = np.array([0, self._found[unit].tokens]), np.array([self._found[unit].tokens > 0])
            if len(self._aside):
                table = self.table(unit)
                bounds = np.append(table["start"].astype(np.int64), bounds[-1])
                kept = ~np.isin(table["text"], self._aside)
            ends = bounds[np.flatnonzero(np.diff(kept, prepend=False, append=False))].reshape(-1, 2)
            self._trained[unit] = [TokenSpan(unit, start, end - start) for start, end in ends.tolist()]
        return self._trained[unit]

    def _wait_for(self, following: np.ndarray, there: Callable[[int], bool] | None = None) -> None:
        """Until the first of these units is there. Meanwhile this process makes whichever nobody else is making.

        Args:
            there: `find`, if not given.
        """
        unit = int(following[0])
        at_once = 1 if self._corpus.data.disk_budget_gb else AT_ONCE
        while not (there or self.has_meta)(unit):
            if not self.tokenize_shard(unit) and not self._make_one_of(following[1:at_once].tolist()):
                time.sleep(0.05)
            self._report(0)

    def _make_one_of(self, units: list[int]) -> bool:
        """Whether one was made. What is wrong with it will be told when it is wanted."""
        with contextlib.suppress(ConfigError):
            return any(not self.has_meta(unit) and self.tokenize_shard(unit) for unit in units)
        return False

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all text of the units that were found; 0 of a `tokens` source."""
        return sum(meta.text_bytes for meta in self._found.values())

    def count_cached(self) -> int:
        """How many units are there now."""
        return sum(self.has_meta(unit) for unit in range(len(self.units)))

    @property
    def files_found(self) -> int:
        """Files all of whose parts are there, so far as this process knows."""
        missing = {part.file for unit, parts in enumerate(self.units) if unit not in self._found for part in parts}
        return len(self.files) - len(missing)

    @property
    def num_found(self) -> int:
        """Units of which this process knows that they are there."""
        return len(self._found)

    def left_out(self) -> list[str]:
        """What the units that were found left out, in words."""
        metas = self._found.values()
        tally = ReadStats(
            read=sum(meta.rows for meta in metas), without_text=sum(meta.rows_without_text for meta in metas)
        )
        tally.bad = sum((Counter(meta.bad_rows) for meta in metas), Counter())
        return tally.lines(self._corpus.label)

    def place(self, unit: int, row: np.void) -> tuple[str, int]:
        """The file of a row of a unit's table, and the number of the row there."""
        part = self.units[unit][int(row["file"])]
        return self.files[part.file].path, int(row["number"]) + self._rows_before(part)

    def order(self, seq_len: int, seed: int, window_tokens: int, packing: str) -> SampleOrder:
        """Of its samples."""
        pack = partial(best_fit, table=self.table, seq_len=seq_len) if packing == "best_fit" else None
        return SampleOrder(len(self.units), self.spans_in, seq_len, seed, window_tokens, pack)

    def _tokens(self, unit: int) -> np.ndarray:
        """[tokens] of a unit for training, documents one after the other, each closed by the end-of-text token."""
        if not self.has_tokens(unit):
            self._wait_for(np.array([unit]), self.has_tokens)
        self._check(unit)
        return _mapped(self.folders[unit] / "tokens.bin", np.dtype(self._found[unit].dtype), self._found[unit].tokens)

    def _check(self, unit: int) -> None:
        """Tokenize a unit again whose files have changed since; each process checks it once."""
        while unit not in self._checked:
            known = self._known(unit)
            if not self.folders[unit].is_dir() and not unit_damage(known):
                self._checked.add(unit)
            elif self.tokenize_shard(unit):
                shutil.rmtree(known, ignore_errors=True)
                self._checked.add(unit)
            else:
                time.sleep(0.05)

    def _table(self, unit: int) -> np.ndarray:
        """[texts] of `DOCUMENT`, in the order of their tokens."""
        self._check(unit)
        folder = self.folders[unit] if self.folders[unit].is_dir() else self._known(unit)
        return _mapped(folder / "documents", DOCUMENT, self._found[unit].texts)

    def content(self, units: np.ndarray) -> str:
        """Digest of the training texts of these units."""
        found = hashlib.sha256()
        for unit in units.tolist():
            pieces = [piece[1:] for piece in self._trained_on(unit)]
            found.update(f"{self._found[unit].content} {pieces}\n".encode())
        return found.hexdigest()[:32]


def _mapped(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    return np.memmap(path, dtype, "r") if length else np.zeros(0, dtype)
