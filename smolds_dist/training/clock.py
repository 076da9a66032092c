"""Where a step's time and memory go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch.profiler import record_function

from smolds_dist.parallel.engine import Engine

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


@torch.no_grad()
def matrix_product_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest of several products of square matrices, [N, N] x [N, N]; what FLOPs utilisation is a share of.

    A measured peak, unlike a data sheet's, is there for every device, and no model can pass it by much.
    """
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    best, end, repeat = torch.inf, time.perf_counter() + seconds, 0
    while repeat < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        repeat += 1
    return 2 * size**3 / best
