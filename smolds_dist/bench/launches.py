"""`smolds bench launches`: count what a training step asks of an NVIDIA GPU, without one.

A small model's step is often limited by its host, which starts every kernel. This runs one step on the CPU in the branches
that CUDA takes, with the model's layers and experts but narrow weights, whose width changes no count, and counts PyTorch's
operators by part of the model, and the calls that make the host wait for the GPU. Views and allocations start no kernel; an
operator may start more than one (a sort does). "Compiled" replaces the operators of each region of `training.compiling` by
the kernels and calls that Inductor plans for it; its plan for a GPU may differ in a few. "With CUDA graphs" counts what the
host starts: the operators outside a micro batch's passes, and two graphs.
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from smolds_dist.architecture import LOGITS_CHUNK
from smolds_dist.bench.common import bench_parser, parse, write_result
from smolds_dist.config import load_config
from smolds_dist.costs.flops import layers_of
from smolds_dist.data.batch import Batch, MicroBatch
from smolds_dist.errors import ConfigError
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, device
from smolds_dist.model.regions import compile_regions
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.make_engine import make_engine
from smolds_dist.parallel.process_group import start_process_group
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import Machine, plan_topology
from smolds_dist.settings import RunConfig
from smolds_dist.training.compiling import call_blocks, call_regions, undo_compile
from smolds_dist.training.step import Stepper

NARROW = ("--model.hidden_size=96", "--model.intermediate_size=64", "--model.vocab_size=256")
# Part of the model by function, of which the innermost on the stack counts.
PARTS = {
    "DeepSeekV3Attention.forward": "attention",
    "RMSNorm.forward": "norms",
    "TopKRouter.forward": "router",
    "TokenChoiceTopKRouter.forward": "router",  # AutoEP's
    "sort_by_expert": "dispatch",
    "_Dispatch.forward": "dispatch",
    "_Dispatch.backward": "dispatch",
    "expert_ffn": "experts",
    "GroupedExperts.forward": "experts",
    "CpuExperts.forward": "experts",
    "TokenReorderer.forward": "dispatch",
    "AutoEPMoELayer.forward": "dispatch",
    "SwiGLU.forward": "experts",
    "_Combine.forward": "combine",
    "_Combine.backward": "combine",
    "LMHead.forward": "loss",
    "LocalEngine.step": "optimizer",
    "LocalEngine._move_grads": "optimizer",
    "DeepSpeedEngine.step": "optimizer",
}
ALL_PARTS = (*dict.fromkeys(PARTS.values()), "bookkeeping")
# Functions that are compiled, by engine: with AutoEP only a block's dense part.
REGIONS = {
    "local": {"DeepSeekV3Block.forward": "block", "_to_gradients": "loss"},
    "deepspeed": {"DeepSeekV3Block.attend": "block", "_to_gradients": "loss"},
}
OUTSIDE = {"DeepSeekMoE.record"}  # of the block's region
CAPTURED = {"LocalEngine.forward", "LocalEngine.backward"}
MICRO_BATCH = "Stepper.accumulate"
TORCH = str(Path(torch.__file__).parent) + os.sep
# Start no kernel.
FREE = {
    "detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view",
    "_reshape_alias", "lift_fresh", "_record_function_enter_new", "_record_function_exit", "set_",
}  # fmt: skip
WAITS = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "unique",
    "bincount",
}  # fmt: skip


@dataclass
class Counts:
    """What a step asked for. Operators inside a compiled region are also counted under the region's name."""

    operators: Counter[str] = field(default_factory=Counter)  # by part
    regions: Counter[str] = field(default_factory=Counter)  # operators by region
    captured: int = 0  # operators that CUDA graphs contain
    waits: Counter[str] = field(default_factory=Counter)  # "PHASE: OPERATION in CALLER"


