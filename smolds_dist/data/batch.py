"""Batch: the tokens of any sample of the run, from sources, mixture and orders together; how many texts in them are unique.

No topology enters, so every world size trains on the same global batches and a resumed run goes on at the exact sample.
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
from smolds_dist.data.order import VERSION, SampleOrder, TokenSpan
from smolds_dist.data.sharded_source import ShardedSource
from smolds_dist.data.tokenizer import tokenizer_digest
from smolds_dist.progress import Reporter
from smolds_dist.settings import Data

LARGEST_EXACT = 2**20
SKETCH_BITS = 14  # 2^14 registers


class Sample(NamedTuple):
    """Where a sample's tokens are."""

    source: ShardedSource
    spans: list[TokenSpan]


@dataclass(frozen=True)
class TrainingData:
    """All that a run is trained on and measured by."""

    tokenizer: PreTrainedTokenizerBase
    sources: dict[str, ShardedSource]
    orders: dict[str, SampleOrder]
    mixture: Mixture
    seq_len: int
    limits: dict[str, int | None]  # tokens after which the reading of a source stopped
    reporter: Reporter  # hears of it while tokens are made or waited for

    def wait_for_samples(self, samples: int) -> None:
        """Waits for the tokens of the run's first `samples` samples."""
        self.has_samples(samples, wait=True)

    def has_samples(self, samples: int, wait: bool = False) -> bool:
        """Whether the tokens of the run's first `samples` samples are there."""
        return all(self.orders[name].extend(taken - 1, wait) for name, taken in self.taken(samples).items() if taken)

    def taken(self, samples: int) -> dict[str, int]:
        """How many of the run's first `samples` samples are of each source."""
        return dict(zip(self.sources, self.mixture.totals(samples).tolist(), strict=True))

    def samples(self, indices: np.ndarray) -> list[Sample]:
        """The samples at those places of the run [n]; waits for tokens that are not there yet."""
        source, number = self.mixture.locate(indices)
        found: list[Sample | None] = [None] * len(indices)
        for at, (name, order) in enumerate(self.orders.items()):
            here = np.flatnonzero(source == at)
            for place, spans in zip(here.tolist(), order.spans(number[here]), strict=True):
                found[place] = Sample(self.sources[name], spans)
        return [sample for sample in found if sample]

    def batch(self, indices: range) -> Tensor:
        """Token ids [len(indices), seq_len] (int64) at those places of the run."""
        ids = np.empty((len(indices), self.seq_len), dtype=np.int64)
        for row, sample in zip(ids, self.samples(np.asarray(indices)), strict=True):
            at = 0
            for shard, start, length in sample.spans:
                row[at : at + length] = sample.source.tokens(shard)[start : start + length]
                at += length
            row[at:] = self.tokenizer.eos_token_id  # where documents are packed; none of these is predicted
        return torch.from_numpy(ids)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples of the run go through each source of which is known how large it is."""
        taken = self.taken(samples)
        return {name: taken[name] / order.num_samples for name, order in self.orders.items() if order.complete}

    @property
    def val_weights(self) -> dict[str, float]:
        """Each source's part in the validation loss: its share of the run, so that it stays the same from step to step."""
        taken = self.taken(self.mixture.stages[-1].end)
        return {name: part / sum(taken.values()) for name, part in taken.items()}

    @property
    def val_unigram_entropy(self) -> float:
        """Nats per token of held-out text: the loss of the best model that ignores context."""
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
        """What the tokens of the run's first `samples` samples depend on, for checkpoints."""
        return self._fixed | {"contents": {name: self._content(name, n) for name, n in self.taken(samples).items()}}

    def _content(self, name: str, samples: int) -> str:
        """Digest of a source's training texts up to the end of the window with the last of its first `samples` samples."""
        source, order = self.sources[name], self.orders[name]
        return source.content(order.shards_until(samples - 1) if samples else np.zeros(0, np.int64))


