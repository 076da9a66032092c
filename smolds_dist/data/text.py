"""Text: which rows are documents, what becomes of the others, and documents as token ids with the digests by which equal
texts are known.
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
PREFIX_TOKENS = 50  # tokens by which the original run tells texts apart


class Document(NamedTuple):
    """A text and where it stands."""

    chunk: int  # among those that are read, from 0
    number: int  # of its line or row there, from 1
    text: str | np.ndarray | Flat  # or token ids, of a `tokens` source


@dataclass
class ReadStats:
    """What has been read of a source, and what was left out.

    Args:
        say: told of files that are left out, and of the first bad row of a file.
        bad_rows: file for the others: a JSON line for each, with file, row and why; made with the first.
    """

    log: Callable[[str], None] = lambda _: None
    bad_rows: Path | None = None
    read: int = 0  # rows
    without_text: int = 0  # null, empty or blank ones
    bad: Counter[str] = field(default_factory=Counter)  # by kind

    def describe(self, name: str) -> list[str]:
        """What was left out of the source of this name, in words."""
        messages = []
        if self.without_text:
            messages.append(
                f"{name}: {self.without_text:,} of {self.read:,} rows hold no text (null, empty or blank); left out."
            )
        if self.bad:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.bad.most_common())
            messages.append(f"{name}: {self.bad.total():,} of {self.read:,} rows were left out ({kinds}).")
        return messages

    def add_bad_row(self, file: str, row_name: str, number: int, bad: BadRow) -> None:
        """Counts a bad row and writes it down."""
        self.bad[bad.kind] += 1
        if self.bad_rows is not None:
            with self.bad_rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"file": file, row_name: number, "kind": bad.kind, "why": bad.why}) + "\n")


def documents(
    source: Source, files: list[File], data: Data, stats: ReadStats | None = None, chunks: list[FileChunk] | None = None
) -> Iterator[Document]:
    """The documents of a source, file by file, their texts as they are but for a byte order mark.

    Rows that are null, empty or blank are no documents.

    Args:
        parts: only these, in this order.

    Raises:
        ConfigError: where a file is empty or damaged, or a row holds no string, and is not to be skipped
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
                            f"{file.path} has in {row_name} {number:,} {text.why}; mend it, or leave such rows out with "
                            "--data.on_bad_row skip."
                        )
                    stats.add_bad_row(file.path, row_name, number, text)
                    bad_here += 1
                    if bad_here == 1:
                        stats.log(
                            f"{file.path} has in {row_name} {number:,} {text.why}; left out, as others like it will be."
                        )
                else:
                    yield Document(at, number, text)
            if stats.read == read and chunk.of == 1:
                raise BadFileError("is empty")
        except BadFileError as error:
            if data.on_bad_file == "refuse":
                raise ConfigError(f"{file.path} {error}; mend or remove it, or use --data.on_bad_file skip.") from None
            stats.log(f"{file.path} {error}; {'left out' if stats.read == read else 'its rest was left out'}.")


def check_first_rows(source: Source, files: list[File], data: Data, most: int = 1000) -> None:
    """Reads the first row of each file, so that a wrong column or format shows before the work begins.

    Raises:
        ConfigError: as `documents` does.
    """
    if source.source.startswith("hf:"):
        return
    remote = any("://" in file.path for file in files)
    for file in files[: 32 if remote else most]:
        next(documents(source, [file], data), None)


class Tokenized(NamedTuple):
    """A document's tokens and where it stands."""

    chunk: int  # as of its `Document`
    number: int
    ids: bytes  # little-endian uint32, the end-of-text token included
    text: int  # 64-bit digest of the whole text
    beginning: int  # of its first `PREFIX_TOKENS` tokens
    length: int  # UTF-8 bytes of the text; of a `tokens` source 0, to be found by decoding


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, allow_control_tokens: bool = False
) -> Iterator[list[Tokenized]]:
    """Documents in their order, as `single_documents` has them, some hundred at once.

    Encoding goes on in a thread, for the tokenizer leaves the interpreter free: meanwhile the next documents are read, and
    the caller works on those that are done.

    Args:
        allow_control_tokens: text that spells a control token becomes it.
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
    """The same, those of a flat file one by one; token ids without the end-of-text token, and none without tokens.

    Raises:
        WrongIdError: where ids of a `tokens` source do not fit the tokenizer.
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
    """What a document's digest is made of: its text, or the ids of a `tokens` source as they are stored here."""
    text = document.text
    return text.encode(errors="replace") if isinstance(text, str) else np.asarray(text).astype("<u4").tobytes()


class WrongIdError(Exception):
    """An id that the tokenizer does not have."""

    def __init__(self, chunk: int, document: int, token: int, vocabulary: int):
        super().__init__(
            f"has in document {document:,} the id {token}; the tokenizer has ids from 0 to {vocabulary - 1}"
        )
        self.chunk = chunk


def _split_flat(tokens: np.ndarray, eos: int) -> Iterator[tuple[int, np.ndarray]]:
    """The documents of a flat file, each with its end-of-text token; without holding all of it in memory."""
    start = number = 0
    for block in range(0, len(tokens), BLOCK):
        for at in np.flatnonzero(tokens[block : block + BLOCK] == eos).tolist():
            number += 1
            yield number, np.asarray(tokens[start : block + at + 1])
            start = block + at + 1
    if start < len(tokens):
        yield number + 1, np.asarray(tokens[start:])


def digest(content: bytes) -> int:
    """64 bits that tell texts apart."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def decoded_bytes(document: Tokenized, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text of a document that came as tokens."""
    ids = np.frombuffer(document.ids, "<u4")[:-1]
    return len(str(tokenizer.decode(ids.tolist())).encode(errors="replace"))


def is_validation(text: int, fraction: float) -> bool:
    """By a text's digest alone: a document stays on its side when the corpus grows, in every source, and copies stay
    together.
    """
    return text < fraction * 2**64
