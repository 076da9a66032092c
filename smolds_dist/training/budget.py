"""A run's time budget: after warmup, lower the number of steps to what fits."""

import time

import torch

from smolds_dist.config import save_config
from smolds_dist.training.build import Job, Training


class TimeBudget:
    """Lowers `train.steps` at the end of warmup to what fits into `train.time_budget`.

    Until then no learning rate depends on the number of steps. The time is measured once: the lowered number is saved in
    config.yaml and every later checkpoint, and a resumed run reads it there (`checkpoint.resume.prepare_resumed`).
    """

    def __init__(self) -> None:
        self._ends = [time.monotonic()]  # the start, then the end of each step

    def after_step(self, job: Job, training: Training, step: int) -> None:
        """Measure steps during warmup and lower `train.steps` at its end. Collective."""
        train = job.config.train
        if train.time_budget is None or step > train.warmup_steps or step == train.steps:
            return
        self._ends.append(time.monotonic())
        if step < train.warmup_steps:
            return
        later = self._ends[(len(self._ends) - 1) // 2 :]  # the first steps also allocate memory
        seconds = (later[-1] - later[0]) / (len(later) - 1)
        left = train.time_budget - (later[-1] - self._ends[0])
        fitting = torch.tensor(float(step + max(1, int(left / seconds))) if job.main else 0.0)
        most, train.steps = train.steps, min(train.steps, int(training.engine.sum_over_ranks(fitting).item()))
        training.log.fit(train.steps)
        if job.main:
            save_config(job.config, job.config.run_dir / "config.yaml")
            training.log.info(
                f"{seconds:.3f} s per step: the time budget of {train.time_budget:.0f} s allows {train.steps:,} of at most "
                f"{most:,} steps"
            )
