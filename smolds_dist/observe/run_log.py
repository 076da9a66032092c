"""What a run reports while it trains: lines and a progress bar on the terminal, rows of metrics, samples."""

import sys

from torch import Tensor

from smolds_dist.observe.metrics import MetricsWriter
from smolds_dist.progress import ProgressBar
from smolds_dist.settings import RunConfig


class RunLog:
    """Reports on rank 0, on the terminal as `log.level` says, and does nothing on the others, so that all ranks may call it.

    Args:
        start_step: the step before the first that will be reported.
        main: whether this is rank 0.
    """

    def __init__(self, config: RunConfig, start_step: int, main: bool):
        self.shown = main and config.log.level != "quiet"
        self.verbose = main and config.log.level == "verbose"
        self._bar = ProgressBar("step", config.train.steps, start_step, config.log.every, self.shown)
        self._metrics = MetricsWriter(config, start_step) if main else None

    def say(self, text: str) -> None:
        """Something worth knowing, on standard output."""
        if self.shown:
            self._bar.write(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Whatever the level."""
        if self._metrics is not None:
            self._bar.write(f"warning: {text}", sys.stderr)

    def training_row(self, row: dict, counts_LE: Tensor | None) -> None:
        """A step; see `MetricsWriter.training_row`."""
        if self._metrics is None:
            return
        row = self._metrics.training_row(row, counts_LE)
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        text = f"loss {loss}, {row['tokens_per_s']:,.0f} tokens/s"
        text += ", update skipped: not finite" if row.get("skipped") else f", MaxVio {row['max_vio']:.2f}"
        if self.verbose:
            norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
            text += f", gradient norm {norm}, learning rate {row['lr']:.2e}, {row['mfu']:.1%} of peak FLOP/s"
        self._bar.show(row["step"], text, line=self.verbose)

    def row(self, step: int, **values: object) -> None:
        """A row of metrics: an evaluation, or an `event` such as a restart."""
        if self._metrics is not None:
            self._metrics.row({"step": step, **values})

    def samples(self, step: int, texts: dict[str, str]) -> None:
        if self._metrics is not None:
            self._metrics.samples(step, texts)

    def fit(self, steps: int) -> None:
        """Sets the run's number of steps from now on."""
        self._bar.total = steps

    def close_bar(self) -> None:
        self._bar.close()

    def close(self) -> None:
        self.close_bar()
        if self._metrics is not None:
            self._metrics.close()
