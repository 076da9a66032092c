"""`python -m benchmarks roofline`: the time of a training step by kind of operation, and its lower bounds.

Some steps of smolds in one process are profiled. A kind's bound is what its matrix products take alone, each timed in its
own shape, and for all else the time that memory takes for `least_bytes`: what operations that were fused would move.
PyTorch's profiler records what operations are given, not what they write, and an operation that need not be there has no
bound worth to reach; so bytes follow from the model's shapes, not from the operations as they are. Products count as they
are, with padding and with the scores that the backward pass computes again.

Kinds differ in what their bound leaves out: exponentials, which take most of a softmax on a CPU, count nothing. Copies and
conversions, views, and Python between the operations are bound by 0.

On CUDA an operation's time is that of its kernels, and the time in which none runs is outside of operations. PyTorch's own
attention kernels count as products at the peak. This was not run on CUDA yet.
"""

import argparse
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from smolds_dist.bench.common import add_dtype, bench_parser, keep, parse
from smolds_dist.bench.train import describe_machine, log, make_task

if TYPE_CHECKING:
    import torch

    from benchmarks.operations import Operation
    from smolds_dist.bench.contenders import Task
    from smolds_dist.training.clock import Product

PRODUCT_SECONDS = 0.02  # for which each shape is repeated
PEAK_SECONDS = 0.5  # likewise for the peak
SHOWN = 12  # operations of a kind that the JSON names


def main(args: list[str]) -> None:
    """Measures, prints a table and, with --json, writes all numbers.

    Raises:
        ConfigError: for options that are none.
    """
    parser = bench_parser("python -m benchmarks roofline", __doc__)
    parser.add_argument("--sequences", type=int, default=4, help="of a step")
    add_dtype(parser)
    parser.add_argument("--steps", type=int, default=3, help="profiled, and as many not, after two to warm up")
    options, settings = parse(parser, args)
    result = measure(options, settings)
    keep(options, result)
    print(table(result))


