"""Mixture: which source each sample of the run comes from; every prefix of the run has the configured proportions.

A source with proportion w is due at a constant rate: after t samples, w x t of them should come from it. Each sample goes
to the source that would first lag by a full sample, among those that are not a full sample ahead: earliest deadline
first, as in proportionate fairness (S. Baruah et al., Algorithmica 15, 1996). The pattern repeats, so that any sample's
source can be looked up.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import floor, lcm
from typing import Any, NamedTuple

import numpy as np

from smolds_dist.settings import RunConfig
from smolds_dist.stages import Stages, resolve_stages

FINEST = 100_000  # denominator that weights are rounded to; weights of up to five digits stay exact


class Part(NamedTuple):
    """Samples of the run with one mixture and one sequence length."""

    end: int  # its last sample (exclusive)
    step: int  # its last step
    shares: dict[str, float]  # proportion of each source
    seq_len: int


Schedule = list[Part]


@dataclass(frozen=True)
class StageOrder:
    """The samples of a stage. Letters: S sources."""

    first: int  # sample of the run
    end: int
    step: int  # its last step
    seq_len: int
    shares: dict[str, Fraction]
    taken: np.ndarray  # [S] samples of each source before the stage
    source: np.ndarray  # of the stage's first samples; repeats from `repeats_from` on
    count: np.ndarray  # earlier samples of the same source in the stage, for each of them
    repeats_from: int
    period: np.ndarray  # [S] samples of each source per repetition

    def locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return source and index in that source of samples counted from the stage's first."""
        length = len(self.source) - self.repeats_from
        turn = np.maximum(position - self.repeats_from, 0) // length
        row = position - turn * length
        source = self.source[row]
        return source, self.taken[source] + self.count[row] + turn * self.period[source]


class Mixture:
    """Sources by global sample index.

    Args:
        stages: of the run; the last continues indefinitely.
    """

    def __init__(self, names: list[str], stages: Stages):
        self.names = names
        self.stages: list[StageOrder] = []
        taken = np.zeros(len(names), dtype=np.int64)
        lags = [Fraction(0)] * len(names)  # tokens of each source that are due
        for span in stages.spans:
            shares = exact_shares({name: span.weights.get(name, 0.0) for name in names})
            first, end, length = span.samples, span.samples_until(span.last), span.seq_len
            found = _pattern(list(shares.values()), [lag / length for lag in lags])
            self.stages.append(StageOrder(first, end, span.last, length, shares, taken, *found))
            before, taken = taken, self.totals(end)
            lags = [
                lag + length * (share * (end - first) - int(now - old))
                for lag, share, now, old in zip(lags, shares.values(), taken, before, strict=True)
            ]

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for global sample indices [n] each one's source, and how many samples of that source precede it."""
        source, number = np.empty(len(indices), np.int64), np.empty(len(indices), np.int64)
        for at, stage in enumerate(self.stages):
            end = stage.end if at + 1 < len(self.stages) else np.iinfo(np.int64).max
            here = (indices >= stage.first) & (indices < end)
            if here.any():
                source[here], number[here] = stage.locate(indices[here] - stage.first)
        return source, number

    def totals(self, samples: int) -> np.ndarray:
        """Return how many of the first `samples` samples come from each source [S]."""
        stage = next((s for s in self.stages if samples <= s.end), self.stages[-1])
        position = samples - stage.first
        length = len(stage.source) - stage.repeats_from
        turn = max(0, position - stage.repeats_from) // length
        rest = np.bincount(stage.source[: position - turn * length], minlength=len(self.names))
        return stage.taken + rest + turn * stage.period

    def tokens(self, samples: int) -> np.ndarray:
        """Return how many tokens of the first `samples` samples come from each source [S], with padding."""
        found = np.zeros(len(self.names), dtype=np.int64)
        for stage in self.stages:
            last = samples if stage is self.stages[-1] else min(samples, stage.end)
            if last > stage.first:
                found += stage.seq_len * (self.totals(last) - stage.taken)
        return found

    def lengths(self, name: str) -> list[tuple[int, int]]:
        """Return the first sample of a source with each sequence length, and that length."""
        at, found = self.names.index(name), list[tuple[int, int]]()
        for stage in self.stages:
            first = int(stage.taken[at])
            if found and found[-1][0] == first:
                found.pop()
            if not found or found[-1][1] != stage.seq_len:
                found.append((first, stage.seq_len))
        return found

    def schedule(self) -> Schedule:
        """Return the schedule; equal neighboring stages count as one."""
        parts: Schedule = []
        for stage in self.stages:
            shares = {name: float(share) for name, share in stage.shares.items() if share}
            if parts and parts[-1][2:] == (shares, stage.seq_len):
                parts.pop()
            parts.append(Part(stage.end, stage.step, shares, stage.seq_len))
        return parts


