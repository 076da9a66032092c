"""Sum a step's numbers over the ranks and make its row of metrics.

Shape letters: L layers, E experts, N query heads.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolds_dist.costs.flops import flops_per_token
from smolds_dist.observe.rows import is_kept, rounded
from smolds_dist.parallel.engine import read_together
from smolds_dist.parallel.optim import PARTS
from smolds_dist.parallel.process_group import max_over_ranks
from smolds_dist.parallel.router_statistics import entropy_and_histogram
from smolds_dist.training.build import Job, Training
from smolds_dist.training.clock import memory_in_use
from smolds_dist.training.step import StepOutput


class StepResult(NamedTuple):
    """A step's result for the training loop, the same on all ranks except times and the error."""

    row: dict  # for `RunLog.training_row`
    counts: Tensor | None  # routed tokens per expert [L, E]; None if the update was skipped
    requested: list[float]  # number of ranks that received each stop signal
    failed: bool  # whether a checkpoint could not be written
    error: str | None  # why, on rank 0


def summarize_step(job: Job, training: Training, output: StepOutput) -> StepResult:
    """End a step and sum its numbers over all ranks. Collective."""
    clock, update = training.stepper.clock, output.update
    measured, world = clock.measured, job.topology.world_size
    error = training.checkpoints.failure()
    phases = clock.seconds if measured else {}
    if "all_to_all" in phases:  # else the forward pass includes waits for other ranks
        training.stragglers.record(phases["forward"])
    mine = {
        "loss": [output.loss.item()],
        "mtp_loss": [] if output.mtp_loss is None else [output.mtp_loss.item()],
        "requested": job.stop.counts(),
        "failed": [float(error is not None)],
        # Four bytes: fp32 sums each exactly over up to 65,536 ranks.
        "digest": list(map(float, output.digest.to_bytes(4, "little"))),
        "phases": list(phases.values()),
        "squares": [float(update.squares.get(part, 0.0)) for part in PARTS] if measured else [],
    }
    together = training.engine.sum_over_ranks(torch.tensor([value for values in mine.values() for value in values]))
    parts = together.split([len(values) for values in mine.values()])
    sums = {name: part.tolist() for name, part in zip(mine, parts, strict=True)}
    seconds = clock.lap()

    stage = training.stage
    step_tokens = stage.global_batch * stage.seq_len
    row: dict[str, Any] = {
        "step": output.step,
        "tokens": training.state.tokens + step_tokens,
        "loss": sums["loss"][0] / world,
        "lr": output.lr,
    }
    if sums["mtp_loss"]:
        row["mtp_loss"] = sums["mtp_loss"][0] / world
    row |= {"grad_norm": update.grad_norm, "tokens_per_s": round(step_tokens / seconds, 1)}
    share = flops_per_token(job.model_config, stage.seq_len) * step_tokens / seconds / training.peak
    row["mfu"] = float(f"{share:.4g}")  # significant digits: a small model's MFU on a large GPU is tiny
    digest = sum(int(byte) << 8 * place for place, byte in enumerate(sums["digest"])) % 2**32
    row |= {"batch": f"{digest:08x}"} | data_row(job, training, output.samples)
    if (
        job.config.train.qk_clip and output.logits is not None and update.applied
    ):  # else they may be NaN, which JSON lacks
        row |= {"max_logit": float(f"{output.logits.max():.4g}")}
        row |= {"clipped_heads": int((output.logits > job.config.train.qk_clip).sum())}
    if measured:
        means = {name: total / world for name, total in zip(phases, sums["phases"], strict=True)}
        means["other"] = seconds - sum(means.values())
        row["seconds"] = {name: round(mean, 6) for name, mean in means.items()}
        details = diagnostics(job, training, output.step)
        if update.applied:  # else they may be NaN, which JSON lacks
            if job.topology.expert > 1:
                row["max_received"] = round(max_received(output.counts, job.topology.expert), 4)
            row |= details | {"grad_norms": norms_by_part(update.grad_norm, sums["squares"])}
    if (outliers := training.stepper.outliers).limit:
        outliers.add(row["loss"], update.grad_norm, update.outlier)
        row |= {"outliers": outliers.count} | ({"outlier": True} if update.outlier else {})
    if training.stepper.statistics.is_due(output.step) and update.applied and output.logits is not None:
        statistics = training.stepper.statistics.row(update.grad_norm, output.logits)
        training.log.row(output.step, event="statistics", **statistics)
    counts = output.counts if update.applied else None
    return StepResult(row, counts, sums["requested"], bool(sums["failed"][0]), error)


def data_row(job: Job, training: Training, samples: range) -> dict:
    """Return data progress after a batch of these samples of the run; on rank 0."""
    if training.texts is None:
        return {}
    with training.stepper.clock.phase("logging"):
        training.texts.add(samples)
    epochs = {name: round(epochs, 6) for name, epochs in job.data.epochs(samples.stop).items()}
    return {"seen_texts": training.texts.seen, "unique_texts": training.texts.unique, "epochs": epochs}


def diagnostics(job: Job, training: Training, step: int) -> dict:
    """Return memory, selection biases and router statistics for a measured step's row. Collective."""
    engine = training.engine
    memory = max_over_ranks(job.topology, memory_in_use(engine.device) // 10**6)
    sums = engine.sum_over_ranks(training.stepper.routers.take())
    sums, bias_LE = read_together([sums, torch.stack(training.balancer.biases)])
    entropy_L, histogram = entropy_and_histogram(sums)
    row = {"memory_gb": memory / 1000, "router_entropy": rounded(entropy_L), "bias": rounded(bias_LE)}
    if is_kept(step, digits=1):
        row["router_histogram"] = histogram.long().tolist()
    return row


def max_received(counts_LE: Tensor, expert: int) -> float:
    """Return the most rows that a rank's experts got in a layer, over the mean rank's; its activations take that much more
    memory."""
    of_ranks = counts_LE.unflatten(-1, (expert, -1)).sum(-1)
    return (of_ranks / of_ranks.mean(-1, keepdim=True)).max().item()


def norms_by_part(norm: float, squares: list[float]) -> dict[str, float]:
    """Split the gradient norm by part of the model, in proportion to the parts' squares."""
    total = sum(squares) or 1.0
    return {
        part: round(norm * math.sqrt(square / total), 6) for part, square in zip(PARTS, squares, strict=True) if square
    }