def measure(options: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """The kinds of the fastest profiled step, their bounds, and what follows from them."""
    import torch

    from smolds_dist.bench.calibrate import memory_bandwidth
    from smolds_dist.costs.flops import flops_per_token, largest_products
    from smolds_dist.training.clock import matrix_product_peak

    task = make_task(options, settings)
    device, dtype = torch.device(task.device), torch.bfloat16 if task.dtype == "bf16" else torch.float32
    model, tokens = task.model_config(), task.sequences * task.seq_len
    plain, profiled = take_steps(task, options.steps)
    operations, seconds = min(profiled, key=lambda step: step[1])
    log("memory, and matrix products alone")
    bandwidth = memory_bandwidth(device)
    alone = fastest_products(operations, device, dtype)
    peak = matrix_product_peak(device, dtype, PEAK_SECONDS, largest_products(model, tokens))
    peak = max([peak, *(product.flops / alone[product, kind] for product, kind in alone if kind == dtype)])
    bounds = bounds_of(operations, alone, model, tokens, task, peak, bandwidth)
    flops = flops_per_token(model, task.seq_len)
    made = sum(operation.product.flops for operation in operations if operation.product)
    fastest, limit = min(plain), sum(bounds.values())
    return describe_machine(task) | {
        "tokens_per_step": tokens,
        "flops_per_token": flops,
        "product_flops_per_token_as_run": made / tokens,
        "matrix_product_peak": peak,
        "memory_bandwidth": bandwidth,
        "step_seconds": plain,
        "profiled_step_seconds": [total for _, total in profiled],
        "profiled_seconds": seconds,
        "bound_seconds": limit,
        "tokens_per_s": tokens / fastest,
        "median_tokens_per_s": tokens / median(plain),
        "tokens_per_s_limit": tokens / limit,
        "flops_utilisation": flops * tokens / fastest / peak,
        "kinds": kind_rows(operations, bounds),
    }


def take_steps(task: "Task", steps: int) -> tuple[list[float], "list[tuple[list[Operation], float]]"]:
    """Seconds of plain steps, and operations and seconds of profiled ones, which take turns."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from benchmarks.operations import STEP, operations_of, recorded_modules
    from smolds_dist.bench.contenders import smolds_engine

    engine, balancer, _ = smolds_engine(task)
    ids, on_cuda = task.batch(), task.device.startswith("cuda")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it reports its own starts and stops
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]

    def step() -> None:
        with record_function("forward"), balancer.counting():
            loss = engine.forward(ids, ids)
        with record_function("backward"):
            engine.backward(loss)
        with record_function("optimizer"):
            engine.step(1e-4)
            balancer.step()
        if on_cuda:
            torch.cuda.synchronize()

    for _ in range(2):
        step()
    plain, profiled = [], []
    for number in range(steps):
        log(f"step {number + 1} of {steps}")
        plain.append(seconds_of(step))
        with recorded_modules(engine.model):
            with profile(activities=activities, record_shapes=True) as trace, record_function(STEP):
                step()
            profiled.append(operations_of(trace.events(), on_cuda))
    return plain, profiled


def seconds_of(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def fastest_products(
    operations: "list[Operation]", device: "torch.device", dtype: "torch.dtype"
) -> "dict[tuple[Product, torch.dtype], float]":
    """The shortest time of every distinct product of a step: repeated alone in its shape, or in the step itself, where other
    work on the machine has disturbed the repetitions more.

    Args:
        dtype: of products whose own was not recorded.
    """
    from smolds_dist.training.clock import product_seconds

    in_step: dict[tuple[Product, torch.dtype], float] = {}
    for operation in operations:
        if operation.product and operation.seconds:
            one = operation.product, operation.dtype or dtype
            in_step[one] = min(operation.seconds, in_step.get(one, operation.seconds))
    return {
        one: min(seconds, product_seconds(one[0], device, one[1], PRODUCT_SECONDS)) for one, seconds in in_step.items()
    }


def bounds_of(
    operations: "list[Operation]",
    alone: "dict[tuple[Product, torch.dtype], float]",
    model: Any,
    tokens: int,
    task: "Task",
    peak: float,
    bandwidth: float,
) -> dict[str, float]:
    """Seconds of a step that each kind takes at least."""
    import torch

    from benchmarks.least_bytes import least_bytes
    from benchmarks.operations import KINDS, SCORES
    from smolds_dist.costs.flops import attention_flops

    dtype = torch.bfloat16 if task.dtype == "bf16" else torch.float32
    moved = least_bytes(model, tokens, dtype.itemsize)
    bounds = {kind: moved.get(kind, 0.0) / bandwidth for kind in KINDS}
    for operation in operations:
        if operation.product and operation.seconds:
            bounds[operation.kind] += alone[operation.product, operation.dtype or dtype]
    if not bounds[SCORES]:  # products and softmax are one kernel
        bounds[SCORES] = 3 * attention_flops(model, task.seq_len) * tokens / peak
    return bounds


def kind_rows(operations: "list[Operation]", bounds: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each kind that the step has, or whose bound is not 0; the largest gap first. Their seconds add up to the
    step's."""
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    calls: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for operation in operations:
        spent[operation.kind][operation.name] += operation.seconds
        calls[operation.kind] += 1
        flops[operation.kind] += operation.product.flops if operation.product else 0
    rows = []
    for kind, bound in bounds.items():
        if kind in spent or bound:
            seconds = sum(spent[kind].values())
            rows.append({
                "kind": kind, "calls": calls[kind], "seconds": seconds, "bound_seconds": bound,
                "gap_seconds": seconds - bound, "product_flops": flops[kind],
                "operations": dict(sorted(spent[kind].items(), key=lambda one: -one[1])[:SHOWN]),
            })  # fmt: skip
    return sorted(rows, key=lambda row: -row["gap_seconds"])


def table(result: dict[str, Any]) -> str:
    """The kinds by their gap, and the limit that their bounds make."""
    total, tokens = result["profiled_seconds"], result["tokens_per_step"]
    limit, peak, flops = result["bound_seconds"], result["matrix_product_peak"], result["flops_per_token"]
    lines = [
        f"{result['preset']}, {result['dtype']}, {tokens:,} tokens a step, on {result['machine']}; matrix products "
        f"{peak / 1e9:,.0f} GFLOP/s, memory {result['memory_bandwidth'] / 1e9:,.1f} GB/s",
        f"{'':32}{'calls':>8}{'ms':>11}{'share':>8}{'bound ms':>11}{'gap ms':>11}",
    ]
    total = {
        "kind": "the step, profiled", "calls": sum(row["calls"] for row in result["kinds"]), "seconds": total,
        "bound_seconds": limit, "gap_seconds": total - limit,
    }  # fmt: skip
    fastest, share = tokens / result["tokens_per_s"], flops * tokens / limit / peak
    for row in (*result["kinds"], total):
        lines.append(
            f"{row['kind']:32}{row['calls']:>8,}{1e3 * row['seconds']:>11,.1f}{row['seconds'] / total:>8.1%}"
            f"{1e3 * row['bound_seconds']:>11,.1f}{1e3 * row['gap_seconds']:>11,.1f}"
        )
    lines += [
        f"without the profiler {1e3 * fastest:,.1f} ms: {result['tokens_per_s']:,.0f} tokens/s, of at most "
        f"{result['tokens_per_s_limit']:,.0f} by these bounds, {limit / fastest:.1%}",
        f"{flops / 1e9:.3f} GFLOPs a token, and {result['product_flops_per_token_as_run'] / 1e9:.3f} in the products as "
        f"they are; {result['flops_utilisation']:.1%} of the peak, of at most {share:.1%} by these bounds",
    ]
    return "\n".join(lines)