def mixture_of(config: RunConfig) -> Mixture:
    """Return the mixture of a run's settings; each stage ends at the end of a step."""
    return Mixture(list(config.data.mixed), resolve_stages(config))


def truncate_schedule(schedule: Iterable[Iterable[Any]], samples: int, step: int) -> Schedule:
    """Return the schedule, perhaps as a manifest has it, of the run's first `samples` samples and `step` steps."""
    parts = [Part(*one) for one in schedule]
    begins = [0, *(part.end for part in parts)]
    return [
        part._replace(end=min(part.end, samples), step=min(part.step, step))
        for begin, part in zip(begins, parts, strict=False)
        if begin < samples
    ]


def names_in(schedule: Schedule) -> list[str]:
    """Return the sources that have a proportion in a schedule."""
    return sorted({name for part in schedule for name in part.shares})


def format_schedule(schedule: Schedule) -> str:
    """Format `Mixture.schedule` as "70% web + 30% code until step 800, then ...", with sequence lengths if they differ."""

    def proportions(part: Part) -> str:
        largest_first = sorted(part.shares.items(), key=lambda item: -item[1])
        mixed = " + ".join(f"{100 * share:.4g}% {name}" for name, share in largest_first)
        return mixed if len({one.seq_len for one in schedule}) == 1 else f"{mixed} in {part.seq_len:,} tokens"

    return ", then ".join(f"{proportions(part)} until step {part.step}" for part in schedule)


def exact_shares(weights: dict[str, float]) -> dict[str, Fraction]:
    """Return weights as fractions that sum to 1, exact or rounded to multiples of 1 / `FINEST`."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    shares = {name: weight / total for name, weight in exact.items()}
    if lcm(*(share.denominator for share in shares.values())) <= FINEST:
        return shares
    parts = {name: floor(share * FINEST) for name, share in shares.items()}
    largest_rest = sorted(shares, key=lambda name: parts[name] - shares[name] * FINEST)
    for name in largest_rest[: FINEST - sum(parts.values())]:
        parts[name] += 1
    return {name: Fraction(part, FINEST) for name, part in parts.items()}


def _pattern(shares: list[Fraction], behind: list[Fraction]) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Return which source each sample comes from, until the pattern repeats.

    Args:
        behind: by how many samples each source lags at the beginning.
    """
    period = lcm(*(share.denominator for share in shares))
    scale = lcm(period, *(lag.denominator for lag in behind))
    rates, lags = [int(share * scale) for share in shares], [int(lag * scale) for lag in behind]
    taken = [0] * len(shares)
    order: list[int] = []
    counts: list[int] = []
    at_turn = [tuple(taken)]
    while True:
        for _ in range(period):
            # Lag of each source after this sample if it is not taken, in 1/scale; if above 0, it may be next.
            short = [lag + rate * (len(order) + 1) - n * scale for lag, rate, n in zip(lags, rates, taken, strict=True)]
            due = [source for source, rate in enumerate(rates) if rate and short[source] > 0]
            if due:  # the deadline, rounded up
                best = min(due, key=lambda source: -((lags[source] - (taken[source] + 1) * scale) // rates[source]))
            else:  # those with a weight may all be ahead of their proportions, by what others lag from before
                best = max(filter(rates.__getitem__, range(len(rates))), key=short.__getitem__)
            order.append(best)
            counts.append(taken[best])
            taken[best] += 1
        turn = np.subtract(taken, at_turn[-1])
        if [int(n) for n in turn] == [int(share * period) for share in shares]:
            return np.array(order), np.array(counts), len(order) - period, turn
        at_turn.append(tuple(taken))
