"""The loss that a ladder predicts for a model."""

import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from smolds_dist.config import load_config
from smolds_dist.costs.memory import with_vocabulary
from smolds_dist.costs.step_time import RunTime
from smolds_dist.errors import ConfigError
from smolds_dist.inputs import read_json, read_yaml
from smolds_dist.planner.family import granularity, weights
from smolds_dist.planner.ladder_fit import FIT, RESULTS, read_points
from smolds_dist.planner.scaling_law import FittedLaw
from smolds_dist.planner.search import Candidate
from smolds_dist.settings import RunConfig

FAR = 100  # times the FLOPs of the ladder's largest run


def load_fit(ladder: Path, config: RunConfig) -> FittedLaw:
    """Return the law of a ladder's folder, for predictions of `config`.

    Raises:
        ConfigError: if it has none, one of other runs than its results, or one of another vocabulary.
    """
    path, plan = ladder / FIT, ladder / "ladder.yaml"
    advice = f"write it by `smolds ladder fit {ladder}`"
    if not path.is_file():
        raise ConfigError(f"--ladder {ladder} has no {FIT}; {advice}.")
    fitted = read_json(path, advice, FittedLaw)
    if not (fitted.points and fitted.resampled and all(map(math.isfinite, astuple(fitted.law)))):
        raise ConfigError(f"{path} has no runs, or constants that are not finite; {advice}.")
    if (ladder / RESULTS).is_file():  # else only the fit was kept
        own = [*fitted.points, *(fitted.dense.points if fitted.dense else ())]
        known, used = ({point.run: point.loss for point in points} for points in (read_points(ladder), own))
        if known != used:
            names = ", ".join(sorted(name for name in known | used if known.get(name) != used.get(name)))
            raise ConfigError(f"{path} was fitted before {RESULTS} changed ({names}); {advice}.")
    if plan.is_file():
        options = read_yaml(plan, "plan the ladder again", dict[str, Any]).get("options", [])
        vocabulary, asked = (with_vocabulary(one).vocab_size for one in (load_config(options), config))
        if vocabulary != asked:
            raise ConfigError(
                f"--ladder {ladder} has losses per token of a vocabulary of {vocabulary:,}, but the training options have "
                f"{asked:,}, whose tokens are not comparable; repeat the ladder's tokenizer options."
            )
    return fitted


@dataclass(frozen=True)
class Outlook:
    """A ladder's law, for one model."""

    fitted: FittedLaw
    active: int  # matmul weights that a token uses
    total: int
    granularity: float

    @classmethod
    def of(cls, fitted: FittedLaw, config: RunConfig) -> "Outlook":
        return cls(fitted, *weights(config), granularity(config))

    def predict(self, tokens: float) -> tuple[float, float, float]:
        """Return the loss after `tokens` in nats per token, and its 80 % interval."""
        return self.fitted.predict(self.active, self.total, tokens, self.granularity)

    def loss(self, tokens: float) -> float:
        """Return the loss after `tokens`, as `predict`."""
        return self.fitted.law.loss(self.active, self.total, tokens, self.granularity)

    def loss_in(self, run: RunTime, layout: Candidate) -> float:
        """Return the loss that a layout reaches in a run's training time."""
        return self.loss(run.training * layout.tokens_per_s)

    def describe(self, tokens: float) -> str:
        """Return the loss after `tokens` as text, with a warning if it is far from the ladder's runs."""
        loss, low, high = self.predict(tokens)
        text = f"predicted loss {loss:.4f} (80 %: {low:.4f} to {high:.4f}) after {tokens:,.0f} tokens"
        times = 6 * self.active * tokens / max(point.flops for point in self.fitted.points)
        return text + (f"; a guess, at {times:,.0f} times the FLOPs of the ladder's largest run" if times > FAR else "")
