"""One optimizer step over all ranks: forward and backward of every micro batch, then the update.

Shape letters: L layers, E experts, N query heads.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolds_dist.data.batch import Batch
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.captured import Recorder
from smolds_dist.parallel.engine import Engine, Update
from smolds_dist.parallel.router_statistics import RouterStatistics
from smolds_dist.parallel.topology import Topology
from smolds_dist.schedule import balance_scale, learning_rate
from smolds_dist.settings import RunConfig
from smolds_dist.stages import resolve_stages
from smolds_dist.training.clock import StepClock
from smolds_dist.training.guard import OutlierFilter
from smolds_dist.training.qk_clip import QkClip
from smolds_dist.training.statistics import Statistics


class StepOutput(NamedTuple):
    """The result of a step on this rank."""

    step: int
    samples: range  # of the run, in its global batch
    lr: float
    loss: Tensor  # mean over this rank's samples, on the host like all tensors here; without `mtp_loss`
    mtp_loss: Tensor | None  # of multi-token prediction, if any
    digest: int  # of its tokens (`data.batch.batch_digest`)
    update: Update
    counts: Tensor  # routed tokens per expert of all ranks [L, E]
    logits: Tensor | None  # largest attention logits of all ranks [L, N], if tracked


@dataclass
class Stepper:
    """Runs optimizer steps. Its methods are collective."""

    engine: Engine
    balancer: Balancer
    topology: Topology  # in the current stage
    config: RunConfig
    batches: BatchPrefetcher  # this rank's samples of each global batch
    should_stop: Callable[[], bool] = lambda: False  # returns True after a stop signal
    outliers: OutlierFilter = field(default_factory=OutlierFilter)

    def __post_init__(self) -> None:
        self.routers = RouterStatistics(self.engine.model)
        self.stages = resolve_stages(self.config)
        self.clock = StepClock(self.engine, self.topology.expert)
        model_config: Any = self.engine.model.config
        train = self.config.train
        self.qk_clip = QkClip(self.engine, model_config, train.qk_clip)
        every = self.config.log.statistics_every
        self.statistics = Statistics(self.engine, self.qk_clip, every, train.grad_clip)
        self._mtp_loss: Tensor | None = None
        if model_config.num_nextn_predict_layers:
            model: Any = self.engine.model
            self._mtp_loss = model.mtp_loss = torch.zeros((), device=self.engine.device)

    def train_step(self, step: int, data_step: int) -> StepOutput:
        """Run a step.

        Args:
            data_step: step whose samples it takes, later than `step` after rollbacks.

        Raises:
            ConfigError, StoppedWaitingError: on all ranks, before any change, if the batch is not available.
        """
        self.clock.begin(step)
        lr = learning_rate(step, self.config)
        watch = self.statistics if self.statistics.is_due(step) else None
        with watch.measuring() if watch else nullcontext():
            loss, digest = self.accumulate(data_step)
        with self.clock.phase("optimizer"):
            counts_LE, logits_LN = self.balancer.take(), self.qk_clip.take()
            results = {"loss": loss, "counts": counts_LE} | ({} if logits_LN is None else {"logits": logits_LN})
            accept = self.outliers.accepts if self.outliers.limit else None
            if self._mtp_loss is not None:
                results["mtp"] = self._mtp_loss / self.topology.accumulation
                results["loss"] = loss - self.config.train.mtp_coef * results["mtp"]
            if accept:
                results["mean_loss"] = self.engine.sum_over_ranks(results["loss"].clone()) / self.topology.world_size
            update = self.engine.step(
                lr, self.clock.measured, results, lambda read: self.qk_clip.factors(read.get("logits")), accept, watch
            )
            if watch:
                self.qk_clip.record(False)
            # Decay the bias rate with the learning rate: a jump in the last step would affect the final model.
            self.balancer.step(update.applied, balance_scale(step, self.config), counts_LE)
        read, samples = update.read, self.stages.batch(data_step)
        losses = read["loss"], read.get("mtp")
        return StepOutput(step, samples, lr, *losses, digest, update, read["counts"], read.get("logits"))

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

    def accumulate(self, data_step: int) -> tuple[Tensor, int]:
        """Run forward and backward over this rank's samples of a step; return the mean of the complete loss and the tokens'
        digest."""
        topology, clock = self.topology, self.clock
        total = torch.zeros((), device=self.engine.device)
        if self._mtp_loss is not None:
            self._mtp_loss.zero_()
        with clock.phase("data"):
            batch = self.batches.take(data_step, self.should_stop)
            num_labels = self._mean_labels(batch)
        for micro_batch in batch.micro_batches:
            with clock.phase("forward"), self.balancer.counting(), self.routers.recording(clock.measured):
                loss = self.engine.forward(*micro_batch, num_labels=num_labels)
            with clock.phase("backward"):
                self.batches.prefetch_next()
                self.engine.backward(loss)
            total += loss.detach()
        return total / topology.accumulation, batch.digest

    def _mean_labels(self, batch: Batch) -> Tensor | None:
        """Return the mean number of labels per micro batch over the step and all ranks, if documents are masked.

        It divides the micro batches' losses, so that their mean is the mean over all labels, however these are distributed.
        """
        if batch.num_labels is None:
            return None
        labels_of_all = self.engine.sum_over_ranks(torch.tensor(float(batch.num_labels)))
        return labels_of_all / self.topology.world_size / len(batch.micro_batches)

    def close(self) -> None:
        self.batches.close()
