"""Measure a step's time and memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch
from torch.profiler import record_function

from smolds_dist.parallel.engine import Engine

# [M, K] x [K, N]. With AMX, large and tall ones reach twice the rate of the first; GPUs need the last.
PRODUCTS = ((1024, 1024, 1024), (8192, 384, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192))
LONGEST_PRODUCT = 0.2  # seconds
SMALLEST_PRODUCT = 2.5e8  # FLOPs; a model's smaller matmuls do not reach the peak
PHASES = ("data", "forward", "backward", "all_to_all", "optimizer", "logging")


HOST = torch.device("cpu")


def is_measured(step: int) -> bool:
    """Return True for steps with detailed timing, which are slightly slower: the first ten, and every tenth."""
    return step <= 10 or step % 10 == 0


class Stamp:
    """A point in a device's work. On CUDA an event in the stream, so that the host does not wait; untested on CUDA."""

    def __init__(self, device: torch.device):
        self._event = torch.Event(device, enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        elif device.type != "cpu":
            torch.accelerator.synchronize(device)
        self._time = time.perf_counter()

    def seconds_since(self, earlier: "Stamp") -> float:
        """Return the seconds since a stamp of the same device; waits until the device has reached this one."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


class Span(NamedTuple):
    """A phase that has run once."""

    name: str
    begin: Stamp
    end: Stamp
    all_to_all: float  # seconds in all-to-alls


class StepClock:
    """Times steps and their phases.

    A device runs asynchronously: in measured steps, phases are timed on the device and read at the end of the step.
    Forward and backward exclude their all-to-alls, where these are timed. MPS synchronizes after each phase instead, and is
    untested on Apple hardware.

    Args:
        expert: the expert-parallel size; 1 = no all-to-alls.
    """

    def __init__(self, engine: Engine, expert: int = 1):
        self._engine, self._expert = engine, expert
        self.measured = self._complete = False
        self._spans: list[Span] = []  # of this step so far, and logging of the previous one
        self._since = time.perf_counter()

    def begin(self, step: int) -> None:
        """Start a step."""
        self.measured = is_measured(step)
        # On CUDA, timing all-to-alls synchronizes around every collective.
        rare = self._engine.device.type == "cuda" and self._expert > 1
        self._complete = step == 10 or step % 100 == 0 if rare else self.measured
        self._engine.time_all_to_all(self._complete and self._expert > 1)
        self._engine.all_to_all_seconds()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one of `PHASES`, which also appears under its name in a profile."""
        device = self._engine.device if self.measured else HOST
        with record_function(name):
            begin = Stamp(device)
            yield
            end = Stamp(device)
        inside = self._engine.all_to_all_seconds() if self._complete else 0.0
        self._spans.append(Span(name, begin, end, inside))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of this step's phases so far; waits for the device. Has `all_to_all` only if this step times it."""
        found = dict.fromkeys(PHASES, 0.0)
        for name, begin, end, inside in self._spans:
            found[name] += end.seconds_since(begin) - inside
            found["all_to_all"] += inside
        if not self._complete:
            del found["all_to_all"]
        return found

    def lap(self) -> float:
        """End a step; return the seconds since the previous one's end, without pauses."""
        self._engine.time_all_to_all(False)
        self.measured = self._complete = False
        self._spans = []
        now = time.perf_counter()
        total, self._since = now - self._since, now
        return total

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the step's time, such as an evaluation."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin


def memory_in_use(device: torch.device) -> int:
    """Return this rank's memory in bytes: on CUDA the peak allocation since the last call and what CUDA graphs keep
    (untested on CUDA), on MPS the driver's allocation, on the CPU the resident set size."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        # Memory that graphs use between their first and last kernel counts as free.
        pools = [one for one in torch.cuda.memory_snapshot() if any(one.get("segment_pool_id", ()))]
        return peak + sum(one["total_size"] - one["allocated_size"] for one in pools)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


class Product(NamedTuple):
    """A matmul [M, K] x [K, N], or a batch of them."""

    M: int
    K: int
    N: int
    batch: int = 0  # 0 = one matmul of two matrices
    transposed: tuple[bool, bool] = (False, False)  # True for a column-major left or right operand

    @property
    def flops(self) -> int:
        return 2 * max(1, self.batch) * self.M * self.K * self.N


def matrix_product_peak(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.1, shapes: Sequence[tuple[int, int, int]] = ()
) -> float:
    """Measure the FLOP/s of the fastest of several matmuls, the peak that MFU is relative to.

    A measured peak, unlike a data sheet's, exists for every device. No model exceeds it by much, least of all one whose own
    matmuls are among `shapes`.

    Args:
        seconds: time to repeat each matmul.
        shapes: (M, K, N) of matmuls to try in addition to `PRODUCTS`, as from `costs.flops.largest_products`; those under
            `SMALLEST_PRODUCT` are skipped.
    """
    tried = [*PRODUCTS, *(shape for shape in shapes if Product(*shape).flops >= SMALLEST_PRODUCT)]
    longest = max(LONGEST_PRODUCT, 2 * seconds)
    return fastest_rate(lambda *shape: product_seconds(Product(*shape), device, dtype, seconds), tried, longest)


def fastest_rate(
    product_seconds: Callable[[int, int, int], float],
    shapes: Sequence[tuple[int, int, int]] = PRODUCTS,
    longest: float = LONGEST_PRODUCT,
) -> float:
    """Return the highest FLOP/s among several matmuls, skipping those too slow at the best rate so far.

    Args:
        product_seconds: returns the seconds of a matmul [M, K] x [K, N].
        shapes: (M, K, N) of each; the first is always tried.
        longest: maximum seconds of one matmul.
    """
    rate = 0.0
    for M, K, N in shapes:
        flops = 2 * M * K * N
        if not rate or flops / rate < longest:
            rate = max(rate, flops / product_seconds(M, K, N))
    return rate


@torch.no_grad()
def product_seconds(product: Product, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the shortest time of a matmul repeated for `seconds`, at least twice."""

    def operand(rows: int, columns: int, transposed: bool) -> torch.Tensor:
        shape = (columns, rows) if transposed else (rows, columns)
        values = torch.randn(*((product.batch,) if product.batch else ()), *shape, device=device, dtype=dtype)
        return values.mT if transposed else values

    M, K, N, batch, transposed = product
    left, right = operand(M, K, transposed[0]), operand(K, N, transposed[1])
    out = torch.empty(*left.shape[:-1], N, device=device, dtype=dtype)
    multiply = torch.bmm if batch else torch.mm
    best, end, repeat = torch.inf, time.perf_counter() + seconds, 0
    while repeat < 2 or time.perf_counter() < end:  # the first may compile its kernel
        begin = time.perf_counter()
        multiply(left, right, out=out)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        repeat += 1
    return best
