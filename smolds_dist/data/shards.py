"""Packed token shards: the corpus as two flat arrays of token ids, training and held-out, written once.

Layout: `<cache>/shards/<key>/{train.bin, val.bin, meta.json}`. A folder of that name is complete by construction: the
writer fills a temporary folder, under a lock, and renames it when the last byte is on disk.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from smolds_dist.config import Data, RunConfig
from smolds_dist.data.corpus import RowCount, documents, fingerprint
from smolds_dist.data.tokenizer import load_tokenizer, text_encoder, train_tokenizer
from smolds_dist.errors import ConfigError
from smolds_dist.progress import ProgressBar

FORMAT = 2  # part of every key: raise it when the layout or the meaning of a file changes
DOCUMENTS_AT_ONCE = 512
SMALLEST_VAL_TOKENS = 16_384  # or a tenth of the corpus, whichever is less


@dataclass(frozen=True)
class Meta:
    """What a shard folder says of itself."""

    dtype: str
    train_tokens: int
    val_tokens: int
    val_bytes: int  # UTF-8 bytes of the held-out text
    val_unigram_entropy: float  # nats per token: the loss of the best model that ignores context


@dataclass(frozen=True)
class TokenShards:
    """A tokenised corpus and its tokenizer."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def meta(self) -> Meta:
        return self.read_meta(self.folder)

    @staticmethod
    def read_meta(folder: Path) -> Meta:
        return Meta(**json.loads((folder / "meta.json").read_text()))

    @property
    def identity(self) -> dict:
        """What the token order depends on, for checkpoints."""
        return {"train_tokens": self.meta.train_tokens, "tokenizer": tokenizer_digest(self.tokenizer)}

    @cached_property
    def train(self) -> np.ndarray:
        """[train_tokens], documents one after the other, each closed by the end-of-text token."""
        return np.memmap(self.folder / "train.bin", dtype=self.meta.dtype, mode="r")

    @cached_property
    def val(self) -> np.ndarray:
        """[val_tokens], likewise, of documents that `train` does not hold."""
        return np.memmap(self.folder / "val.bin", dtype=self.meta.dtype, mode="r")


def prepare_shards(config: RunConfig) -> TokenShards:
    """Tokenises the corpus, or finds it already tokenised. Safe to call from many processes and nodes at once.

    Raises:
        ConfigError: where the corpus is missing, or too small for one sequence in either split.
    """
    data, progress = config.data, config.log.level != "quiet"
    cache = Path(data.cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--data.cache_dir {data.cache_dir!r} cannot be made ({error.strerror}); choose another."
        ) from None
    corpus_key = fingerprint(data)

    name = data.tokenizer
    if name == "train":
        key = _key(corpus_key, data.tokenizer_vocab_size)
        tokenizer_dir = _written_once(
            cache / "tokenizers" / key, lambda folder: _train_tokenizer(data, folder, progress), _tokenizer_damage
        )
        name = str(tokenizer_dir)
    tokenizer = load_tokenizer(name)
    limit = _token_limit(config)
    key = _key(corpus_key, tokenizer_digest(tokenizer), limit, data.val_fraction)
    folder = _written_once(
        cache / "shards" / key, lambda folder: _write_shards(folder, data, tokenizer, limit, progress), _shards_damage
    )
    shards = TokenShards(folder, tokenizer)
    for split, tokens in (("training", shards.meta.train_tokens), ("held-out", shards.meta.val_tokens)):
        if tokens < data.seq_len:
            raise ConfigError(
                f"the {split} split of {data.source!r} has {tokens} tokens, less than one sequence of --data.seq_len "
                f"{data.seq_len}; use more text or shorter sequences."
            )
    return shards


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that the tokenizer does."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _token_limit(config: RunConfig) -> int | None:
    """Tokens after which reading stops: a Hub data set can be endless, so there it is what the run will see."""
    if config.data.max_tokens or not config.data.source.startswith("hf:"):
        return config.data.max_tokens
    needed = config.train.steps * config.train.global_batch * config.data.seq_len
    return int(needed / (1 - config.data.val_fraction) * 1.02) + SMALLEST_VAL_TOKENS


def _key(*parts) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:20]


