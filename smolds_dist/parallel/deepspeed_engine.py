"""The engine for several ranks: DeepSpeed's ZeRO and AutoEP."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from smolds_dist.errors import ConfigError
from smolds_dist.parallel.cpu_experts import patch_cpu_experts
from smolds_dist.parallel.engine import (
    NOTHING,
    Accept,
    Factors,
    Fill,
    KindsOf,
    Update,
    Watch,
    model_inputs,
    nan_unless_finite,
    optimizer_step_count,
    read_together,
    same_shape,
    scale_rows,
    squares_by_part,
)
from smolds_dist.parallel.expert_parallel import (
    CommunicationClock,
    deepspeed_config,
    expert_parameters,
    keep_router_logits,
    keep_routers_in_fp32,
)
from smolds_dist.parallel.fragments import (
    Fragment,
    fill_parameters,
    full_shape,
    logical_shapes,
    offset_in,
    split_by_tensor,
    tensor_shapes,
)
from smolds_dist.parallel.matrix_owners import MatrixOwners, OnMatrices, apply_on_replicas
from smolds_dist.parallel.moving_average import MovingAverage
from smolds_dist.parallel.mup import mup_of
from smolds_dist.parallel.optim import allocate_state, make_optimizer, parameter_groups
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import RunConfig, Train

if TYPE_CHECKING:  # importing the model takes a second, and the launcher does not need it
    from smolds_dist.model import DeepSeekV3Config


def zero3_init(config: RunConfig, topology: Topology, model_config: "DeepSeekV3Config") -> AbstractContextManager[None]:
    """Return a context in which a model's layers are sharded as they are built (ZeRO 3); no rank holds a full model."""
    import deepspeed

    settings = deepspeed_config(config, topology, model_config)
    # The dtype comes from the configuration: DeepSpeed 0.19 overrides an explicit one. Without `mem_efficient_linear=False`
    # it would replace PyTorch's linear layer in the whole process.
    return deepspeed.zero.Init(config_dict_or_path=settings, mem_efficient_linear=False)


def partition_offsets(groups: list[list[Any]]) -> dict[int, tuple[int, int, int]]:
    """Return where ZeRO 3 keeps this rank's slice of each parameter, by id: flat partition, first element and length.

    Args:
        groups: the parameters of each partition, in the order of their slices.
    """
    offsets = {}
    for index, parameters in enumerate(groups):
        begin = 0
        for parameter in parameters:
            offsets[id(parameter)] = (index, begin, parameter.partition_numel())
            begin += parameter.partition_numel()
    return offsets


