"""A profiled training step, grouped into familiar kinds of operations.

Every operation belongs to the scope of our innermost function or module that runs it. In the backward pass our functions
have their own scopes; other operations have the scope of the forward operation whose gradient they compute, which PyTorch's
sequence numbers identify. An operation's time excludes the operations that it calls, so that all times sum to the step's.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import record_function

from smolds_dist.model.attention import DeepSeekV3Attention
from smolds_dist.model.modeling import LMHead
from smolds_dist.model.moe import DeepSeekExpertLayer, DeepSeekMoE, SwiGLU, TopKRouter
from smolds_dist.model.norm import RMSNorm
from smolds_dist.training.clock import Product

STEP = "step"  # the name under which a step is recorded
MODULES = (DeepSeekV3Attention, LMHead, DeepSeekExpertLayer, DeepSeekMoE, SwiGLU, TopKRouter, RMSNorm)
# Scopes by the names of modules, of autograd functions, and of phases.
SCOPES = {
    "DeepSeekV3Attention": "attention", "_CausalAttention": "scores", "_Rotate": "rotary",
    "DeepSeekMoE": "mixture", "TopKRouter": "router", "DeepSeekExpertLayer": "expert layer", "_ExpertFFN": "feed-forward",
    "SwiGLU": "feed-forward", "_Dispatch": "dispatch", "_Combine": "dispatch", "RMSNorm": "norms", "_RMSNorm": "norms",
    "LMHead": "loss", "_LinearCrossEntropy": "loss", "torch::autograd::AccumulateGrad": "optimizer",
    "optimizer": "optimizer",
}  # fmt: skip
BACKWARD = "autograd::engine::evaluate_function: "

EXPERTS, PROJECTIONS = "products: experts", "products: attention projections"
SCORES, VOCABULARY = "products: attention scores", "products: vocabulary"
ROUTER, OPTIMIZER, COPIES = "router", "optimizer", "copies and conversions"
ELEMENTWISE, REST, OUTSIDE = "other elementwise", "views, memory, the rest", "outside operations"
PRODUCTS = {
    "feed-forward": EXPERTS, "expert layer": EXPERTS, "attention": PROJECTIONS, "scores": SCORES, "loss": VOCABULARY
}  # fmt: skip
OTHERS = {
    "scores": "softmax of attention", "loss": "softmax and loss", "feed-forward": "SwiGLU", "norms": "norms",
    "rotary": "rotary", "dispatch": "dispatch and combine", "expert layer": "dispatch and combine", "mixture": ROUTER,
}  # fmt: skip
KINDS = (*dict.fromkeys((*PRODUCTS.values(), *OTHERS.values())), OPTIMIZER, COPIES, ELEMENTWISE, REST, OUTSIDE)

# Index of the first of two factors among an operation's inputs.
FACTORS = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
COPYING = {"copy_", "_to_copy", "clone", "contiguous", "cat", "_cat"}
# Operations that compute nothing: views, allocations, and wrappers.
IDLE = set(
    "view _unsafe_view reshape view_as slice select narrow split chunk transpose t numpy_T mT permute unsqueeze squeeze "
    "expand as_strided alias detach flatten unbind resolve_conj resolve_neg result_type empty empty_like empty_strided "
    "new_empty new_zeros new_full resize_ to linear matmul item is_nonzero _local_scalar_dense lift_fresh".split()
)
DTYPES = {"float": torch.float32, "c10::BFloat16": torch.bfloat16, "c10::Half": torch.float16}


class Operation(NamedTuple):
    """One call of a step."""

    name: str
    kind: str  # one of KINDS
    seconds: float  # on the CPU without the operations that it calls; on CUDA of its kernels
    product: Product | None  # if it counts as a matmul
    dtype: torch.dtype | None  # of its factors


@contextmanager
def recorded_modules(model: nn.Module) -> Iterator[None]:
    """Record every module of `MODULES` under its class's name in a profile."""
    hooks = []
    for module in model.modules():
        if isinstance(module, MODULES):
            scopes: list[record_function] = []

            def enter(module: nn.Module, _inputs: Any, scopes: list = scopes) -> None:
                scopes.append(record_function(type(module).__name__))
                scopes[-1].__enter__()

            def leave(_module: nn.Module, _inputs: Any, _output: Any, scopes: list = scopes) -> None:
                scopes.pop().__exit__(None, None, None)

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def operations_of(events: Iterable[Any], on_cuda: bool = False) -> tuple[list[Operation], float]:
    """Return the operations of a step that was recorded under the name `STEP`, and its seconds.

    Their seconds sum to the step's: time outside PyTorch's operations is one of kind `OUTSIDE`.

    Args:
        events: `torch.profiler.profile(record_shapes=True).events()`.
        on_cuda: seconds are those of the kernels that operations launched; `OUTSIDE` is the time without kernels.
    """
    called = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    (step,) = [event for event in called if event.name == STEP]
    begin, end = step.time_range.start, step.time_range.end
    called = [event for event in called if begin <= event.time_range.start and event.time_range.end <= end]
    forward = forward_scopes(called)
    operations = []
    for event in called:
        if is_operation(event.name):
            scope = scope_of(event, forward)
            seconds = (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6
            product, dtype = product_of(event) if scope != "optimizer" else (None, None)
            kind = kind_of(event.name.partition("::")[2], scope, product is not None)
            operations.append(Operation(event.name, kind, seconds, product, dtype))
    total = (end - begin) / 1e6
    outside = total - sum(operation.seconds for operation in operations)
    return [*operations, Operation("Python and autograd", OUTSIDE, outside, None, None)], total


def is_operation(name: str) -> bool:
    """Return True for PyTorch operations: other events are scopes and autograd nodes."""
    return "::" in name and not name.startswith(("autograd::", "torch::autograd"))


def forward_scopes(events: Iterable[Any]) -> dict[int, str]:
    """Return the scope of each forward operation with a gradient, by its sequence number.

    Of several with the same number, only the last has a gradient.
    """
    scopes = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not in_backward(event):
            scopes[event.sequence_nr] = scope_of(event, {})
    return scopes


def in_backward(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(BACKWARD):
            return True
        event = event.cpu_parent
    return False


def scope_of(event: Any, forward: dict[int, str]) -> str:
    """Return one of the values of `SCOPES`; empty outside them, and where autograd sums gradients of one tensor."""
    if event.cpu_parent is not None and event.cpu_parent.name.startswith(BACKWARD) and is_operation(event.name):
        return ""
    while event is not None:
        name = event.name
        if (scope := SCOPES.get(name) or SCOPES.get(name.removesuffix("Backward"))) is not None:
            return scope
        if name.startswith(BACKWARD):
            return forward.get(event.sequence_nr, "")
        event = event.cpu_parent
    return ""


def kind_of(name: str, scope: str, is_product: bool) -> str:
    """Return the kind of an operation; `name` is PyTorch's without `aten::`."""
    if scope in ("optimizer", "router"):
        return scope
    if is_product:
        return PRODUCTS.get(scope, ELEMENTWISE)
    if "attention" in name:  # PyTorch's fused kernels, matmuls and softmax in one
        return SCORES
    if name in COPYING:
        return COPIES
    if name in IDLE:
        return REST
    if scope == "expert layer" and ("silu" in name or name.startswith("mul")):  # of grouped matmuls
        return OTHERS["feed-forward"]
    if scope == "mixture" and name == "add":  # of the shared experts' outputs
        return ELEMENTWISE
    return OTHERS.get(scope, ELEMENTWISE)


def product_of(event: Any) -> tuple[Product | None, torch.dtype | None]:
    """Return an event's matmul, if it is one, and its dtype, if PyTorch records it (2.13 and later)."""
    first = FACTORS.get(event.name.partition("::")[2])
    if first is None or len(event.input_shapes) < first + 2:
        return None, None
    left, right = event.input_shapes[first : first + 2]
    if right[-1] == 1:  # a memory-bound vector: a norm's gradient
        return None, None
    # A grouped matmul, whose left factor has the rows of all groups, counts as one matmul over all rows.
    batch = left[0] if len(left) == len(right) == 3 else 0
    strides = getattr(event, "structured_input_strides", None) or ()
    columns = [len(one) >= 2 and one[-2] == 1 and one[-1] > 1 for one in strides[first : first + 2]]
    names = getattr(event, "input_dtypes", None) or ()
    dtype = DTYPES.get(names[first]) if len(names) > first else None
    product = Product(
        left[-2], left[-1], right[-1], batch, (columns[0], columns[1]) if len(columns) == 2 else (False, False)
    )
    return product, dtype
