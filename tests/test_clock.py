"""Times of phases, and the measured matmul peak, the reference of MFU."""

import time
from types import SimpleNamespace

import pytest
import torch

from smolds_dist.costs.flops import largest_products
from smolds_dist.settings import Model
from smolds_dist.training.clock import (
    LONGEST_PRODUCT,
    PRODUCTS,
    Product,
    StepClock,
    fastest_rate,
    matrix_product_peak,
    product_seconds,
)


@pytest.mark.parametrize(
    ("rates", "peak", "products"),
    [
        # GFLOP/s of each shape; shapes without an entry would take too long
        (
            {(1024, 1024, 1024): 540, (8192, 384, 1024): 1000, (2048, 2048, 2048): 900, (4096, 4096, 4096): 1300},
            1300,
            4,
        ),
        ({(1024, 1024, 1024): 430, (8192, 384, 1024): 410, (2048, 2048, 2048): 415}, 430, 3),
        ({(1024, 1024, 1024): 40, (8192, 384, 1024): 50}, 50, 2),
        ({(1024, 1024, 1024): 1}, 1, 1),
    ],
    ids=["amx", "avx512", "old laptop", "slower still"],
)
def test_peak_is_the_best_shapes_among_those_that_are_fast_enough(rates, peak, products):
    asked = []

    def seconds(M, K, N):
        asked.append((M, K, N))
        return 2 * M * K * N / (rates[M, K, N] * 1e9)

    assert fastest_rate(seconds) == pytest.approx(peak * 1e9)
    assert len(asked) == products


def test_peak_of_this_machine_is_a_measured_matmuls(monkeypatch):
    shapes, rates = [], []
    product = torch.mm

    def noted(left, right, out):
        begin = time.perf_counter()
        product(left, right, out=out)
        shapes.append((*left.shape, right.shape[1]))
        rates.append(2 * left.numel() * right.shape[1] / (time.perf_counter() - begin))

    monkeypatch.setattr(torch, "mm", noted)
    small, large = (64, 64, 64), (512, 384, 1024)
    peak = matrix_product_peak(torch.device("cpu"), torch.float32, 0.001, (small, large))
    assert large in shapes and small not in shapes
    assert max(rates) / 2 < peak <= max(rates)  # timed within the calls
    assert all(shapes.count(shape) >= 2 for shape in shapes)  # the first call only warms up
    assert all(2 * M * K * N / peak < LONGEST_PRODUCT for M, K, N in set(shapes) - {shapes[0]})


def test_the_models_matmuls_are_also_tried():
    asked = []

    def seconds(M, K, N):
        asked.append((M, K, N))
        return 2 * M * K * N / (9e11 if (M, K, N) == (512, 384, 2048) else 4e11)

    shapes = largest_products(Model(vocab_size=49_152), 2048)
    assert shapes == ((512, 384, 2048), (1024, 384, 49_152))
    assert fastest_rate(seconds, (*PRODUCTS, *shapes)) == pytest.approx(9e11)
    assert asked[-2:] == list(shapes)
    assert fastest_rate(seconds, PRODUCTS, longest=0.5) == pytest.approx(4e11) and asked[-1] == (4096, 4096, 4096)


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
def test_a_matmul_is_timed_in_its_own_layout(monkeypatch, transposed):
    seen = []
    product = torch.bmm

    def noted(left, right, out):
        seen.append((left.shape, right.shape, (left.stride(-2) == 1, right.stride(-2) == 1)))
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "bmm", noted)
    one = Product(3, 4, 5, batch=2, transposed=transposed)
    assert product_seconds(one, torch.device("cpu"), torch.float32, 0.0) > 0
    assert seen == 2 * [((2, 3, 4), (2, 4, 5), transposed)] and one.flops == 2 * 2 * 3 * 4 * 5


class DeviceEvent:
    """CUDA's event on a device that runs 10 ms of work at each record, and starts only when the host waits for it."""

    queue, reached = 0, 0

    def __init__(self, device, enable_timing):
        assert device.type == "cuda" and enable_timing

    def record(self):
        DeviceEvent.queue += 1
        self.place = DeviceEvent.queue

    def synchronize(self):
        DeviceEvent.reached = max(DeviceEvent.reached, self.place)

    def elapsed_time(self, end):
        assert end.place <= DeviceEvent.reached, "read before the device has reached it"
        return 10.0 * (end.place - self.place)


@pytest.mark.parametrize("expert", [1, 2])
def test_phases_on_cuda_are_timed_by_events_and_read_once_the_device_has_reached_them(monkeypatch, expert):
    """Simulates CUDA's events: no phase waits for the device; all-to-alls, which do, are timed in step 10 and each 100th."""
    timed = []
    engine = SimpleNamespace(
        device=torch.device("cuda"),
        time_all_to_all=timed.append,
        all_to_all_seconds=lambda: 0.004 * (timed[-1] if timed else 0),
    )
    monkeypatch.setattr(torch, "Event", DeviceEvent)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: pytest.fail("a phase waited for the device"))
    clock = StepClock(engine, expert)
    for step in (9, 10, 11, 20, 100):
        clock.begin(step)
        for name in ("forward", "backward", "forward"):
            with clock.phase(name):
                pass
        measured = step != 11
        assert (DeviceEvent.queue, DeviceEvent.reached) == (6 * measured, 0)
        if measured:
            seconds = clock.seconds
            assert DeviceEvent.reached == 6
            inside = 0.004 if expert > 1 and step in (10, 100) else 0.0
            assert seconds["forward"] == pytest.approx(2 * (0.01 - inside))
            assert seconds["backward"] == pytest.approx(0.01 - inside)
            assert seconds.get("all_to_all", 0.0) == pytest.approx(3 * inside)
            assert ("all_to_all" in seconds) == (expert == 1 or step in (10, 100))
        clock.lap()
        DeviceEvent.queue = DeviceEvent.reached = 0
    assert timed[::2] == [expert > 1 and step in (10, 100) for step in (9, 10, 11, 20, 100)] and not any(timed[1::2])
