"""Whole matrices where ZeRO has cut them: every cut matrix has one owner among the ranks that hold parts of it.

The owner gathers the parts, computes on the whole, and sends everyone's part of the result back, so that each matrix is
computed once (distributed Muon, arXiv 2502.16982, algorithm 1). What a rank holds whole never travels: at ZeRO 1 and 2
that is all but the matrices at the borders of the ranks' partitions; at ZeRO 3 every matrix is cut.

Shape letters: N matrices of one shape, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from smolds_dist.parallel.fragments import Fragment, place_in
from smolds_dist.parallel.gather import all_to_all

ROUND = 2**25
"""Elements of the matrices that are gathered at a time, over all ranks: bounds what an owner holds beside its own parts."""
BATCH = 2**23
"""Elements that are computed on at a time."""

OnMatrices = Callable[[Tensor], Tensor]  # of whole matrices [N, R, C], the same shape back


class Part(NamedTuple):
    """Elements [start, start + length) of a matrix, which lie at `offset` of a rank's flat partition."""

    matrix: str
    shape: tuple[int, ...]
    start: int
    offset: int
    length: int


class Round(NamedTuple):
    """One gather and one scatter."""

    sent: list[list[Part]]  # this rank's parts, by the rank that owns the matrix
    received: list[list[Part]]  # parts of the matrices that this rank owns, by the rank that holds them


class Plan(NamedTuple):
    """What one flat partition needs."""

    whole: list[Part]  # matrices that are here already
    rounds: list[Round]


class MatrixOwners:
    """Applies functions of whole matrices to flat partitions. Made by all ranks together.

    Args:
        fragments: what this rank holds.
        flats: the partitions [n] that the optimizer works on, which the fragments' values are views of; as many, in the
            same order, on all ranks.
        device: where collectives take their tensors from.
    """

    def __init__(self, fragments: Iterable[Fragment], flats: list[Tensor], device: torch.device):
        self._device = device
        self._index = {id(flat): index for index, flat in enumerate(flats)}
        mine: list[list[Part]] = [[] for _ in flats]
        for fragment in fragments:
            if len(fragment.shape) == 2:
                index, offset = place_in(flats, fragment.tensors["value"])
                length = len(fragment.tensors["value"])
                mine[index].append(Part(fragment.name, fragment.shape, fragment.start, offset, length))
        everyone: list[list[list[Part]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        loads = [0.0] * len(everyone)
        self._plans = [
            plan_for([held[index] for held in everyone], dist.get_rank(), loads) for index in range(len(flats))
        ]

    def apply(self, flat: Tensor, values: Tensor, function: OnMatrices) -> Tensor:
        """Replaces `values` [n], which are of the partition `flat`, by `function` of the matrices. Collective.

        Every rank calls it for the same partitions in the same order.
        """
        plan = self._plans[self._index[id(flat)]]
        _in_batches(((part.shape, values[part.offset : part.offset + part.length]) for part in plan.whole), function)
        for sent, received in plan.rounds:
            ours = [values[part.offset : part.offset + part.length] for parts in sent for part in parts]
            theirs = self._exchange(ours, sent, received)
            matrices: dict[str, Tensor] = {}
            places = []
            begin = 0
            for part in chain(*received):
                if part.matrix not in matrices:
                    matrices[part.matrix] = theirs.new_empty(part.shape)
                place = matrices[part.matrix].view(-1)[part.start : part.start + part.length]
                place.copy_(theirs[begin : begin + part.length])
                places.append(place)
                begin += part.length
            _in_batches(((matrix.shape, matrix) for matrix in matrices.values()), function)
            back = self._exchange(places, received, sent)
            begin = 0
            for place in ours:
                place.copy_(back[begin : begin + len(place)])
                begin += len(place)
        return values

    def _exchange(self, pieces: list[Tensor], given: list[list[Part]], coming: list[list[Part]]) -> Tensor:
        sizes, expected = ([sum(part.length for part in parts) for parts in one] for one in (given, coming))
        return all_to_all(pieces, sizes, expected, torch.empty(0, device=self._device))


def plan_for(held: list[list[Part]], rank: int, loads: list[float]) -> Plan:
    """What `rank` computes and exchanges. Every rank gets the same owners, as long as it is asked about the same.

    Args:
        held: the parts of one partition that each rank holds.
        loads: work that each rank has already, which is added to; an owner is the least loaded rank of those that hold
            a part.
    """
    holders: dict[str, list[int]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    for holder, parts in enumerate(held):
        for part in parts:
            holders[part.matrix].append(holder)
            shapes[part.matrix] = part.shape
    for matrix, ranks in holders.items():
        if len(ranks) == 1:
            loads[ranks[0]] += _work(shapes[matrix])
    cut = sorted((m for m, ranks in holders.items() if len(ranks) > 1), key=lambda m: (-_work(shapes[m]), m))
    owner: dict[str, int] = {}
    for matrix in cut:
        owner[matrix] = min(holders[matrix], key=lambda holder: (loads[holder], holder))
        loads[owner[matrix]] += _work(shapes[matrix])
    number_of = _rounds(cut, shapes)
    rounds = [Round([[] for _ in held], [[] for _ in held]) for _ in range(max(number_of.values(), default=-1) + 1)]
    for holder, parts in enumerate(held):
        for part in parts:
            if part.matrix in owner:
                if holder == rank:
                    rounds[number_of[part.matrix]].sent[owner[part.matrix]].append(part)
                if owner[part.matrix] == rank:
                    rounds[number_of[part.matrix]].received[holder].append(part)
    return Plan([part for part in held[rank] if part.matrix not in owner], rounds)


def _rounds(matrices: list[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The round of each: so many in one that they are `ROUND` elements, or one matrix."""
    numbers: dict[str, int] = {}
    number = elements = 0
    for matrix in matrices:
        size = torch.Size(shapes[matrix]).numel()
        if elements and elements + size > ROUND:
            number, elements = number + 1, 0
        numbers[matrix] = number
        elements += size
    return numbers


def _work(shape: tuple[int, ...]) -> float:
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