def _written_once(folder: Path, write: Callable[[Path], None], find_damage: Callable[[Path], str | None]) -> Path:
    """`folder`, filled by `write` if it is not there yet or damaged; the others wait for the one that writes."""
    if folder.is_dir() and not find_damage(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), _leftovers_removed(folder):
        if folder.is_dir() and (damage := find_damage(folder)):
            print(f"{folder} is damaged: {damage}; it is written again", flush=True)
            shutil.rmtree(folder)
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.writing-", dir=folder.parent))
            write(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
    return folder


def _shards_damage(folder: Path) -> str | None:
    """By sizes alone: every start of a run reads this."""
    try:
        meta = TokenShards.read_meta(folder)
    except (OSError, ValueError, TypeError):
        return "meta.json cannot be read"
    for name, tokens in (("train.bin", meta.train_tokens), ("val.bin", meta.val_tokens)):
        size, expected = _size(folder / name), tokens * np.dtype(meta.dtype).itemsize
        if size != expected:
            return f"{name} has {size:,} bytes instead of {expected:,}"
    return None


def _tokenizer_damage(folder: Path) -> str | None:
    try:
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "tokenizer.json cannot be read"
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _leftovers_removed(folder: Path) -> Iterator[None]:
    """Deletes what killed writers of `folder` left behind, before and after; call it with the lock held."""

    def remove() -> None:
        for leftover in folder.parent.glob(f"{folder.name}.writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    remove()
    try:
        yield
    finally:
        remove()


def _train_tokenizer(data: Data, folder: Path, progress: bool) -> None:
    if progress:
        print(f"Training a byte-level BPE tokenizer of {data.tokenizer_vocab_size} tokens on {data.source}", flush=True)
    train_tokenizer(documents(data), data.tokenizer_vocab_size, folder)


def _write_shards(
    folder: Path, data: Data, tokenizer: PreTrainedTokenizerBase, limit: int | None, progress: bool
) -> None:
    encoder, vocab_size = text_encoder(tokenizer), len(tokenizer)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    counts = {"train": 0, "val": 0}
    val_bytes = 0
    rows = RowCount()
    bar = ProgressBar(f"Tokenising {data.source}: token", shown=progress)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for texts in _batched(
            documents(data, say=lambda text: bar.write(text, sys.stdout), count=rows), DOCUMENTS_AT_ONCE
        ):
            encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
            for text, encoding in zip(texts, encodings, strict=True):
                held_out = _is_held_out(text, data.val_fraction)
                tokens = np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype=dtype)
                tokens.tofile(val if held_out else train)
                counts["val" if held_out else "train"] += len(tokens)
                val_bytes += len(text.encode()) if held_out else 0
                if limit and sum(counts.values()) >= limit:
                    break
            bar.show(sum(counts.values()))
            if limit and sum(counts.values()) >= limit:
                break
    if rows.without_text:
        bar.write(f"{data.source}: {rows}", sys.stdout)
    bar.close()
    total = sum(counts.values())
    wanted = max(int(data.val_fraction * total), min(SMALLEST_VAL_TOKENS, total // 10))
    if counts["val"] < wanted / 2:
        # A few long documents may all fall on the training side: its last tokens become held-out text.
        moved = _move_tail(folder, dtype, wanted - counts["val"])
        val_bytes += len(str(tokenizer.decode(moved, skip_special_tokens=True)).encode())
        counts = {"train": counts["train"] - len(moved), "val": counts["val"] + len(moved)}

    frequency = np.bincount(np.fromfile(folder / "val.bin", dtype=dtype), minlength=vocab_size) / max(counts["val"], 1)
    frequency = frequency[frequency > 0]
    meta = Meta(
        dtype=dtype.name,
        train_tokens=counts["train"],
        val_tokens=counts["val"],
        val_bytes=val_bytes,
        val_unigram_entropy=float(-(frequency * np.log(frequency)).sum()),
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta)))


def _is_held_out(text: str, fraction: float) -> bool:
    """By the text alone, so that a document stays on its side when the corpus grows, and duplicates stay together."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _move_tail(folder: Path, dtype: np.dtype, count: int) -> np.ndarray:
    with open(folder / "train.bin", "r+b") as train, open(folder / "val.bin", "ab") as val:
        kept = max(0, os.fstat(train.fileno()).st_size - count * dtype.itemsize)
        train.seek(kept)
        tail = train.read()
        train.truncate(kept)
        val.write(tail)
    return np.frombuffer(tail, dtype=dtype)


def _batched(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(texts, size)):
        yield batch
