"""Units' tokens: each unit of a source has a folder of its own, which is written whole or not at all, by one of any number
of processes and machines.

Layout: `<cache>/units/<xx>/<key>/{tokens.bin, documents, meta.json}`, and `bad_rows.jsonl` where rows were skipped.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.parts import Part
from smolds_dist.data.remote import waiting
from smolds_dist.data.source import File
from smolds_dist.data.text import Document, Tally, documents
from smolds_dist.data.tokens import Tokenized, WrongIdError, is_held_out, tokenize
from smolds_dist.errors import ConfigError
from smolds_dist.settings import Data, Source

FORMAT = 4  # part of every key: raise it when the layout or the meaning of a file changes
# A row of a table of documents: where its tokens start, its part of the unit and number there, digests of its text and its
# beginning.
DOCUMENT = np.dtype([("start", "<u8"), ("file", "<u4"), ("number", "<u4"), ("text", "<u8"), ("beginning", "<u8")])


@dataclass(frozen=True)
class UnitMeta:
    """What a unit's folder says of itself."""

    dtype: str
    tokens: int  # for training
    texts: int  # documents for training
    aside: list[tuple[int, int, int]]  # documents that are not trained on, as their digests say: part, number, tokens
    text_bytes: int  # UTF-8 bytes of all text; 0 of a `tokens` source
    content: str  # digest of the training texts in their order
    rows: int
    rows_without_text: int
    bad_rows: dict[str, int]  # that were left out, by kind

    @property
    def token_bytes(self) -> int:
        return self.tokens * np.dtype(self.dtype).itemsize

    @property
    def all_tokens(self) -> int:
        """Those of documents aside too."""
        return self.tokens + sum(tokens for _, _, tokens in self.aside)


def read_unit(folder: Path) -> UnitMeta:
    return UnitMeta(**json.loads((folder / "meta.json").read_text()))


def unit_damage(folder: Path) -> str | None:
    """By sizes alone: every start of a run reads this."""
    try:
        meta = read_unit(folder)
        expected_sizes = {"documents": meta.texts * DOCUMENT.itemsize}
        if folder.suffix != ".known":  # then only what it holds is known
            expected_sizes["tokens.bin"] = meta.token_bytes
        for name, expected in expected_sizes.items():
            size = (folder / name).stat().st_size
            if size != expected:
                return f"{name} has {size:,} bytes instead of {expected:,}"
    except (OSError, ValueError, TypeError):
        return "a file is missing or cannot be read"
    return None


class DocumentWriter:
    """Writes documents one after the other: their tokens to one file, the table to another."""

    def __init__(self, tokens: Path, table: Path, dtype: np.dtype):
        self.tokens = self.texts = 0
        self._dtype, self._tokens, self._table = dtype, tokens.open("wb"), table.open("wb")

    def add(self, documents: list[Tokenized]) -> None:
        rows = np.empty(len(documents), DOCUMENT)
        for at, document in enumerate(documents):
            rows[at] = (self.tokens, document.part, document.number, document.text, document.beginning)
            self.tokens += len(document.ids) // 4
        self.texts += len(documents)
        self._table.write(rows.tobytes())
        ids = np.frombuffer(b"".join(document.ids for document in documents), dtype="<u4")
        self._tokens.write(ids.astype(self._dtype).tobytes())

    def close(self) -> None:
        self._tokens.close()
        self._table.close()


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    return np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)


def write_unit(
    folder: Path,
    unit: list[Part],
    source: Source,
    files: list[File],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    alive: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Tokenises a unit into `folder`.

    Args:
        limit: stop with the document that reaches so many tokens.
        alive: told now and then how many tokens there are.

    Raises:
        ConfigError: for a file or row that cannot be read and is not to be skipped.
    """
    dtype = token_dtype(tokenizer)
    tally = Tally(say=lambda text: print(text, file=sys.stderr, flush=True), bad_rows=folder / "bad_rows.jsonl")
    content = hashlib.sha256()
    aside: list[tuple[int, int, int]] = []
    read = text_bytes = 0
    out = DocumentWriter(folder / "tokens.bin", folder / "documents", dtype)
    waiting_before = waiting.set(lambda: alive(read))
    try:
        for batch in tokens_of(documents(source, files, data, tally, unit), unit, files, data, tokenizer):
            if limit:
                batch = _up_to(batch, limit - read)
            kept = [one for one in batch if not is_held_out(one.text, data.val_fraction)]
            out.add(kept)
            content.update(b"".join(one.text.to_bytes(8, "big") for one in kept))
            held_out = (one for one in batch if is_held_out(one.text, data.val_fraction))
            aside += [(one.part, one.number, len(one.ids) // 4) for one in held_out]
            read += sum(len(one.ids) // 4 for one in batch)
            text_bytes += sum(one.length for one in batch)
            alive(read)
            if limit and read >= limit:
                break
    finally:
        waiting.reset(waiting_before)
        out.close()
    meta = UnitMeta(
        dtype=dtype.name,
        tokens=out.tokens,
        texts=out.texts,
        aside=aside,
        text_bytes=text_bytes,
        content=content.hexdigest(),
        rows=tally.read,
        rows_without_text=tally.without_text,
        bad_rows=dict(tally.bad),
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta)))


def tokens_of(
    found: Iterator[Document], unit: list[Part], files: list[File], data: Data, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[Tokenized]]:
    """The tokens of documents of a unit, some hundred at once.

    Raises:
        ConfigError: where ids of a `tokens` source do not fit the tokenizer.
    """
    try:
        yield from tokenize(found, tokenizer, data.allow_control_tokens)
    except WrongIdError as error:
        path = files[unit[error.part].file].path
        raise ConfigError(f"{path} {error}; give the tokenizer that made them.") from None


def _up_to(batch: list[Tokenized], limit: int) -> list[Tokenized]:
    """The documents until there are `limit` tokens."""
    ends = np.cumsum([len(document.ids) // 4 for document in batch])
    return batch[: int(np.searchsorted(ends, limit)) + 1]


def left_out_of(name: str, metas: list[UnitMeta]) -> list[str]:
    """What these units of a source left out, in words."""
    tally = Tally(read=sum(meta.rows for meta in metas), without_text=sum(meta.rows_without_text for meta in metas))
    tally.bad = sum((Counter(meta.bad_rows) for meta in metas), Counter())
    return tally.lines(name)
