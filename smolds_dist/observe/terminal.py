"""What a person sees of a run while it trains."""

import sys

from smolds_dist.progress import ProgressBar
from smolds_dist.settings import Log


class Terminal:
    """Speaks on rank 0 alone, as `log.level` says; warnings always."""

    def __init__(self, log: Log, steps: int, done: int, main: bool):
        self._main = main
        self.shown = main and log.level != "quiet"
        self.verbose = main and log.level == "verbose"
        self._bar = ProgressBar("step", steps, done, log.every, self.shown)

    def step(self, row: dict) -> None:
        """A row of `MetricsWriter.training_row`."""
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        text = f"loss {loss}, {row['tokens_per_s']:,.0f} tokens/s"
        text += ", update skipped: not finite" if row.get("skipped") else f", MaxVio {row['max_vio']:.2f}"
        if self.verbose:
            norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
            text += f", gradient norm {norm}, learning rate {row['lr']:.2e}, {row['mfu']:.1%} of peak FLOP/s"
        self._bar.show(row["step"], text, line=self.verbose)

    def say(self, text: str) -> None:
        """Something worth knowing, on standard output."""
        if self.shown:
            self._bar.write(text, sys.stdout)

    def warn(self, text: str) -> None:
        if self._main:
            self._bar.write(f"warning: {text}", sys.stderr)

    def close(self) -> None:
        self._bar.close()
