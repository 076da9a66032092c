"""Text: which rows are documents, which rows are skipped, and documents as token ids with digests that identify equal
documents.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.rows import ROW_NAMES, BadRow, rows_before, rows_of
from smolds_dist.data.source import BadFileError, File, FileChunk
from smolds_dist.data.token_files import BLOCK, Flat
from smolds_dist.data.tokenizer import text_encoder
from smolds_dist.errors import ConfigError
from smolds_dist.settings import Data, Source

BYTE_ORDER_MARK = "\ufeff"
DOCUMENTS_AT_ONCE = 512
PREFIX_TOKENS = 50  # tokens that identify a document in the original run


class Document(NamedTuple):
    """A document and its location."""

    chunk: int  # index among the chunks read, from 0
    number: int  # of its line or row in the chunk, from 1
    text: str | np.ndarray | Flat  # or token ids, from a `tokens` source


@dataclass
class ReadStats:
    """What was read from a source, and what was skipped.

    Args:
        log: called for each skipped file and for the first bad row of a file.
        bad_rows: file with a JSON line per bad row (file, row and reason); created with the first.
    """

    log: Callable[[str], None] = lambda _: None
    bad_rows: Path | None = None
    read: int = 0  # rows
    without_text: int = 0  # null, empty or blank ones
    bad: Counter[str] = field(default_factory=Counter)  # by kind

    def describe(self, name: str) -> list[str]:
        """Return messages about what was skipped in the source of this name."""
        messages = []
        if self.without_text:
            messages.append(
                f"{name}: {self.without_text:,} of {self.read:,} rows contain no text (null, empty or blank); skipped."
            )
        if self.bad:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.bad.most_common())
            messages.append(f"{name}: {self.bad.total():,} of {self.read:,} rows were skipped ({kinds}).")
        return messages

    def add_bad_row(self, file: str, row_name: str, number: int, bad: BadRow) -> None:
        """Count a bad row and record it in the file."""
        self.bad[bad.kind] += 1
        if self.bad_rows is not None:
            with self.bad_rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"file": file, row_name: number, "kind": bad.kind, "why": bad.why}) + "\n")


def documents(
    source: Source, files: list[File], data: Data, stats: ReadStats | None = None, chunks: list[FileChunk] | None = None
) -> Iterator[Document]:
    """Yield the documents of a source, file by file, unchanged except for a removed byte order mark.

    Rows that are null, empty or blank are not documents.

    Args:
        chunks: only these, in this order.

    Raises:
        ConfigError: if a file is empty or damaged, or a row holds no string, and is not skipped
            (`data.on_bad_file`, `data.on_bad_row`).
    """
    stats = stats or ReadStats()
    row_name = ROW_NAMES.get(source.source.partition(":")[0], "file")
    for at, chunk in enumerate(chunks or [FileChunk(number, 0, 1) for number in range(len(files))]):
        file, read, bad_here, before = files[chunk.file], stats.read, 0, None
        try:
            for number, text in rows_of(file, source, (chunk.number, chunk.of)):
                stats.read += 1
                if isinstance(text, str):
                    text = text.removeprefix(BYTE_ORDER_MARK)
                    if text.strip():
                        yield Document(at, number, text)
                    else:
                        stats.without_text += 1
                elif text is None:
                    stats.without_text += 1
                elif isinstance(text, BadRow):
                    before = rows_before(file, source, (chunk.number, chunk.of)) if before is None else before
                    number += before
                    if data.on_bad_row == "refuse":
                        raise ConfigError(
                            f"{file.path}, {row_name} {number:,}: {text.why}; fix it, or skip such rows with "
                            "--data.on_bad_row skip."
                        )
                    stats.add_bad_row(file.path, row_name, number, text)
                    bad_here += 1
                    if bad_here == 1:
                        stats.log(f"{file.path}, {row_name} {number:,}: {text.why}; this and similar rows are skipped.")
                else:
                    yield Document(at, number, text)
            if stats.read == read and chunk.of == 1:
                raise BadFileError("is empty")
        except BadFileError as error:
            if data.on_bad_file == "refuse":
                raise ConfigError(f"{file.path} {error}; fix or remove it, or use --data.on_bad_file skip.") from None
            stats.log(f"{file.path} {error}; {'skipped' if stats.read == read else 'the rest of it was skipped'}.")


def check_first_rows(source: Source, files: list[File], data: Data, most: int = 1000) -> None:
    """Read the first row of each file, so that a wrong column or format is reported early.

    Raises:
        ConfigError: see `documents`.
    """
    if source.source.startswith("hf:"):
        return
    remote = any("://" in file.path for file in files)
    for file in files[: 32 if remote else most]:
        next(documents(source, [file], data), None)


class Tokenized(NamedTuple):
    """A tokenized document and its location."""

    chunk: int  # see `Document`
    number: int
    ids: bytes  # little-endian uint32, the end-of-text token included
    text: int  # 64-bit digest of the full text
    beginning: int  # digest of its first `PREFIX_TOKENS` tokens
    length: int  # UTF-8 bytes of the text; 0 from a `tokens` source, known only after decoding


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, allow_control_tokens: bool = False
) -> Iterator[list[Tokenized]]:
    """Tokenize documents from `single_documents` in order, in batches of up to `DOCUMENTS_AT_ONCE`.

    A thread encodes, because the tokenizer releases Python's lock: the next documents are read and the caller works on the
    previous batch in the background.

    Args:
        allow_control_tokens: encode the spelling of a control token as that token.
    """
    encoder = text_encoder(tokenizer, allow_control_tokens)
    end = array("I", [int(tokenizer.eos_token_id)]).tobytes()

    def encode(batch: list[Document]) -> tuple[list[Document], list[bytes]]:
        if not isinstance(batch[0].text, str):
            return batch, [document_bytes(document) for document in batch]
        encodings = encoder.encode_batch_fast([str(document.text) for document in batch], add_special_tokens=False)
        return batch, [array("I", encoding.ids).tobytes() for encoding in encodings]

    def finished(batch: list[Document], encoded: list[bytes]) -> list[Tokenized]:
        done = []
        for document, ids in zip(batch, encoded, strict=True):
            content = document_bytes(document)
            length = len(content) if isinstance(document.text, str) else 0
            beginning = digest(ids[: 4 * PREFIX_TOKENS])
            done.append(Tokenized(document.chunk, document.number, ids + end, digest(content), beginning, length))
        return done

    with ThreadPoolExecutor(1, "tokenizer") as pool:
        pending: Future | None = None
        for batch in _batches(documents):
            previous, pending = pending, pool.submit(encode, batch)
            if previous:
                yield finished(*previous.result())
        if pending:
            yield finished(*pending.result())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    documents = iter(documents)
    while batch := list(islice(documents, DOCUMENTS_AT_ONCE)):
        yield batch


def single_documents(found: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Yield the same documents, but split flat files; token ids come without end-of-text token, and empty ones are dropped.

    Raises:
        WrongIdError: if ids of a `tokens` source do not fit the tokenizer.
    """
    eos, vocabulary = int(tokenizer.eos_token_id), len(tokenizer)
    for document in found:
        if isinstance(document.text, str):
            yield document
            continue
        text = document.text
        numbered = _split_flat(text.tokens, eos) if isinstance(text, Flat) else [(document.number, np.asarray(text))]
        for number, ids in numbered:
            if len(ids):
                for outside in (int(ids.max()), int(ids.min())):
                    if not 0 <= outside < vocabulary:
                        raise WrongIdError(document.chunk, number, outside, vocabulary)
                yield Document(document.chunk, number, ids[:-1] if ids[-1] == eos else ids)


