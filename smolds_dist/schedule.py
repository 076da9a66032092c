"""The learning rate of every step: warm-up, then `train.schedule`, until a stage sets a rate or shape of its own."""

import math
from typing import NamedTuple

from smolds_dist.settings import RunConfig, Train
from smolds_dist.stages import resolve_stages

INVERSE_SQRT_STEPS = 10_000  # time scale of inverse_sqrt from a run's first step, as in transformers


class Segment(NamedTuple):
    """Steps with one shape of the learning rate."""

    first: int  # steps before it
    last: int  # step at which the shape ends, perhaps after the next segment's begin
    shape: str
    begin: float  # rate before its first step
    end: float  # rate at `last`

    def rate(self, step: int) -> float:
        """Return the rate of a step of this segment."""
        if self.shape == "inverse_sqrt":
            scale = self.first or INVERSE_SQRT_STEPS
            return self.begin * math.sqrt(scale / (scale + step - self.first))
        done = min(1.0, (step - self.first) / max(1, self.last - self.first))
        share = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.end + (self.begin - self.end) * share


def learning_rate(step: int, config: RunConfig) -> float:
    """Return the learning rate of step 1, 2, ..., `train.steps`.

    The first `train.warmup_steps` rise linearly. `train.schedule` then follows a cosine, or is stable and decays linearly
    (WSD, arXiv 2404.06395, section 4.2); both end at `lr * min_lr_fraction`. A stage's `lr` or `lr_shape` ends it.
    """
    return _segment_at(step, rate_segments(config)).rate(step)


def balance_scale(step: int, config: RunConfig) -> float:
    """Return the ratio of a step's learning rate to the highest, 1 while it warms up: the decay of `balance_rate`."""
    segments = rate_segments(config)
    segment = _segment_at(step, segments)
    if segment.shape == "warmup":
        return 1.0
    return segment.rate(step) / (max(max(one.begin, one.end) for one in segments) or 1.0)


def rate_segments(config: RunConfig) -> list[Segment]:
    """Return the segments of the learning rate, each until the next one's begin."""
    train = config.train
    segments = _schedule(train)
    spans = resolve_stages(config).spans if train.stages else []
    changes = [
        (span, stage)
        for span, stage in zip(spans, spans[0].config.train.stages or [] if spans else [], strict=True)
        if stage.lr is not None or stage.lr_shape is not None
    ]
    for at, (span, stage) in enumerate(changes):
        first = span.first
        last = changes[at + 1][0].first if at + 1 < len(changes) else max(train.steps, span.last)
        if stage.lr_until is not None:
            last = int(stage.lr_until.split()[0])  # type: ignore[union-attr]
        shape = stage.lr_shape or "constant"
        now = _segment_at(first, segments).rate(first) if first else train.lr
        if not first:
            warmup = 0 if shape == "warmup" else min(train.warmup_steps, train.steps)
            rise = stage.lr if stage.lr and shape in ("constant", "inverse_sqrt") else train.lr
            segments = [Segment(0, warmup, "warmup", 0.0, rise)] if warmup else []
            now, first = 0.0 if shape == "warmup" else rise, warmup
        segments.append(_shaped(shape, (first, last), now, stage.lr, train))
    return segments


def _schedule(train: Train) -> list[Segment]:
    """Return the segments of `train.schedule`."""
    steps, end = train.steps, train.lr * train.min_lr_fraction
    warmup = min(train.warmup_steps, steps)
    segments = [Segment(0, warmup, "warmup", 0.0, train.lr)] if warmup else []
    if train.schedule == "cosine":
        return [*segments, Segment(warmup, steps, "cosine", train.lr, end)]
    decay = steps - min(round(steps * train.decay_fraction), steps - warmup)
    return [
        *segments,
        Segment(warmup, decay, "constant", train.lr, train.lr),
        Segment(decay, steps, "linear", train.lr, end),
    ]


def _shaped(shape: str, steps: tuple[int, int], now: float, level: float | None, train: Train) -> Segment:
    """Return the segment of a stage that begins at rate `now`."""
    if shape in ("warmup", "linear", "cosine"):
        default = train.lr * (1 if shape == "warmup" else train.min_lr_fraction)
        return Segment(*steps, shape, now, default if level is None else level)
    if level is None or shape == "hold":
        level = now
    return Segment(*steps, shape, level, level)


def _segment_at(step: int, segments: list[Segment]) -> Segment:
    return next((one for one in reversed(segments) if one.first < step), segments[0])
