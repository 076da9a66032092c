"""Time of a step on several ranks by cause: all-to-all, optimizer traffic, and waiting for other ranks.

`benchmarks.scale` starts it by `smolds_dist.bench.train.run_trial`, like a contender.
"""

import time
from typing import Any

import torch
import torch.distributed as dist

from smolds_dist.bench.contenders import Gate, Task, answer, repeat, smolds_engine
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.expert_parallel import CommunicationClock, autoep_layers
from smolds_dist.parallel.topology import Topology

ALL_TO_ALL = "all_to_all_single"
# ZeRO's collectives, by DeepSpeed's names.
OF_OPTIMIZER = (
    "all_reduce reduce reduce_scatter reduce_scatter_tensor all_gather all_gather_into_tensor all_reduce_coalesced broadcast"
).split()


class Traffic:
    """Separate traffic from waiting by a barrier before every all-to-all, forward and backward, and before the optimizer.

    After a barrier all ranks enter a collective together, so that its time excludes waiting. ZeRO's reductions during the
    backward pass have no barrier: waiting in these counts as optimizer traffic. Barriers slow a step down, so speed is
    measured without them.
    """

    def __init__(self, engine: Engine, topology: Topology):
        self._device = engine.device
        self._ranks = topology.world_size
        self._waited = 0.0
        self._since = time.perf_counter()
        self._clock = CommunicationClock(ALL_TO_ALL, *OF_OPTIMIZER) if self._ranks > 1 else None
        if self._clock is None:
            return
        self._clock.run(True)
        for layer in autoep_layers(engine.model).values():
            layer.router.register_forward_hook(self._wait)  # before dispatch
            layer.experts.register_forward_hook(self._wait)  # before combine
            layer.register_full_backward_pre_hook(self._wait)
            layer.experts.register_full_backward_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.wait()

    def wait(self) -> None:
        """Wait for all ranks."""
        if self._ranks > 1:
            begin = self._now()
            dist.barrier()
            self._waited += self._now() - begin

    def seconds(self) -> dict[str, float]:
        """End a step; return its seconds by cause, mean over ranks. Collective."""
        now = self._now()
        spent = self._clock.seconds() if self._clock else {}
        all_to_all = spent.pop(ALL_TO_ALL, 0.0)
        mine = torch.tensor([now - self._since, all_to_all, sum(spent.values()), self._waited], device=self._device)
        if self._ranks > 1:
            dist.all_reduce(mine)
        total, all_to_all, optimizer, waiting = (mine / self._ranks).tolist()
        self._waited, self._since = 0.0, self._now()
        return {"step": total, "all_to_all": all_to_all, "optimizer_traffic": optimizer, "waiting": waiting}

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


def measured_step(task: Task, gate: Gate) -> None:
    """Run smolds' step; its notes are the step's seconds by cause."""
    engine, balancer, topology = smolds_engine(task)
    ids, traffic = task.batch(), Traffic(engine, topology)

    def step() -> None:
        with balancer.counting():
            loss = engine.forward(ids, ids)
        engine.backward(loss)
        traffic.wait()
        engine.step(1e-4)
        balancer.step()
        gate.notes.append(traffic.seconds())

    repeat(gate, step)


if __name__ == "__main__":
    answer({"smolds": measured_step})
