"""The loss that a ladder predicts for a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolds_dist.costs.step_time import RunTime
from smolds_dist.errors import ConfigError
from smolds_dist.inputs import read_json
from smolds_dist.planner.family import granularity, weights
from smolds_dist.planner.scaling_law import FittedLaw
from smolds_dist.planner.search import Candidate
from smolds_dist.settings import RunConfig

FAR = 100  # times the FLOPs of the ladder's largest run


def load_fit(ladder: Path) -> FittedLaw:
    """Return the law of a ladder's folder.

    Raises:
        ConfigError: if it has none.
    """
    path = ladder / "fit.json"
    advice = f"write it by `smolds ladder fit {ladder}`"
    if not path.is_file():
        raise ConfigError(f"--ladder {ladder} has no fit.json; {advice}.")
    try:
        return FittedLaw.from_json(read_json(path, advice, dict[str, Any]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a fit of this version ({error}); {advice}.") from None


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
