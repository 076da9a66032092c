"""What a ladder costs: FLOPs, and time by the planner."""

from dataclasses import dataclass

from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.hardware import Hardware
from smolds_dist.costs.memory import with_vocabulary
from smolds_dist.ladder.plan import Ladder, Rung, named, runs_of, sweep_of
from smolds_dist.planner.family import weights
from smolds_dist.planner.search import best_first, candidates
from smolds_dist.progress import duration
from smolds_dist.stages import UNITS


@dataclass(frozen=True)
class Cost:
    """What training costs."""

    tokens: int
    flops: float
    seconds: float  # on one device, by the planner

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.tokens + other.tokens, self.flops + other.flops, self.seconds + other.seconds)


def cost_of(ladder: Ladder, rung: Rung, steps: int, machine: Hardware, devices: int) -> Cost:
    """Return the cost of `steps` steps, with the fastest layout on `devices` devices of one node."""
    config = ladder.config_of(rung)
    machine = machine.shared_by(devices)
    with named(rung):
        best = best_first(list(candidates(config, machine, 1, devices, 0.1)), machine)[0]
    tokens = steps * ladder.step_tokens(rung)
    flops = flops_per_token(with_vocabulary(config), config.data.seq_len) * tokens
    return Cost(tokens, flops, steps * best.time.total)


def table(ladder: Ladder, machine: Hardware, devices: int) -> str:
    """Return a table of the rungs with their costs, and the sum.

    Raises:
        ConfigError: if a rung does not fit on the devices.
    """
    rows: list[tuple[str, ...]] = [("rung", "active", "total", "runs", "tokens", "FLOPs", "time", "device hours")]
    total = Cost(0, 0.0, 0.0)
    runs = 0
    entries = [(rung, f"{rung.name}{', hold-out' * rung.held_out}", runs_of(rung, 1.0)) for rung in ladder.rungs]
    if len(ladder.rates) > 1:
        entries.insert(0, (ladder.rungs[0], f"{ladder.rungs[0].name}, rates", sweep_of(ladder, ladder.rates)))
    for rung, name, own in entries:
        cost = cost_of(ladder, rung, sum(run.steps - run.first for run in own), machine, devices)
        lengths = " ".join(short(steps * ladder.step_tokens(rung)) for steps in sorted({run.steps for run in own}))
        rows.append(
            (name, *map(short, weights(ladder.config_of(rung))), str(len(own)), lengths, *_costs(cost, devices))
        )
        total, runs = total + cost, runs + len(own)
    rows.append(("sum", "", "", str(runs), short(total.tokens), *_costs(total, devices)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(lines)


def _costs(cost: Cost, devices: int) -> tuple[str, str, str]:
    return f"{cost.flops:.2g}", duration(cost.seconds), f"{cost.seconds * devices / 3600:,.2f}"


def short(number: float) -> str:
    """Return a number such as 1.23M."""
    unit = next((unit for unit in "TBMK" if number >= UNITS[unit]), "")
    return f"{number / UNITS[unit]:.3g}{unit}"