def initialize(model: Any, config: RunConfig, topology: Topology, make: Callable[[Any], torch.optim.Optimizer]) -> Any:
    """Wrap `model` in DeepSpeed's own engine.

    Raises:
        ConfigError: if DeepSpeed rejects the user's configuration file.
    """
    import deepspeed

    try:
        return deepspeed.initialize(
            model=model,
            optimizer=make,
            config=deepspeed_config(config, topology, model.config),
            model_parameters=model.parameters(),  # a list would keep the replaced experts in memory
            dist_init_required=False,
        )[0]
    except ValidationError as error:  # DeepSpeed validates its configuration with pydantic
        if config.parallel.ds_config is None:
            raise
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        raise ConfigError(f"{config.parallel.ds_config}: {name}: {wrong['msg']}; fix it.") from None


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0 to 3 and AutoEP, over nccl or gloo.

    Tested over gloo with several ranks on one machine, and over NCCL with one rank on one GPU. NCCL on several GPUs uses
    the same code but is untested.
    """

    def __init__(self, model: Any, config: RunConfig, topology: Topology, fill: Fill | None):
        self.device = torch.device(topology.torch_device)
        self.grad_clip = config.train.grad_clip
        self.topology = topology
        self._norm = float("nan")
        self._applied, self._outlier = True, False
        self._accept: Callable[[float], bool] | None = None  # until this step's decision
        self._watch: Watch | None = None
        self._watched: dict[int, list[tuple[Fragment, int]]] = {}
        self._hidden: list[list[Tensor]] = []  # parameters of the optimizer's groups during a skipped update
        self._squares: dict[str, Tensor] | None = None  # this step's, if requested
        # By id of an optimizer tensor: fragments of it and the factors to scale their rows by
        self._factors: dict[int, list[tuple[Fragment, Tensor]]] = {}
        self._masters: dict[int, Tensor] = {}  # fp32 copies by id of the parameter (ZeRO 0)
        self._average = MovingAverage()  # DeepSpeed may step the optimizer while it is built
        self._clock = CommunicationClock("all_to_all_single")
        self.engine = initialize(model, config, topology, partial(self._make_optimizer, model, config.train, fill))
        self.model = self.engine.module
        if topology.zero == 3:
            self._offsets = partition_offsets(self.engine.optimizer.fp16_groups)
        if config.train.optimizer == "muon" and topology.zero:
            self._owners = MatrixOwners(self.fragments(), self._flats(), self.tensor_shapes(), self.device)
        if topology.dtype == "bf16":
            self._finish_bf16(fill)
        self._average = MovingAverage(config.train.ema, self._flats())
        if model.config.has_router_losses:
            keep_router_logits(self.model)

    def _make_optimizer(
        self, model: nn.Module, train: Train, fill: Fill | None, parameters: list[nn.Parameter]
    ) -> torch.optim.Optimizer:
        """Make the optimizer; DeepSpeed calls this after AutoEP has replaced our expert weights."""
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        if fill is not None:
            fill_parameters(model, fill, expert_parameters(model))
        if self.topology.device == "cpu":
            patch_cpu_experts(model)
        known = {id(parameter) for parameter in parameters}
        named = [(name, p) for name, p in model.named_parameters() if id(p) in known]
        groups = split_params_into_different_moe_groups_for_optimizer(
            parameter_groups(named, train, mup_of(train, model.config))
        )
        built = make_optimizer([group for group in groups if group["params"]], train, self.topology.dtype)
        built.register_step_pre_hook(lambda optimizer, *_: self._before_update(optimizer))
        built.register_step_post_hook(lambda optimizer, *_: self._after_update(optimizer))
        for group in built.param_groups:
            holders = self._replica_ranks(group["part"] == "experts")
            if group["muon"] and (self.topology.zero or len(holders) > 1):
                group["on_matrices"] = partial(self._on_matrices, holders)
        return built

    def _finish_bf16(self, fill: Fill | None) -> None:
        """Restore what DeepSpeed's cast of the model to bf16 has changed."""
        if self.topology.zero == 0:
            # DeepSpeed 0.19 without ZeRO allocates state with a step on zero gradients, which Adam's bias correction would
            # count.
            self.engine.basic_optimizer.state.clear()
            groups = zip(self.engine.optimizer.fp16_groups, self.engine.optimizer.fp32_groups, strict=True)
            self._masters = {id(p): m for ps, ms in groups for p, m in zip(ps, ms, strict=True)}
            for parameter in self.model.parameters():
                # DeepSpeed 0.19 without ZeRO rejects `grad_accum_dtype` fp32, but takes gradients of any dtype.
                parameter.grad_dtype = torch.float32
        keep_routers_in_fp32(self.model)
        if fill is not None:  # the optimizer's tensors were copied from rounded weights
            for fragment in self.fragments():
                fill(fragment.only("value"))

    def _replica_ranks(self, of_experts: bool) -> range:
        """Return the ranks that hold the same experts as this one, or the same other weights."""
        stride = self.topology.expert if of_experts else 1
        return range(self.topology.rank % stride, self.topology.world_size, stride)

    def _on_matrices(
        self, holders: range, parameters: list[Tensor], values: list[Tensor], function: OnMatrices
    ) -> None:
        if self.topology.zero == 0:
            apply_on_replicas(holders, values, function, self.device)
        else:  # `_owners` is set after ZeRO partitions the optimizer's tensors
            for flat, one in zip(parameters, values, strict=True):
                self._owners.apply(flat, one, function)

    def _add_squares(self, optimizer: torch.optim.Optimizer) -> None:
        """Sum the squared gradients of this rank's slices after clipping; ZeRO steps one group or slice at a time."""
        if self._squares is not None:
            for part, square in squares_by_part(optimizer).items():
                self._squares[part] = self._squares.get(part, 0.0) + square

    def _before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and hide all parameters from the optimizer if the update is skipped: it then changes nothing.

        ZeRO steps one group or slice at a time, after it has clipped, and not at all if a gradient is not finite.
        """
        if self.topology.zero == 0:
            self._clip_without_zero(optimizer)
        else:
            self._add_squares(optimizer)
        if self._accept and self._applied:
            norm = self._norm if self.topology.zero == 0 else float(self.engine.optimizer._global_grad_norm)
            rejected = self.sum_over_ranks(torch.tensor(float(not self._accept(norm))))
            self._outlier, self._accept = bool(rejected), None
            self._applied = not self._outlier
        if self._watch and self._applied:
            self._watch.before_update([
                replace(fragment, tensors={"value": value, "gradient": updated.grad.view(-1)[start : start + len(value)]})
                for group in optimizer.param_groups
                for updated in group["params"]
                for fragment, start in self._watched.get(id(updated), ())
                for value in [fragment.tensors["value"]]
            ])  # fmt: skip
        if not self._applied:
            self._hidden = [group["params"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["params"] = []

    def _after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale updated rows before DeepSpeed copies them to the model, and average the result; ZeRO steps one group or
        slice at a time."""
        for group, parameters in zip(optimizer.param_groups, self._hidden, strict=False):
            group["params"] = parameters
        self._hidden = []
        for group in optimizer.param_groups if self._applied else ():
            for updated in group["params"]:
                for fragment, rows in self._factors.get(id(updated), ()):
                    scale_rows(fragment, rows)
            self._average.update(group["params"])
        if self._watch and self._applied:
            self._watch.after_update()

    def _clip_without_zero(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip by the norm over all experts, including those on other ranks.

        DeepSpeed 0.19 without ZeRO clips by the mean of the ranks' norms, which depends on the topology. Remove when
        `deepspeed.runtime.utils.clip_grad_norm_` sums expert gradients over the expert-parallel group.
        """
        shares = squares_by_part(optimizer)
        for part in shares:
            # Replicas have the same averaged gradients: count them once.
            shares[part] /= len(self._replica_ranks(part == "experts"))
        if self._squares is not None:
            self._squares |= shares
        total = torch.stack(list(shares.values())).sum()
        dist.all_reduce(total)
        norm = total.sqrt()
        self._norm = norm.item()
        self._applied = math.isfinite(self._norm)
        if self._applied and self.grad_clip:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)

    def set_accumulation(self, topology: Topology) -> None:
        self.engine.set_train_micro_batch_size(topology.micro_batch)
        self.engine.set_train_batch_size(topology.per_rank * topology.world_size)
        self.engine.micro_steps = 0  # DeepSpeed ends a step at multiples of the accumulation
        if self.topology.zero:  # ZeRO keeps a copy (DeepSpeed 0.19)
            self.engine.optimizer.gradient_accumulation_steps = topology.accumulation

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        bounds: Tensor | None = None,
        num_labels: Tensor | None = None,
    ) -> Tensor:
        return self.engine(**model_inputs(self.device, ids, labels, positions, bounds, num_labels)).loss

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * nan_unless_finite(loss))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only increments DeepSpeed's count of micro batches

    def step(
        self,
        lr: float,
        by_part: bool = False,
        results: Mapping[str, Tensor] = NOTHING,
        factors: Factors | None = None,
        accept: Accept | None = None,
        watch: Watch | None = None,
    ) -> Update:
        read = dict(zip(results, read_together(list(results.values())), strict=True))
        rows = factors(read) if factors else {}
        self._factors, self._watch, self._watched = {}, watch, {}
        flats = self._flats() if rows or watch else []
        for fragment in self.fragments() if flats else ():
            if watch or fragment.name in rows:
                index, start = offset_in(flats, fragment.tensors["value"])
                self._watched.setdefault(id(flats[index]), []).append((fragment, start))
                if fragment.name in rows:
                    self._factors.setdefault(id(flats[index]), []).append((fragment, rows[fragment.name]))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self._norm, self._applied, self._outlier = float("nan"), True, False
        self._accept = (lambda norm: accept(norm, read)) if accept else None
        self._squares = {} if by_part else None
        self.engine.step()
        norm = self._norm if self.topology.zero == 0 else float(self.engine.get_global_grad_norm())
        squares = self._squares or {}
        squares = dict(zip(squares, read_together(list(squares.values())), strict=True))
        return Update(norm, self._applied and self.engine.was_step_applied(), squares, read, self._outlier)

    def without_graphs(self) -> AbstractContextManager[None]:
        return nullcontext()  # has none

    def time_all_to_all(self, on: bool) -> None:
        self._clock.run(on)

    def all_to_all_seconds(self) -> float:
        return sum(self._clock.seconds().values())

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def fragments(self) -> Iterator[Fragment]:
        experts = expert_parameters(self.model)
        for name, parameter in self.model.named_parameters():
            start, tensors = self._local_views(parameter)
            replicas = {}
            if self.topology.zero == 0:
                holders = self._replica_ranks(name in experts)
                replicas = {"replica": holders.index(self.topology.rank), "replicas": len(holders)}
            if tensors:
                shapes = logical_shapes(name, full_shape(parameter), experts.get(name, 0))
                yield from split_by_tensor(shapes, start, tensors, **replicas)

    def _local_views(self, parameter: Any) -> tuple[int, dict[str, Tensor]]:
        """Return the first element and flat views by kind of this rank's slice of a parameter; no views if it has none."""
        start, part = 0, slice(None)
        if self.topology.zero == 0:
            flat = self._masters.get(id(parameter), parameter)
        elif self.topology.zero < 3:
            # DeepSpeed's accessors cannot return the experts' moments here (0.19.8): they are linked after the first
            # group's step, before the experts' group has any. The mapping has their location.
            mapping = parameter._hp_mapping
            if mapping is None:
                return 0, {}
            place, flat = mapping.hp_fragment_address, self._flats()[mapping.param_group_index]
            start, part = mapping.lp_fragment_address.start, slice(place.start, place.start + place.numel)
        else:
            # These views are live; with an offloaded optimizer DeepSpeed's `safe_get_local_...` return copies (0.19.8).
            index, begin, length = self._offsets[id(parameter)]
            flat = self._flats()[index]
            start, part = parameter.ds_zero_partition_rank * length, slice(begin, begin + length)
        tensors = {"value": flat} | same_shape(self.engine.basic_optimizer.state[flat], flat) | self._average.of(flat)
        return start, {kind: tensor.detach().view(-1)[part] for kind, tensor in tensors.items()}

    def _flats(self) -> list[Tensor]:
        """Return the optimizer's tensors: at ZeRO 0 the parameters or their fp32 copies, else this rank's slice of every
        group, flat and fp32."""
        if self.topology.zero == 3:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return [flat for group in self.engine.basic_optimizer.param_groups for flat in group["params"]]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(self.model, expert_parameters(self.model), self.topology.expert)

    @property
    def optimizer_steps(self) -> int:
        return optimizer_step_count(self.engine.basic_optimizer)

    def allocate_optimizer_state(self, kinds_of: KindsOf, steps: int) -> None:
        flats = self._flats()
        kinds: dict[int, list[str]] = {}  # the same for all fragments of one flat tensor
        for fragment in self.fragments():
            index, _ = offset_in(flats, fragment.tensors["value"])
            if index not in kinds:
                kinds[index] = list(kinds_of(fragment.name))
        for index, stored in kinds.items():  # flat tensors that are all padding have no fragment and no state
            allocate_state(self.engine.basic_optimizer, flats[index], stored, steps)

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        self.engine.destroy()
