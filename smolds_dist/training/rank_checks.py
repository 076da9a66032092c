"""Compare ranks: find stragglers, and ranks whose weights differ from their replicas'.

Shape letters: W ranks, N tensors.
"""

import hashlib
import json
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smolds_dist.launching.state import read_state
from smolds_dist.parallel.topology import Topology

SLOW = 1.3  # times the ranks' median
WINDOWS = 3  # in a row, until a rank counts as a straggler
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StragglerDetector:
    """Compares the ranks' compute times, which exclude waits for a straggler.

    The time is that of a measured step's forward pass without its all-to-alls. At ZeRO 3 it includes waits, because the
    forward pass gathers weights, so a straggler may go unnoticed.
    """

    def __init__(self, topology: Topology):
        self._rank, self._world = topology.rank, topology.world_size
        self._seconds: deque[float] = deque(maxlen=1000)  # `compare` may never be called
        self._windows = [0] * topology.world_size  # consecutive slow windows of each rank

    def record(self, seconds: float) -> None:
        """Record the forward seconds of a measured step."""
        self._seconds.append(seconds)

    def compare(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[int, float]:
        """End a window. Collective.

        Returns:
            The ranks that were slow in `WINDOWS` windows in a row, and each one's time over the ranks' (lower) median.
        """
        mine = torch.zeros(self._world)
        mine[self._rank] = statistics.median(self._seconds) if self._seconds else 0.0
        self._seconds.clear()
        seconds = sum_over_ranks(mine).tolist()
        middle = statistics.median_low(seconds)
        times = [one / middle if middle else 1.0 for one in seconds]
        self._windows = [windows + 1 if one > SLOW else 0 for windows, one in zip(self._windows, times, strict=True)]
        return {rank: times[rank] for rank, windows in enumerate(self._windows) if windows == WINDOWS}


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Sum each tensor's bits as integers modulo 2^64, [N]. The sum is exact in any order, and one flipped bit changes it."""
    bits = (tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]) for tensor in tensors)
    return torch.stack([one.sum(dtype=torch.int64) for one in bits])


def find_weight_mismatch(model: nn.Module, topology: Topology, experts: Iterable[str]) -> tuple[str, list[int]] | None:
    """Return the first weight that differs between replicas, and the ranks in the minority (all of them if there is no
    majority). Collective.

    This finds silent data corruption (Llama 3, arXiv 2407.21783, section 3.3.4). At ZeRO 3 there are no replicas and nothing
    is compared; from ZeRO 1 on, every step rewrites the weights from the optimizer's copies.

    Args:
        experts: names of the tensors that are sharded over an expert group's ranks.
    """
    if topology.zero == 3:
        return None
    named = list(model.named_parameters())
    own_N = checksums(tensor for _, tensor in named)
    all_WN = [torch.empty_like(own_N) for _ in range(topology.world_size)]
    dist.all_gather(all_WN, own_N)
    sums_NW = torch.stack(all_WN, dim=1).tolist()
    experts = set(experts)
    for (name, _), sums_W in zip(named, sums_NW, strict=True):
        groups = topology.expert if name in experts else 1
        for first in range(groups):
            if odd := minority({rank: sums_W[rank] for rank in range(first, topology.world_size, groups)}):
                return name, odd
    return None


def find_text_mismatch(identity: dict[str, Any], topology: Topology) -> list[int]:
    """Return the ranks that were trained on another text than the majority; all if there is none. Collective.

    Hosts with caches of their own could have different files, of which the rendezvous compares only the first window.

    Args:
        identity: `TrainingData.identity` up to the last step.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
    own = torch.tensor(int.from_bytes(digest[:8], signed=True), device=topology.torch_device)
    every = [torch.empty_like(own) for _ in range(topology.world_size)]
    dist.all_gather(every, own)
    return minority({rank: int(one) for rank, one in enumerate(every)})


def minority(values: dict[int, int]) -> list[int]:
    """Return the ranks whose value differs from the majority's; all ranks if there is no majority."""
    common, count = Counter(values.values()).most_common(1)[0]
    if count == len(values):
        return []
    return [rank for rank, value in values.items() if 2 * count <= len(values) or value != common]


def format_ranks(run_dir: Path, ranks: Iterable[int]) -> str:
    """Format ranks with their hosts."""
    return ", ".join(f"rank {rank} on host {host_of(run_dir, rank)}" for rank in ranks)


def host_of(run_dir: Path, rank: int) -> str:
    """Return the host from the rank's own entry."""
    return read_state(run_dir / "ranks", f"rank_{rank:05}.json").get("host", "unknown")
