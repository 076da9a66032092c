"""Held-out text of a source: documents of its first units, of which only a few have to be read for it.

Which documents are held out is said by their own digests, in all units of all sources; those of later units are left aside
too, so that no copy of a held-out text is trained on. Held-out text thus does not grow with the corpus, and is there before
the first step.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.parts import Part
from smolds_dist.data.source import File
from smolds_dist.data.text import Document, documents
from smolds_dist.data.token_files import Flat
from smolds_dist.data.tokens import Tokenized, decoded_bytes, digest, is_held_out
from smolds_dist.data.units import DOCUMENT, DocumentWriter, read_unit, token_dtype, tokens_of
from smolds_dist.settings import Data, Source

ENOUGH_TOKENS = 2**18  # of held-out text
ENOUGH_BYTES = 2**28  # of text, read for it
SMALLEST_TOKENS = 16_384  # or a tenth of the text that was read, whichever is less


@dataclass(frozen=True)
class HeldOutMeta:
    """What a held-out folder says of itself."""

    dtype: str
    tokens: int
    texts: int
    bytes: int
    unigram_entropy: float
    kept: dict[str, int]  # of units whose last tokens were moved here: how many stay there
    moved: list[int]


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of a source."""

    tokens: np.ndarray  # documents one after the other, each closed by the end-of-text token
    documents: np.ndarray  # [texts] of `DOCUMENT`; the end of a text counts as one
    bytes: int  # UTF-8 bytes of the text
    unigram_entropy: float  # nats per token: the loss of the best model that ignores context
    moved: list[int]  # digests of texts whose end was moved here


def read_held_out(folder: Path) -> tuple[HeldOut, dict[int, int]]:
    """The text, and how many tokens stay in those units whose last ones were moved here."""
    meta = _read_meta(folder)
    tokens = np.fromfile(folder / "tokens.bin", meta.dtype)
    documents = np.fromfile(folder / "documents", DOCUMENT)
    kept = {int(unit): tokens for unit, tokens in meta.kept.items()}
    return HeldOut(tokens, documents, meta.bytes, meta.unigram_entropy, meta.moved), kept


def _read_meta(folder: Path) -> HeldOutMeta:
    return HeldOutMeta(**json.loads((folder / "meta.json").read_text()))


def held_out_damage(folder: Path) -> str | None:
    try:
        meta = _read_meta(folder)
        if (folder / "tokens.bin").stat().st_size != meta.tokens * np.dtype(meta.dtype).itemsize:
            return "tokens.bin has another size than it should"
        if (folder / "documents").stat().st_size != meta.texts * DOCUMENT.itemsize:
            return "documents has another size than it should"
    except (OSError, ValueError, TypeError):
        return "a file is missing or cannot be read"
    return None