class Recorder:
    """Counts within `recording()`: functions above autograd, to mark the nodes of the backward pass with their part, and
    operators below it."""

    def __init__(self, engine: str) -> None:
        self.counts = Counts()
        self._regions = REGIONS[engine]
        self._inside = 0  # of an operation that is one kernel on a GPU
        self._once: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[Counts]:
        with _Functions(self), _Operators(self):
            yield self.counts

    def function(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        name = getattr(function, "__name__", "")
        place = self.place()
        if name in WAITS or (name == "to" and "cpu" in (*args[1:], *kwargs.values())):
            self.counts.waits[f"{'micro batch' if place.in_micro_batch else 'step'}: {name} in {place.caller}"] += 1
        fused = name == "rms_norm"  # composite on the CPU
        self._inside += fused
        try:
            result = function(*args, **kwargs)
        finally:
            self._inside -= fused
        if fused:
            self.add(place)
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.grad_fn is not None:
                mark(one.grad_fn, (place, id(one.grad_fn) if fused else 0))
        return result

    def operator(self, function: Any) -> None:
        if self._inside or function.is_view or function._schema.name.partition("::")[2] in FREE:
            return
        place = self.place()
        node = torch._C._current_autograd_node()
        metadata: Any = node.metadata if node is not None else {}
        if "place" in metadata:
            origin, once = metadata["place"]
            part = origin.part if place.part == "bookkeeping" else place.part
            place = place._replace(part=part, region=origin.region)
            if once in self._once:
                return
            if once:
                self._once.add(once)
        self.add(place)

    def add(self, place: "Place") -> None:
        self.counts.operators[place.part] += 1
        self.counts.captured += place.captured
        if place.region:
            self.counts.regions[place.region] += 1

    def place(self) -> "Place":
        """Return the place of the caller, from the stack."""
        names: list[str] = []
        caller = ""
        frame: FrameType | None = sys._getframe(3)  # below the mode
        while frame is not None:
            names.append(frame.f_code.co_qualname)
            caller = caller or ("" if frame.f_code.co_filename.startswith(TORCH) else names[-1])
            frame = frame.f_back
        part = next((PARTS[name] for name in names if name in PARTS), "bookkeeping")
        region = next((self._regions[name] for name in reversed(names) if name in self._regions), "")
        return Place(
            part,
            region if OUTSIDE.isdisjoint(names) else "",
            not CAPTURED.isdisjoint(names),
            MICRO_BATCH in names,
            caller,
        )


class Place(NamedTuple):
    """Where an operator comes from."""

    part: str
    region: str  # that is compiled, "" outside of these
    captured: bool  # by CUDA graphs
    in_micro_batch: bool
    caller: str  # the innermost function outside PyTorch


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self._recorder.function(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        self._recorder.operator(func)
        return func(*args, **(kwargs or {}))


def mark(node: Any, origin: tuple[Place, int]) -> None:
    """Mark the backward nodes that a function has just made; those before them have a mark."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one is not None and "place" not in one.metadata:
            one.metadata["place"] = origin
            waiting += [before for before, _ in one.next_functions]


@dataclass
class SameBatch:
    """The batches of a `Stepper`: always the same."""

    ids: Tensor

    def take(self, *_args: Any) -> Batch:
        return Batch([MicroBatch(self.ids, self.ids)], None, 0)

    def prefetch_next(self) -> None:
        pass


def make_stepper(preset: str, settings: list[str], sequences: int) -> tuple[Stepper, RunConfig]:
    """Return a `Stepper` of the narrow model in bf16 whose step is one micro batch, and its configuration."""
    config = load_config(
        ["--preset", preset, *NARROW, *settings, f"--train.global_batch={sequences}", f"--train.micro_batch={sequences}",
         "--parallel.device=cpu", "--train.dtype=bf16"],
        benchmark=True,
    )  # fmt: skip
    topology = plan_topology(config, Machine(("cpu",), 1, True), RankInfo())
    start_process_group(topology)
    torch.manual_seed(0)
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**config.model.architecture(None)))
    engine = make_engine(model, config, replace(topology, keeps_memory=False))
    ids = torch.randint(0, config.model.vocab_size or 0, (sequences, config.data.seq_len))
    batches: Any = SameBatch(ids)
    return Stepper(engine, Balancer(engine.model, config.train.balance_rate), topology, config, batches), config


def count_step(stepper: Stepper) -> Counts:
    """Count a step after the first, with none of the measurements of every tenth."""
    with device.as_family("cuda"):
        stepper.train_step(11, 11)
        recorder = Recorder(stepper.topology.engine)
        with recorder.recording() as counts:
            stepper.train_step(12, 12)
    return counts


class PlannedError(Exception):
    """Ends a compilation whose plan is known."""


def planned_kernels(stepper: Stepper, tokens: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return the calls of each of `REGIONS`, and the kernels and operators that Inductor plans for one, with its backward.

    Args:
        tokens: sequences of the micro batch, and their length.
    """
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import config as inductor
    from torch._inductor import ir, scheduler
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    plans: list[int] = []

    def stop(nodes: Any) -> NoReturn:
        plans.append(
            sum(
                not (isinstance(one, scheduler.NopKernelSchedulerNode) or isinstance(one.node, ir.MultiOutput))
                for one in nodes
            )
        )
        raise PlannedError

    def plan(graph: Any, inputs: Any, **options: Any) -> Any:
        try:
            with inductor.patch(_post_fusion_custom_pass=stop):
                compile_fx_inner(graph, inputs, **options)
        except Exception as error:
            if "PlannedError" not in repr(error):  # Inductor wraps it
                raise
        return make_boxed_func(graph.forward)

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=plan)

    engine, recompute = stepper.engine, stepper.config.train.activation_checkpointing
    if recompute not in ("none", "full"):
        raise ConfigError(f"--train.activation_checkpointing {recompute} is not counted; use none or full.")
    model: Any = engine.model.config
    with device.as_family("cuda"):
        call_blocks(engine, tokens, model, backend, stepper.topology.engine == "local", documents=False)
        # Forward and backward pass of each kind of block, dense ones first; `full` recomputes the forward pass.
        blocks = [
            forward + backward + (forward if recompute == "full" else 0)
            for forward, backward in zip(plans[::2], plans[1::2], strict=True)
        ]
        plans.clear()
        compile_regions(backend, dynamic=False)
        call_regions(model, stepper.topology, engine.device, tokens)
        undo_compile(engine.model)
    chunks = math.ceil(tokens[0] * (tokens[1] - 1) / LOGITS_CHUNK["cuda"])
    dense, mixtures = layers_of(model) if len(blocks) > 1 else (0, model.num_hidden_layers)
    found = {"block": (mixtures, blocks[-1]), "loss": (chunks, max(plans))}
    return found | ({"dense block": (dense, blocks[0])} if dense else {})


def bench_launches(args: list[str]) -> None:
    """Run `smolds bench launches`: count, print a table and, with --json, write all numbers."""
    parser = bench_parser("smolds bench launches", __doc__)
    parser.add_argument("--sequences", type=int, default=16, help="sequences of the micro batch")
    options, settings = parse(parser, args)
    stepper, config = make_stepper(options.preset, settings, options.sequences)
    counts = count_step(stepper)
    tokens = options.sequences, config.data.seq_len
    result = summarize(counts, planned_kernels(stepper, tokens))
    about = {"preset": options.preset, "settings": settings, "tokens": tokens, "torch": torch.__version__}
    write_result(options, about | result)
    print(table(result))


def summarize(counts: Counts, planned: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Return the operators by part, uncompiled and compiled, and the waits."""
    uncompiled = {part: counts.operators[part] for part in ALL_PARTS}
    total = sum(uncompiled.values())
    outside = total - sum(counts.regions.values())
    return {
        "uncompiled": uncompiled,
        "uncompiled_total": total,
        "regions": planned,
        "outside_regions": outside,
        "compiled_total": outside + sum(calls * kernels for calls, kernels in planned.values()),
        "with_graphs": total - counts.captured + 2 if counts.captured else None,
        "waits": dict(counts.waits),
    }


def table(result: dict[str, Any]) -> str:
    """Format a result."""
    lines = [
        f"{'part':24}{'operators':>10}",
        *(f"{part:24}{count:>10,}" for part, count in result["uncompiled"].items()),
    ]
    lines += [f"{'total, uncompiled':24}{result['uncompiled_total']:>10,}", ""]
    for name, (calls, kernels) in result["regions"].items():
        lines.append(f"{f'{name}: {calls} x {kernels}':24}{calls * kernels:>10,}")
    lines.append(f"{'outside of these':24}{result['outside_regions']:>10,}")
    lines += [f"{'total, compiled':24}{result['compiled_total']:>10,}", ""]
    lines += [f"{'with CUDA graphs':24}{result['with_graphs']:>10,}", ""] if result["with_graphs"] else []
    lines.append("the host waits for the GPU")
    return "\n".join([*lines, *(f"{count:>6} x {where}" for where, count in sorted(result["waits"].items()))])
