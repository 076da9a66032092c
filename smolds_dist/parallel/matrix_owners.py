"""Apply functions to full matrices, each computed by one of the ranks that hold it or a slice of it: its owner.

If ZeRO has sharded a matrix, the owner gathers the slices, computes on the full matrix and scatters the result (distributed
Muon, arXiv 2502.16982, algorithm 1). Every rank makes the same plan from all ranks' slices. Full matrices on one rank are
never sent: at ZeRO 1 and 2 only those at the borders of the ranks' partitions are split; at ZeRO 3 all are.

For replicas, as at ZeRO 0, the owner sends them the result.

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
"""Elements of the matrices gathered at a time, over all ranks; bounds an owner's extra memory."""
BATCH = 2**23
"""Elements computed on at a time."""

OnMatrices = Callable[[Tensor], Tensor]  # full matrices [N, R, C] to the same shape


class MatrixSlice(NamedTuple):
    """Elements [start, start + length) of a matrix, at `offset` in a rank's flat partition."""

    matrix: str
    shape: tuple[int, ...]
    start: int
    offset: int
    length: int


class Round(NamedTuple):
    """One gather and one scatter."""

    sent: list[list[MatrixSlice]]  # this rank's slices, by the matrix's owner
    received: list[list[MatrixSlice]]  # slices of this rank's matrices, by the rank that holds them


class Plan(NamedTuple):
    """The work on one flat partition."""

    local: list[MatrixSlice]  # full matrices on this rank
    rounds: list[Round]


class MatrixOwners:
    """Applies functions of full matrices to flat partitions. Created by all ranks together.

    Args:
        fragments: this rank's slices.
        flats: the optimizer's flat partitions [n], of which the fragments' values are views; the same number and order on
            all ranks.
        shapes: of all logical tensors of the model, by name.
        device: the collectives' device.
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
        """Replace `values` [n] of the partition `flat` by `function` of their matrices. Collective.

        Every rank must call it for the same partitions in the same order.
        """
        plan = self._plans[self._index[id(flat)]]
        apply_by_shape(((s.shape, values[s.offset : s.offset + s.length]) for s in plan.local), function)
        for sent, received in plan.rounds:
            ours = [values[s.offset : s.offset + s.length] for slices in sent for s in slices]
            theirs = self._exchange(ours, sent, received)
            slices = list(chain(*received))
            matrices = {s.matrix: theirs.new_empty(s.shape) for s in slices}
            views = [matrices[s.matrix].view(-1)[s.start : s.start + s.length] for s in slices]
            _copy_in_order(views, theirs)
            apply_by_shape(((matrix.shape, matrix) for matrix in matrices.values()), function)
            _copy_in_order(ours, self._exchange(views, received, sent))

    def _exchange(self, own: list[Tensor], sent: list[list[MatrixSlice]], received: list[list[MatrixSlice]]) -> Tensor:
        sizes, expected = ([sum(s.length for s in slices) for slices in one] for one in (sent, received))
        return all_to_all(own, sizes, expected, torch.empty(0, device=self._device))


def apply_on_replicas(ranks: range, stacks: list[Tensor], function: OnMatrices, device: torch.device) -> None:
    """Replace stacked matrices [N, R, C] with replicas on several ranks by `function` of them. Collective over all ranks.

    Args:
        ranks: the ranks that hold the replicas, including this one.
        device: the collectives' device.
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
    apply_by_shape(((matrix.shape, matrix) for matrix in owned[rank]), function)
    sizes = {owner: sum(matrix.numel() for matrix in some) for owner, some in owned.items()}
    received = all_to_all(
        [matrix.reshape(-1) for _ in others for matrix in owned[rank]],
        [sizes[rank] if other in others else 0 for other in range(world)],
        [sizes[other] if other in others else 0 for other in range(world)],
        torch.empty(0, device=device),
    )
    _copy_in_order([matrix for other in others for matrix in owned[other]], received)


def _copy_in_order(views: list[Tensor], values: Tensor) -> None:
    """Copy `values` [n] into the views, one after the other."""
    for view, s in zip(views, values.split([view.numel() for view in views]), strict=True):
        view.copy_(s.view(view.shape))


def make_plan(held: np.ndarray, matrices: dict[str, tuple[int, ...]], world: int, rank: int, loads: np.ndarray) -> Plan:
    """Plan what `rank` computes and exchanges. Equal arguments give the same owners on every rank.

    All ranks' slices stay in arrays; Python loops only over the matrices and `rank`'s own exchanges.

    Args:
        held: all ranks' slices of one partition [M, 5], in rank order: rank, number of the matrix, start, offset, length.
        matrices: shapes by name, sorted by name, which is the order of their numbers.
        loads: each rank's work so far [world], updated in place; the owner is the least loaded rank with a slice.
    """
    names, shapes = list(matrices), list(matrices.values())
    holder, matrix = held[:, 0], held[:, 1]
    cost = np.array([_cost(shape) for shape in shapes])
    num_slices = np.bincount(matrix, minlength=len(names))
    alone = num_slices[matrix] == 1
    np.add.at(loads, holder[alone], cost[matrix[alone]])
    split = sorted(np.flatnonzero(num_slices > 1).tolist(), key=lambda number: -cost[number])
    by_matrix = np.argsort(matrix, kind="stable")  # within a matrix in rank order
    end = np.cumsum(num_slices)
    owner = np.full(len(names), -1)
    for number in split:
        holders = holder[by_matrix[end[number] - num_slices[number] : end[number]]]
        owner[number] = holders[loads[holders].argmin()]  # the first of equally loaded ranks
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
    """Assign matrices to rounds of up to `ROUND` elements, or one larger matrix."""
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
    """Return the cost of the Newton-Schulz iteration up to a factor: matmuls of a matrix with its smaller Gram matrix."""
    return float(torch.Size(shape).numel() * min(shape))


def apply_by_shape(matrices: Iterable[tuple[tuple[int, ...], Tensor]], function: OnMatrices) -> None:
    """Replace each matrix by `function` of it, several of one shape at a time."""
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
