"""What a job's ranks report before any work, and the topology that rank 0 plans from it.

A host with other packages, options, devices, or a run folder of its own would fail later, or train on wrongly.
"""

import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from smolds_dist.costs.hardware import known_hardware
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.ranks import RankInfo, address_towards, host_name, interface_towards
from smolds_dist.parallel.rendezvous import Rendezvous
from smolds_dist.parallel.topology import Machine, Topology, choose_device, detect_machine, device_index, plan_topology
from smolds_dist.parallel.versions import package_versions, source_digest
from smolds_dist.settings import RunConfig

CONNECT_SECONDS = 3.0


@dataclass
class RankFacts:
    """What a rank reports."""

    rank: int
    local_rank: int
    host: str
    ranks_here: int  # on its node
    versions: dict[str, str]  # of what numbers depend on
    settings: dict[str, Any]
    machine: Machine
    shared: bool  # True if it can access rank 0's run folder
    address: tuple[str, int] | None = None  # where it can be reached, if it is a node's first rank
    gpus_on_node: int = 0  # as in `RankInfo`

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host}"


def plan_together(ranks: Rendezvous, config: RunConfig, shared: bool) -> tuple[Topology, Machine]:
    """Compare what the ranks report and plan their topology on rank 0. Collective.

    Args:
        shared: True if this rank can access rank 0's run folder.

    Returns:
        This rank's topology, and the machine that it was planned for: the least of all.

    Raises:
        ConfigError: naming the first difference, its host and the fix, or from `plan_topology`.
    """
    info, machine = ranks.info, detect_machine()
    if ranks.store is None:
        return plan_topology(config, machine, info), machine
    settings = json.loads(json.dumps(asdict(config), default=str))
    versions = package_versions()
    nodes = -(-info.world_size // info.ranks_per_node)
    with ExitStack() as stack:
        address = None
        if nodes > 1:
            versions["source of smolds"] = source_digest()
            # Rank 0's host may resolve its own name to the loopback.
            host = os.environ["MASTER_ADDR"] if info.rank == 0 else address_towards(os.environ["MASTER_ADDR"])
            if info.local_rank == 0 and host:
                server = stack.enter_context(closing(socket.create_server(("", 0), backlog=64)))
                address = (host, server.getsockname()[1])
        facts = RankFacts(
            info.rank, info.local_rank, host_name(), info.ranks_per_node, versions, settings, machine, shared, address,
            info.gpus_on_node,
        )  # fmt: skip
        plan = ranks.agree("plan", lambda: asdict(facts), partial(plan_from, config))
        ranks.agree("links", lambda: unreachable(facts, plan["addresses"]), _report_unreachable)
    own = {"rank": info.rank, "local_rank": info.local_rank, "device_index": device_index(machine, info)}
    topology = Topology(**plan["topology"] | own)  # lists instead of tuples
    if topology.backend == "gloo" and len(plan["addresses"]) > 1:
        # gloo's default is the interface of this host's name, often the loopback.
        (first, _), (second, _) = plan["addresses"][:2]
        if interface := interface_towards(second if info.rank < info.ranks_per_node else first):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return topology, Machine(**plan["machine"])


def plan_from(config: RunConfig, values: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the plan for ranks that report these values: `asdict(RankFacts)` by rank."""
    facts = [RankFacts(**value | {"machine": Machine(**value["machine"])}) for value in values]
    check_same(config, facts)
    machine, per_node = least_machine(config, facts)
    topology = plan_topology(config, machine, RankInfo(0, 0, len(facts), per_node))
    nodes = sum(one.local_rank == 0 for one in facts)
    return {
        "topology": asdict(replace(topology, nodes=nodes)),
        "machine": asdict(machine),
        "addresses": [one.address for one in facts if one.address],
    }


def check_same(config: RunConfig, facts: list[RankFacts]) -> None:
    """Raise a `ConfigError` for the first rank that cannot train with rank 0."""
    first = facts[0]
    for one in facts[1:]:
        for name in first.versions | one.versions:
            own, other = one.versions.get(name), first.versions.get(name)
            if own != other:
                raise ConfigError(
                    f"{one} has {name} {own or 'not installed'}, but {first} has {other or 'none'}; install the same "
                    "versions on all hosts (`smolds doctor --hostfile` lists them)."
                )
        if one.settings != first.settings:
            name = next(difference(first.settings, one.settings))
            own, other = (_value(facts_of.settings, name) for facts_of in (one, first))
            raise ConfigError(
                f"{one} has --{name} {own}, but {first} has {other}; start all ranks with the same options and files."
            )
        if not one.shared:
            raise ConfigError(
                f"{config.run_dir} on host {one.host} is not the folder that rank 0 on host {first.host} writes to; choose "
                "a --run.dir on a file system that all hosts share."
            )


def difference(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the settings that differ."""
    for name in one | other:
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from difference(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}"


def _value(settings: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part, {})
    return settings


def least_machine(config: RunConfig, facts: list[RankFacts]) -> tuple[Machine, int]:
    """Return a machine that every rank has at least: the smallest memory, the slowest device; and the ranks per node, the
    largest number that divides those of every node.

    Raises:
        ConfigError: if the kinds of devices differ, or a rank has no device.
    """
    kinds = dict[str, RankFacts]()
    for one in facts:
        rank = RankInfo(one.rank, one.local_rank, len(facts), one.ranks_here, gpus_on_node=one.gpus_on_node)
        try:
            kinds.setdefault(choose_device(config.parallel.device, one.machine, rank), one)
        except ConfigError as error:
            raise ConfigError(f"{one}: {error}") from None
    if len(kinds) > 1:
        (kind, one), (other_kind, other) = list(kinds.items())[:2]
        without = other if other_kind == "cpu" else one
        raise ConfigError(
            f"{one} trains on {kind}, but {other} on {other_kind}; repair the GPUs of {without.host}, or set "
            "--parallel.device cpu."
        )
    kind = next(iter(kinds))
    per_node = math.gcd(*(one.ranks_here for one in facts))
    machines = [one.machine for one in facts]
    memories = [_memory_of_rank(one, kind) for one in facts]
    known = [memory for memory in memories if memory is not None]
    memory = min(known) * (per_node if kind == "cpu" else 1) if len(known) == len(facts) else None
    return replace(
        machines[0],
        devices=machines[0].devices if all(m.devices == machines[0].devices for m in machines) else (kind,),
        device_count=min(machine.device_count for machine in machines),
        bf16=all(machine.bf16 for machine in machines),
        memory=memory,
        name=_slowest({machine.name for machine in machines}),
        compiler=all(machine.compiler for machine in machines),
    ), per_node


def _memory_of_rank(facts: RankFacts, kind: str) -> int | None:
    memory = facts.machine.memory if kind == facts.machine.devices[0] else None
    return memory // facts.ranks_here if memory is not None and kind == "cpu" else memory


def _slowest(names: set[str | None]) -> str | None:
    """Return the device whose matmuls are slowest; None if one of several is unknown."""
    if len(names) == 1:
        return next(iter(names))
    known = {name: known_hardware(name) for name in names if name}
    if len(known) < len(names) or None in known.values():
        return None
    return min(known, key=lambda name: max(known[name].peak.values()))  # type: ignore[union-attr]


def unreachable(facts: RankFacts, addresses: list[list[Any]]) -> list[str]:
    """Return the addresses of other nodes to which a node's first rank cannot connect; it tries the 1st, 2nd, 4th ... next
    node, so that a thousand nodes take ten connections each."""
    if facts.address is None:
        return []
    own = addresses.index(list(facts.address))
    found = []
    for step in (2**power for power in range(len(addresses).bit_length())):
        if step >= len(addresses):
            break
        host, port = addresses[(own + step) % len(addresses)]
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            found.append(f"{facts} cannot connect to {host}:{port} ({error.strerror or error})")
    return found


def _report_unreachable(found: list[list[str]]) -> None:
    for texts in found:
        for text in texts:
            raise ConfigError(
                f"{text}; open all TCP ports between the hosts, because ranks choose free ones, or set GLOO_SOCKET_IFNAME "
                "(NCCL_SOCKET_IFNAME on GPUs) to the interface that connects them."
            )


def check_same_text(values: list[dict[str, Any]]) -> None:
    """Raise a `ConfigError` for the first rank that would train on another text or tokenizer than rank 0.

    Args:
        values: `TrainingData.identity` by rank, each with its rank's `host`.
    """
    first = values[0]
    for rank, one in enumerate(values):
        different = [name for name in first["contents"] if one["contents"].get(name) != first["contents"][name]]
        what = "tokenizer" if one["tokenizer"] != first["tokenizer"] else ""
        if what or different:
            what = what or f"text of the source {different[0]!r}"
            raise ConfigError(
                f"rank {rank} on host {one['host']} has another {what} than rank 0 on host {first['host']}; copy the same "
                "files to all hosts, or read them from a folder that all share."
            )
