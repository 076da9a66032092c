"""A custom router: its input is noisy in training (input jitter of the Switch Transformer, arXiv 2101.03961, section 2.2),
everything else is unchanged. Run it with

    python examples/new_router.py --train.steps 200

and any option of `smolds train`.
"""

import sys

import torch
from torch import Tensor

from smolds_dist import DeepSeekV3ForCausalLM, load_config
from smolds_dist.data.prepare import prepare_data
from smolds_dist.model import TopKRouter
from smolds_dist.parallel.balancer import Balancer, max_violation
from smolds_dist.parallel.make_engine import make_engine
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.schedule import learning_rate
from smolds_dist.training.build import make_model_config

JITTER = 0.01


class JitterRouter(TopKRouter):
    """Route like `TopKRouter`: x [T, H] to weights [T, K], selected experts [T, K] and logits [T, E]."""

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            x_TH = x_TH * torch.empty_like(x_TH).uniform_(1 - JITTER, 1 + JITTER)
        return super().forward(x_TH)


def main(args: list[str]) -> None:
    config = load_config(["--preset", "debug", "--parallel.engine=local", *args])
    data = prepare_data(config)
    torch.manual_seed(config.train.seed)
    model = DeepSeekV3ForCausalLM(make_model_config(config, data))
    for block in model.model.layers:
        router = JitterRouter(model.config)
        router.load_state_dict(block.mlp.gate.state_dict())
        block.mlp.gate = router

    topology = plan_topology(config, detect_machine(), RankInfo())
    engine = make_engine(model, config, topology)
    balancer = Balancer(engine.model, config.train.balance_rate)
    for step in range(1, config.train.steps + 1):
        for start in range(
            (step - 1) * config.train.global_batch, step * config.train.global_batch, topology.micro_batch
        ):
            ids = data.batch(range(start, start + topology.micro_batch))
            with balancer.counting():
                loss = engine.forward(ids, ids)
            engine.backward(loss)
        engine.step(learning_rate(step, config))
        counts_LE = balancer.step()
        if step % 10 == 0 or step == config.train.steps:
            print(f"step {step}: loss {loss.item():.3f}, MaxVio {max_violation(counts_LE).mean():.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
