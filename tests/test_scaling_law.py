"""The law of a ladder: constants of published laws come back from points drawn from them; intervals, report and plot."""

import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest

from smolds_dist.errors import ConfigError
from smolds_dist.inputs import read_json
from smolds_dist.planner.ladder_fit import fit_ladder, multipliers, report
from smolds_dist.planner.scaling_law import FittedLaw, Law, Point, fit, fit_all

HOFFMANN = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # arXiv 2203.15556, equation 10
KRAJEWSKI = Law(E=0.47, A=18.1, B=30.8, alpha=0.115, beta=0.147, g=2.1, gamma=0.58)  # arXiv 2402.07871, table 2
SPARSE = replace(HOFFMANN, sparsity=0.4)


def drawn(law, sizes=5, smallest=1e6, per_weight=(10, 20, 40), ratios=(3.0,), granularities=(1.0,), noise=0.0, seed=0):
    """Return runs with losses of a law, with a relative error of `noise`."""
    random, points = np.random.default_rng(seed), []
    for active in [smallest * 2.0**index for index in range(sizes)]:
        for ratio in ratios:
            for granularity in granularities:
                for tokens in [active * number for number in per_weight]:
                    loss = law.loss(active, active * ratio, tokens, granularity)
                    loss *= math.exp(noise * random.standard_normal())
                    run = f"{active:.0f}-{tokens:.0f}"
                    points.append(Point(active, active * ratio, float(tokens), float(loss), {}, granularity, run))
    return points


@pytest.mark.parametrize(
    ("law", "design", "free"),
    [
        (HOFFMANN, {}, 5), (HOFFMANN, {"smallest": 5e7}, 5), (HOFFMANN, {"sizes": 4, "per_weight": (10, 40)}, 5),
        (KRAJEWSKI, {"granularities": (1, 2, 4, 8, 16)}, 7), (SPARSE, {"ratios": (2.0, 5.0)}, 6),
    ],
)  # fmt: skip
def test_published_constants_come_back_from_exact_losses(law, design, free):
    found = fit(drawn(law, **design))
    assert asdict(found) == pytest.approx(asdict(law), rel=0.01)
    assert sum(value != 0 for value in asdict(found).values()) == free


@pytest.mark.parametrize(
    ("law", "design"),
    [
        (HOFFMANN, {}), (KRAJEWSKI, {"granularities": (1, 2, 4, 8, 16)}), (SPARSE, {"ratios": (2.0, 5.0)}),
    ],
)  # fmt: skip
def test_noise_and_an_outlier_do_not_ruin_a_law(law, design):
    """The outlier's loss is 10 % too high. Least squares move exponents of the noisy points by several times the limits."""
    points = drawn(law, noise=0.001, **design)
    points[4] = replace(points[4], loss=points[4].loss * 1.1)
    found = fit(points)
    for name in ("alpha", "beta", "sparsity"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), abs=0.02)
    assert found.gamma == pytest.approx(law.gamma, abs=0.1)
    largest = points[-1]
    far = largest.active * 4, largest.total * 4, largest.tokens * 4, largest.granularity
    assert found.loss(*far) == pytest.approx(law.loss(*far), rel=0.01)


@pytest.mark.long
def test_intervals_contain_the_truth_in_most_ladders():
    """Of 20 ladders, 80 % intervals contain the loss of a run with 16 times the FLOPs, and alpha, about 16 times."""
    far = 64e6, 192e6, 64e6 * 40
    loss_hits = alpha_hits = 0
    for seed in range(20):
        fitted = fit_all(drawn(HOFFMANN, noise=0.003, seed=seed), resamples=25)
        _, low, high = fitted.predict(*far)
        loss_hits += low <= HOFFMANN.loss(*far) <= high
        low, high = fitted.interval("alpha")
        alpha_hits += low <= HOFFMANN.alpha <= high
    assert 12 <= loss_hits <= 20
    assert 12 <= alpha_hits <= 19


def test_experts_whose_routers_add_active_weights_determine_sparsity():
    """64 instead of 8 experts add 4 % to the active weights of a small model, and seven times to the total."""
    few, many = drawn(SPARSE, ratios=(2.0,)), drawn(SPARSE, smallest=1.04e6, ratios=(14.0,))
    assert fit([*few, *many]).sparsity == pytest.approx(0.4, abs=0.01)
    one_family = [replace(point, total=point.active * (point.active / 1e6) ** 0.9 * 1.2) for point in few]
    assert fit(one_family).sparsity == 0


