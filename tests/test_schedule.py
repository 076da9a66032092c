"""The learning rate of every step, compared with PyTorch's and transformers' schedulers of the same names."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.optim import lr_scheduler

from smolds_dist.schedule import balance_scale, learning_rate
from smolds_dist.settings import RunConfig, Stage, Train

STEPS = 110


def rates_of(**train: Any) -> list[float]:
    settings: dict[str, Any] = {"steps": STEPS, "warmup_steps": 10, "lr": 1.0} | train
    config = RunConfig(train=Train(**settings))
    return [learning_rate(step, config) for step in range(1, config.train.steps + 1)]


def theirs(make: Callable[..., Any], *args: Any, lr: float = 1.0, steps: int = STEPS, **more: Any) -> list[float]:
    """The rates of an outside scheduler after each of its steps, as ours reach the last rate in the last step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer, *args, **more)
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


def test_cosine_schedule_is_that_of_transformers():
    expected = theirs(transformers.get_cosine_with_min_lr_schedule_with_warmup, 10, STEPS, min_lr_rate=0.1)
    assert rates_of(min_lr_fraction=0.1) == pytest.approx(expected)


def test_wsd_schedule_is_that_of_transformers():
    expected = theirs(transformers.get_wsd_schedule, 10, 20, STEPS, min_lr_ratio=0.0, decay_type="linear")
    decay = 20 / STEPS
    assert rates_of(schedule="wsd", decay_fraction=decay, min_lr_fraction=0.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (3, 3), (2, 0), (10, 50)])
def test_short_runs_have_finite_positive_rates(schedule, steps, warmup):
    rates = rates_of(steps=steps, warmup_steps=warmup, schedule=schedule, decay_fraction=0.5, lr=1e-3)
    assert all(math.isfinite(rate) and 0 < rate <= 1e-3 for rate in rates)


def test_shapes_of_a_stage_are_those_of_the_schedulers_of_the_same_names():
    linear = [Stage(lr=0.0, lr_shape="linear")]
    expected = theirs(transformers.get_linear_schedule_with_warmup, 10, STEPS)
    assert rates_of(stages=linear) == pytest.approx(expected, abs=1e-12)
    inverse = [Stage(10, lr=1.0, lr_shape="warmup"), Stage(lr_shape="inverse_sqrt")]
    expected = theirs(transformers.get_inverse_sqrt_schedule, 10)
    assert rates_of(stages=inverse) == pytest.approx(expected)
    assert rates_of(stages=[Stage(lr_shape="inverse_sqrt")]) == pytest.approx(expected)
    expected = theirs(transformers.get_inverse_sqrt_schedule, 0)  # transformers' time scale without a warm-up
    assert rates_of(stages=[Stage(lr_shape="inverse_sqrt")], warmup_steps=0) == pytest.approx(expected)
    constant = [Stage(lr_shape="constant")]
    assert rates_of(stages=constant) == pytest.approx(theirs(transformers.get_constant_schedule_with_warmup, 10))


def test_stages_are_a_chain_of_schedulers():
    """DeepSeek-V3's course: warm-up, constant, cosine, and two lower rates."""
    stages = [
        Stage(20, lr=1.0, lr_shape="warmup"), Stage(60, lr_shape="constant"), Stage(90, lr=0.1, lr_shape="cosine"),
        Stage(100, lr_shape="hold"), Stage(lr=0.05),
    ]  # fmt: skip

    def chain(optimizer: Any) -> Any:
        parts = [
            lr_scheduler.LinearLR(optimizer, 1e-12, 1.0, 20), lr_scheduler.ConstantLR(optimizer, 1.0, 40),
            lr_scheduler.CosineAnnealingLR(optimizer, 30, 0.1), lr_scheduler.ConstantLR(optimizer, 0.1, 100),
            lr_scheduler.ConstantLR(optimizer, 0.05, 100),
        ]  # fmt: skip
        return lr_scheduler.SequentialLR(optimizer, parts, [20, 60, 90, 100])

    ours, expected = rates_of(stages=stages), theirs(chain)
    # A scheduler's last value in a chain is the next one's first.
    known = [step for step in range(STEPS) if step + 1 not in (90, 100)]
    assert [ours[step] for step in known] == pytest.approx([expected[step] for step in known], abs=1e-9)
    assert ours[88:91] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * 29 / 30)), 0.1, 0.1])
    assert ours[98:101] == pytest.approx([0.1, 0.1, 0.05])


def test_stages_without_a_rate_leave_the_schedule_as_it_is():
    alone = rates_of()
    assert rates_of(stages=[Stage(0.3, seq_len=512), Stage(document_mask=True)]) == alone
    later = rates_of(stages=[Stage(0.5, seq_len=512), Stage(lr=0.0, lr_shape="linear")])
    assert later[:55] == alone[:55]
    assert later[55:] == pytest.approx([alone[54] * (1 - i / 55) for i in range(1, 56)], abs=1e-12)
    # A shape goes on through stages that set none.
    split = [Stage(0.5, lr=0.0, lr_shape="linear"), Stage(seq_len=512)]
    assert rates_of(stages=split) == rates_of(stages=[Stage(lr=0.0, lr_shape="linear")])


def test_cosine_can_be_cut_off_on_its_way():
    """OLMo 2's course: a cosine over 5 trillion tokens, ended at 4, then a linear decay to 0."""
    tokens = Train().global_batch * RunConfig().data.seq_len  # per step
    stages = [
        Stage(f"{80 * tokens} tokens", lr=0.1, lr_shape="cosine", lr_until=f"{100 * tokens} tokens"),
        Stage(lr=0.0, lr_shape="linear"),
    ]
    whole = rates_of(steps=100, min_lr_fraction=0.1)
    rates = rates_of(stages=stages)
    assert rates[:80] == pytest.approx(whole[:80])
    assert rates[80:] == pytest.approx([whole[79] * (1 - i / 30) for i in range(1, 31)], abs=1e-12)


def test_balance_rate_decays_with_the_learning_rate():
    stages = [Stage(20, lr=2.0, lr_shape="warmup"), Stage(60, lr_shape="constant"), Stage(lr=0.0, lr_shape="linear")]
    config = RunConfig(train=Train(steps=STEPS, lr=1.0, stages=stages))
    assert [balance_scale(step, config) for step in (1, 20, 60, 85)] == pytest.approx([1.0, 1.0, 1.0, 0.5])
    plain = RunConfig(train=Train(steps=STEPS, lr=1e-3, warmup_steps=10))
    assert balance_scale(5, plain) == 1.0
    assert balance_scale(60, plain) == pytest.approx(learning_rate(60, plain) / 1e-3)
