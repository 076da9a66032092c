"""Functions of whole matrices, each computed by one of the ranks that hold it or a part of it: its owner.

Where ZeRO has cut a matrix, the owner gathers the parts, computes on the whole, and sends everyone's part of the result back
(distributed Muon, arXiv 2502.16982, algorithm 1). Every rank makes the same plan out of all ranks' parts, of which there are
at ZeRO 3 as many as ranks times matrices that a rank has a part of. What one rank holds whole never travels: at ZeRO 1 and 2
that is all but the matrices at the borders of the ranks' partitions; at ZeRO 3 every matrix is cut.

Where several ranks hold the same, as at ZeRO 0, the owner sends them the result.

Shape letters: N matrices of one shape, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from smolds_dist.parallel.fragments import Fragment, offset_in
from smolds_dist.parallel.gather import all_gather_rows, all_to_all

ROUND = 2**25
"""Elements of the matrices that are gathered at a time, over all ranks: bounds what an owner holds beside its own parts."""
BATCH = 2**23
"""Elements that are computed on at a time."""

OnMatrices = Callable[[Tensor], Tensor]  # of whole matrices [N, R, C], the same shape back


class MatrixSlice(NamedTuple):
    """Elements [start, start + length) of a matrix, which lie at `offset` of a rank's flat partition."""

    matrix: str
    shape: tuple[int, ...]
    start: int
    offset: int
    length: int


class Round(NamedTuple):
    """One gather and one scatter."""

    sent: list[list[MatrixSlice]]  # this rank's parts, by the rank that owns the matrix
    received: list[list[MatrixSlice]]  # parts of the matrices that this rank owns, by the rank that holds them


class Plan(NamedTuple):
    """What one flat partition needs."""

    local: list[MatrixSlice]  # matrices that are here already
    rounds: list[Round]


class MatrixOwners:
    """Applies functions of whole matrices to flat partitions. Made by all ranks together.

    Args:
        fragments: what this rank holds.
        flats: the partitions [n] that the optimizer works on, which the fragments' values are views of; as many, in the
            same order, on all ranks.
        shapes: of all logical tensors of the model, by name.
        device: where collectives take their tensors from.
    """

    def __init__(
        self,
        fragments: Iterable[Fragment],
        flats: list[Tensor],
        shapes: dict[str, tuple[int, ...]],
        device: torch.device,
    ):
        self._device = device
        self._index = {id(flat): index for index, flat in enumerate(flats)}
        matrices = {name: shapes[name] for name in sorted(shapes) if len(shapes[name]) == 2}
        number = {name: index for index, name in enumerate(matrices)}
        mine = []
        for fragment in fragments:
            if len(fragment.shape) == 2:
                index, offset = offset_in(flats, fragment.tensors["value"])
                mine.append((index, number[fragment.name], fragment.start, offset, len(fragment.tensors["value"])))
        held = all_gather_rows(mine, 5, device)
        world = dist.get_world_size()
        loads = np.zeros(world)
        self._plans = [
            make_plan(np.delete(held[held[:, 1] == index], 1, axis=1), matrices, world, dist.get_rank(), loads)
            for index in range(len(flats))
        ]

    def apply(self, flat: Tensor, values: Tensor, function: OnMatrices) -> None:
        """Replaces `values` [n], which are of the partition `flat`, by `function` of the matrices. Collective.

        Every rank calls it for the same partitions in the same order.
        """
        plan = self._plans[self._index[id(flat)]]
        _in_batches(((s.shape, values[s.offset : s.offset + s.length]) for s in plan.local), function)
        for sent, received in plan.rounds:
            ours = [values[s.offset : s.offset + s.length] for slices in sent for s in slices]
            theirs = self._exchange(ours, sent, received)
            slices = list(chain(*received))
            matrices = {s.matrix: theirs.new_empty(s.shape) for s in slices}
            views = [matrices[s.matrix].view(-1)[s.start : s.start + s.length] for s in slices]
            _copy_in_order(views, theirs)
            _in_batches(((matrix.shape, matrix) for matrix in matrices.values()), function)
            _copy_in_order(ours, self._exchange(views, received, sent))

    def _exchange(self, own: list[Tensor], sent: list[list[MatrixSlice]], received: list[list[MatrixSlice]]) -> Tensor:
        sizes, expected = ([sum(s.length for s in slices) for slices in one] for one in (sent, received))
        return all_to_all(own, sizes, expected, torch.empty(0, device=self._device))