def document_separator(data: Data, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token after which another document begins; None where documents are not kept apart (`data.document_mask`)."""
    return tokenizer.eos_token_id if data.document_mask else None


def apply_document_mask(ids: Tensor, end_of_text: int) -> tuple[Tensor, Tensor]:
    """Positions and labels [B, S] that keep documents apart, as transformers' models take them.

    Positions begin anew after each end-of-text token. A document's first token is no label (-100): what comes before it
    tells nothing of it.
    """
    places_S = torch.arange(ids.shape[1])
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, :-1] == end_of_text
    first = torch.where(begins, places_S, 0).cummax(1).values
    return places_S - first, ids.masked_fill(begins, -100)


def batch_digest(ids: Tensor, indices: range) -> int:
    """32 bits of the sequences [n, seq_len] at those places of the run; those of a batch's parts add up, modulo 2^32."""
    rows = ids.numpy().astype("<u4")
    return sum(zlib.crc32(row.tobytes(), index % 2**32) for row, index in zip(rows, indices, strict=True)) % 2**32


def evaluation_batch(tokens: np.ndarray, seq_len: int, indices: range, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels [len(indices), seq_len] of held-out sequences; past `num_sequences` the labels are -100.

    Every rank has to run as many forward passes as the others, so the last batch is filled with sequences that do not count.
    """
    sequences = [tokens[i * seq_len : (i + 1) * seq_len] for i in (min(index, num_sequences - 1) for index in indices)]
    ids = torch.from_numpy(np.stack(sequences).astype(np.int64))
    counted = torch.tensor([index < num_sequences for index in indices])
    return ids, ids.masked_fill(~counted[:, None], -100)


class UniqueTexts:
    """How many distinct texts a run has been trained on, against how many it has seen.

    A text counts when the sample with its first token is trained on, and is known by its first 50 tokens. Up to 2^20
    distinct texts are counted exactly; from there on a HyperLogLog sketch estimates them, with a standard error of 0.8 %
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
        """The samples at those places of the run are trained on."""
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
        """What a checkpoint keeps: "exact" or "sketch", and bytes [n]."""
        if isinstance(self._counter, set):
            kind, content = "exact", np.array(sorted(self._counter), dtype="<u8").tobytes()
        else:
            kind, content = "sketch", self._counter.serialize_updatable()
        return kind, np.frombuffer(self.seen.to_bytes(8, "little") + content, dtype=np.uint8).copy()

    def restore(self, kind: str, content: np.ndarray) -> None:
        """Goes on from `state`."""
        self.seen = int.from_bytes(content[:8].tobytes(), "little")
        if kind == "exact":
            self._counter = set(np.frombuffer(content[8:].tobytes(), dtype="<u8").tolist())
        else:
            import datasketches

            self._counter = datasketches.hll_sketch.deserialize(content[8:].tobytes())


def sketch_of(texts: Iterable[int]) -> Any:
    """A HyperLogLog sketch of 64-bit digests."""
    import datasketches

    sketch = datasketches.hll_sketch(SKETCH_BITS, datasketches.tgt_hll_type.HLL_8)
    for text in texts:
        sketch.update(text)
    return sketch


def document_prefixes(data: TrainingData, indices: range) -> np.ndarray:
    """Digests [texts] of the beginnings of the texts whose first token is in those samples."""
    found = [np.zeros(0, np.uint64)]
    for sample in data.samples(np.asarray(indices)):
        for shard, start, length in sample.spans:
            table = np.asarray(sample.source.table(shard))
            first, end = search_sorted(table["start"], np.array([start, start + length], np.uint64)).tolist()
            found.append(table["beginning"][first:end])
    return np.concatenate(found)


def search_sorted(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each of `values` [n] the first place in `sorted_values` that is not below it.

    As `numpy.searchsorted`, which would copy a column of a mapped table, however long, at every call.
    """
    return np.array([bisect_left(sorted_values, value) for value in values], np.int64)
