"""Batch: the tokens of any sample of the run, from sources, mixture and orders; counts unique documents.

Independent of the topology: every world size trains on the same global batches, and a resumed run continues at the exact
sample.
"""

import zlib
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.mixture import Mixture
from smolds_dist.data.order import VERSION, TokenSpan
from smolds_dist.data.sharded_source import ShardedSource
from smolds_dist.data.staged_order import StagedOrder
from smolds_dist.data.tokenizer import tokenizer_digest
from smolds_dist.progress import Reporter
from smolds_dist.settings import Data
from smolds_dist.stages import Stages


class MicroBatch(NamedTuple):
    """Arguments of `Engine.forward`."""

    ids: Tensor  # token ids [B, S]
    labels: Tensor  # [B, S]
    positions: Tensor | None = None  # [B, S], if documents are masked from each other and there are several
    bounds: Tensor | None = None  # of these documents


class Batch(NamedTuple):
    """A rank's samples of a global batch."""

    micro_batches: list[MicroBatch]
    num_labels: int | None  # tokens predicted in them, if documents are masked from each other
    digest: int


LARGEST_EXACT = 2**20
SKETCH_BITS = 14  # 2^14 registers


class Sample(NamedTuple):
    """The location of a sample's tokens."""

    source: ShardedSource
    spans: list[TokenSpan]


@dataclass(frozen=True)
class TrainingData:
    """The data that a run is trained and validated on."""

    tokenizer: PreTrainedTokenizerBase
    sources: dict[str, ShardedSource]
    orders: dict[str, StagedOrder]
    mixture: Mixture
    stages: Stages
    limits: dict[str, int | None]  # tokens after which reading of a source stops
    reporter: Reporter  # receives progress while tokens are produced or waited for

    def wait_for_samples(self, samples: int) -> None:
        """Wait for the tokens of the run's first `samples` samples."""
        self.has_samples(samples, wait=True)

    def has_samples(self, samples: int, wait: bool = False) -> bool:
        """Return True if the tokens of the run's first `samples` samples are ready."""
        return all(self.orders[name].extend(taken - 1, wait) for name, taken in self.taken(samples).items() if taken)

    def taken(self, samples: int) -> dict[str, int]:
        """Return how many of the run's first `samples` samples come from each source."""
        return dict(zip(self.sources, self.mixture.totals(samples).tolist(), strict=True))

    def samples(self, indices: np.ndarray) -> list[Sample]:
        """Return the samples at these indices of the run [n]; wait for missing tokens."""
        source, number = self.mixture.locate(indices)
        found: list[Sample | None] = [None] * len(indices)
        for at, (name, order) in enumerate(self.orders.items()):
            here = np.flatnonzero(source == at)
            for place, spans in zip(here.tolist(), order.spans(number[here]), strict=True):
                found[place] = Sample(self.sources[name], spans)
        return [sample for sample in found if sample]

    def batch(self, indices: range) -> Tensor:
        """Return the token ids [len(indices), seq_len] (int64) of these samples of the run, all of one stage."""
        ids = np.empty((len(indices), self.stages.of_sample(indices[0]).seq_len), dtype=np.int64)
        for row, sample in zip(ids, self.samples(np.asarray(indices)), strict=True):
            at = 0
            for shard, start, length in sample.spans:
                row[at : at + length] = sample.source.tokens(shard)[start : start + length]
                at += length
            row[at:] = self.tokenizer.eos_token_id  # padding of packed documents, never predicted
        return torch.from_numpy(ids)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how many epochs of each source the first `samples` samples take; only sources of known size."""
        tokens = dict(zip(self.sources, self.mixture.tokens(samples).tolist(), strict=True))
        return {name: tokens[name] / order.tokens_per_epoch for name, order in self.orders.items() if order.complete}

    @property
    def val_weights(self) -> dict[str, float]:
        """Each source's weight in the validation loss: its proportion of the whole run, constant from step to step."""
        tokens = self.mixture.tokens(self.mixture.stages[-1].end)
        return dict(zip(self.sources, (tokens / tokens.sum()).tolist(), strict=True))

    @property
    def val_unigram_entropy(self) -> float:
        """Nats per token of the validation set: the loss of the best model that ignores context."""
        return sum(self.sources[n].validation.unigram_entropy * w for n, w in self.val_weights.items())

    @cached_property
    def _fixed(self) -> dict:
        return {
            "order": VERSION,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "limits": self.limits,
            "schedule": self.mixture.schedule(),
        }

    def identity(self, samples: int) -> dict:
        """Return what the tokens of the run's first `samples` samples depend on, for checkpoints."""
        return self._fixed | {"contents": {name: self._content(name, n) for name, n in self.taken(samples).items()}}

    def _content(self, name: str, samples: int) -> str:
        """Return a digest of a source's training documents up to the end of the window of its last of `samples` samples."""
        source, order = self.sources[name], self.orders[name]
        return source.content(order.shards_until(samples - 1) if samples else np.zeros(0, np.int64))