def apply_on_replicas(ranks: range, stacks: list[Tensor], function: OnMatrices, device: torch.device) -> None:
    """Replaces stacked matrices [N, R, C], which several ranks hold, by `function` of them. Collective, of all ranks.

    Args:
        ranks: those that hold the same, this one among them.
        device: where collectives take their tensors from.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    others = [other for other in ranks if other != rank]
    owned: dict[int, list[Tensor]] = {owner: [] for owner in ranks}
    loads = dict.fromkeys(ranks, 0.0)
    matrices = [(_cost(matrix.shape), matrix) for stack in stacks for matrix in stack]
    for cost, matrix in sorted(matrices, key=lambda one: -one[0]):  # a stable order, the same on all ranks
        owner = min(ranks, key=loads.__getitem__)
        loads[owner] += cost
        owned[owner].append(matrix)
    _in_batches(((matrix.shape, matrix) for matrix in owned[rank]), function)
    sizes = {owner: sum(matrix.numel() for matrix in some) for owner, some in owned.items()}
    received = all_to_all(
        [matrix.reshape(-1) for _ in others for matrix in owned[rank]],
        [sizes[rank] if other in others else 0 for other in range(world)],
        [sizes[other] if other in others else 0 for other in range(world)],
        torch.empty(0, device=device),
    )
    _copy_in_order([matrix for other in others for matrix in owned[other]], received)


def _copy_in_order(views: list[Tensor], values: Tensor) -> None:
    """Copies `values` [n] into the places, one after the other."""
    for view, s in zip(views, values.split([view.numel() for view in views]), strict=True):
        view.copy_(s.view(view.shape))


def make_plan(held: np.ndarray, matrices: dict[str, tuple[int, ...]], world: int, rank: int, loads: np.ndarray) -> Plan:
    """What `rank` computes and exchanges. Every rank gets the same owners, as long as it is asked about the same.

    All ranks' parts are looked at in arrays alone; Python loops over the matrices, and over what `rank` sends and receives.

    Args:
        held: the parts of one partition that all ranks hold [M, 5], in the order of the ranks: rank, number of the matrix,
            start, offset and length.
        matrices: shapes by name, in the order of their numbers, which is that of the names.
        loads: work [world] that each rank has already, which is added to; an owner is the least loaded rank of those that
            hold a part.
    """
    names, shapes = list(matrices), list(matrices.values())
    holder, matrix = held[:, 0], held[:, 1]
    cost = np.array([_cost(shape) for shape in shapes])
    num_slices = np.bincount(matrix, minlength=len(names))
    alone = num_slices[matrix] == 1
    np.add.at(loads, holder[alone], cost[matrix[alone]])
    split = sorted(np.flatnonzero(num_slices > 1).tolist(), key=lambda number: -cost[number])
    by_matrix = np.argsort(matrix, kind="stable")  # within one in the order of the ranks
    end = np.cumsum(num_slices)
    owner = np.full(len(names), -1)
    for number in split:
        holders = holder[by_matrix[end[number] - num_slices[number] : end[number]]]
        owner[number] = holders[loads[holders].argmin()]  # the first of them where loads are the same
        loads[owner[number]] += cost[number]
    number_of = _rounds(split, shapes)
    rounds = [
        Round([[] for _ in range(world)], [[] for _ in range(world)])
        for _ in range(max(number_of.values(), default=-1) + 1)
    ]

    local: list[MatrixSlice] = []
    for _, number, *bounds in held[holder == rank].tolist():
        to = local if owner[number] < 0 else rounds[number_of[number]].sent[owner[number]]
        to.append(MatrixSlice(names[number], shapes[number], *bounds))
    for other, number, *bounds in held[owner[matrix] == rank].tolist():
        rounds[number_of[number]].received[other].append(MatrixSlice(names[number], shapes[number], *bounds))
    return Plan(local, rounds)


def _rounds(matrices: list[int], shapes: list[tuple[int, ...]]) -> dict[int, int]:
    """The round of each: so many in one that they are `ROUND` elements, or one matrix."""
    numbers: dict[int, int] = {}
    number = elements = 0
    for matrix in matrices:
        size = torch.Size(shapes[matrix]).numel()
        if elements and elements + size > ROUND:
            number, elements = number + 1, 0
        numbers[matrix] = number
        elements += size
    return numbers


def _cost(shape: tuple[int, ...]) -> float:
    """Of the Newton-Schulz iteration, up to a factor: products of a matrix with its smaller Gram matrix."""
    return float(torch.Size(shape).numel() * min(shape))


def _in_batches(matrices: Iterable[tuple[tuple[int, ...], Tensor]], function: OnMatrices) -> None:
    """Replaces the elements of each by `function` of them, several of one shape at a time."""
    waiting: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)

    def compute(shape: tuple[int, ...]) -> None:
        several = waiting.pop(shape)
        for matrix, result in zip(several, function(torch.stack([m.view(shape) for m in several])), strict=True):
            matrix.view(shape).copy_(result)

    for shape, matrix in matrices:
        waiting[shape].append(matrix)
        if (len(waiting[shape]) + 1) * matrix.numel() > BATCH:
            compute(shape)
    for shape in list(waiting):
        compute(shape)
