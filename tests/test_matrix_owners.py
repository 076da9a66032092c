"""Which rank computes which matrix under ZeRO; test_parity.py tests the numbers."""

import json
import sys

import numpy as np
import pytest
import ranks
import torch

from smolds_dist.parallel import matrix_owners
from smolds_dist.parallel.matrix_owners import MatrixSlice, Plan, apply_by_shape, make_plan

WORLD = 4
SHAPES = {
    f"layer{i}.{kind}": shape for i in range(6) for kind, shape in (("q", (12, 8)), ("o", (8, 12)), ("up", (24, 8)))
}
SIZE = sum(rows * columns for rows, columns in SHAPES.values())


def flat_partitions() -> list[list[MatrixSlice]]:
    """Slices as at ZeRO 1: each rank has an equal range of the concatenated matrices."""
    share = -(-SIZE // WORLD)
    held: list[list[MatrixSlice]] = [[] for _ in range(WORLD)]
    begin = 0
    for name, shape in SHAPES.items():
        end = begin + shape[0] * shape[1]
        for rank in range(WORLD):
            first, last = max(begin, rank * share), min(end, (rank + 1) * share)
            if first < last:
                held[rank].append(MatrixSlice(name, shape, first - begin, first - rank * share, last - first))
        begin = end
    return held


def cut_each() -> list[list[MatrixSlice]]:
    """Slices as at ZeRO 3: each rank has an equal range of every matrix."""
    held: list[list[MatrixSlice]] = [[] for _ in range(WORLD)]
    offset = 0
    for name, shape in SHAPES.items():
        share = shape[0] * shape[1] // WORLD
        for rank in range(WORLD):
            held[rank].append(MatrixSlice(name, shape, rank * share, offset, share))
        offset += share
    return held


def plans(held: list[list[MatrixSlice]]) -> list[Plan]:
    matrices = {name: SHAPES[name] for name in sorted(SHAPES)}
    number = {name: place for place, name in enumerate(matrices)}
    rows = [
        (rank, number[part.matrix], part.start, part.offset, part.length)
        for rank, parts in enumerate(held)
        for part in parts
    ]
    return [make_plan(np.array(rows), matrices, WORLD, rank, np.zeros(WORLD)) for rank in range(WORLD)]


@pytest.mark.parametrize("held", [flat_partitions(), cut_each()], ids=("zero1", "zero3"))
@pytest.mark.parametrize("most", [200, 10**9])
def test_every_matrix_has_one_owner_with_all_slices(monkeypatch, held, most):
    monkeypatch.setattr(matrix_owners, "ROUND", most)
    made = plans(held)
    computed = [part.matrix for plan in made for part in plan.local]
    assert len({len(plan.rounds) for plan in made}) == 1  # else ranks would wait for each other indefinitely
    for number in range(len(made[0].rounds)):
        for owner, plan in enumerate(made):
            received = plan.rounds[number].received
            for sender, parts in enumerate(received):
                assert parts == made[sender].rounds[number].sent[owner]
            elements = dict.fromkeys((part.matrix for parts in received for part in parts), 0)
            for part in (part for parts in received for part in parts):
                elements[part.matrix] += part.length
            assert all(elements[name] == torch.Size(SHAPES[name]).numel() for name in elements)
            computed += elements
        together = {part.matrix for plan in made for parts in plan.rounds[number].sent for part in parts}
        assert len(together) == 1 or sum(torch.Size(SHAPES[name]).numel() for name in together) <= most
    assert sorted(computed) == sorted(SHAPES)


def test_work_is_balanced():
    work = [
        sum(
            matrix_owners._cost(SHAPES[name]) for name in {p.matrix for parts in plan.rounds[0].received for p in parts}
        )
        for plan in plans(cut_each())
    ]
    assert max(work) - min(work) <= max(map(matrix_owners._cost, SHAPES.values()))


def test_only_border_matrices_are_sent_between_flat_partitions():
    travelling = {
        part.matrix for plan in plans(flat_partitions()) for r in plan.rounds for parts in r.sent for part in parts
    }
    assert len(travelling) <= WORLD - 1


def test_batches_hold_one_shape_and_are_bounded(monkeypatch):
    monkeypatch.setattr(matrix_owners, "BATCH", 60)
    shapes = [(2, 8), (8, 2), (2, 8), (2, 8), (2, 8), (20, 10), (8, 2)]
    matrices = [torch.randn(rows * columns) for rows, columns in shapes]
    expected = [3 * matrix for matrix in matrices]
    seen = []

    def triple(several):
        seen.append(tuple(several.shape))
        return 3 * several

    apply_by_shape(zip(shapes, matrices, strict=True), triple)
    assert sorted(seen) == [(1, 2, 8), (1, 20, 10), (2, 8, 2), (3, 2, 8)]
    assert all(torch.equal(one, other) for one, other in zip(matrices, expected, strict=True))


HELD_BY_SEVERAL = """
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from smolds_dist.parallel.matrix_owners import apply_on_replicas

dist.init_process_group("gloo")
folder, shapes = Path(sys.argv[1]), ((3, 4, 6), (1, 6, 4), (1, 4, 6), (5, 2, 2))
for apart in (1, 2, 4):
    first = dist.get_rank() % apart
    stacks = [torch.arange(1000.0 * first + 100 * i, 1000 * first + 100 * i + n * r * c).view(n, r, c)
              for i, (n, r, c) in enumerate(shapes)]
    expected = [-stack for stack in stacks]
    computed = []

    def negative(matrices):
        number, rows, columns = matrices.shape
        computed.extend((first, rows * columns * min(rows, columns)) for first in matrices[:, 0, 0].tolist())
        return -matrices

    apply_on_replicas(range(first, dist.get_world_size(), apart), stacks, negative, torch.device("cpu"))
    assert all(map(torch.equal, stacks, expected))
    (folder / f"{apart}_{dist.get_rank()}.json").write_text(json.dumps(computed))
"""


def test_replicas_divide_the_work(tmp_path):
    """Matrices with replicas on all ranks, on every second rank, and on one rank only."""
    (tmp_path / "script.py").write_text(HELD_BY_SEVERAL)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    finished = ranks.run([*start, str(tmp_path / "script.py"), str(tmp_path)], timeout=60)
    assert not finished.returncode, finished.text
    for apart in (1, 2, 4):
        computed = [json.loads((tmp_path / f"{apart}_{rank}.json").read_text()) for rank in range(WORLD)]
        numbers = [number for some in computed for number, _ in some]
        assert len(numbers) == len(set(numbers)) == 10 * apart
        work = [sum(one for _, one in some) for some in computed]
        assert max(work) - min(work) <= 4 * 6 * 4