def test_optimum_has_the_lowest_loss_of_its_flops():
    active, tokens = SPARSE.optimum(1e18, ratio=4.0)
    assert 6 * active * tokens == pytest.approx(1e18)
    best = SPARSE.loss(active, active * 4, tokens)
    for factor in (0.97, 1.03):
        other = active * factor
        assert SPARSE.loss(other, other * 4, 1e18 / 6 / other) > best
    assert HOFFMANN.optimum(2e18)[0] / HOFFMANN.optimum(1e18)[0] == pytest.approx(2 ** (0.28 / 0.62))


@pytest.mark.parametrize(
    ("design", "words"),
    [
        ({"sizes": 2}, "6 runs of 2 sizes .*; add 1 more sizes"),
        ({"per_weight": (20,)}, "add a second number of tokens for two of the sizes"),
        ({"granularities": (1, 2)}, "add 1 more granularities"),
        ({"sizes": 0}, "0 runs .*; add 3 more sizes and 3 more numbers of tokens"),
    ],
)
def test_too_few_runs_raise_what_to_add(design, words):
    with pytest.raises(ConfigError, match=words):
        fit(drawn(HOFFMANN, **design))


def test_a_diverged_run_is_named():
    points = drawn(HOFFMANN)
    with pytest.raises(ConfigError, match=r"1000000-20000000 has loss nan.*lower rate"):
        fit([points[0], replace(points[1], loss=math.nan), *points[2:]])


def with_twins():
    """Return mixtures and dense twins of one law; the largest size of both is held out, and mixtures need 1.4 times the
    seconds per FLOP."""
    points = []
    for ratio, slower in ((3.0, 1.4), (1.0, 1.0)):
        for point in drawn(SPARSE, sizes=6, ratios=(ratio,)):
            held_out = point.active == 32e6
            point = replace(point, run=f"{point.run}-{ratio:g}", held_out=held_out, losses={"a": 2.0, "b": point.loss})
            points.append(replace(point, seconds=point.flops / 1e11 * slower))
    return points


def test_multipliers_of_a_mixture_are_those_of_its_law():
    """The dense law, without the sparsity exponent, reaches the mixture's loss with the square of its growth in FLOPs."""
    points = [replace(point, losses={}) for point in with_twins()]
    found = multipliers(fit_all(points, resamples=2))
    assert len(found) == 18 and found[-1].point.held_out
    for one in found:
        growth = math.sqrt(one.compute[0])
        weights = one.point.active * growth
        assert HOFFMANN.loss(weights, weights, one.point.tokens * growth) == pytest.approx(one.point.loss, rel=1e-3)
        assert 1.1 < growth < 1.6
        assert one.time == pytest.approx(one.compute[0] / 1.4, rel=1e-3)
    with pytest.raises(ConfigError, match="--dense-twins"):
        multipliers(fit_all(drawn(HOFFMANN), resamples=2))


def test_a_folder_is_fitted_reported_plotted_and_read_again(tmp_path):
    """Losses by source have laws of their own; a run outside `points` and a held-out one are not fitted."""
    runs = [asdict(point) | {"lr": 0.01} for point in with_twins()]
    for run in runs:
        run["losses"] = {"code": run["loss"] * 0.9, "text": run["loss"]}
    other = runs[0] | {"run": "other rate", "loss": None}
    names = [run["run"] for run in runs]
    (tmp_path / "results.json").write_text(json.dumps({"points": names, "runs": [*runs, other]}))
    fitted = fit_ladder(tmp_path, resamples=4)
    assert read_json(tmp_path / "fit.json", "", FittedLaw) == fitted
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert len(fitted.fitted) == 15 and len(fitted.dense.fitted) == 15
    ratio = fitted.sources["code"].law.E / fitted.law.E
    assert ratio == pytest.approx(0.9, rel=0.01)
    text = report(fitted)
    for words in (
        "15 runs of 5 sizes",
        "alpha +0.34",
        "sparsity fixed at 0",
        "code: E",
        "hold-out +FLOPs",
        "multipliers:",
    ):
        assert re.search(words, text), text
