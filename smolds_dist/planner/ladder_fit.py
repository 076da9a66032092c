"""Law of a ladder's folder: fit, report, and whether its mixtures pay compared with dense twins."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq

from smolds_dist.errors import ConfigError
from smolds_dist.files import replace_text
from smolds_dist.inputs import convert, read_json
from smolds_dist.planner.scaling_law import INTERVAL, NAMES, RESAMPLES, FittedLaw, Law, Point, distinct, fit_all

RESULTS, FIT, PLOT = "results.json", "fit.json", "fit.png"
FIXED = {"sparsity": "no two sizes differ in total weights alone", "g": "all runs have the same granularity"}


@dataclass
class Results:
    """Fields read from `RESULTS`."""

    points: list[str]  # names of the runs at the best rate
    runs: list[dict[str, Any]]


def fit_ladder(folder: Path, resamples: int = RESAMPLES) -> FittedLaw:
    """Fit the law of a ladder's results, and write `FIT` and `PLOT` to their folder.

    Raises:
        ConfigError: without results, or if they do not determine the law.
    """
    from smolds_dist.planner.ladder_plot import draw

    fitted = fit_all(read_points(folder), resamples)
    replace_text(folder / FIT, json.dumps(fitted.to_json()) + "\n")
    draw(fitted, folder / PLOT)
    return fitted


def read_points(folder: Path) -> list[Point]:
    """Return the runs of `RESULTS` that the law is fitted to or compared with."""
    path, advice = folder / RESULTS, f"train the ladder with `smolds ladder run {folder}`"
    results = read_json(path, advice, Results)
    runs = [run for run in results.runs if run.get("run") in results.points]
    return convert(
        [run | {"loss": math.nan if run.get("loss") is None else run["loss"]} for run in runs],
        list[Point],
        path,
        advice,
    )


def report(fitted: FittedLaw) -> str:
    """Format the constants, checks, compute-optimal models, and multipliers over dense twins."""
    used = fitted.fitted
    sizes, tokens = (distinct([getattr(point, name) for point in used]) for name in ("active", "tokens"))
    lines = [
        "loss = E + (A + g / granularity^gamma) / N^alpha + B / tokens^beta, N = active * (total / active)^sparsity",
        f"{len(used)} runs of {sizes} sizes and {tokens} numbers of tokens; a run's loss varies by {fitted.noise:.2%}; "
        f"intervals contain {INTERVAL[1] - INTERVAL[0]:.0%}; FLOPs: 6 * active * tokens, without attention's scores",
        "",
        *_constants(fitted),
        *(f"{name} fixed at 0: {why}" for name, why in FIXED.items() if name not in fitted.free),
    ]
    for name, source in fitted.sources.items():
        constants = ", ".join(f"{one} {getattr(source.law, one):.4g}" for one in source.free)
        lines.append(f"{name}: {constants}")
    if len(used) < len(fitted.points):
        lines += ["", *_checks(fitted)]
    lines += ["", *_optima(fitted)]
    if fitted.dense:
        lines += ["", *_multipliers(fitted)]
    return "\n".join(lines)


def table(header: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines with columns aligned to the right; the header's columns are separated by two blanks."""
    cells = [header.split("  "), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _constants(fitted: FittedLaw) -> Iterator[str]:
    rows = [(name, getattr(fitted.law, name), *fitted.interval(name)) for name in NAMES if name in fitted.free]
    yield from table(
        "constant  value  low  high", [(name, *(f"{one:.4g}" for one in values)) for name, *values in rows]
    )


def _checks(fitted: FittedLaw) -> Iterator[str]:
    rows = []
    for point in fitted.points:
        if point.held_out:
            loss, low, high = fitted.predict(point.active, point.total, point.tokens, point.granularity)
            inside = "yes" if low <= point.loss <= high else "no"
            values = f"{point.loss:.4f}", f"{loss:.4f}", f"{low:.4f}", f"{high:.4f}", f"{loss / point.loss - 1:+.2%}"
            rows.append((point.run, f"{point.flops:.3g}", *values, inside))
    yield from table("hold-out  FLOPs  loss  predicted  low  high  error  inside", rows)


def _optima(fitted: FittedLaw) -> Iterator[str]:
    """Yield compute-optimal models with the largest run's ratio of total to active weights and granularity."""
    largest = max(fitted.fitted, key=lambda point: point.flops)
    ratio, rows = largest.total / largest.active, []
    for factor in (1, 10, 100):
        flops = largest.flops * factor
        active, tokens = fitted.law.optimum(flops, ratio, largest.granularity)
        loss, low, high = fitted.predict(active, active * ratio, tokens, largest.granularity)
        found = [law.optimum(flops, ratio, largest.granularity)[0] for law in fitted.resampled]
        span = " to ".join(f"{one:.2e}" for one in np.quantile(found, INTERVAL))
        rows.append(
            (f"{flops:.2e}", f"{active:.2e}", span, f"{tokens:.2e}", f"{loss:.3f}", f"{low:.3f}", f"{high:.3f}")
        )
    yield from table("FLOPs  best active weights  interval  tokens  loss  low  high", rows)


@dataclass(frozen=True)
class Multiplier:
    """What a mixture's loss costs a dense model with as many tokens per weight, over what it cost the mixture."""

    point: Point
    compute: tuple[float, float, float]  # FLOPs over FLOPs: value, low, high; infinite beyond the dense law's E
    time: float  # seconds over seconds, by each model's measured speed; NaN without measurements


def multipliers(fitted: FittedLaw) -> list[Multiplier]:
    """Return the multiplier of every mixture, smallest first.

    Dense models keep the mixture's tokens per active weight, so the comparison runs along the ladder, and neither side is
    nearer to its compute optimum by choice. Seconds per FLOP of dense models are interpolated between the measured sizes.

    Raises:
        ConfigError: without dense twins.
    """
    if not fitted.dense:
        raise ConfigError("the ladder has no dense twins to compare with; plan it with --dense-twins.")
    twins = sorted((one for one in fitted.dense.points if one.seconds), key=lambda one: one.active)
    found = []
    for point in sorted(fitted.points, key=lambda one: (one.active, one.total, one.tokens)):
        growth = dense_growth(fitted.dense.law, point)
        low, high = np.quantile(
            [dense_growth(law, point) for law in fitted.dense.resampled], INTERVAL, method="nearest"
        )
        time = math.nan
        if twins and point.seconds:
            slow = np.interp(
                math.log(point.active) + math.log(growth),
                [math.log(one.active) for one in twins],
                [math.log(one.seconds / one.flops) for one in twins],
            )
            time = growth**2 * math.exp(slow) / (point.seconds / point.flops)
        found.append(Multiplier(point, (growth**2, min(low, growth) ** 2, max(high, growth) ** 2), time))
    return found


def dense_growth(law: Law, point: Point) -> float:
    """Return the factor by which a dense model's weights and tokens exceed the mixture's at the same loss; its square is
    that of FLOPs."""

    def excess(log: float) -> float:
        active, tokens = point.active * math.exp(log), point.tokens * math.exp(log)
        return law.loss(active, active, tokens) - point.loss

    if excess(20.0) > 0:
        return math.inf
    return math.exp(brentq(excess, -20.0, 20.0))


def _multipliers(fitted: FittedLaw) -> Iterator[str]:
    rows = []
    for one in multipliers(fitted):
        point, compute = one.point, (f"{value:.2f}" for value in one.compute)
        name = point.run + (" (hold-out)" if point.held_out else "")
        rows.append((name, f"{point.active:,.0f}", f"{point.tokens:,.0f}", *compute, f"{one.time:.2f}"))
    yield "multipliers: cost of the mixture's loss for a dense model with as many tokens per weight, over the mixture's"
    yield from table("mixture  active weights  tokens  FLOPs  low  high  time", rows)
