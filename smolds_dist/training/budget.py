"""A run's time budget: after the warm-up, as many steps as fit."""

import time

import torch

from smolds_dist.config import save_config
from smolds_dist.training.build import Job, Training


class TimeBudget:
    """Lowers `train.steps` at the end of the warm-up to what fits into `train.time_budget`.

    Until then no learning rate depends on the number of steps. It is measured once: the lowered number goes into
    config.yaml and every later checkpoint, from which a resumed run takes it (`checkpoint.resume.prepare_resumed`).
    """

    def __init__(self) -> None:
        self._ends = [time.monotonic()]  # of the steps so far, after the start

    def after_step(self, job: Job, training: Training, step: int) -> None:
        """Collective."""
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
                f"a step takes {seconds:.3f} s here: {train.steps:,} of at most {most:,} steps, in {train.time_budget:.0f} s"
            )
