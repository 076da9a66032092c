"""The gradient noise scale: gradients of known noise, and a run's checkpoint."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from smolds_dist.errors import ConfigError
from smolds_dist.training.noise_scale import estimate, measure


def drawn(count: int, size: int, noise: float, seed: int = 0):
    """Return the estimate from `count` micro batches of `size` samples, whose gradients are normal around one of norm 1,
    with tr(Sigma) = `noise`."""
    torch.manual_seed(seed)
    weight, dims = nn.Parameter(torch.zeros(100)), 100
    gradients = 1 / math.sqrt(dims) + math.sqrt(noise / dims) * torch.randn(count, size, dims)
    return estimate(lambda number: (gradients[number] @ weight).mean(), [weight], count, size)


@pytest.mark.parametrize(("count", "size"), [(400, 1), (200, 2), (50, 8)])
def test_known_noise_comes_back_from_any_micro_batch(count, size):
    errors, inside = [], 0
    for seed in range(20):
        found = drawn(count, size, noise=50.0, seed=seed)
        errors.append(found.tokens / 50 - 1)
        inside += abs(found.tokens - 50) < 2 * found.error
        assert found.error < 20
        assert found.noise == pytest.approx(50, rel=0.1)
    assert sum(errors) / 20 == pytest.approx(0, abs=0.05) and max(map(abs, errors)) > 0.01
    assert inside >= 16  # of 20, for two standard errors


def test_a_gradient_lost_in_noise_has_an_infinite_scale():
    found = [drawn(4, 1, noise=1e6, seed=seed) for seed in range(8)]
    assert any(one.tokens == one.error == math.inf for one in found)


def test_half_the_micro_batch_gives_the_same_noise_scale(kept_run):
    run, _ = kept_run
    one, two = (measure(run, step=2, sequences=32, micro_batch=size) for size in (1, 2))
    assert 0 < one.tokens < math.inf
    assert abs(one.tokens - two.tokens) < 2 * math.hypot(one.error, two.error)
    assert one.gradient == pytest.approx(two.gradient, rel=0.2)
    assert one.noise == pytest.approx(two.noise, rel=0.2)
    assert replace(measure(run, step=2, sequences=32, micro_batch=1)) == one  # the same samples
    later = measure(run, sequences=32, micro_batch=1)  # at the end, from earlier samples
    assert later.gradient != one.gradient
    with pytest.raises(ConfigError, match="fewer than 3"):
        measure(run, sequences=8)