def document_separator(data: Data, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the end-of-text token if documents are masked from each other (`data.document_mask`), else None."""
    return tokenizer.eos_token_id if data.document_mask else None


def apply_document_mask(ids: Tensor, end_of_text: int) -> tuple[Tensor, Tensor]:
    """Return positions and labels [B, S] that separate documents, as transformers' models take them.

    Positions restart after each end-of-text token. A document's first token is not a label (-100), because the tokens
    before it belong to another document.
    """
    places_S = torch.arange(ids.shape[1])
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, :-1] == end_of_text
    first = torch.where(begins, places_S, 0).cummax(1).values
    return places_S - first, ids.masked_fill(begins, -100)


def batch_digest(ids: Tensor, indices: range) -> int:
    """Return 32 bits of the sequences [n, seq_len] at these indices of the run; digests of slices add up modulo 2^32."""
    rows = ids.numpy().astype("<u4")
    return sum(zlib.crc32(row.tobytes(), index % 2**32) for row, index in zip(rows, indices, strict=True)) % 2**32


def evaluation_batch(tokens: np.ndarray, seq_len: int, indices: range, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Return token ids and labels [len(indices), seq_len] of validation sequences; labels past `num_sequences` are -100.

    Every rank must run the same number of forward passes, so the last batch is padded with ignored sequences.
    """
    sequences = [tokens[i * seq_len : (i + 1) * seq_len] for i in (min(index, num_sequences - 1) for index in indices)]
    ids = torch.from_numpy(np.stack(sequences).astype(np.int64))
    counted = torch.tensor([index < num_sequences for index in indices])
    return ids, ids.masked_fill(~counted[:, None], -100)


class UniqueTexts:
    """Counts the distinct documents, and all documents, that a run was trained on.

    A document counts when the sample with its first token is trained on; its first 50 tokens identify it. Up to 2^20
    distinct documents are counted exactly; beyond that, a HyperLogLog sketch estimates them with a standard error of 0.8 %
    (P. Flajolet et al., 2007; the sketch is that of Apache DataSketches).
    """

    def __init__(self, data: TrainingData):
        self._data = data
        self.seen = 0
        self._counter: set[int] | Any = set()  # or a sketch

    @property
    def unique(self) -> int:
        if isinstance(self._counter, set):
            return len(self._counter)
        return round(self._counter.get_estimate())

    def add(self, indices: range) -> None:
        """Count the documents of these samples of the run."""
        beginnings = document_prefixes(self._data, indices).tolist()
        self.seen += len(beginnings)
        if isinstance(self._counter, set):
            self._counter.update(beginnings)
            if len(self._counter) > LARGEST_EXACT:
                self._counter = sketch_of(self._counter)
        else:
            for beginning in beginnings:
                self._counter.update(beginning)

    def state(self) -> tuple[str, np.ndarray]:
        """Return what a checkpoint stores: "exact" or "sketch", and bytes [n]."""
        if isinstance(self._counter, set):
            kind, content = "exact", np.array(sorted(self._counter), dtype="<u8").tobytes()
        else:
            kind, content = "sketch", self._counter.serialize_updatable()
        return kind, np.frombuffer(self.seen.to_bytes(8, "little") + content, dtype=np.uint8).copy()

    def restore(self, kind: str, content: np.ndarray) -> None:
        """Continue from a `state`."""
        self.seen = int.from_bytes(content[:8].tobytes(), "little")
        if kind == "exact":
            self._counter = set(np.frombuffer(content[8:].tobytes(), dtype="<u8").tolist())
        else:
            import datasketches

            self._counter = datasketches.hll_sketch.deserialize(content[8:].tobytes())


def sketch_of(texts: Iterable[int]) -> Any:
    """Return a HyperLogLog sketch of 64-bit digests."""
    import datasketches

    sketch = datasketches.hll_sketch(SKETCH_BITS, datasketches.tgt_hll_type.HLL_8)
    for text in texts:
        sketch.update(text)
    return sketch


def document_prefixes(data: TrainingData, indices: range) -> np.ndarray:
    """Return digests [documents] of the first tokens of the documents that begin in these samples."""
    found = [np.zeros(0, np.uint64)]
    for sample in data.samples(np.asarray(indices)):
        for shard, start, length in sample.spans:
            table = np.asarray(sample.source.table(shard))
            first, end = search_sorted(table["start"], np.array([start, start + length], np.uint64)).tolist()
            found.append(table["beginning"][first:end])
    return np.concatenate(found)


def search_sorted(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each of `values` [n] the first index in `sorted_values` that is not below it.

    Same as `numpy.searchsorted`, which would copy a column of a memory-mapped table at every call.
    """
    return np.array([bisect_left(sorted_values, value) for value in values], np.int64)
