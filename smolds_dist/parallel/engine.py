"""The two engines, one interface: `LocalEngine` is plain PyTorch for one process, `DeepSpeedEngine` is everything else.

A step is `forward` and `backward` for each of `topology.accumulation` micro batches, then `step`. Both engines give the
same losses. Their training state goes in and out as `Fragment`s, which know no engine and no layout.
"""

import ctypes
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smolds_dist.config import RunConfig
from smolds_dist.parallel.expert_parallel import skip_shared_memory_build
from smolds_dist.parallel.fragments import Fragment, cut, logical_shapes
from smolds_dist.parallel.meeting import Patience, meet
from smolds_dist.parallel.ranks import RankInfo, interface_towards
from smolds_dist.parallel.topology import Topology

if TYPE_CHECKING:  # the launcher needs no model, whose import takes a second
    from smolds_dist.model import DeepSeekV3ForCausalLM

GroupParameters = Callable[[Iterable[tuple[str, nn.Parameter]]], list[dict]]
MakeOptimizer = Callable[[list[dict]], torch.optim.Optimizer]
KindsOf = Callable[[str], Iterable[str]]


class Update(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float  # before clipping
    applied: bool  # no rank updates anything where the loss or the gradient of any rank is not finite
    squares: dict[str, Tensor]
    """This rank's share of the squared gradient norm, by the `part` of the parameter groups, up to a factor that all have in
    common: summed over ranks, the shares of a whole."""


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

    def step(self, lr: float, by_part: bool = False) -> Update:
        """Averages over ranks, clips, updates and clears the gradients.

        Args:
            by_part: whether to fill in `Update.squares`.
        """
        ...

    def time_all_to_all(self, on: bool) -> None:
        """Starts or ends the timing of all-to-all, which keeps the device from running ahead."""
        ...

    def all_to_all_seconds(self) -> float:
        """Seconds this rank has spent in all-to-all, waiting for others included, since the last call of this."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Consolidated weights, as `DeepSeekV3ForCausalLM` names them, on rank 0's CPU; collective."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds of weights and optimizer state, in an order that never changes. Not collective.

        The views are live: what is written to them before `state_written` is what training goes on with.
        """
        ...

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer has made."""
        ...

    def allocate_optimizer_state(self, kinds_of: KindsOf, steps: int) -> None:
        """Makes room for the state of an optimizer that has made `steps` updates, so that `fragments` shows it.

        Args:
            kinds_of: names of the state of a logical tensor, "value" left out.
        """
        ...

    def state_written(self) -> None:
        """Ends a restoration: what was written to the fragments reaches wherever the engine keeps it."""
        ...

    def barrier(self) -> None:
        """Waits for all ranks."""
        ...

    def close(self) -> None:
        """Lets go of the engine's memory; the process group stays."""
        ...


def make_engine(
    model: "DeepSeekV3ForCausalLM",
    config: RunConfig,
    topology: Topology,
    group_parameters: GroupParameters,
    make_optimizer: MakeOptimizer,
) -> Engine:
    """The engine that `topology` names, with the model on its device and in its dtype."""
    if topology.device == "cpu":
        keep_freed_memory()
    if topology.engine == "local":
        return LocalEngine(model, config, topology, group_parameters, make_optimizer)
    from smolds_dist.parallel.deepspeed_engine import DeepSpeedEngine  # needs deepspeed, which may not be here

    return DeepSpeedEngine(model, config, topology, group_parameters, make_optimizer)


def keep_freed_memory() -> None:
    """Has glibc keep large blocks that are freed, for the next ones, in this process from now on (Linux).

    Left alone, it gives every large block back to the kernel and gets new pages for the next, all zeroed: for a step's
    temporary tensors that takes longer than what is computed in them.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_max = -1, -4  # parameters' numbers in malloc.h
    ctypes.CDLL(None).mallopt(mmap_max, 0)
    ctypes.CDLL(None).mallopt(trim_threshold, -1)


def start_process_group(topology: Topology, info: RankInfo, patience: Patience | None = None) -> bool:
    """Joins the other ranks, if the topology has a process group; False where `patience` ended the waiting for them.

    Raises:
        ConfigError: where ranks are missing.
    """
    if topology.device == "cuda":
        torch.cuda.set_device(topology.local_rank)
    if topology.engine != "deepspeed":
        return True
    # One process with DeepSpeed has no launcher that tells it where to meet.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {name: os.environ.get(name, value) for name, value in alone.items()}
    if topology.device == "cpu":
        # DeepSpeed would pick an installed GPU's accelerator whatever the run asked for.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if topology.backend == "gloo" and topology.nodes > 1:
        # gloo would take the interface of this host's name, which is often the loopback.
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Held until the end of this function: torch's own store is the same server's.
    store = meet(info, patience or Patience()) if topology.world_size > 1 else None
    if store is None and topology.world_size > 1:
        return False
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    skip_shared_memory_build()
    deepspeed.init_distributed(dist_backend=topology.backend, verbose=False)
    return True


def end_process_group() -> None:
    """Leaves the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def largest_over_ranks(topology: Topology, value: int) -> int:
    """The largest of the ranks' values, below 2^24. Collective."""
    if topology.world_size == 1:
        return value
    largest = torch.tensor(float(value), device=topology.torch_device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def squares_by_part(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Squared norm of the gradients that `optimizer` holds, fp32, by the `part` of its groups."""
    norms: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if gradients:
            norms.setdefault(group["part"], []).append(nn.utils.get_total_norm(gradients))
    return {part: torch.stack(several).square().sum() for part, several in norms.items()}


def nan_unless_finite(loss: Tensor) -> Tensor:
    """1 for a finite loss, else NaN: as a factor, it makes the check of the gradient one of the loss too."""
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def same_shape(state: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """The entries of an optimizer's state that have a number for every element of the parameter."""
    return {k: t for k, t in state.items() if isinstance(t, Tensor) and t.shape == parameter.shape}


def allocate_state(optimizer: torch.optim.Optimizer, parameter: Tensor, kinds: Iterable[str], steps: int) -> None:
    """As torch's optimizers make their state: zeros, and a count of steps beside the parameter for fused kernels."""
    fused = optimizer.defaults.get("fused", False)
    count = torch.tensor(float(steps), device=parameter.device if fused else "cpu")
    optimizer.state[parameter] = {"step": count, **{kind: torch.zeros_like(parameter).detach() for kind in kinds}}


def optimizer_step_count(optimizer: torch.optim.Optimizer) -> int:
    return next((int(state["step"]) for state in optimizer.state.values() if "step" in state), 0)


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
        self.masters = dict(zip((name for name, _ in model.named_parameters()), self.pairs, strict=True))

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
        (loss * nan_unless_finite(loss) / self.accumulation).backward()

    def step(self, lr: float, by_part: bool = False) -> Update:
        squares = squares_by_part(self.optimizer)
        total = torch.stack(list(squares.values())).sum().sqrt()
        norm = total.item()
        applied = math.isfinite(norm)
        if self.grad_clip and applied:
            nn.utils.clip_grads_with_norm_([master for _, master in self.pairs], self.grad_clip, total)
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if applied:
            self.state_written()
        return Update(norm, applied, squares if by_part else {})

    def time_all_to_all(self, on: bool) -> None:
        pass

    def all_to_all_seconds(self) -> float:
        return 0.0

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}

    def fragments(self) -> Iterator[Fragment]:
        for name, (parameter, master) in self.masters.items():
            tensors = {"value": master} | same_shape(self.optimizer.state[master], master)
            flat = {kind: tensor.detach().view(-1) for kind, tensor in tensors.items()}
            yield from cut(logical_shapes(name, parameter.shape), 0, flat)

    @property
    def optimizer_steps(self) -> int:
        return optimizer_step_count(self.optimizer)

    def allocate_optimizer_state(self, kinds_of: KindsOf, steps: int) -> None:
        for name, (parameter, master) in self.masters.items():
            allocate_state(self.optimizer, master, kinds_of(next(iter(logical_shapes(name, parameter.shape)))), steps)

    @torch.no_grad()
    def state_written(self) -> None:
        for parameter, master in self.pairs:
            if parameter is not master:
                parameter.copy_(master)

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass
