"""Whole logical tensors out of what the ranks hold of them, each at the rank that wants it and a few at a time."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from smolds_dist.parallel.fragments import Fragment


def all_to_all(pieces: list[Tensor], sizes: list[int], coming: list[int], like: Tensor) -> Tensor:
    """One flat tensor [n] of all that the ranks have for this one, in their order. Collective, unless there is one process.

    Args:
        pieces: flat tensors, those for rank 0 first.
        sizes: how many elements of them are for each rank.
        coming: how many elements each rank has for this one.
        like: of the dtype of all, on the device that collectives take their tensors from.
    """
    given = torch.cat([like.new_empty(0), *(piece.to(like.device) for piece in pieces)])
    if not dist.is_initialized():
        return given
    received = like.new_empty(sum(coming))
    dist.all_to_all_single(received, given, coming, sizes)
    return received


class Gatherer:
    """Brings logical tensors together. Made, and called, by all ranks.

    Args:
        fragments: what this rank holds, as live views.
        device: where collectives take their tensors from.
        dtype: what values are rounded to.
    """

    def __init__(self, fragments: Iterable[Fragment], device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._mine: dict[str, list[Fragment]] = defaultdict(list)
        for fragment in fragments:
            share = fragment.share()
            if len(share.tensors["value"]):
                self._mine[share.name].append(share)
        mine = {n: [(one.start, len(one.tensors["value"])) for one in held] for n, held in self._mine.items()}
        self._held = [mine]  # by rank: start and length of what it holds of each tensor
        if dist.is_initialized():
            self._held = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(self._held, mine)

    def __call__(self, wanted: list[list[str]]) -> list[Tensor]:
        """The tensors that this rank is to have, whole and flat [n], on the CPU.

        Args:
            wanted: the names for each rank; no name twice for one.
        """
        like = torch.empty(0, dtype=torch.uint8, device=self.device)  # not every backend sends bf16
        pieces, sizes = [], []
        for names in wanted:
            found = [f.tensors["value"].detach().to(self.dtype) for n in names for f in self._mine.get(n, ())]
            pieces += [one.view(torch.uint8) for one in found]
            sizes.append(sum(one.nbytes for one in found))
        names = wanted[dist.get_rank() if dist.is_initialized() else 0]
        coming = [
            self.dtype.itemsize * sum(length for n in names for _, length in held.get(n, ())) for held in self._held
        ]
        received = all_to_all(pieces, sizes, coming, like).cpu().view(self.dtype)
        lengths = {n: sum(length for held in self._held for _, length in held.get(n, ())) for n in names}
        whole = {n: torch.empty(length, dtype=self.dtype) for n, length in lengths.items()}
        begin = 0
        for held in self._held:
            for name in names:
                for start, length in held.get(name, ()):
                    whole[name][start : start + length] = received[begin : begin + length]
                    begin += length
        return [whole[name] for name in names]
