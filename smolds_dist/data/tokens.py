"""Tokens: documents as ids, each closed by the end-of-text token, with the numbers by which equal texts are known."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.text import Document
from smolds_dist.data.token_files import BLOCK, Flat
from smolds_dist.data.tokenizer import text_encoder

DOCUMENTS_AT_ONCE = 512
BEGINNING = 50  # tokens by which the original run tells texts apart


class Tokenized(NamedTuple):
    """A document's tokens and where it stands."""

    part: int  # as of its `Document`
    number: int
    ids: bytes  # little-endian uint32, the end-of-text token included
    text: int  # 64-bit digest of the whole text
    beginning: int  # of its first `BEGINNING` tokens
    length: int  # UTF-8 bytes of the text; of a `tokens` source 0, to be found by decoding


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, allow_control_tokens: bool = False
) -> Iterator[list[Tokenized]]:
    """Documents in their order, some hundred at once.

    Encoding goes on in a thread, for the tokenizer leaves the interpreter free: meanwhile the next documents are read, and
    the caller works on those that are done.

    Args:
        allow_control_tokens: text that spells a control token becomes it.

    Raises:
        WrongIdError: where ids of a `tokens` source do not fit the tokenizer.
    """
    encoder = text_encoder(tokenizer, allow_control_tokens)
    eos, vocabulary = int(tokenizer.eos_token_id), len(tokenizer)
    end = array("I", [eos]).tobytes()

    def encode(batch: list[Document]) -> tuple[list[Document], list[array]]:
        if batch and not isinstance(batch[0].text, str):
            return batch, []
        encodings = encoder.encode_batch_fast([str(document.text) for document in batch], add_special_tokens=False)
        return batch, [array("I", encoding.ids) for encoding in encodings]

    def finished(batch: list[Document], encoded: list[array]) -> Iterator[list[Tokenized]]:
        if not encoded:
            yield from _as_they_are(batch, eos, vocabulary)
            return
        done = []
        for (part, number, text), ids in zip(batch, encoded, strict=True):
            content = str(text).encode(errors="replace")
            tokens = ids.tobytes()
            done.append(Tokenized(part, number, tokens + end, digest(content), _beginning(tokens), len(content)))
        yield done

    with ThreadPoolExecutor(1, "tokenizer") as pool:
        ahead: Future | None = None
        for batch in _batches(documents):
            previous, ahead = ahead, pool.submit(encode, batch)
            if previous:
                yield from finished(*previous.result())
        if ahead:
            yield from finished(*ahead.result())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    documents = iter(documents)
    while batch := list(islice(documents, DOCUMENTS_AT_ONCE)):
        yield batch


def _as_they_are(batch: list[Document], eos: int, vocabulary: int) -> Iterator[list[Tokenized]]:
    for part, number, tokens in batch:
        whole = _cut(tokens.tokens, eos) if isinstance(tokens, Flat) else iter([(number, np.asarray(tokens))])
        while some := list(islice(whole, DOCUMENTS_AT_ONCE)):
            done = []
            for at, ids in some:
                if not len(ids):
                    continue
                if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
                    outside = int(ids.max()) if int(ids.max()) >= vocabulary else int(ids.min())
                    raise WrongIdError(part, at, outside, vocabulary)
                content = ids[:-1] if ids[-1] == eos else ids
                tokens_only = content.astype("<u4").tobytes()
                end = np.asarray([eos], dtype="<u4").tobytes()
                done.append(Tokenized(part, at, tokens_only + end, digest(tokens_only), _beginning(tokens_only), 0))
            yield done


class WrongIdError(Exception):
    """An id that the tokenizer does not have."""

    def __init__(self, part: int, document: int, token: int, vocabulary: int):
        super().__init__(
            f"has in document {document:,} the id {token}; the tokenizer has ids from 0 to {vocabulary - 1}"
        )
        self.part = part


def _cut(tokens: np.ndarray, eos: int) -> Iterator[tuple[int, np.ndarray]]:
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


def _beginning(tokens: bytes) -> int:
    return digest(tokens[: 4 * BEGINNING])


def decoded_bytes(document: Tokenized, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text of a document that came as tokens."""
    ids = np.frombuffer(document.ids, "<u4")[:-1]
    return len(str(tokenizer.decode(ids.tolist())).encode(errors="replace"))


def is_held_out(text: int, fraction: float) -> bool:
    """By a text's digest alone: a document stays on its side when the corpus grows, in every source, and copies stay
    together.
    """
    return text < fraction * 2**64
