"""How many ranks a launch starts, and where."""

from dataclasses import dataclass
from pathlib import Path

from smolds_dist.errors import ConfigError
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import Machine, plan_topology
from smolds_dist.settings import RunConfig


@dataclass(frozen=True)
class Plan:
    """How many ranks to start, where, and with which launcher."""

    launcher: str
    procs: int
    per_node: int
    hostfile: Path | None = None
    hosts: tuple[str, ...] = ()  # of the hostfile
    port: int | None = None  # of the rendezvous
    excluded: tuple[str, ...] = ()  # nodes of the allocation not to use
    per_rank: tuple[str, ...] = ()  # srun's options for cores and GPUs, which it does not inherit from the allocation

    @property
    def nodes(self) -> int:
        return -(-self.procs // self.per_node)


def is_valid(plan: Plan, config: RunConfig, machine: Machine) -> bool:
    """Return True if the run has a layout for this number of ranks."""
    try:
        plan_topology(config, machine, RankInfo(0, 0, plan.procs, plan.per_node))
    except ConfigError:
        return False
    return True
