"""Batch: the tokens of any sample of the run, from sources, mixture and orders together.

No topology enters, so every world size trains on the same global batches and a resumed run goes on at the exact sample.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smolds_dist.data.mixture import Mixture
from smolds_dist.data.order import VERSION, Piece, SourceOrder
from smolds_dist.data.tokenizer import tokenizer_digest
from smolds_dist.data.unit_source import Progress, UnitSource
from smolds_dist.settings import Data


class Sample(NamedTuple):
    """Where a sample's tokens are."""

    source: UnitSource
    pieces: list[Piece]


@dataclass(frozen=True)
class TrainingData:
    """All that a run is trained on and measured by."""

    tokenizer: PreTrainedTokenizerBase
    sources: dict[str, UnitSource]
    orders: dict[str, SourceOrder]
    mixture: Mixture
    seq_len: int
    limits: dict[str, int | None]  # tokens after which the reading of a source stopped

    def tell_progress(self, progress: Progress) -> None:
        """What is told from now on while tokens are made or waited for."""
        for source in self.sources.values():
            source.progress = progress

    def reach(self, samples: int) -> None:
        """Waits for the tokens of the run's first `samples` samples."""
        self.covers(samples, wait=True)

    def covers(self, samples: int, wait: bool = False) -> bool:
        """Whether the tokens of the run's first `samples` samples are there."""
        needed = zip(self.orders.values(), self.mixture.totals(samples).tolist(), strict=True)
        return all(order.extend(taken - 1, wait) for order, taken in needed if taken)

    def samples(self, indices: np.ndarray) -> list[Sample]:
        """The samples at those places of the run [n]; waits for tokens that are not there yet."""
        source, number = self.mixture.look_up(indices)
        found: list[Sample | None] = [None] * len(indices)
        for at, (name, order) in enumerate(self.orders.items()):
            here = np.flatnonzero(source == at)
            for place, pieces in zip(here.tolist(), order.pieces(number[here]), strict=True):
                found[place] = Sample(self.sources[name], pieces)
        return [sample for sample in found if sample]

    def batch(self, indices: range) -> Tensor:
        """Token ids [len(indices), seq_len] (int64) at those places of the run."""
        ids = np.empty((len(indices), self.seq_len), dtype=np.int64)
        for row, sample in zip(ids, self.samples(np.asarray(indices)), strict=True):
            at = 0
            for unit, start, length in sample.pieces:
                row[at : at + length] = sample.source.tokens(unit)[start : start + length]
                at += length
            row[at:] = self.tokenizer.eos_token_id  # where documents are packed; none of these is predicted
        return torch.from_numpy(ids)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples of the run go through each source of which is known how large it is."""
        totals = self.mixture.totals(samples).tolist()
        return {
            name: total / order.num_samples
            for (name, order), total in zip(self.orders.items(), totals, strict=True)
            if order.complete
        }

    @property
    def val_weights(self) -> dict[str, float]:
        """Each source's part in the validation loss: its share of the run, so that it stays the same from step to step."""
        totals = self.mixture.totals(self.mixture.stages[-1].end)
        return {name: float(part) for name, part in zip(self.sources, totals / totals.sum(), strict=True)}

    @property
    def val_unigram_entropy(self) -> float:
        """Nats per token of held-out text: the loss of the best model that ignores context."""
        return sum(self.sources[n].held_out.unigram_entropy * w for n, w in self.val_weights.items())

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
        totals = self.mixture.totals(samples).tolist()
        contents = {name: self._content(name, total) for name, total in zip(self.sources, totals, strict=True)}
        return self._fixed | {"contents": contents}

    def _content(self, name: str, samples: int) -> str:
        """Digest of a source's training texts up to the end of the window with the last of its first `samples` samples."""
        source, order = self.sources[name], self.orders[name]
        return source.content(order.units_until(samples - 1) if samples else np.zeros(0, np.int64))


def document_end(data: Data, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token after which another document begins; None where documents are not kept apart (`data.document_mask`)."""
    return tokenizer.eos_token_id if data.document_mask else None


def by_document(ids: Tensor, end_of_text: int) -> tuple[Tensor, Tensor]:
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
