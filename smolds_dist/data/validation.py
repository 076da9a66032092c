"""Validation set of a source: complete documents that no source of the run trains on.

A document's digest decides: below `data.val_fraction` it is a validation document, so its split does not change when the
corpus grows, is the same in every source, and copies stay together. The set is filled from the first shards until it is
large enough; such documents in later shards are skipped. So it does not grow with the corpus, and is ready before the first
step.

If that is too little, as in a small corpus, documents with the next higher digests are added. Their digests are stored
(`ValidationSet.beyond`), and all sources exclude them.
"""

import heapq
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smolds_dist.data.cache import build_once, checksums, file_damage, key_of
from smolds_dist.data.shards import DOCUMENT, Corpus, DocumentWriter
from smolds_dist.data.text import Document, check_first_rows, decoded_bytes, digest, document_bytes, is_validation
from smolds_dist.data.tokenizer import without_beginning
from smolds_dist.errors import ConfigError
from smolds_dist.progress import print_line

FORMAT = 1  # in the key; raise it when the layout, the meaning of a file or the choice of documents changes
# Bytes of text; for a `tokens` source, four per token.
VALIDATION_BYTES = 2**20  # target size
MAX_BYTES_READ = 2**28  # limit of reading for it
MIN_VALIDATION_BYTES = 2**16  # minimum size, or a tenth of the bytes read if less


@dataclass(frozen=True)
class ValidationSet:
    """The validation documents of a source."""

    tokens: np.ndarray  # concatenated documents, each ending with the end-of-text token
    documents: np.ndarray  # [documents] of `DOCUMENT`
    bytes: int  # UTF-8 bytes of the text
    unigram_entropy: float  # nats per token: the loss of the best model that ignores context
    beyond: list[int]  # digests of its documents that are above `val_fraction`


def load_validation_set(corpus: Corpus, cache: Path, limit: int | None) -> ValidationSet:
    """Return the validation set, from the cache or written there.

    Args:
        limit: tokens that the run takes of the source; bounds how much is read.

    Raises:
        ConfigError: if a file cannot be read and is not skipped, or the source is a single document.
    """
    most = min(MAX_BYTES_READ, 4 * limit) if limit else MAX_BYTES_READ
    keys = [corpus.key(shard) for shard in range(len(corpus.shards))]
    folder = build_once(
        cache / "held_out" / key_of(FORMAT, keys, most),
        lambda folder: write_validation_set(folder, corpus, most),
        lambda folder: file_damage(folder, _sizes_of),
    )
    meta = json.loads((folder / "meta.json").read_text())
    tokens, documents = np.fromfile(folder / "tokens.bin", meta["dtype"]), np.fromfile(folder / "documents", DOCUMENT)
    return ValidationSet(tokens, documents, meta["bytes"], meta["unigram_entropy"], meta["beyond"])


def _sizes_of(meta: dict) -> dict[str, int]:
    itemsize = np.dtype(meta["dtype"]).itemsize
    return {"tokens.bin": meta["tokens"] * itemsize, "documents": meta["texts"] * DOCUMENT.itemsize}


def write_validation_set(folder: Path, corpus: Corpus, most: int) -> None:
    """Choose the validation documents by their text alone, and write them to `folder`.

    Args:
        most: bytes of text to read at most.
    """
    check_first_rows(corpus.source, corpus.files, corpus.data)
    if added := without_beginning(corpus.tokenizer):
        print_line(
            f"the tokenizer adds {added} at the beginning of text; training documents do not have it", sys.stderr
        )
    chunks = [chunk for shard in corpus.shards for chunk in shard]
    selector = ValidationSelector(corpus.data.val_fraction)
    for document in corpus.documents(chunks):
        selector.add(document)
        if selector.size >= VALIDATION_BYTES or (selector.read >= most and selector.can_choose):
            break
    chosen, beyond = selector.select()
    if selector.read and not chosen:
        raise ConfigError(
            f"{corpus.label!r} is a single document, so none is left for the validation set; split it into several "
            "files or rows."
        )
    out, num_bytes = DocumentWriter(folder / "tokens.bin", folder / "documents", corpus.dtype), 0
    for batch in corpus.tokenize(chosen):
        out.add([one._replace(chunk=chunks[one.chunk].file) for one in batch])
        num_bytes += sum(one.length or decoded_bytes(one, corpus.tokenizer) for one in batch)
    out.close()
    counts = np.bincount(np.fromfile(folder / "tokens.bin", corpus.dtype), minlength=len(corpus.tokenizer))
    frequency = counts[counts > 0] / max(out.tokens, 1)
    entropy = float(-(frequency * np.log(frequency)).sum())
    meta = {"dtype": corpus.dtype.name, "tokens": out.tokens, "texts": out.texts, "bytes": num_bytes}
    meta |= {"unigram_entropy": entropy, "beyond": beyond, "sums": checksums(folder, ("tokens.bin", "documents"))}
    (folder / "meta.json").write_text(json.dumps(meta))


class ValidationSelector:
    """Chooses validation documents among those that are added.

    Args:
        fraction: documents whose digests are below this fraction of their range are chosen.
    """

    def __init__(self, fraction: float):
        self.read = self.size = 0  # bytes: all, and those below the fraction
        self._fraction = fraction
        self._below: list[Document] = []
        # The next higher digests up to `MIN_VALIDATION_BYTES` bytes: bytes and documents, copies together.
        self._next: dict[int, tuple[int, list[Document]]] = {}
        self._next_size = 0
        self._highest: list[int] = []  # a heap of the same digests, negative
        self._has_training_document = False  # there are documents in neither

    def add(self, document: Document) -> None:
        """Consider another document."""
        content = document_bytes(document)
        text, size = digest(content), len(content)
        self.read += size
        if is_validation(text, self._fraction):
            self._below.append(document)
            self.size += size
            return
        if text not in self._next:
            heapq.heappush(self._highest, -text)
        before, copies = self._next.get(text, (0, []))
        self._next[text] = before + size, [*copies, document]
        self._next_size += size
        while self._next_size - self._next[-self._highest[0]][0] >= MIN_VALIDATION_BYTES:
            self._next_size -= self._next.pop(-heapq.heappop(self._highest))[0]
            self._has_training_document = True

    @property
    def can_choose(self) -> bool:
        """True if there are documents for both splits."""
        return self._has_training_document or bool(self._below) + len(self._next) > 1

    def select(self) -> tuple[list[Document], list[int]]:
        """Return the documents, and the digests of those above the fraction. If any document is above it, at least one is
        left for training."""
        chosen, beyond, size = list(self._below), list[int](), self.size
        for text in sorted(self._next):
            last = not self._has_training_document and len(beyond) == len(self._next) - 1
            if size >= min(MIN_VALIDATION_BYTES, self.read / 10) or last:
                break
            more, copies = self._next[text]
            chosen += copies
            beyond.append(text)
            size += more
        return chosen, beyond
