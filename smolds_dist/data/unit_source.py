"""A source whose units are tokenised when they are wanted: by worker processes that run ahead, by `smolds data prepare` long
before, or else by the process that needs them."""

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.cache import key_of, write_if_free, written_once
from smolds_dist.data.held_out import ENOUGH_BYTES, held_out_damage, read_held_out, write_held_out
from smolds_dist.data.order import Piece, SourceOrder
from smolds_dist.data.packing import best_fit
from smolds_dist.data.parts import units_of_files
from smolds_dist.data.rows import rows_before
from smolds_dist.data.source import File, settings_of
from smolds_dist.data.text import look_ahead
from smolds_dist.data.tokenizer import tokenizer_digest
from smolds_dist.data.units import DOCUMENT, FORMAT, UnitMeta, left_out_of, read_unit, unit_damage, write_unit
from smolds_dist.errors import ConfigError
from smolds_dist.settings import Data, Source

AT_ONCE = 16  # units that a process looks for work in, from the one that is wanted next
OPEN_UNITS = 1024

# Told while units are made or waited for: the source, and the tokens of the one that this process is making.
Progress = Callable[["UnitSource", int], None]


class UnitSource:
    """The units of a source.

    Args:
        said: what the settings call it.
        source: as it is read.
        files: its files.
        limit: tokens after which no more units are taken, with the documents of the last one up to there.
        stream_limit: of a source that is one endless unit.

    Raises:
        ConfigError: where the text of a file cannot be read and is not to be skipped.
    """

    def __init__(
        self,
        name: str,
        said: str,
        source: Source,
        files: list[File],
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        cache: Path,
        progress: Progress,
        limit: int | None = None,
        stream_limit: int | None = None,
    ):
        self.name, self.said, self.source, self._data, self._tokenizer = name, said, source, data, tokenizer
        self.files = files
        self.units = units_of_files(source, files)
        self.progress = progress
        self._stream_limit = stream_limit
        self._found: dict[int, UnitMeta] = {}
        self._also: np.ndarray = np.zeros(0, np.uint64)
        self._open = lru_cache(OPEN_UNITS)(self._map_tokens)
        self._open_table = lru_cache(OPEN_UNITS)(self._map_table)
        self._rows_before = lru_cache(OPEN_UNITS)(
            lambda part: rows_before(files[part.file], source, (part.number, part.of))
        )
        made_with = [
            FORMAT, settings_of(source, data), tokenizer_digest(tokenizer), data.val_fraction, data.allow_control_tokens,
            stream_limit,
        ]  # fmt: skip
        keys = [
            key_of(made_with, [(*self._identity(part.file), part.number, part.of) for part in unit])
            for unit in self.units
        ]
        self.folders = [cache / "units" / key[:2] / key for key in keys]
        self._ends: dict[int, int] = {}  # where the training tokens of a unit end, where it is not at the unit's end
        self._last: tuple[int, int, int] | None = None  # as of `write_held_out`
        if not self.find(0):
            look_ahead(source, files, data)
        if limit:
            self._take_up_to(limit)
        key = key_of("held out", FORMAT, keys[: len(self.units)], self._last)
        self.held_out, kept = read_held_out(
            written_once(cache / "held_out" / key, self._write_held_out, held_out_damage)
        )
        for unit, end in kept.items():
            self._ends[unit] = min(end, self._ends.get(unit, end))

    def _identity(self, file: int) -> tuple[str, int, str]:
        described = self.files[file]
        # Several machines with the same Python share these.
        path = Path(described.path).name if self.source.source == "stdlib" else described.path
        return path, described.size, described.version

    def _write_held_out(self, folder: Path) -> None:
        # Of a stream about as much is read as the run reads of it.
        most = ENOUGH_BYTES if self._stream_limit is None else min(ENOUGH_BYTES, 8 * self._stream_limit)
        write_held_out(
            folder, self.units, self.source, self.files, self._data, self._tokenizer, self._made, most, self._last
        )

    def _made(self, unit: int) -> Path:
        self._wait_for(np.array([unit]), self.has_tokens)
        return self.folders[unit]

    def _take_up_to(self, limit: int) -> None:
        total = 0
        for unit in range(len(self.units)):
            self._wait_for(np.arange(unit, len(self.units)))
            meta = self._found[unit]
            if total + meta.all_tokens >= limit:
                self.units = self.units[: unit + 1]
                self._end_with(unit, limit - total)
                return
            total += meta.all_tokens

    def _end_with(self, unit: int, limit: int) -> None:
        """Takes the unit's documents until there are so many tokens."""
        meta, table = self._found[unit], self.table(unit)
        lengths = np.diff(table["start"].astype(np.int64), append=meta.tokens)
        trained = zip(table["file"].tolist(), table["number"].tolist(), lengths.tolist(), strict=True)
        in_order = sorted([*trained, *map(tuple, meta.aside)])
        enough = int(np.searchsorted(np.cumsum([tokens for _, _, tokens in in_order]), limit))
        part, number, _ = in_order[enough]
        places = zip(table["file"].tolist(), table["number"].tolist(), strict=True)
        self._ends[unit] = int(lengths[[place <= (part, number) for place in places]].sum())
        self._last = part, number, self._ends[unit]

    def leave_out(self, texts: list[int]) -> None:
        """Further texts that are not trained on, by digest, because another source holds them out."""
        self._also = np.array(sorted(texts), dtype=np.uint64)

    def find(self, unit: int) -> bool:
        """Whether it is known what a unit holds: its tokens are there, or have been."""
        if unit not in self._found:
            for folder in (self.folders[unit], self._known(unit)):
                if folder.is_dir() and not unit_damage(folder):
                    self._found[unit] = read_unit(folder)
                    return True
            return False
        return True

    def has_tokens(self, unit: int) -> bool:
        """Whether a unit's tokens are there."""
        return self.find(unit) and (self.folders[unit] / "tokens.bin").exists()

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
        self._open.cache_clear()
        self._open_table.cache_clear()
        gone = folder.with_suffix(".gone")
        with contextlib.suppress(OSError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        return meta.token_bytes

    def bytes_there(self) -> int:
        """Bytes of the tokens of all units that have some."""
        there = (meta for unit, meta in self._found.items() if (self.folders[unit] / "tokens.bin").exists())
        return sum(meta.token_bytes for meta in there)

    def make(self, unit: int) -> bool:
        """Whether a unit's tokens are there now: made here, if nobody else is making them.

        Raises:
            ConfigError: for a file or row that cannot be read and is not to be skipped.
        """
        write = partial(
            write_unit,
            unit=self.units[unit],
            source=self.source,
            files=self.files,
            data=self._data,
            tokenizer=self._tokenizer,
            limit=self._stream_limit,
            alive=lambda tokens: self.progress(self, tokens),
        )
        return write_if_free(self.folders[unit], write, unit_damage) and self.find(unit)

    def pieces_of(self, following: np.ndarray, wait: bool) -> list[Piece] | None:
        """As `order.PiecesOf`."""
        unit = int(following[0])
        if not self.find(unit):
            if not wait:
                return None
            self._wait_for(following)
        length = self._ends.get(unit, self._found[unit].tokens)
        if not len(self._also):
            return [Piece(unit, 0, length)] if length else []
        table = self.table(unit)
        starts = np.minimum(table["start"].astype(np.int64), length)
        ends = np.append(starts[1:], length)
        pieces: list[Piece] = []
        for start, end, out in zip(starts.tolist(), ends.tolist(), np.isin(table["text"], self._also), strict=True):
            if out or start == end:
                continue
            if pieces and pieces[-1].start + pieces[-1].length == start:
                pieces[-1] = pieces[-1]._replace(length=pieces[-1].length + end - start)
            else:
                pieces.append(Piece(unit, start, end - start))
        return pieces

    def _wait_for(self, following: np.ndarray, there: Callable[[int], bool] | None = None) -> None:
        """Until the first of these units is there. Meanwhile this process makes whichever nobody else is making.

        Args:
            there: `find`, if not given.
        """
        unit = int(following[0])
        at_once = 1 if self._data.disk_budget_gb else AT_ONCE
        while not (there or self.find)(unit):
            if not self.make(unit) and not self._make_one_of(following[1:at_once].tolist()):
                time.sleep(0.05)
            self.progress(self, 0)

    def _make_one_of(self, units: list[int]) -> bool:
        """Whether one was made. What is wrong with it will be told when it is wanted."""
        with contextlib.suppress(ConfigError):
            return any(not self.find(unit) and self.make(unit) for unit in units)
        return False

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all text of the units that were found; 0 of a `tokens` source."""
        return sum(meta.text_bytes for meta in self._found.values())

    def look(self) -> int:
        """How many units are there now."""
        return sum(self.find(unit) for unit in range(len(self.units)))

    @property
    def files_found(self) -> int:
        """Files all of whose parts are there, so far as this process knows."""
        missing = {part.file for unit, parts in enumerate(self.units) if unit not in self._found for part in parts}
        return len(self.files) - len(missing)

    @property
    def num_found(self) -> int:
        """Units of which this process knows that they are there."""
        return len(self._found)

    @property
    def tokens_found(self) -> int:
        """Of these, for training and aside."""
        return sum(meta.all_tokens for meta in self._found.values())

    def left_out(self) -> list[str]:
        """What the units that were found left out, in words."""
        return left_out_of(self.said, list(self._found.values()))

    def tokens(self, unit: int) -> np.ndarray:
        """[tokens] of a unit for training, documents one after the other, each closed by the end-of-text token."""
        return self._open(unit)

    def table(self, unit: int) -> np.ndarray:
        """[texts] of `DOCUMENT`, in the order of their tokens."""
        return self._open_table(unit)

    def place(self, unit: int, row: np.void) -> tuple[str, int]:
        """The file of a row of a unit's table, and the number of the row there."""
        part = self.units[unit][int(row["file"])]
        return self.files[part.file].path, int(row["number"]) + self._rows_before(part)

    def order(self, seq_len: int, seed: int, window_tokens: int, packing: str) -> SourceOrder:
        """Of its samples."""
        pack = partial(best_fit, table=self.table, seq_len=seq_len) if packing == "best_fit" else None
        return SourceOrder(len(self.units), self.pieces_of, seq_len, seed, window_tokens, pack)

    def _map_tokens(self, unit: int) -> np.ndarray:
        if not self.has_tokens(unit):
            self._wait_for(np.array([unit]), self.has_tokens)
        return _mapped(self.folders[unit] / "tokens.bin", np.dtype(self._found[unit].dtype), self._found[unit].tokens)

    def _map_table(self, unit: int) -> np.ndarray:
        folder = self.folders[unit] if self.folders[unit].is_dir() else self._known(unit)
        return _mapped(folder / "documents", DOCUMENT, self._found[unit].texts)

    def content(self, units: np.ndarray) -> str:
        """Digest of the training texts of these units."""
        found = hashlib.sha256(self._also.tobytes())
        for unit in units.tolist():
            found.update(f"{self._found[unit].content} {self._ends.get(unit)}\n".encode())
        return found.hexdigest()[:32]


def _mapped(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    return np.memmap(path, dtype, "r") if length else np.zeros(0, dtype)
