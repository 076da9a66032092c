"""A rank of a run in which one bit of one rank's weights flips after a step, or its text is another from then on; run by
test_rank_checks.py.

Usage: flip_worker.py RANK STEP GROUP OPTIONS...   where GROUP begins the name of a parameter group, or is "text"
"""

import sys

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from smolds_dist.config import load_config
from smolds_dist.data.batch import TrainingData
from smolds_dist.parallel.process_group import MIN_TIMEOUT, end_rank
from smolds_dist.parallel.ranks import rank_from_environment
from smolds_dist.training.trainer import train

rank, step, part = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
steps = 0


def flip(optimizer: torch.optim.Optimizer, *_: object) -> None:
    global steps
    steps += 1
    for group in torch.distributed.distributed_c10d._world.pg_map:  # DeepSpeed creates some without a timeout
        assert group._get_backend(torch.device("cpu")).options._timeout >= MIN_TIMEOUT
    if part != "text" and steps == step and rank_from_environment().rank == rank:
        group = next(group for group in optimizer.param_groups if group["part"] == part)
        group["params"][0].detach().view(torch.int32).view(-1)[7] ^= 1 << 20


def content(data: TrainingData, name: str, samples: int) -> str:
    changed = part == "text" and steps >= step and rank_from_environment().rank == rank
    return content_of(data, name, samples) + ("changed" if changed else "")


content_of = TrainingData._content
TrainingData._content = content  # type: ignore[method-assign]
register_optimizer_step_post_hook(flip)
end_rank(train(load_config(sys.argv[4:])))
