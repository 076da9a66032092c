"""Discrete-event simulation of a step, for unbalanced experts and stragglers, which the closed formulas do not model.

Every rank is a program of compute and collectives. In a collective (all-to-all, reduction) a rank waits for its group, then
takes the time that its own links need for its own rows. With balanced loads and equal ranks, a step takes the time that
`step_time.step_time` predicts. The simulated machines themselves are untested.

Shape letters: L layers, E experts.
"""

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from smolds_dist.costs.flops import layers_of
from smolds_dist.costs.hardware import Hardware
from smolds_dist.costs.layout import Layout
from smolds_dist.costs.step_time import (
    elementwise_seconds,
    exchange_seconds,
    matmul_seconds,
    overhead_seconds,
    step_time,
)
from smolds_dist.errors import ConfigError
from smolds_dist.rows import read_rows


class Event(NamedTuple):
    """A rank waits for the others of `group` (its first rank and size), then takes `seconds`; it computes without waiting if
    it is alone."""

    seconds: float
    group: tuple[int, int] | None = None


@dataclass(frozen=True)
class Simulation:
    """Result of one simulated step."""

    seconds: float  # until the last rank is done
    waiting: tuple[float, ...]  # seconds that each rank waits for others


def loads_of_run(run: Path) -> list[list[float]]:
    """Return every expert's fraction of the rows in the last step that a run recorded, [L, E].

    Raises:
        ConfigError: if the run recorded none.
    """
    loads = next((row["load"] for row in reversed(read_rows(run / "metrics.jsonl")) if "load" in row), None)
    if loads is None:
        raise ConfigError(f"{run} has no recorded expert loads; name the folder of a run that has trained a step.")
    return loads


def simulate_step(
    model: Any,
    layout: Layout,
    machine: Hardware,
    loads: list[list[float]] | None = None,
    straggling: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulate one step of all ranks.

    Args:
        loads: every expert's fraction of a layer's rows, [L, E], each row summing to 1; default: balanced.
        straggling: standard deviation of a rank's relative slowdown; a rank is never faster than the machine.
    """
    chance = random.Random(seed)
    if loads is None:
        loads = [[1 / model.num_experts] * model.num_experts] * layers_of(model)[1]
    slowness = (1 + abs(chance.gauss(0, straggling)) for _ in range(layout.world))
    return run_programs([_program(rank, model, layout, machine, loads, slow) for rank, slow in enumerate(slowness)])


def run_programs(programs: list[Iterator[Event]]) -> Simulation:
    """Run every rank's program to its end.

    Raises:
        RuntimeError: if ranks deadlock in a collective.
    """
    waiting = [0.0] * len(programs)
    present: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
    events = [(0.0, rank) for rank in range(len(programs))]
    while events:
        now, rank = heapq.heappop(events)
        event = next(programs[rank], None)
        if event and event.group is None:
            heapq.heappush(events, (now + event.seconds, rank))
        elif event and event.group:
            there = present.setdefault(event.group, [])
            there.append((rank, now, event.seconds))
            if len(there) == event.group[1]:
                for other, since, seconds in present.pop(event.group):
                    waiting[other] += now - since
                    heapq.heappush(events, (now + seconds, other))
    if present:
        raise RuntimeError(f"deadlock: ranks wait indefinitely in {sorted(present)}")
    return Simulation(now, tuple(waiting))


def _program(
    rank: int, model: Any, layout: Layout, machine: Hardware, loads: list[list[float]], slow: float
) -> Iterator[Event]:
    """Yield a rank's events of one step; forward, backward and recomputation take a pass's time as 1 : 2 : 1."""
    size, own = layout.expert, model.num_experts // layout.expert
    group, place = (rank // size * size, size), rank % size
    dense, experts = (seconds / len(loads) for seconds in matmul_seconds(model, layout, machine))
    other = (elementwise_seconds(model, layout, machine) + overhead_seconds(model, layout, machine)) / len(loads)
    # Rows that the rank receives in each layer, relative to the mean rank; it always sends its own.
    share = [sum(load[place * own : (place + 1) * own]) * size for load in loads]
    turns = [(1, range(len(loads))), (2, range(len(loads) - 1, -1, -1))]
    if layout.recompute in ("experts", "selective", "full"):  # which repeats the all-to-all
        turns.insert(1, (1, range(len(loads))))
    parts = sum(part for part, _ in turns)
    for _ in range(layout.accumulation):
        for part, layers in turns:
            for layer in layers:
                exchange = [Event(exchange_seconds(model, layout, machine, max(1.0, share[layer])), group)]
                exchange *= size > 1
                yield Event((dense + other) * slow * part / parts)
                yield from exchange
                yield Event(experts * share[layer] * slow * part / parts)
                yield from exchange
    closed = step_time(model, layout, machine)
    if layout.world > 1:
        yield Event(closed.gradients, (0, layout.world))
    yield Event(closed.optimizer)
