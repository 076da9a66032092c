"""One optimizer step over all ranks, and the numbers that it leaves.

Shape letters: L layers, E experts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from smolds_dist.data.ahead import BatchesAhead
from smolds_dist.data.batch import by_document, document_end
from smolds_dist.observe.rows import is_kept, rounded
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.process_group import largest_over_ranks
from smolds_dist.parallel.router_statistics import RouterStatistics, entropy_and_histogram
from smolds_dist.parallel.topology import Topology
from smolds_dist.training.build import Job, Training
from smolds_dist.training.clock import PHASES, StepClock, is_measured, memory_in_use
from smolds_dist.training.optim import PARTS, learning_rate


class Step(NamedTuple):
    """What `take_step` comes back with, alike on all ranks but for times and the error."""

    row: dict  # for `MetricsWriter.training_row`
    counts: torch.Tensor | None  # routed tokens per expert [L, E]; None where the update was skipped
    asked: list[float]  # how many ranks have been asked to stop, by signal
    failed: bool  # whether a checkpoint could not be written
    error: str | None  # why, on rank 0


def take_step(job: Job, training: Training, step: int) -> Step:
    """One optimizer step over all ranks, and its numbers. Collective."""
    config, topology, engine, clock = job.config, job.topology, training.engine, training.clock
    measured = is_measured(step)
    clock.begin(measured)
    lr = learning_rate(step, config.train)
    first_sample = training.progress.skipped_samples + (step - 1) * config.train.global_batch
    end_of_text = document_end(config.data, job.data.tokenizer)
    loss_part, digest = accumulate_gradients(
        topology,
        training.ahead,
        first_sample,
        engine,
        training.balancer,
        training.routers,
        clock,
        end_of_text,
        stopped=lambda: job.stop.asked is not None,
    )
    with clock.phase("optimizer"):
        logits_LN = training.qk_clip.take()
        update = engine.step(lr, by_part=measured, factors=training.qk_clip.factors(logits_LN))
        # The biases settle as the weights do: a last step's jump would show in every later forward pass.
        settling = 1.0 if step <= config.train.warmup_steps else lr / config.train.lr
        counts_LE = training.balancer.step(update.applied, settling)

    error = training.checkpoints.failure()
    # All that is a number goes through one sum over the ranks.
    # A digest goes as four bytes: single precision adds them up exactly over up to 65,536 ranks.
    mine: list[list] = [[loss_part], job.stop.counts(), [error is not None], list(digest.to_bytes(4, "little")), [], []]
    if measured:
        training.slow.note(clock.seconds["forward"])
        mine[4:] = list(clock.seconds.values()), [update.squares.get(part, 0.0) for part in PARTS]
    sums = engine.sum_over_ranks(torch.tensor([float(value) for values in mine for value in values]))
    (loss_sum,), asked, (failed,), digest_bytes, phases, squares = (
        part.tolist() for part in sums.split([len(v) for v in mine])
    )
    seconds = clock.lap()

    step_tokens = config.train.global_batch * config.data.seq_len
    row = {"step": step, "tokens": step * step_tokens, "loss": loss_sum / topology.world_size, "lr": lr}
    row |= {"grad_norm": update.grad_norm, "tokens_per_s": round(step_tokens / seconds, 1)}
    share = job.flops_per_token * step_tokens / seconds / training.peak
    row["mfu"] = float(f"{share:.4g}")  # digits, not decimals: a small model's share of a large GPU is tiny
    digest = sum(int(byte) << 8 * place for place, byte in enumerate(digest_bytes)) % 2**32
    row |= {"batch": f"{digest:08x}"} | data_row(job, training, first_sample)
    if logits_LN is not None and update.applied:  # else they may be NaN, which JSON has no number for
        row |= {"max_logit": float(f"{logits_LN.max():.4g}")}
        row |= {"clipped_heads": int((logits_LN > config.train.qk_clip).sum())}
    if measured:
        means = {name: total / topology.world_size for name, total in zip(PHASES, phases, strict=True)}
        means["other"] = seconds - sum(means.values())
        row["seconds"] = {name: round(mean, 6) for name, mean in means.items()}
        details = look_closely(job, training, step)
        if update.applied:  # else they may be NaN, which JSON has no number for
            row |= details
            whole = sum(squares) or 1.0
            shares = dict(zip(PARTS, squares, strict=True))
            row["grad_norms"] = {
                part: round(update.grad_norm * math.sqrt(share / whole), 6) for part, share in shares.items() if share
            }
    return Step(row, counts_LE if update.applied else None, asked, bool(failed), error)


def data_row(job: Job, training: Training, first_sample: int) -> dict:
    """How far the data has gone after the batch that begins with that sample of the run; on rank 0."""
    end = first_sample + job.config.train.global_batch
    if training.texts is None:
        return {}
    with training.clock.phase("logging"):
        training.texts.see(range(first_sample, end))
    epochs = {name: round(epochs, 6) for name, epochs in job.data.epochs(end).items()}
    return {"seen_texts": training.texts.seen, "unique_texts": training.texts.unique, "epochs": epochs}


def look_closely(job: Job, training: Training, step: int) -> dict:
    """Memory, selection biases and the routers' probabilities, for a step's row. Collective."""
    memory = largest_over_ranks(job.topology, memory_in_use(training.engine.device) // 10**6)
    entropy_L, histogram = entropy_and_histogram(training.engine.sum_over_ranks(training.routers.take()))
    row = {"memory_gb": memory / 1000, "router_entropy": rounded(entropy_L)}
    row["bias"] = rounded(torch.stack(training.balancer.biases))
    if is_kept(step, digits=1):
        row["router_histogram"] = histogram.long().tolist()
    return row


def accumulate_gradients(
    topology: Topology,
    ahead: BatchesAhead,
    first_sample: int,
    engine: Engine,
    balancer: Balancer,
    routers: RouterStatistics,
    clock: StepClock,
    end_of_text: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[torch.Tensor, int]:
    """Forward and backward over this rank's part of a global batch.

    Args:
        first_sample: global index of the batch's first sample.
        end_of_text: the token after which another document begins, where they are kept apart.
        stopped: whether the run was asked to stop.

    Returns:
        The mean loss of this rank's part, and the digest of its tokens (`data.batch.batch_digest`).
    """
    first = first_sample + topology.rank * topology.per_rank
    total = torch.zeros((), device=engine.device)
    with clock.phase("data"):
        ids, digest = ahead.take(range(first, first + topology.per_rank), stopped)
        batches = [Packed(part, part) for part in ids.split(topology.micro_batch)]
        if end_of_text is not None:
            batches = documents_apart(batches, end_of_text, engine, topology)
    for batch in batches:
        with clock.phase("forward"), balancer.counting(), routers.watching(clock.measured):
            loss = engine.forward(*batch)
        with clock.phase("backward"):
            ahead.begin_next()
            engine.backward(loss)
        total += loss.detach()
    return total / topology.accumulation, digest


class Packed(NamedTuple):
    """What `Engine.forward` takes."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None = None
    num_labels: torch.Tensor | None = None


def documents_apart(batches: list[Packed], end_of_text: int, engine: Engine, topology: Topology) -> list[Packed]:
    """The same with positions and labels by document. Collective.

    Each loss is divided by the mean number of labels of a micro batch, over the step and all ranks: so their mean is that of
    all labels, however they are spread.
    """
    apart = [by_document(batch.ids, end_of_text) for batch in batches]
    here = sum((labels[:, 1:] >= 0).sum() for _, labels in apart)
    mean = engine.sum_over_ranks(torch.as_tensor(here, dtype=torch.float32)) / topology.world_size / len(apart)
    return [
        Packed(batch.ids, labels, positions, mean) for batch, (positions, labels) in zip(batches, apart, strict=True)
    ]
