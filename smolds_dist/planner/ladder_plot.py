"""Plot of a ladder's law: its runs, curves of equal FLOPs, and the prediction with its interval."""

from pathlib import Path

import numpy as np

from smolds_dist.planner.scaling_law import FittedLaw

BEYOND = 10  # times the largest run's FLOPs


def draw(fitted: FittedLaw, path: Path) -> None:
    """Write the plot, 900 pixels wide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8.5), layout="constrained")
    axes = figure.subplot_mosaic([["runs", "runs"], ["equal", "errors"]], height_ratios=(3, 2))
    _draw_runs(fitted, axes["runs"])
    _draw_equal_flops(fitted, axes["equal"])
    _draw_errors(fitted, axes["errors"])
    figure.savefig(path, dpi=100)


def _shape(fitted: FittedLaw) -> tuple[float, float]:
    """Return the ratio of total to active weights and the granularity of the largest fitted run, for all curves."""
    largest = max(fitted.fitted, key=lambda point: point.flops)
    return largest.total / largest.active, largest.granularity


def _draw_runs(fitted: FittedLaw, axis) -> None:
    ratio, granularity = _shape(fitted)
    flops = [point.flops for point in fitted.points]
    budgets = np.geomspace(min(flops), max(flops) * BEYOND, 40)
    optima = [fitted.law.optimum(budget, ratio, granularity) for budget in budgets]
    bands = np.array([fitted.predict(n, n * ratio, tokens, granularity) for n, tokens in optima])
    axis.plot(budgets, bands[:, 0], color="black", lw=1, label="compute-optimal")
    axis.fill_between(budgets, bands[:, 1], bands[:, 2], color="black", alpha=0.12, lw=0, label="80 % interval")
    models = sorted({(point.active, point.total) for point in fitted.points})
    for index, model in enumerate(models):
        runs = sorted((p for p in fitted.points if (p.active, p.total) == model), key=lambda point: point.tokens)
        color = f"C{index % 10}"
        for marker, chosen in (("o", [p for p in runs if not p.held_out]), ("*", [p for p in runs if p.held_out])):
            label = f"{model[0]:.2e} of {model[1]:.2e}" + (" (hold-out)" if marker == "*" else "")
            size = 6 if marker == "o" else 13
            if chosen:
                axis.plot(
                    *zip(*((p.flops, p.loss) for p in chosen), strict=True), marker, color=color, ms=size, label=label
                )
        tokens = np.geomspace(runs[0].tokens / 1.5, runs[-1].tokens * 4, 30)
        law = fitted.law.loss(*model, tokens, runs[0].granularity)
        axis.plot(6 * model[0] * tokens, law, color=color, lw=1, alpha=0.6)
    axis.set(xscale="log", xlabel="FLOPs (6 x active weights x tokens)", ylabel="validation loss (nats per token)")
    axis.set_title("Runs by active and total weights, and the fitted law")
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)


def _draw_equal_flops(fitted: FittedLaw, axis) -> None:
    ratio, granularity = _shape(fitted)
    flops = [point.flops for point in fitted.points]
    minima = []
    for index, budget in enumerate(np.geomspace(min(flops), max(flops) * BEYOND, 5)):
        best, _ = fitted.law.optimum(budget, ratio, granularity)
        active = np.geomspace(best / 10, best * 10, 60)
        loss = fitted.law.loss(active, active * ratio, budget / 6 / active, granularity)
        axis.plot(active, loss, color=f"C{index}", label=f"{budget:.1e}")
        minima.append((best, fitted.law.loss(best, best * ratio, budget / 6 / best, granularity)))
    axis.plot(*zip(*minima, strict=True), "k.--", lw=1, label="minimum")
    axis.set(xscale="log", xlabel="active weights", ylabel="predicted loss", title="Equal FLOPs")
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)


def _draw_errors(fitted: FittedLaw, axis) -> None:
    for held_out, marker, color in ((False, "o", "C0"), (True, "*", "C3")):
        points = [point for point in fitted.points if point.held_out == held_out]
        if not points:
            continue
        predicted = [fitted.predict(p.active, p.total, p.tokens, p.granularity) for p in points]
        losses, lows, highs = np.array(predicted).T
        measured = np.array([point.loss for point in points])
        error = (losses / measured - 1) * 100
        bars = np.array([losses - lows, highs - losses]) / measured * 100
        label = "hold-out" if held_out else "fitted"
        axis.errorbar(
            [p.flops for p in points], error, bars, fmt=marker, color=color, lw=1, ms=9 if held_out else 4, label=label
        )
    axis.axhline(0, color="black", lw=1)
    axis.set(xscale="log", xlabel="FLOPs", ylabel="predicted / measured - 1 (%)", title="Errors with 80 % intervals")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
