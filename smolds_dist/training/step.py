"""One optimizer step over all ranks: forward and backward of every micro batch, then the update.

Shape letters: L layers, E experts, N query heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolds_dist.data.batch import apply_document_mask
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.captured import Recorder
from smolds_dist.parallel.engine import Engine, Update
from smolds_dist.parallel.optim import learning_rate
from smolds_dist.parallel.router_statistics import RouterStatistics
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import Train
from smolds_dist.training.clock import StepClock, is_measured
from smolds_dist.training.qk_clip import QkClip


class StepOutput(NamedTuple):
    """The result of a step on this rank."""

    step: int
    first_sample: int  # global index of its batch's first sample
    lr: float
    loss: Tensor  # mean over this rank's samples
    digest: int  # of its tokens (`data.batch.batch_digest`)
    update: Update
    counts: Tensor  # routed tokens per expert of all ranks [L, E]
    logits: Tensor | None  # largest attention logits of all ranks [L, N], with a limit


@dataclass
class Stepper:
    """Runs optimizer steps. Its methods are collective."""

    engine: Engine
    balancer: Balancer
    topology: Topology
    train: Train
    batches: BatchPrefetcher  # this rank's samples of each global batch
    end_of_text: int | None = None  # the token between documents, if documents are masked from each other
    should_stop: Callable[[], bool] = lambda: False  # returns True after a stop signal

    def __post_init__(self) -> None:
        self.routers = RouterStatistics(self.engine.model)
        self.clock = StepClock(self.engine)
        model_config: Any = self.engine.model.config
        self.qk_clip = QkClip(self.engine, model_config, self.train.qk_clip)

    def train_step(self, step: int, first_sample: int) -> StepOutput:
        """Run a step whose batch begins with sample `first_sample` of the run.

        Raises:
            ConfigError, StoppedWaitingError: on all ranks, before any change, if the batch is not available.
        """
        measured = is_measured(step)
        self.clock.begin(measured)
        lr = learning_rate(step, self.train)
        loss, digest = self.accumulate(first_sample)
        with self.clock.phase("optimizer"):
            logits_LN = self.qk_clip.take()
            update = self.engine.step(lr, by_part=measured, factors=self.qk_clip.factors(logits_LN))
            # Decay the bias rate with the learning rate: a jump in the last step would affect the final model.
            rate_scale = 1.0 if step <= self.train.warmup_steps else lr / self.train.lr
            counts_LE = self.balancer.step(update.applied, rate_scale)
        return StepOutput(step, first_sample, lr, loss, digest, update, counts_LE, logits_LN)

    def capture(self, ids: Tensor, recorder: Recorder) -> None:
        """Record the passes of micro batches like `ids` [B, S] as graphs. The engine is a `LocalEngine`.

        Raises:
            RuntimeError: if that fails; training then runs without.
        """
        engine: Any = self.engine
        try:
            with self.routers.capturing():
                engine.capture(ids, recorder)
        finally:
            self.qk_clip.take()  # of these passes

    def accumulate(self, first_sample: int) -> tuple[Tensor, int]:
        """Run forward and backward over this rank's samples of a global batch; return the mean loss and tokens' digest."""
        topology, clock = self.topology, self.clock
        first = first_sample + topology.rank * topology.per_rank
        total = torch.zeros((), device=self.engine.device)
        with clock.phase("data"):
            ids, digest = self.batches.take(range(first, first + topology.per_rank), self.should_stop)
            micro_batches = self._micro_batches(ids)
        for micro_batch in micro_batches:
            with clock.phase("forward"), self.balancer.counting(), self.routers.recording(clock.measured):
                loss = self.engine.forward(*micro_batch)
            with clock.phase("backward"):
                self.batches.prefetch_next()
                self.engine.backward(loss)
            total += loss.detach()
        return total / topology.accumulation, digest

    def _micro_batches(self, ids: Tensor) -> list[tuple[Tensor, ...]]:
        """Return the arguments of `Engine.forward`; if documents are masked, with positions and labels per document.

        Each loss is then divided by the mean number of labels per micro batch over the step and all ranks, so that their
        mean is the mean over all labels, however these are distributed.
        """
        parts = ids.split(self.topology.micro_batch)
        if self.end_of_text is None:
            return [(part, part) for part in parts]
        masked = [apply_document_mask(part, self.end_of_text) for part in parts]
        num_labels = sum((labels[:, 1:] >= 0).sum() for _, labels in masked)
        labels_of_all = self.engine.sum_over_ranks(torch.as_tensor(num_labels, dtype=torch.float32))
        mean = labels_of_all / self.topology.world_size / len(parts)
        return [(part, labels, positions, mean) for part, (positions, labels) in zip(parts, masked, strict=True)]

    def close(self) -> None:
        self.batches.close()