def write_held_out(
    folder: Path,
    units: list[list[Part]],
    source: Source,
    files: list[File],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    unit_folder: Callable[[int], Path],
    most: int = ENOUGH_BYTES,
    last: tuple[int, int, int] | None = None,
) -> None:
    """Writes the held-out text of a source to `folder`.

    Where it is too little, as of few long documents, the last training tokens of the units that were read join it.

    Args:
        unit_folder: makes a unit's tokens, if they are not there, and says where.
        most: bytes of text, or of other files, that are read for it.
        last: of the last unit, where it is not taken whole: part and number of its last document, and its training tokens.

    Raises:
        ConfigError: as `documents` does.
    """
    dtype = token_dtype(tokenizer)
    out = DocumentWriter(folder / "tokens.bin", folder / "documents", dtype)
    num_bytes = read = 0
    seen = _Seen()
    while read < len(units) and out.tokens < ENOUGH_TOKENS and seen.bytes < most:
        unit, whole_unit = units[read], last is None or read < len(units) - 1
        candidates = _candidates(documents(source, files, data, parts=unit), data.val_fraction, seen, most)
        for batch in tokens_of(candidates, unit, files, data, tokenizer):
            found = [one for one in batch if is_held_out(one.text, data.val_fraction)]
            if last and not whole_unit:
                found = [one for one in found if (one.part, one.number) <= last[:2]]
            out.add([one._replace(part=unit[one.part].file) for one in found])
            num_bytes += sum(one.length or decoded_bytes(one, tokenizer) for one in found)
            if out.tokens >= ENOUGH_TOKENS:
                break
        read += 1

    kept: dict[str, int] = {}
    moved: list[int] = []
    if out.tokens < SMALLEST_TOKENS // 2:
        folders = [unit_folder(number) for number in range(read)]
        ends = {read - 1: last[2]} if last and read == len(units) else {}
        for number, tail in _tails(out.tokens, folders, ends, data.val_fraction).items():
            kept[str(number)] = tail.kept
            moved += [one.text for one in tail.documents]
            out.add([one._replace(part=units[number][one.part].file) for one in tail.documents])
            num_bytes += sum(decoded_bytes(one, tokenizer) for one in tail.documents)
    out.close()
    counts = np.bincount(np.fromfile(folder / "tokens.bin", dtype), minlength=len(tokenizer))
    frequency = counts[counts > 0] / max(out.tokens, 1)
    entropy = float(-(frequency * np.log(frequency)).sum())
    meta = HeldOutMeta(dtype.name, out.tokens, out.texts, num_bytes, entropy, kept, moved)
    (folder / "meta.json").write_text(json.dumps(asdict(meta)))


@dataclass
class _Seen:
    bytes: int = 0  # of the documents that were looked at


def _candidates(found: Iterator[Document], fraction: float, seen: _Seen, most: int) -> Iterator[Document]:
    """Those that may be held out, until so many bytes were looked at; of text that is known before it is tokenised."""
    for document in found:
        text = document.text
        if isinstance(text, str):
            content = text.encode(errors="replace")
            seen.bytes += len(content)
            if is_held_out(digest(content), fraction):
                yield document
        else:
            seen.bytes += (text.tokens if isinstance(text, Flat) else text).nbytes
            yield document
        if seen.bytes >= most:
            return


@dataclass
class _Tail:
    kept: int  # tokens of the unit
    documents: list[Tokenized]


def _tails(there: int, folders: list[Path], ends: dict[int, int], fraction: float) -> dict[int, _Tail]:
    """The last tokens of units, so many as held-out text lacks; none where it lacks less than half.

    Args:
        ends: where the training tokens of a unit end, where it is not at the unit's end.
    """
    metas = [read_unit(folder) for folder in folders]
    total = sum(meta.all_tokens for meta in metas) - sum(metas[unit].tokens - end for unit, end in ends.items())
    wanted = max(int(fraction * total), min(SMALLEST_TOKENS, total // 10))
    tails: dict[int, _Tail] = {}
    missing = wanted - there if there < wanted / 2 else 0
    for unit in reversed(range(len(folders))):
        end = ends.get(unit, metas[unit].tokens)
        count = min(missing, end)
        if count:
            tokens = np.fromfile(folders[unit] / "tokens.bin", metas[unit].dtype)[:end]
            table = np.fromfile(folders[unit] / "documents", DOCUMENT)
            tails[unit] = _tail(tokens, table[table["start"] < end], count)
            missing -= count
    return tails


def _tail(tokens: np.ndarray, table: np.ndarray, count: int) -> _Tail:
    kept = len(tokens) - count
    ends = np.append(table["start"][1:].astype(np.int64), len(tokens))
    moved = []
    for row, end in zip(table, ends.tolist(), strict=True):
        if end > kept:
            ids = tokens[max(int(row["start"]), kept) : end].astype("<u4").tobytes()
            place = int(row["file"]), int(row["number"])
            moved.append(Tokenized(*place, ids, int(row["text"]), int(row["beginning"]), 0))
    return _Tail(kept, moved)
