"""Where a step's time and memory go."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch.profiler import record_function

from smolds_dist.parallel.engine import Engine

# [M, K] x [K, N]. With AMX, large and tall ones reach twice the rate of the first; GPUs want the last.
PRODUCTS = ((1024, 1024, 1024), (8192, 384, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192))
LONGEST_PRODUCT = 0.2  # seconds
PHASES = ("data", "forward", "backward", "all_to_all", "optimizer", "logging")


def is_measured(step: int) -> bool:
    """Steps that are looked at closely, which costs them a little time: the first ten, and every tenth."""
    return step <= 10 or step % 10 == 0


class StepClock:
    """Times steps and their phases.

    A device runs ahead of Python, so its phases can only be told apart where Python waits for it at each one's end. This,
    and the timing of all-to-all, happens in measured steps alone. Forward and backward are without their all-to-all. MPS
    runs the same code, but has not been tested on Apple hardware.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self.measured = False
        self.seconds = dict.fromkeys(PHASES, 0.0)  # of this step so far; logging: of the step before
        self._since = time.perf_counter()

    def begin(self, measured: bool) -> None:
        """Starts a step."""
        self.measured = measured
        self._engine.time_all_to_all(measured)
        self._engine.all_to_all_seconds()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around one of `PHASES`; it carries its name in a profile too."""
        with record_function(name):
            begin = self._now()
            yield
            seconds = self._now() - begin
        if self.measured:
            inside = self._engine.all_to_all_seconds()
            self.seconds["all_to_all"] += inside
            seconds -= inside
        self.seconds[name] += seconds

    def _now(self) -> float:
        if self.measured and self._engine.device.type != "cpu":
            torch.accelerator.synchronize(self._engine.device)
        return time.perf_counter()

    def lap(self) -> float:
        """Ends a step: seconds since the last one's end, pauses left out."""
        self._engine.time_all_to_all(False)
        self.measured = False
        self.seconds = dict.fromkeys(PHASES, 0.0)
        now = time.perf_counter()
        total, self._since = now - self._since, now
        return total

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of a training step, such as an evaluation."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin


def memory_in_use(device: torch.device) -> int:
    """Bytes of this rank: on CUDA the most that was allocated since the last call, on MPS what the driver holds, on the CPU
    what of the process is resident."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


def matrix_product_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest of several matrix products; what FLOPs utilisation is a share of.

    A measured peak, unlike a data sheet's, is there for every device, and no model can pass it by much.

    Args:
        seconds: how long each product is repeated.
    """
    return fastest_rate(lambda M, K, N: _product_seconds(M, K, N, device, dtype, seconds))


def fastest_rate(product_seconds: Callable[[int, int, int], float]) -> float:
    """The most FLOP/s among `PRODUCTS`, without those that would take too long even at the rate found before.

    Args:
        product_seconds: of one product [M, K] x [K, N].
    """
    rate = 0.0
    for M, K, N in PRODUCTS:
        flops = 2 * M * K * N
        if not rate or flops / rate < LONGEST_PRODUCT:
            rate = max(rate, flops / product_seconds(M, K, N))
    return rate


@torch.no_grad()
def _product_seconds(M: int, K: int, N: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    left, right = torch.randn(M, K, device=device, dtype=dtype), torch.randn(K, N, device=device, dtype=dtype)
    out = torch.empty(M, N, device=device, dtype=dtype)
    best, end, repeat = torch.inf, time.perf_counter() + seconds, 0
    while repeat < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        repeat += 1
    return best
