"""The peak that FLOPs utilisation is a share of."""

import pytest
import torch

from smolds_dist.training.clock import LONGEST_PRODUCT, fastest_rate, matrix_product_peak


@pytest.mark.parametrize(
    ("rates", "peak", "products"),
    [
        # GFLOP/s of each shape; an entry that is never asked for is one that would take too long
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
def test_peak_is_that_of_the_best_shape_that_does_not_take_long(rates, peak, products):
    asked = []

    def seconds(M, K, N):
        asked.append((M, K, N))
        return 2 * M * K * N / (rates[M, K, N] * 1e9)

    assert fastest_rate(seconds) == pytest.approx(peak * 1e9)
    assert len(asked) == products


def test_peak_of_this_machine_is_that_of_a_product_it_has_made(monkeypatch):
    shapes = []
    product = torch.mm

    def noted(left, right, out):
        shapes.append((*left.shape, right.shape[1]))
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    peak = matrix_product_peak(torch.device("cpu"), torch.float32, seconds=0.001)
    assert 1e8 < peak < 1e14
    assert all(shapes.count(shape) >= 2 for shape in shapes)  # the first call only warms up
    assert all(2 * M * K * N / peak < LONGEST_PRODUCT for M, K, N in set(shapes) - {shapes[0]})
