"""Gather full logical tensors from the ranks' slices, a few at a time, each to the rank that requests it.

Every rank knows all ranks' slices (at ZeRO 3, world size times one rank's). They are sent and kept as rows of numbers;
Python loops only over those of requested tensors.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from smolds_dist.parallel.fragments import Fragment


def all_to_all(pieces: list[Tensor], sizes: list[int], incoming: list[int], like: Tensor) -> Tensor:
    """Exchange flat tensors; return what all ranks sent to this one, [n], in rank order. Collective, except in one process.

    Args:
        pieces: flat tensors to send, those for rank 0 first.
        sizes: elements to send to each rank.
        incoming: elements to receive from each rank.
        like: a tensor of the common dtype on the collectives' device.
    """
    outgoing = torch.cat([like.new_empty(0), *(piece.to(like.device) for piece in pieces)])
    if not dist.is_initialized():
        return outgoing
    received = like.new_empty(sum(incoming))
    dist.all_to_all_single(received, outgoing, incoming, sizes)
    return received


def all_gather_rows(mine: Sequence[Sequence[int]], width: int, device: torch.device) -> np.ndarray:
    """Gather all ranks' rows in rank order, each preceded by its rank: int64 [M, 1 + width]. Collective, except in one
    process.

    Args:
        mine: this rank's rows of `width` numbers.
        device: the collectives' device.
    """
    rows = torch.tensor(mine, dtype=torch.int64).view(len(mine), width)
    gathered_rows = [rows]
    if dist.is_initialized():
        count = torch.tensor([len(rows)], device=device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, count)
        lengths = torch.cat(counts).tolist()
        padded = rows.new_zeros(max(lengths), width)
        padded[: len(rows)] = rows
        padded = padded.to(device)
        gathered = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(gathered, padded)
        gathered_rows = [some[:length].cpu() for some, length in zip(gathered, lengths, strict=True)]
    ranks = np.repeat(np.arange(len(gathered_rows)), [len(some) for some in gathered_rows])
    return np.column_stack((ranks, torch.cat(gathered_rows).numpy()))


class Gatherer:
    """Gathers full logical tensors. All ranks must create and call it.

    Args:
        fragments: this rank's slices, as live views.
        names: of all logical tensors of the model, in the same order on all ranks.
        device: the collectives' device.
        dtype: the dtype to round values to.
    """

    def __init__(self, fragments: Iterable[Fragment], names: Iterable[str], device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._number = {name: number for number, name in enumerate(names)}
        self._local: dict[str, list[Fragment]] = defaultdict(list)
        for fragment in fragments:
            share = fragment.share()
            if len(share.tensors["value"]):
                self._local[share.name].append(share)
        held = (one for some in self._local.values() for one in some)
        mine = [(self._number[one.name], one.start, len(one.tensors["value"])) for one in held]
        self.index_slices(all_gather_rows(mine, 3, device))

    def index_slices(self, held: np.ndarray) -> None:
        """Index the ranks' slices by tensor.

        Args:
            held: rank, number of the tensor, start and length of each slice [M, 4], in rank order.
        """
        self._held = held[np.argsort(held[:, 1], kind="stable")]  # by tensor, then by rank
        self._begin = np.searchsorted(self._held[:, 1], np.arange(len(self._number) + 1))

    def _slices_of(self, names: list[str]) -> np.ndarray:
        """Return rank, index in `names`, start and length of each slice [P, 4], in the order received: by rank, then by
        name."""
        numbers = [self._number[name] for name in names]
        some = [self._held[self._begin[number] : self._begin[number + 1]] for number in numbers]
        slices = np.concatenate([np.empty((0, 4), np.int64), *some])
        slices[:, 1] = np.repeat(np.arange(len(names)), [len(one) for one in some])
        return slices[np.argsort(slices[:, 0], kind="stable")]

    def __call__(self, wanted: list[list[str]]) -> list[Tensor]:
        """Return the full tensors requested by this rank, flat [n], on the CPU.

        Args:
            wanted: the names requested by each rank, without repeats.
        """
        like = torch.empty(0, dtype=torch.uint8, device=self.device)  # not every backend supports bf16
        pieces, sizes = [], []
        for names in wanted:
            found = [f.tensors["value"].detach().to(self.dtype) for n in names for f in self._local.get(n, ())]
            pieces += [one.view(torch.uint8) for one in found]
            sizes.append(sum(one.nbytes for one in found))
        names = wanted[dist.get_rank() if dist.is_initialized() else 0]
        slices = self._slices_of(names)
        incoming = np.zeros(len(wanted), np.int64)
        np.add.at(incoming, slices[:, 0], self.dtype.itemsize * slices[:, 3])
        received = all_to_all(pieces, sizes, incoming.tolist(), like).cpu().view(self.dtype)
        lengths = np.zeros(len(names), np.int64)
        np.add.at(lengths, slices[:, 1], slices[:, 3])
        full = [torch.empty(length, dtype=self.dtype) for length in lengths.tolist()]
        ends = accumulate(slices[:, 3].tolist())
        for (_, index, start, length), end in zip(slices.tolist(), ends, strict=True):
            full[index][start : start + length] = received[end - length : end]
        return full
