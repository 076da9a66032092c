"""All layouts of a run on given nodes, with the memory and time of each, best first."""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, get_args

from smolds_dist.costs.hardware import Hardware
from smolds_dist.costs.layout import Layout, layout_of
from smolds_dist.costs.memory import MEMORY_SHARE, Memory, rank_memory, with_vocabulary
from smolds_dist.costs.step_time import StepTime, step_time
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import Machine, expert_sizes, plan_topology
from smolds_dist.settings import Recomputed, RunConfig
from smolds_dist.stages import StageSpan, resolve_stages

MAX_SEQUENCES = 64  # largest micro batch tried
TIMES = tuple(StepTime.__dataclass_fields__)
RECOMPUTED: tuple[Recomputed, ...] = get_args(Recomputed)


@dataclass(frozen=True)
class StageCost:
    """Memory and time of a step in a stage of the run."""

    span: StageSpan
    steps: int
    layout: Layout
    memory: Memory
    time: StepTime


@dataclass(frozen=True)
class Candidate:
    """A layout with its settings, memory and time."""

    settings: dict[str, Any]  # by the option's name
    stages: list[StageCost]

    @property
    def worst(self) -> StageCost:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def layout(self) -> Layout:
        """The layout in the stage that needs the most memory."""
        return self.worst.layout

    @property
    def memory(self) -> Memory:
        return self.worst.memory

    @cached_property
    def time(self) -> StepTime:
        """The mean over the run's steps."""
        return StepTime(*(self._mean([getattr(one.time, name) for one in self.stages]) for name in TIMES))

    @cached_property
    def tokens_per_step(self) -> float:
        """The mean over the run's steps."""
        return self._mean([one.layout.tokens_per_step for one in self.stages])

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all ranks."""
        return self.tokens_per_step / self.time.total

    def _mean(self, values: list[float]) -> float:
        steps = [one.steps for one in self.stages]
        return math.fsum(map(operator.mul, steps, values)) / sum(steps)

    @property
    def options(self) -> list[str]:
        """Command-line options of the layout."""
        return [f"--{name}={value}" for name, value in self.settings.items()]


def candidates(config: RunConfig, machine: Hardware, nodes: int, per_node: int, max_vio: float) -> Iterator[Candidate]:
    """Yield every valid layout: expert-parallel sizes, ZeRO stages, micro batches and activation checkpointing. Settings
    other than "auto" are kept.

    Raises:
        ConfigError: if none is valid, with the topology's reason.
    """
    world = nodes * per_node
    model = with_vocabulary(config)
    here = Machine((machine.device,), per_node, True, int(machine.memory))
    rank = RankInfo(0, 0, world, per_node)
    base = replace(config, parallel=replace(config.parallel, device="auto"))
    plan_topology(base, here, rank)  # raises if no layout is valid
    sizes: list[Any] = [config.parallel.expert]
    if sizes == ["auto"]:
        sizes = expert_sizes(world, config.model.num_experts)
    stages: list[Any] = [config.parallel.zero] if config.parallel.zero != "auto" else [0, 1, 2, 3]
    if world == 1 and config.parallel.engine != "deepspeed":
        stages = [0]
    per_rank = config.train.global_batch // world
    batches: list[Any] = [size for size in range(1, min(per_rank, MAX_SEQUENCES) + 1) if per_rank % size == 0]
    if config.train.micro_batch or len(resolve_stages(config).spans) > 1:
        batches = [config.train.micro_batch]  # unset, each stage has its own
    asked = config.train.activation_checkpointing
    recomputed = RECOMPUTED if asked == "none" else (asked,)
    for size, zero, batch, recompute in product(sizes, stages, batches, recomputed):
        settings = {
            "parallel.expert": size, "parallel.zero": zero, "train.micro_batch": batch,
            "train.activation_checkpointing": recompute,
        }  # fmt: skip
        if batch is None:
            del settings["train.micro_batch"]
        tried = replace(
            base,
            parallel=replace(base.parallel, expert=size, zero=zero),
            train=replace(base.train, micro_batch=batch, activation_checkpointing=recompute),
        )
        topology, total, costs = plan_topology(tried, here, rank), tried.train.steps, []
        for span in resolve_stages(tried).spans:
            if span.first < total:
                layout = layout_of(span.config, topology.at(span))
                memory = rank_memory(model, layout, machine.process, max_vio)
                time = step_time(model, layout, machine, max_vio)
                costs.append(StageCost(span, min(span.last, total) - span.first, layout, memory, time))
        yield Candidate(settings, costs)


def fits(one: Candidate, machine: Hardware) -> bool:
    return one.memory.total <= MEMORY_SHARE * machine.memory


def best_first(found: list[Candidate], machine: Hardware) -> list[Candidate]:
    """Return the layouts that fit, fastest first, then by ZeRO stage.

    Raises:
        ConfigError: if none fits.
    """
    fitting = [one for one in found if fits(one, machine)]
    if not fitting:
        least = min(found, key=lambda one: one.memory.total)
        raise ConfigError(
            f"no layout fits into {MEMORY_SHARE:.0%} of the {machine.memory / 1e9:,.0f} GB of {machine.name}: the smallest, "
            f"{' '.join(least.options)}, needs {least.memory.total / 1e9:,.1f} GB, mostly {least.memory.largest}; "
            "use more nodes, shorter sequences or a smaller model."
        )
    return sorted(fitting, key=lambda one: (-one.tokens_per_s, one.layout.zero))


def rejection_reason(one: Candidate, best: Candidate, machine: Hardware) -> str:
    """Return why another layout is worse than the best, in a few words."""
    if not fits(one, machine):
        return f"needs {one.memory.total / 1e9:,.1f} GB, mostly {one.memory.largest}"
    scale = one.tokens_per_step / best.tokens_per_step
    lost = {name: getattr(one.time, name) - scale * getattr(best.time, name) for name in TIMES}
    cause = max(lost, key=lambda name: lost[name])
    slower = one.time.total / (scale * best.time.total) - 1
    if slower < 0.005:
        return "as fast"
    return f"{slower:.0%} slower, mostly {cause.replace('_', ' ')} ({lost[cause] * 1e3:+,.0f} ms/step)"
