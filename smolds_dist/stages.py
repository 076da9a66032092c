"""Stages of a run: which settings hold in which step, and how many samples and tokens come before it.

A step here is a step of the data: after rollbacks, which skip samples, it is ahead of the step that is trained
(`skipped_steps`). So every stage begins with the same sample in every run.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from smolds_dist.errors import ConfigError
from smolds_dist.settings import RunConfig, Stage, Yarn

# The section of each setting that a stage can change
CHANGING = {
    "seq_len": "data", "document_mask": "data", "global_batch": "train", "micro_batch": "train", "rope_theta": "model",
    "rope_scaling": "model",
}  # fmt: skip
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class StageSpan:
    """A stage's steps and the settings in them."""

    number: int  # from 1
    first: int  # steps before it
    last: int  # its last step
    samples: int  # before it
    tokens: int
    weights: dict[str, float]  # by source
    config: RunConfig  # the settings in effect; its `train.stages` are resolved to steps

    @property
    def seq_len(self) -> int:
        return self.config.data.seq_len

    @property
    def global_batch(self) -> int:
        return self.config.train.global_batch

    def samples_until(self, step: int) -> int:
        """Return the samples of the run up to a step of this stage."""
        return self.samples + (step - self.first) * self.global_batch

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Name the stage in errors, if the run has stages."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(
                f"train.stages: stage {self.number}: {error}" if self.config.train.stages else str(error)
            ) from None

    def __str__(self) -> str:
        return f"{self.global_batch:,} sequences of {self.seq_len:,} tokens per step"


@dataclass(frozen=True)
class Stages:
    """The stages of a run, one if it has none; the last continues indefinitely."""

    spans: list[StageSpan]

    def at(self, step: int) -> StageSpan:
        """Return the stage of a step, from 1."""
        found = bisect_right(self.spans, step - 1, key=lambda span: span.first) - 1
        return self.spans[max(0, found)]

    def of_sample(self, index: int) -> StageSpan:
        """Return the stage of a sample of the run, from 0."""
        return self.spans[bisect_right(self.spans, index, key=lambda span: span.samples) - 1]

    def samples(self, step: int) -> int:
        """Return the samples of the first `step` steps."""
        return self.at(step).samples_until(step)

    def tokens(self, step: int) -> int:
        """Return the tokens of the first `step` steps."""
        span = self.at(step)
        return span.tokens + (step - span.first) * span.global_batch * span.seq_len

    def batch(self, step: int) -> range:
        """Return the samples of a step."""
        return range(self.samples(step - 1) if step > 1 else 0, self.samples(step))


def resolve_stages(config: RunConfig) -> Stages:
    """Return a run's stages, also those that a short run does not reach.

    Raises:
        ConfigError: if a stage's end is not after its begin, or the last one ends before the run.
    """
    total, given = config.train.steps, config.train.stages
    if not given:
        own = {name: one.weight for name, one in config.data.mixed.items()}
        return Stages([StageSpan(1, 0, total, 0, 0, own, config)])
    spans: list[StageSpan] = []
    values: dict[str, Any] = {}
    weights = {name: one.weight for name, one in config.data.mixed.items()}
    first = samples = tokens = 0
    for number, stage in enumerate(given, 1):
        values |= {name: value for name in CHANGING if (value := getattr(stage, name)) is not None}
        weights = weights if stage.weights is None else stage.weights
        effective = _with_values(config, values)
        batch = effective.train.global_batch
        size = batch * effective.data.seq_len
        name = f"train.stages: stage {number}"
        last = step_of(stage.until, total, (first, tokens, size), f"{name}: until")
        if last <= first:
            raise ConfigError(
                f"{name} ends at step {last}, and begins after step {first}; raise until, or lower it before."
            )
        spans.append(StageSpan(number, first, last, samples, tokens, weights, effective))
        steps = last - first
        first, samples, tokens = last, samples + steps * batch, tokens + steps * size
    if first < total:
        raise ConfigError(
            f"train.stages end at step {first:,} of --train.steps {total:,}; omit until in the last stage, or lower "
            "--train.steps."
        )
    return Stages(_resolved(spans, given, total))


def _resolved(spans: list[StageSpan], given: list[Stage], total: int) -> list[StageSpan]:
    """Give every span's settings stages that name all values, and ends in steps."""
    stages = []
    for span, stage in zip(spans, given, strict=True):
        values = {name: getattr(getattr(span.config, section), name) for name, section in CHANGING.items()}
        end = stage.lr_until
        if end is not None:
            begin = span.first, span.tokens, span.global_batch * span.seq_len
            end = f"{step_of(end, total, begin, f'train.stages: stage {span.number}: lr_until')} steps"
        stages.append(replace(stage, **values, until=f"{span.last} steps", weights=span.weights, lr_until=end))
    return [
        replace(span, config=replace(span.config, train=replace(span.config.train, stages=stages))) for span in spans
    ]


def step_of(end: float | str | None, total: int, begin: tuple[int, int, int], name: str) -> int:
    """Return the step at which a stage ends.

    Args:
        total: steps of the run.
        begin: steps and tokens before the stage, and tokens per step in it, with which tokens are converted.
        name: of the setting in messages.

    Raises:
        ConfigError: if `end` has another form.
    """
    if end is None:
        return max(total, begin[0] + 1)
    amount: float | None = end if isinstance(end, int | float) else None
    found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?) ?([KMBT]?) (steps?|tokens)", end) if isinstance(end, str) else None
    if found:
        try:
            amount = float(found[1]) * UNITS[found[2]]
        except ValueError:
            found = None
    if amount is None or isinstance(end, bool) or not 0 < amount < 1e18 or (not found and 1 < amount != int(amount)):
        raise ConfigError(
            f"{name} {end!r} is not an end; set a fraction of the steps (0.8), a step (4000) or tokens ('1.5T tokens')."
        )
    if found and found[3] == "tokens":
        first, tokens, size = begin
        return first + round((amount - tokens) / size)
    return round(amount * total) if not found and amount <= 1 else int(amount)


def _with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """Return a copy of the settings with a stage's values."""
    sections = {
        section: replace(getattr(config, section), **{n: v for n, v in values.items() if CHANGING[n] == section})
        for section in CHANGING.values()
    }
    return replace(config, **sections)


def format_stages(resolved: list[Stage], last: int) -> list[str]:
    """Describe the stages that begin before step `last`, by what changes in them.

    Args:
        resolved: the stages of `StageSpan.config`.
    """
    lines, first, before = [], 0, None
    for stage in resolved:
        until = int(str(stage.until).split()[0])
        if first < max(1, last):
            changed = [f"{stage.global_batch:,} sequences of {stage.seq_len:,} tokens"]
            if len(weights := stage.weights or {}) > 1:
                changed.append(" + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight))
            if stage.lr is not None or stage.lr_shape:
                level = "" if stage.lr is None else f" {stage.lr:g}"
                changed.append(f"learning rate {stage.lr_shape or 'constant'}{level}")
            for name in ("rope_theta", "rope_scaling", "document_mask"):
                value = getattr(stage, name)
                if before is not None and value != getattr(before, name):
                    shown = f"YaRN factor {value.factor:g}" if isinstance(value, Yarn) else f"{name} {value}"
                    changed.append(shown)
            lines.append(f"steps {first + 1:,} to {until:,}: {', '.join(changed)}")
        first, before = until, stage
    return lines
