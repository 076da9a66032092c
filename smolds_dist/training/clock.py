"""Where a step's time and memory go."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch
from torch.profiler import record_function

from smolds_dist.parallel.engine import Engine

# [M, K] x [K, N]. With AMX, large and tall ones reach twice the rate of the first; GPUs want the last.
PRODUCTS = ((1024, 1024, 1024), (8192, 384, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192))
LONGEST_PRODUCT = 0.2  # seconds
SMALLEST_PRODUCT = 2.5e8  # FLOPs; a model's own products below run at no full rate, and would only take time
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


class Product(NamedTuple):
    """[M, K] x [K, N], or as many of them as `batch` says, of one dtype."""

    M: int
    K: int
    N: int
    batch: int = 0  # 0: one product of matrices
    transposed: tuple[bool, bool] = (False, False)  # whether left and right lie in memory column by column

    @property
    def flops(self) -> int:
        return 2 * max(1, self.batch) * self.M * self.K * self.N


def matrix_product_peak(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.1, shapes: Sequence[tuple[int, int, int]] = ()
) -> float:
    """FLOP/s of the fastest of several matrix products; what FLOPs utilisation is a share of.

    A measured peak, unlike a data sheet's, is there for every device. No model can pass it by much, least of all one whose
    own products are among `shapes`.

    Args:
        seconds: how long each product is repeated.
        shapes: (M, K, N) of products to try beside `PRODUCTS`, as `costs.flops.largest_products` has them; those under
            `SMALLEST_PRODUCT` are passed over.
    """
    tried = [*PRODUCTS, *(shape for shape in shapes if Product(*shape).flops >= SMALLEST_PRODUCT)]
    longest = max(LONGEST_PRODUCT, 2 * seconds)
    return fastest_rate(lambda *shape: product_seconds(Product(*shape), device, dtype, seconds), tried, longest)


def fastest_rate(
    product_seconds: Callable[[int, int, int], float],
    shapes: Sequence[tuple[int, int, int]] = PRODUCTS,
    longest: float = LONGEST_PRODUCT,
) -> float:
    """The most FLOP/s among several products, without those that would take too long even at the rate found before.

    Args:
        product_seconds: of one product [M, K] x [K, N].
        shapes: (M, K, N) of each; the first is always tried.
        longest: seconds that one product may take.
    """
    rate = 0.0
    for M, K, N in shapes:
        flops = 2 * M * K * N
        if not rate or flops / rate < longest:
            rate = max(rate, flops / product_seconds(M, K, N))
    return rate


@torch.no_grad()
def product_seconds(product: Product, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The shortest of the times that a product takes when it is repeated for `seconds`, at least twice."""

    def operand(rows: int, columns: int, transposed: bool) -> torch.Tensor:
        shape = (columns, rows) if transposed else (rows, columns)
        values = torch.randn(*((product.batch,) if product.batch else ()), *shape, device=device, dtype=dtype)
        return values.mT if transposed else values

    M, K, N, batch, transposed = product
    left, right = operand(M, K, transposed[0]), operand(K, N, transposed[1])
    out = torch.empty(*left.shape[:-1], N, device=device, dtype=dtype)
    multiply = torch.bmm if batch else torch.mm
    best, end, repeat = torch.inf, time.perf_counter() + seconds, 0
    while repeat < 2 or time.perf_counter() < end:  # the first may have to make its kernel
        begin = time.perf_counter()
        multiply(left, right, out=out)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        repeat += 1
    return best