def document_bytes(document: Document) -> bytes:
    """Return the bytes that a document's digest is computed from: its text, or its ids as they are stored here."""
    text = document.text
    return text.encode(errors="replace") if isinstance(text, str) else np.asarray(text).astype("<u4").tobytes()


class WrongIdError(Exception):
    """A token id that the tokenizer does not have."""

    def __init__(self, chunk: int, document: int, token: int, vocabulary: int):
        super().__init__(
            f"has the token id {token} in document {document:,}, but the tokenizer has ids 0 to {vocabulary - 1}"
        )
        self.chunk = chunk


def _split_flat(tokens: np.ndarray, eos: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the documents of a flat file, each with its end-of-text token, without loading the whole file."""
    start = number = 0
    for block in range(0, len(tokens), BLOCK):
        for at in np.flatnonzero(tokens[block : block + BLOCK] == eos).tolist():
            number += 1
            yield number, np.asarray(tokens[start : block + at + 1])
            start = block + at + 1
    if start < len(tokens):
        yield number + 1, np.asarray(tokens[start:])


def digest(content: bytes) -> int:
    """Return 64 bits that identify a document."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def decoded_bytes(document: Tokenized, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the UTF-8 bytes of the text of a document that was read as tokens."""
    ids = np.frombuffer(document.ids, "<u4")[:-1]
    return len(str(tokenizer.decode(ids.tolist())).encode(errors="replace"))


def is_validation(text: int, fraction: float) -> bool:
    """Return True if a document belongs to the validation set; decided by its digest alone.

    So its split does not change when the corpus grows, is the same in every source, and copies stay together.
    """
    return text < fraction * 2**64
