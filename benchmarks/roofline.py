"""`python -m benchmarks roofline`: the time of a training step by kind of operation, and its lower bounds.

Profiles steps of smolds in one process. A kind's bound is the time of its matmuls alone, each timed in its own shape, plus
the memory time of `least_bytes`, the bytes that fused operations would move. Bytes follow from the model's shapes, not from
the operations: PyTorch's profiler records inputs but not outputs, and an avoidable operation needs no bound. Matmuls count
as executed, with padding and with the attention scores that the backward pass recomputes.

Bounds ignore exponentials, which take most of a softmax on a CPU. Copies, conversions, views, and Python between the
operations have bound 0.

On CUDA an operation's time is that of its kernels, and time without kernels is outside of operations. PyTorch's attention
kernels count as matmuls at the peak. Not run on CUDA yet.
"""

import argparse
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from smolds_dist.bench.common import add_dtype, bench_parser, parse, write_result
from smolds_dist.bench.train import describe_machine, log, make_task

if TYPE_CHECKING:
    import torch

    from benchmarks.operations import Operation
    from smolds_dist.bench.contenders import Task
    from smolds_dist.training.clock import Product

PRODUCT_SECONDS = 0.02  # of repetitions per shape
PEAK_SECONDS = 0.5  # of repetitions for the peak
SHOWN = 12  # operations per kind in the JSON


def main(args: list[str]) -> None:
    """Measure, print a table and, with --json, write all numbers.

    Raises:
        ConfigError: for unknown options.
    """
    parser = bench_parser("python -m benchmarks roofline", __doc__)
    parser.add_argument("--sequences", type=int, default=4, help="sequences per step")
    add_dtype(parser)
    parser.add_argument("--steps", type=int, default=3, help="steps with and without profiling, after two to warm up")
    options, settings = parse(parser, args)
    result = measure(options, settings)
    write_result(options, result)
    print(table(result))


def measure(options: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """Measure the kinds of the fastest profiled step, and their bounds."""
    import torch

    from smolds_dist.bench.calibrate import memory_bandwidth
    from smolds_dist.costs.flops import flops_per_token, largest_products
    from smolds_dist.training.clock import matrix_product_peak

    task = make_task(options, settings)
    device, dtype = torch.device(task.device), torch.bfloat16 if task.dtype == "bf16" else torch.float32
    model, tokens = task.model_config(), task.sequences * task.seq_len
    plain, profiled = run_steps(task, options.steps)
    operations, seconds = min(profiled, key=lambda step: step[1])
    log("measuring memory and matmuls")
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
        "flops_utilization": flops * tokens / fastest / peak,
        "kinds": kind_rows(operations, bounds),
    }


def run_steps(task: "Task", steps: int) -> tuple[list[float], "list[tuple[list[Operation], float]]"]:
    """Return seconds of plain steps, and operations and seconds of profiled ones, in turns."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from benchmarks.operations import STEP, operations_of, recorded_modules
    from smolds_dist.bench.contenders import smolds_engine

    engine, balancer, _ = smolds_engine(task)
    ids, on_cuda = task.batch(), task.device.startswith("cuda")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # silences its own start and stop messages
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
        log(f"step {number + 1}/{steps}")
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
    """Return the shortest time of every distinct matmul of a step: repeated alone in its shape, or in the step, if other
    load on the machine slowed the repetitions more.

    Args:
        dtype: of matmuls whose own was not recorded.
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
    """Return each kind's lower bound in seconds per step."""
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
    if not bounds[SCORES]:  # matmuls and softmax are one kernel
        bounds[SCORES] = 3 * attention_flops(model, task.seq_len) * tokens / peak
    return bounds


def kind_rows(operations: "list[Operation]", bounds: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row for each kind in the step or with a bound, largest gap first. Their seconds sum to the step's."""
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
    """Format the kinds by their gap, and the resulting limit."""
    seconds, tokens = result["profiled_seconds"], result["tokens_per_step"]
    limit, peak, flops = result["bound_seconds"], result["matrix_product_peak"], result["flops_per_token"]
    lines = [
        f"{result['preset']}, {result['dtype']}, {tokens:,} tokens/step, on {result['machine']}; matmul peak "
        f"{peak / 1e9:,.0f} GFLOP/s, memory {result['memory_bandwidth'] / 1e9:,.1f} GB/s",
        f"{'':32}{'calls':>8}{'ms':>11}{'share':>8}{'bound ms':>11}{'gap ms':>11}",
    ]
    total = {
        "kind": "the step, profiled", "calls": sum(row["calls"] for row in result["kinds"]), "seconds": seconds,
        "bound_seconds": limit, "gap_seconds": seconds - limit,
    }  # fmt: skip
    fastest, share = tokens / result["tokens_per_s"], flops * tokens / limit / peak
    for row in (*result["kinds"], total):
        lines.append(
            f"{row['kind']:32}{row['calls']:>8,}{1e3 * row['seconds']:>11,.1f}{row['seconds'] / seconds:>8.1%}"
            f"{1e3 * row['bound_seconds']:>11,.1f}{1e3 * row['gap_seconds']:>11,.1f}"
        )
    lines += [
        f"without the profiler {1e3 * fastest:,.1f} ms: {result['tokens_per_s']:,.0f} tokens/s, of at most "
        f"{result['tokens_per_s_limit']:,.0f} by these bounds, {limit / fastest:.1%}",
        f"{flops / 1e9:.3f} GFLOPs/token, {result['product_flops_per_token_as_run'] / 1e9:.3f} in the matmuls as executed; "
        f"MFU {result['flops_utilization']:.1%}, of at most {share:.1%} by these bounds",
    ]
    return "\n".join(lines)
