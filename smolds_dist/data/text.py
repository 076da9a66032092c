"""Text: which rows are documents, and what becomes of the others."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smolds_dist.data.parts import Part
from smolds_dist.data.rows import PLACES, BadRow, rows_before, rows_of
from smolds_dist.data.source import BadFileError, File
from smolds_dist.data.token_files import Flat
from smolds_dist.errors import ConfigError
from smolds_dist.settings import Data, Source

BYTE_ORDER_MARK = "\ufeff"


class Document(NamedTuple):
    """A text and where it stands."""

    part: int  # among those that are read, from 0
    number: int  # of its line or row there, from 1
    text: str | np.ndarray | Flat  # or token ids, of a `tokens` source


@dataclass
class Tally:
    """What has been read of a source, and what was left out.

    Args:
        say: told of files that are left out, and of the first bad row of a file.
        bad_rows: file for the others: a JSON line for each, with file, row and why; made with the first.
    """

    say: Callable[[str], None] = lambda _: None
    bad_rows: Path | None = None
    read: int = 0  # rows
    without_text: int = 0  # null, empty or blank ones
    bad: Counter[str] = field(default_factory=Counter)  # by kind

    def lines(self, name: str) -> list[str]:
        """What was left out of the source of this name, in words."""
        said = []
        if self.without_text:
            said.append(
                f"{name}: {self.without_text:,} of {self.read:,} rows hold no text (null, empty or blank); left out."
            )
        if self.bad:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.bad.most_common())
            said.append(f"{name}: {self.bad.total():,} of {self.read:,} rows were left out ({kinds}).")
        return said

    def note(self, file: str, place: str, number: int, bad: BadRow) -> None:
        """Counts a bad row and writes it down."""
        self.bad[bad.kind] += 1
        if self.bad_rows is not None:
            with self.bad_rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"file": file, place: number, "kind": bad.kind, "why": bad.why}) + "\n")


def documents(
    source: Source, files: list[File], data: Data, tally: Tally | None = None, parts: Sequence[Part] | None = None
) -> Iterator[Document]:
    """The documents of a source, file by file, their texts as they are but for a byte order mark.

    Rows that are null, empty or blank are no documents.

    Args:
        parts: only these, in this order.

    Raises:
        ConfigError: where a file is empty or damaged, or a row holds no string, and is not to be skipped
            (`data.on_bad_file`, `data.on_bad_row`).
    """
    tally = tally or Tally()
    place = PLACES.get(source.source.partition(":")[0], "file")
    for at, part in enumerate(parts or [Part(number, 0, 1) for number in range(len(files))]):
        file, read, bad_here, before = files[part.file], tally.read, 0, None
        try:
            for number, text in rows_of(file, source, (part.number, part.of)):
                tally.read += 1
                if isinstance(text, str):
                    text = text.removeprefix(BYTE_ORDER_MARK)
                    if text.strip():
                        yield Document(at, number, text)
                    else:
                        tally.without_text += 1
                elif text is None:
                    tally.without_text += 1
                elif isinstance(text, BadRow):
                    before = rows_before(file, source, (part.number, part.of)) if before is None else before
                    number += before
                    if data.on_bad_row == "refuse":
                        raise ConfigError(
                            f"{file.path} has in {place} {number:,} {text.why}; mend it, or leave such rows out with "
                            "--data.on_bad_row skip."
                        )
                    tally.note(file.path, place, number, text)
                    bad_here += 1
                    if bad_here == 1:
                        tally.say(
                            f"{file.path} has in {place} {number:,} {text.why}; left out, as others like it will be."
                        )
                else:
                    yield Document(at, number, text)
            if tally.read == read and part.whole:
                raise BadFileError("is empty")
        except BadFileError as error:
            if data.on_bad_file == "refuse":
                raise ConfigError(f"{file.path} {error}; mend or remove it, or use --data.on_bad_file skip.") from None
            tally.say(f"{file.path} {error}; {'left out' if tally.read == read else 'its rest was left out'}.")


def look_ahead(source: Source, files: list[File], data: Data, most: int = 1000) -> None:
    """Reads the first row of each file, so that a wrong column or format shows before the work begins.

    Raises:
        ConfigError: as `documents` does.
    """
    if source.source.startswith("hf:"):
        return
    remote = any("://" in file.path for file in files)
    for file in files[: 32 if remote else most]:
        next(documents(source, [file], data), None)
