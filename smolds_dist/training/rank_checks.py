"""Ranks against each other: who is slow before it is dead, and who holds other weights than those that should hold the same.

Shape letters: W ranks, N tensors.
"""

import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smolds_dist.launching.state import read_state
from smolds_dist.parallel.topology import Topology

SLOW = 1.3  # times the ranks' median
WINDOWS = 3  # in a row, until a rank counts as slow
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StragglerDetector:
    """Compares how long the ranks compute, which those that wait for a slow one do not.

    What is compared is a step's forward pass without its all-to-all, in the steps that are measured: there nobody waits for
    others but at ZeRO 3, which gathers weights in it, so that there a slow rank can hide.
    """

    def __init__(self, topology: Topology):
        self._rank, self._world = topology.rank, topology.world_size
        self._seconds: deque[float] = deque(maxlen=1000)  # nobody may ever compare
        self._windows = [0] * topology.world_size  # in which each rank was slow, up to the last one

    def record(self, seconds: float) -> None:
        """A measured step's forward pass took this rank so long."""
        self._seconds.append(seconds)

    def compare(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[int, float]:
        """Ends a window. Collective.

        Returns:
            The ranks that have been slow for the `WINDOWS`th time in a row, and how many times the median (of an even number
            of ranks the lower one) each took.
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
    """The sum of each tensor's bits, read as integers [N], modulo 2^64. It is exact in any order, and a single flipped bit
    always changes it."""
    bits = (tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]) for tensor in tensors)
    return torch.stack([one.sum(dtype=torch.int64) for one in bits])


def find_weight_mismatch(model: nn.Module, topology: Topology, experts: Iterable[str]) -> tuple[str, list[int]] | None:
    """The first of the weights that are not the same on all ranks that should hold the same, and the ranks that are in the
    minority; all of them, where none is. Collective.

    Silent data corruption of weights is found so (Llama 3, arXiv 2407.21783, section 3.3.4). At ZeRO 3 no rank holds what
    another one does, and nothing is compared; from ZeRO 1 on, weights come anew out of the optimizer's own in every step.

    Args:
        experts: names of the tensors that ranks of an expert group share out.
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


def minority(values: dict[int, int]) -> list[int]:
    """The ranks that do not have what more than half of them have; all of them where nothing is."""
    common, count = Counter(values.values()).most_common(1)[0]
    if count == len(values):
        return []
    return [rank for rank, value in values.items() if 2 * count <= len(values) or value != common]


def format_ranks(run_dir: Path, ranks: Iterable[int]) -> str:
    """Ranks and their hosts, in words."""
    return ", ".join(f"rank {rank} on host {host_of(run_dir, rank)}" for rank in ranks)


def host_of(run_dir: Path, rank: int) -> str:
    """As the rank itself has noted it."""
    return read_state(run_dir / "ranks", f"rank_{rank:05}.json").get("host", "unknown")
