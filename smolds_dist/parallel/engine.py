"""The two engines, one interface: `LocalEngine` is plain PyTorch for one process, `DeepSpeedEngine` is everything else.

A step is `forward` and `backward` for each of `topology.accumulation` micro batches, then `step`. Both engines give the
same losses.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smolds_dist.config import RunConfig
from smolds_dist.model import DeepSeekV3ForCausalLM
from smolds_dist.parallel.expert_parallel import (
    consolidated_state_dict,
    deepspeed_config,
    keep_routers_in_fp32,
    skip_shared_memory_build,
)
from smolds_dist.parallel.ranks import interface_towards
from smolds_dist.parallel.topology import Topology

GroupParameters = Callable[[Iterable[tuple[str, nn.Parameter]]], list[dict]]
MakeOptimizer = Callable[[list[dict]], torch.optim.Optimizer]


class Engine(Protocol):
    """What the training loop needs of an engine."""

    model: nn.Module  # for evaluation, sampling and the balancer; on all ranks together
    device: torch.device

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss (fp32 scalar) of ids [B, S] on this rank's device; the graph is kept for `backward`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` / accumulation to the step's."""
        ...

    def step(self, lr: float) -> float:
        """Averages over ranks, clips, updates and clears the gradients; returns the gradient norm before clipping."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Consolidated weights, as `DeepSeekV3ForCausalLM` names them, on rank 0's CPU; collective."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state; collective."""
        ...

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote in the same topology; collective."""
        ...

    def barrier(self) -> None:
        """Waits for all ranks."""
        ...

    def close(self) -> None:
        """Ends the process group, if there is one."""
        ...


def make_engine(
    model: DeepSeekV3ForCausalLM,
    config: RunConfig,
    topology: Topology,
    group_parameters: GroupParameters,
    make_optimizer: MakeOptimizer,
) -> Engine:
    """The engine that `topology` names, with the model on its device and in its dtype."""
    engine = LocalEngine if topology.engine == "local" else DeepSpeedEngine
    return engine(model, config, topology, group_parameters, make_optimizer)


def start_process_group(topology: Topology) -> None:
    """Joins the other ranks, if the topology has a process group."""
    if topology.device == "cuda":
        torch.cuda.set_device(topology.local_rank)
    if topology.engine != "deepspeed":
        return
    # One process with DeepSpeed has no launcher that tells it where to meet.
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    if topology.device == "cpu":
        # DeepSpeed would pick an installed GPU's accelerator whatever the run asked for.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if topology.backend == "gloo" and topology.nodes > 1:
        # gloo would take the interface of this host's name, which is often the loopback.
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    skip_shared_memory_build()
    deepspeed.init_distributed(dist_backend=topology.backend, verbose=False)


def end_rank(code: int) -> NoReturn:
    """Ends this process without tearing the interpreter down.

    torch 2.13's gloo threads let go of a collective's tensors after its caller has moved on. Where the interpreter is
    being torn down by then, a process whose run succeeded aborts (seen in one run of six). Can go when
    `ProcessGroupGloo::runLoop` drops its work before the work counts as done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class LocalEngine:
    """One process in plain PyTorch on CPU, CUDA or MPS. Needs neither a process group nor deepspeed.

    In bf16 the model's weights are bf16, and the optimizer works on fp32 copies, into which gradients are accumulated.
    MPS runs the same code, but has not been tested on Apple hardware.
    """

    def __init__(self, model, config, topology, group_parameters, make_optimizer):
        self.device = torch.device(topology.torch_device)
        self.model = model.to(self.device).train()
        self.accumulation = topology.accumulation
        self.grad_clip = config.train.grad_clip
        # (model's parameter, optimizer's fp32 copy); the same tensor twice in fp32.
        self.pairs = [(parameter, parameter) for parameter in model.parameters()]
        groups = group_parameters(model.named_parameters())
        if topology.dtype == "bf16":
            master_of = {p: nn.Parameter(p.detach().float().clone()) for p in model.parameters()}
            groups = [group | {"params": [master_of[p] for p in group["params"]]} for group in groups]
            self.pairs = list(master_of.items())
            for parameter, master in self.pairs:
                # Parameters only: buffers hold selection biases, which stay fp32.
                parameter.data = parameter.data.to(torch.bfloat16)
                parameter.register_post_accumulate_grad_hook(lambda p, m=master: self._move_grad(p, m))
        self.optimizer = make_optimizer(groups)

    @staticmethod
    def _move_grad(parameter: nn.Parameter, master: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad += gradient

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=ids.to(self.device), labels=labels.to(self.device), use_cache=False).loss

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, lr: float) -> float:
        masters = [master for _, master in self.pairs]
        norm = nn.utils.clip_grad_norm_(masters, self.grad_clip or torch.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in self.pairs:
                if parameter is not master:
                    parameter.copy_(master)
        return norm.item()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}

    def save(self, folder: Path) -> None:
        masters = [master.detach() for _, master in self.pairs]
        torch.save({"parameters": masters, "optimizer": self.optimizer.state_dict()}, folder / "local.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "local.pt", map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for (parameter, master), saved in zip(self.pairs, state["parameters"], strict=True):
                master.copy_(saved)
                parameter.copy_(saved)

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0 to 3 and AutoEP, over nccl or gloo.

    Tested on gloo, several ranks on one machine. NCCL on several GPUs runs the same code, but has not been tested.
    """

    def __init__(self, model, config, topology, group_parameters, make_optimizer):
        import deepspeed
        from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

        self.device = torch.device(topology.torch_device)
        self.grad_clip = config.train.grad_clip
        self.topology = topology
        self._norm = float("nan")

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            # Called after AutoEP has put its own expert weights in place of ours.
            known = {id(parameter) for parameter in parameters}
            named = [(name, p) for name, p in model.named_parameters() if id(p) in known]
            groups = split_params_into_different_moe_groups_for_optimizer(group_parameters(named))
            for group in groups:
                group["moe"] = any(is_moe_param(parameter) for parameter in group["params"])
            built = make_optimizer([group for group in groups if group["params"]])
            if topology.zero == 0:
                built.register_step_pre_hook(lambda optimizer, *_: self._clip_without_zero(optimizer))
            return built

        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, topology, model.config),
            model_parameters=list(model.parameters()),
            dist_init_required=False,
        )
        self.model = self.engine.module
        if topology.dtype == "bf16":
            if topology.zero == 0:
                # DeepSpeed 0.19 without ZeRO allocates the state by a step on zero gradients, which Adam's bias
                # correction would count as the first.
                self.engine.basic_optimizer.state.clear()
            keep_routers_in_fp32(self.model)

    def _clip_without_zero(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips by the norm over all experts, also those on other ranks.

        DeepSpeed 0.19 without ZeRO clips by the mean of the ranks' norms, which depends on the topology. Can go when
        `deepspeed.runtime.utils.clip_grad_norm_` sums expert gradients over the expert-parallel group.
        """
        squares = torch.zeros(2, device=self.device)  # dense, experts
        gradients = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    squares[int(group["moe"])] += parameter.grad.float().square().sum()
                    gradients.append(parameter.grad)
        # Every set of experts is held by several ranks, which have the same averaged gradients: count it once.
        squares[1] /= self.topology.world_size // self.topology.expert
        dist.all_reduce(squares[1])
        norm = squares.sum().sqrt()
        self._norm = norm.item()
        if self.grad_clip:
            torch._foreach_mul_(gradients, torch.clamp(self.grad_clip / (norm + 1e-6), max=1.0))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.engine(input_ids=ids.to(self.device), labels=labels.to(self.device), use_cache=False).loss

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only moves DeepSpeed's own count of micro batches on

    def step(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.topology.zero else self._norm

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def state_dict(self) -> dict[str, Tensor]:
        return consolidated_state_dict(self.model)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag="deepspeed")

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        self.engine.destroy()
        dist.destroy_process_group()
