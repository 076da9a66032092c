"""The engine for one process: plain PyTorch."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smolds_dist.model import device
from smolds_dist.parallel.captured import CapturedPasses, Recorder
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
from smolds_dist.parallel.fragments import Fragment, fill_parameters, logical_shapes, split_by_tensor, tensor_shapes
from smolds_dist.parallel.moving_average import MovingAverage
from smolds_dist.parallel.mup import mup_of
from smolds_dist.parallel.optim import allocate_state, make_optimizer, parameter_groups
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import Train

# Elements of bf16 gradients that are copied to fp32 at a time, so that few kernels start and few gradients wait; on a CPU
# each is copied while it is in the cache.
GRADIENTS_AT_ONCE = {"cuda": 2**25}


class LocalEngine:
    """Plain PyTorch in one process on CPU, CUDA or MPS, without a process group or deepspeed.

    In bf16 the optimizer keeps fp32 copies of the weights, into which gradients are accumulated. MPS uses the same code but
    is untested on Apple hardware.
    """

    def __init__(self, model: nn.Module, train: Train, topology: Topology, fill: Fill | None):
        if fill is not None:
            fill_parameters(model, fill)
        self.device = torch.device(topology.torch_device)
        self.model = model.to(self.device).train()
        self.accumulation = topology.accumulation
        self.grad_clip = train.grad_clip
        groups = parameter_groups(model.named_parameters(), train, mup_of(train, model.config))
        master_of = {parameter: parameter for parameter in model.parameters()}
        if topology.dtype == "bf16":
            master_of = {p: nn.Parameter(p.detach().float().clone()) for p in model.parameters()}
            groups = [group | {"params": [master_of[p] for p in group["params"]]} for group in groups]
            for parameter, master in master_of.items():
                # Parameters only: selection biases are buffers and stay fp32.
                parameter.data = parameter.data.to(torch.bfloat16)
                parameter.register_post_accumulate_grad_hook(lambda p, m=master: self._collect_grad(p, m))
        self._collected: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._elements = 0  # of the collected gradients
        self._captured: CapturedPasses | None = None
        self._plain = False  # run without the graphs
        self.optimizer = make_optimizer(groups, train, topology.dtype)
        # By name: the model's parameter and the optimizer's fp32 copy (the same tensor in fp32)
        self.masters = {name: (parameter, master_of[parameter]) for name, parameter in model.named_parameters()}
        self._average = MovingAverage(train.ema, master_of.values())

    def _collect_grad(self, parameter: nn.Parameter, master: nn.Parameter) -> None:
        self._collected.append((parameter, master))
        self._elements += parameter.numel()
        if self._elements >= GRADIENTS_AT_ONCE.get(device.family(parameter), 0):
            self._move_grads()

    @torch.no_grad()
    def _move_grads(self) -> None:
        """Add the collected gradients to those of the fp32 copies."""
        pairs, self._collected, self._elements = self._collected, [], 0
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        for parameter, master in pairs:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if master.grad is None:
                master.grad = torch.empty_like(master)
                sums.append(master.grad)
                gradients.append(gradient)
            else:
                master.grad += gradient
        if sums:
            torch._foreach_copy_(sums, gradients)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        bounds: Tensor | None = None,
        num_labels: Tensor | None = None,
    ) -> Tensor:
        inputs = model_inputs(self.device, ids, labels, positions, bounds, num_labels)
        if self._captured and not self._plain:
            if self._captured.takes(inputs):
                return self._captured.forward(inputs)
            self.release_graphs()
        return self.model(**inputs).loss

    def backward(self, loss: Tensor) -> None:
        if self._captured and not self._plain:
            self._captured.backward()
        else:
            self._run_backward(loss)

    def _run_backward(self, loss: Tensor) -> None:
        (loss * nan_unless_finite(loss) / self.accumulation).backward()
        self._move_grads()

    def step(
        self,
        lr: float,
        by_part: bool = False,
        results: Mapping[str, Tensor] = NOTHING,
        factors: Factors | None = None,
        accept: Accept | None = None,
        watch: Watch | None = None,
    ) -> Update:
        squares = squares_by_part(self.optimizer)
        total = torch.stack(list(squares.values())).sum().sqrt()
        first, *values = read_together([total, *squares.values(), *results.values()])  # the step's only wait
        norm = first.item()
        squares = dict(zip(squares, values[: len(squares)], strict=True))
        read = dict(zip(results, values[len(squares) :], strict=True))
        outlier = math.isfinite(norm) and accept is not None and not accept(norm, read)
        applied = math.isfinite(norm) and not outlier
        # Skip a pass over all gradients that would multiply by 1.
        if self.grad_clip and applied and norm > self.grad_clip:
            nn.utils.clip_grads_with_norm_([master for _, master in self.masters.values()], self.grad_clip, total)
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["rate"]
            if watch:
                watch.before_update(list(self._fragments(gradients=True)))
            self.optimizer.step()
            if rows := factors(read) if factors else {}:
                for fragment in self.fragments():
                    if fragment.name in rows:
                        scale_rows(fragment, rows[fragment.name])
            self._average.update([master for _, master in self.masters.values()])
            if watch:
                watch.after_update()
            if rounded := [pair for pair in self.masters.values() if pair[0] is not pair[1]]:
                with torch.no_grad():
                    torch._foreach_copy_([parameter for parameter, _ in rounded], [master for _, master in rounded])
        if self._captured:
            self._captured.end_step()  # its first pass overwrites the gradients
        else:
            self.optimizer.zero_grad()
        return Update(norm, applied, squares if by_part else {}, read, outlier)

    def capture(self, ids: Tensor, recorder: Recorder, tolerance: float = 0.01) -> None:
        """Record the passes of micro batches like `ids` [B, S] as graphs, and use them from now on.

        Args:
            tolerance: largest relative difference of a replay's gradient norms from the plain passes'.

        Raises:
            RuntimeError: if they cannot be recorded, or a replay differs; the engine then works as before.
        """
        inputs = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in model_inputs(self.device, ids, ids).items()
        }
        several = self.accumulation > 1
        # Memory of the moments, which the first step allocates: if graphs do not fit beside it, recording fails instead.
        elements = 0 if self.optimizer.state else sum(2 * master.numel() for _, master in self.masters.values())
        moments = torch.empty(elements, device=self.device)
        try:
            with recorder.warm_up():
                for _ in range(2):
                    expected = self.gradient_norms(ids)
            captured = CapturedPasses(
                inputs, lambda inputs: self.model(**inputs).loss, self._run_backward, several, recorder
            )
            for _ in range(2 if several else 1):
                captured.forward(inputs)
                captured.backward()
            captured.end_step()
            actual = self._norms() / (2 if several else 1)
            if not torch.allclose(actual, expected, rtol=tolerance, atol=0.0):
                raise RuntimeError(f"gradient norms {actual.tolist()} instead of {expected.tolist()}")
        except Exception:
            self._clear_gradients()
            raise
        finally:
            del moments
        self._captured = captured

    def gradient_norms(self, ids: Tensor) -> Tensor:
        """Return the gradient norm of each part of the model for a micro batch like `ids` [B, S], without a step."""
        try:
            self._run_backward(self.model(**model_inputs(self.device, ids, ids)).loss)
            return self._norms()
        finally:
            self._clear_gradients()

    def _clear_gradients(self) -> None:
        """Clear all gradients, also those that an interrupted backward pass has collected."""
        self._collected, self._elements = [], 0
        self.model.zero_grad()
        self.optimizer.zero_grad()

    def _norms(self) -> Tensor:
        return torch.stack(list(squares_by_part(self.optimizer).values())).sqrt()

    def release_graphs(self) -> None:
        """Return to passes without graphs; at a step's begin."""
        self._captured = None
        self._clear_gradients()

    def set_accumulation(self, topology: Topology) -> None:
        self.release_graphs()
        self.accumulation = topology.accumulation

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        if self._captured:  # whose first pass would overwrite the last step's gradients, in memory that stays
            self.optimizer.zero_grad(set_to_none=False)
        self._plain = True
        try:
            yield
        finally:
            self._plain = False

    def time_all_to_all(self, on: bool) -> None:
        pass

    def all_to_all_seconds(self) -> float:
        return 0.0

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def fragments(self) -> Iterator[Fragment]:
        return self._fragments()

    def _fragments(self, gradients: bool = False) -> Iterator[Fragment]:
        for name, (parameter, master) in self.masters.items():
            tensors = {"value": master} | same_shape(self.optimizer.state[master], master) | self._average.of(master)
            if gradients:
                tensors["gradient"] = torch.zeros_like(master) if master.grad is None else master.grad
            flat = {kind: tensor.detach().view(-1) for kind, tensor in tensors.items()}
            yield from split_by_tensor(logical_shapes(name, parameter.shape), 0, flat)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(self.model)

    @property
    def optimizer_steps(self) -> int:
        return optimizer_step_count(self.optimizer)

    def allocate_optimizer_state(self, kinds_of: KindsOf, steps: int) -> None:
        for name, (parameter, master) in self.masters.items():
            allocate_state(self.optimizer, master, kinds_of(next(iter(logical_shapes(name, parameter.shape)))), steps)

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass
