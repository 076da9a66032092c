"""Gradient noise scale of a run at a checkpoint, in tokens: the batch size above which larger batches save few steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smolds_dist.checkpoint.files import open_verified
from smolds_dist.checkpoint.resume import check_contents
from smolds_dist.config import load_config
from smolds_dist.data.batch import MicroBatch, TrainingData
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.data.prepare import prepare_data
from smolds_dist.errors import ConfigError
from smolds_dist.inference.generate import for_inference
from smolds_dist.interchange.export import build_model, find_checkpoint
from smolds_dist.parallel.engine import model_inputs
from smolds_dist.training.build import make_model_config


@dataclass(frozen=True)
class NoiseScale:
    """Unbiased estimates of |G|^2 and tr(Sigma), and their ratio B_simple (arXiv 1812.06162, equation 2.9).

    The paper's caveats: for Adam the ratio predicts the useful batch within a small factor only, and it is too low in
    warm-up; it grows as the loss falls.
    """

    tokens: float  # B_simple; infinite if |G|^2 is lost in the noise
    error: float  # standard error of `tokens`; infinite like it
    gradient: float  # |G|^2, the squared norm of the true gradient
    noise: float  # tr(Sigma) of one token's gradient


def measure(run: Path, step: int | None = None, sequences: int = 256, micro_batch: int = 4) -> NoiseScale:
    """Measure the noise scale of a run's checkpoint, in fp32 in this process, on the samples that follow it in the run's
    own order, or on the last ones if too few follow.

    Args:
        step: of the checkpoint; default: the newest.
        sequences: samples to use; the error falls with the root of their number once they have as many tokens as the scale.
        micro_batch: sequences whose mean gradient is compared with the mean of all; fewer take longer, and hardly lower the
            error while their tokens are far below the scale.

    Raises:
        ConfigError: if there is no such checkpoint or text, or it has fewer than 3 micro batches.
    """
    folder = find_checkpoint(run, step)
    reader = open_verified(folder)
    manifest, run = reader.manifest, folder.parent.parent
    config = load_config(["--config", str(run / "config.yaml"), "--checkpoint.resume=never", "-q"])
    own = config.data.tokenizer == "train"
    data = prepare_data(config, run / "tokenizer" if own else None, manifest.data["limits"], manifest.samples)
    check_contents(reader, data)
    stage = data.stages.at(manifest.data_step)
    batches = following(data, manifest.data_step, config.train.steps, sequences // micro_batch, micro_batch)
    if len(batches) < 3:
        raise ConfigError(
            f"{run} has {len(batches)} micro batches of {micro_batch} sequences to measure its gradient noise on, "
            "fewer than 3; train more steps, or use smaller micro batches."
        )
    model = for_inference(build_model(reader, make_model_config(stage.config, data))).train()
    device = next(model.parameters()).device

    def loss(number: int) -> Tensor:
        return model(**model_inputs(device, *batches[number])).loss

    return estimate(loss, list(model.parameters()), len(batches), micro_batch * stage.seq_len)


def following(data: TrainingData, step: int, last: int, count: int, size: int) -> list[MicroBatch]:
    """Return the run's `count` micro batches of `size` sequences after `step` of its data, in the same stage, or as many as
    its steps up to `last` have from an earlier step on."""
    stage = data.stages.at(step)
    end = min(stage.last, last)
    first = max(stage.first, min(step, end - math.ceil(count * size / stage.global_batch)))
    batches = BatchPrefetcher(data, (0, 1), [size] * len(data.stages.spans))
    found: list[MicroBatch] = []
    try:
        while len(found) < count and first < end:
            first += 1
            found += [one for one in batches.take(first).micro_batches if len(one.ids) == size]
    finally:
        batches.close()
    return found[:count]


def estimate(loss: Callable[[int], Tensor], parameters: Sequence[nn.Parameter], count: int, tokens: int) -> NoiseScale:
    """Estimate the noise scale from the gradients of `count` micro batches of `tokens` tokens each.

    With s the mean squared norm of one micro batch's gradient and b that of the mean of n, |G|^2 = (n b - s) / (n - 1) and
    tr(Sigma) = tokens n (s - b) / (n - 1) (arXiv 1812.06162, equations A.2 and A.3). The standard error is the jackknife's:
    a second pass over the micro batches gives the norm of each mean of all others without keeping their gradients.

    Args:
        loss: returns a micro batch's mean loss over its tokens, with its graph, the same at each call.
    """

    def scale(small: float, big: float, n: int) -> tuple[float, float]:
        return (n * big - small) / (n - 1), tokens * n * (small - big) / (n - 1)

    clear(parameters)
    for number in range(count):
        loss(number).backward()
    total = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters]
    squares, products = [], []
    for number in range(count):
        clear(parameters)
        loss(number).backward()
        found = [(p.grad.flatten(), t.flatten()) for p, t in zip(parameters, total, strict=True) if p.grad is not None]
        squares.append(sum(torch.dot(g, g).item() for g, _ in found))
        products.append(sum(torch.dot(g, t).item() for g, t in found))
    clear(parameters)
    whole, small = sum(torch.dot(t.flatten(), t.flatten()).item() for t in total), math.fsum(squares)
    ratios = []
    for square, product in zip(squares, products, strict=True):
        rest = (whole - 2 * product + square) / (count - 1) ** 2
        gradient, noise = scale((small - square) / (count - 1), rest, count - 1)
        ratios.append(noise / gradient if gradient > 0 else math.inf)
    gradient, noise = scale(small / count, whole / count**2, count)
    if gradient <= 0 or not all(map(math.isfinite, ratios)):
        return NoiseScale(math.inf, math.inf, gradient, noise)
    mean = math.fsum(ratios) / count
    error = math.sqrt((count - 1) / count * math.fsum((ratio - mean) ** 2 for ratio in ratios))
    return NoiseScale(noise / gradient, error, gradient, noise)


def clear(parameters: Sequence[Any]) -> None:
    """Drop the gradients."""
    for parameter in parameters:
        parameter.grad = None
