"""Train a tiny model in each layout listed as JSON on the command line; rank 0 prints the statistics of its last step.

Run by test_statistics.py under torchrun, and in-process.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from parity_worker import BASE, VOCAB, Shards

from smolds_dist.config import load_config
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.model import DeepSeekV3Config
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.process_group import end_rank, start_process_group
from smolds_dist.parallel.ranks import rank_from_environment
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.training.build import loss_coefficients, new_engine
from smolds_dist.training.step import Stepper

STEPS = 3


def statistics_of_run(options: list[str], before_last: Callable[[Stepper], Any] = lambda _: None) -> dict:
    """Train `STEPS` steps; return the last one's statistics and all losses."""
    config = load_config([*BASE, f"--log.statistics_every={STEPS}", *options])
    topology = plan_topology(config, detect_machine(), rank_from_environment())
    start_process_group(topology)
    settings = config.model.architecture() | loss_coefficients(config.train)
    model_config = DeepSeekV3Config(**(settings | {"vocab_size": VOCAB, "initializer_range": 0.2}))
    engine = new_engine(model_config, config, topology, None)
    batches = BatchPrefetcher(Shards(config), (topology.rank, topology.world_size), [topology.micro_batch])
    stepper = Stepper(engine, Balancer(engine.model, 0.001), topology, config, batches)
    losses = []
    for step in range(1, STEPS + 1):
        if step == STEPS:
            before_last(stepper)
        output = stepper.train_step(step, step)
        losses.append(engine.sum_over_ranks(output.loss).item() / topology.world_size)
        assert (output.logits is not None) == (step == STEPS or config.train.qk_clip > 0)
    assert output.logits is not None
    row = stepper.statistics.row(output.update.grad_norm, output.logits)
    engine.close()
    return {"row": row, "losses": losses}


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        found = statistics_of_run(case)
        if rank_from_environment().rank == 0:
            print("RESULT " + json.dumps(found), flush=True)
    end_rank(0)
