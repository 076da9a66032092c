"""Accumulate three micro batches with gradients 4096 x, y and -4096 x; rank 0 prints the error of their sum relative to y.

Run by test_train.py under torchrun: a sum in bf16 loses most of y.
"""

import sys

from parity_worker import BASE, VOCAB, Shards

from smolds_dist.config import load_config
from smolds_dist.model import DeepSeekV3Config
from smolds_dist.parallel.process_group import end_rank, start_process_group
from smolds_dist.parallel.ranks import rank_from_environment
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.training.build import new_engine


def main() -> None:
    info = rank_from_environment()
    config = load_config([*BASE, "--train.global_batch=12", "--train.dtype=bf16", "--train.grad_clip=0", *sys.argv[1:]])
    topology = plan_topology(config, detect_machine(), info)
    start_process_group(topology)
    config.model.vocab_size = VOCAB
    engine = new_engine(DeepSeekV3Config(**config.model.architecture()), config, topology, None)
    first, second = (Shards().batch(range(2 * info.rank + start, 2 * info.rank + start + 2)) for start in (0, 8))
    norms = []
    for factors in ((0.0, 1.0, 0.0), (4096.0, 1.0, -4096.0)):
        for factor, batch in zip(factors, (first, second, first), strict=True):
            engine.backward(engine.forward(batch, batch) * factor)
        norms.append(engine.step(0.0)[0])  # learning rate 0 keeps the weights
    if info.rank == 0:
        print("DEVIATION", abs(norms[1] / norms[0] - 1), flush=True)
    end_rank(0)


if __name__ == "__main__":
    main()
