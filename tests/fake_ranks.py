"""Rank 13 of many, without the other processes: checks what it derives about the other ranks by a run's own functions.

Run as `python fake_ranks.py WORLD TRAIN-OPTIONS...`. It joins torch's fake process group, whose collectives return
immediately, and builds the run's engine at ZeRO 3 in it.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from smolds_dist.config import load_config
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.parallel.deepspeed_engine import DeepSpeedEngine
from smolds_dist.parallel.expert_parallel import expert_parameters, skip_shared_memory_build
from smolds_dist.parallel.fragments import Fragment, logical_shapes, split_by_tensor, tensor_shapes
from smolds_dist.parallel.gather import Gatherer
from smolds_dist.parallel.matrix_owners import make_plan
from smolds_dist.parallel.ranks import RankInfo, rank_from_environment
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.training.build import new_engine

PER_NODE = 8
VOCAB = 4096


def join_fake_ranks(rank: int, world: int) -> RankInfo:
    """Make this process a rank of `world` without the others: collectives return immediately, with this rank's data or
    nothing in place of the others'."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    here = min(PER_NODE, world)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank % here), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    skip_shared_memory_build()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return rank_from_environment()


def fragments_of(engine: DeepSpeedEngine, rank: int) -> Iterator[Fragment]:
    """Yield any rank's fragments at ZeRO 3, all zeros, derived from this rank's: the ranks that shard a parameter (for
    experts, the replicas of that expert) each hold an equal slice of it, in rank order."""
    experts, expert = expert_parameters(engine.model), engine.topology.expert
    parameter: Any
    for name, parameter in engine.model.named_parameters():
        length = parameter.ds_tensor.numel()
        place, first_expert = rank, 0
        if name in experts:
            place, first_expert = rank // expert, rank % expert * parameter.ds_shape[0]
        tensors = {"value": torch.zeros(length)}
        yield from split_by_tensor(logical_shapes(name, parameter.ds_shape, first_expert), place * length, tensors)


def slices_of_all_ranks(engine: DeepSpeedEngine, shapes: dict[str, tuple[int, ...]], world: int) -> np.ndarray:
    """Return rank, index of the logical tensor, start and length of all ranks' fragments [M, 4]."""
    number = {name: place for place, name in enumerate(sorted(shapes))}
    return np.array(
        [
            (rank, number[one.name], one.start, len(one.tensors["value"]))
            for rank in range(world)
            for one in fragments_of(engine, rank)
        ]
    )


def main() -> None:
    world = int(sys.argv[1])
    config = load_config(sys.argv[2:])
    topology = plan_topology(config, detect_machine(), join_fake_ranks(13, world))
    model_config = DeepSeekV3Config(**config.model.architecture() | {"vocab_size": VOCAB})
    engine = new_engine(model_config, config, topology, None)
    with torch.device("meta"):
        shapes = tensor_shapes(DeepSeekV3ForCausalLM(model_config))
    assert engine.tensor_shapes() == shapes

    # The derived fragments of this rank match DeepSpeed's.
    own = [(one.name, one.start, one.tensors["value"].shape) for one in engine.fragments()]
    assert own == [(one.name, one.start, one.tensors["value"].shape) for one in fragments_of(engine, 13)]
    assert any(".experts.5." in name for name, *_ in own) and not any(".experts.4." in name for name, *_ in own)

    # All ranks together hold every element once.
    held, names = slices_of_all_ranks(engine, shapes, world), sorted(shapes)
    for number, name in enumerate(names):
        ends = 0
        for _, _, start, length in sorted(held[held[:, 1] == number].tolist(), key=lambda part: part[2]):
            assert start == ends
            ends += length
        assert ends == torch.Size(shapes[name]).numel(), name

    # Every matrix has one owner, which receives all of its slices.
    matrices = {name: shapes[name] for name in names if len(shapes[name]) == 2}
    rows = [(r, list(matrices).index(names[n]), s, 0, size) for r, n, s, size in held.tolist() if names[n] in matrices]
    plans = [make_plan(np.array(rows), matrices, world, rank, np.zeros(world)) for rank in range(world)]
    received, owners = Counter(), {}
    for rank, plan in enumerate(plans):
        received.update({part.matrix: part.length for part in plan.local})
        for round_ in plan.rounds:
            for part in (part for parts in round_.received for part in parts):
                received[part.matrix] += part.length
                assert owners.setdefault(part.matrix, rank) == rank
    assert received == {name: torch.Size(shape).numel() for name, shape in matrices.items()}
    assert len(set(owners.values())) > world // 4

    # Two tensors in the export's order: by rank, then by name.
    gatherer = Gatherer(engine.fragments(), names, engine.device, torch.float32)
    gatherer.index_slices(held)
    wanted = [names[3], names[1]]
    parts = gatherer._slices_of(wanted)
    expected = sorted(
        (rank, wanted.index(names[number]), start, length)
        for rank, number, start, length in held.tolist()
        if names[number] in wanted
    )
    assert parts.tolist() == [list(row) for row in expected]
    print("all checks passed", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
