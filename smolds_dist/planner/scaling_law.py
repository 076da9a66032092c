"""Scaling law of a ladder: loss by weights, tokens and granularity, fitted to the ladder's runs.

    loss = E + (A + g / granularity^gamma) / N^alpha + B / tokens^beta,    N = active * (total / active)^sparsity

E, A, B, alpha, beta: arXiv 2203.15556, equation 2. g and gamma: arXiv 2402.07871, equation 7. `sparsity` places N between
the active (0) and the total (1) weights.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations, product
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.optimize import minimize, nnls

from smolds_dist.errors import ConfigError

HUBER = 1e-3  # relative error from which a run's weight falls (arXiv 2203.15556, appendix D.3)
RESAMPLES = 100
STARTS = 4
INTERVAL = (0.1, 0.9)
ALIKE = math.log(1.02)  # weights or granularities closer than 2 % count as equal
NORMAL = np.array([NormalDist().inv_cdf((index + 0.5) / 10) for index in range(10)])
NONE = -80.0  # logarithm of a constant that is 0
# Weak prior of exponents, mean and deviation, as much as one run that is off by `HUBER`: a few runs hardly distinguish a
# small exponent from a large E. Published: 0.115 to 0.37 for weights and tokens, 0.58 for granularity.
PRIOR = (0.35, 0.3)
BOUNDS = {"alpha": (0.02, 2.0), "beta": (0.02, 2.0), "sparsity": (0.0, 1.0), "gamma": (0.02, 2.0)}


@dataclass(frozen=True)
class Point:
    """A trained run at its end, after its learning rate has decayed."""

    active: float  # matmul weights that a token uses, LM head included
    total: float  # matmul weights with all experts
    tokens: float
    loss: float  # validation, nats per token
    losses: dict[str, float] = field(default_factory=dict)  # by source; empty for one source
    granularity: float = 1.0  # dense width of a token's feed-forward network / one expert's width
    run: str = ""  # folder
    held_out: bool = False  # not fitted, but compared with the prediction
    seconds: float = 0.0  # of training, without evaluation

    @property
    def flops(self) -> float:
        return 6 * self.active * self.tokens

    @property
    def dense(self) -> bool:
        return abs(math.log(self.total / self.active)) < ALIKE


@dataclass(frozen=True)
class Law:
    """Constants of the law; g 0: granularity has no effect, sparsity 0: N are the active weights."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    sparsity: float = 0.0
    g: float = 0.0
    gamma: float = 0.0

    def loss(self, active: Any, total: Any, tokens: Any, granularity: Any = 1.0) -> Any:
        """Return nats per token; arguments are numbers or arrays."""
        weights = active * (total / active) ** self.sparsity
        return self.E + self.scale(granularity) / weights**self.alpha + self.B / tokens**self.beta

    def scale(self, granularity: Any) -> Any:
        return self.A + self.g / granularity**self.gamma

    def optimum(self, flops: float, ratio: float = 1.0, granularity: float = 1.0) -> tuple[float, float]:
        """Return the active weights and tokens with the lowest loss at 6 * active * tokens FLOPs (arXiv 2203.15556, equation
        4), for a ratio of total to active weights."""
        scale = self.scale(granularity) * ratio ** (-self.sparsity * self.alpha)
        best = (self.alpha * scale / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        active = best * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return active, flops / 6 / active


NAMES = [one.name for one in fields(Law)]
EXPONENTS = np.array([name in BOUNDS for name in NAMES])


@dataclass(frozen=True)
class FittedLaw:
    """A law, with what its uncertainty and its check need."""

    law: Law
    resampled: list[Law]  # fits to resampled losses
    noise: float  # relative standard deviation of a run's loss
    points: list[Point]
    sources: dict[str, "FittedLaw"] = field(default_factory=dict)
    dense: "FittedLaw | None" = None  # of the dense twins

    def predict(
        self, active: float, total: float, tokens: float, granularity: float = 1.0
    ) -> tuple[float, float, float]:
        """Return the predicted loss of a run, and the interval that contains it with a probability of 80 %: uncertainty of
        the constants, and differences between runs of the same size."""
        at = active, total, tokens, granularity
        loss = self.law.loss(*at)
        spread = np.multiply.outer([law.loss(*at) for law in self.resampled], np.exp(self.noise * NORMAL))
        low, high = np.quantile(spread, INTERVAL)
        return loss, min(float(low), loss), max(float(high), loss)

    def interval(self, constant: str) -> tuple[float, float]:
        low, high = np.quantile([getattr(law, constant) for law in self.resampled], INTERVAL)
        return float(low), float(high)

    @cached_property
    def fitted(self) -> list[Point]:
        return [point for point in self.points if not point.held_out]

    @property
    def free(self) -> list[str]:
        """Constants that the ladder's runs determine; others are 0."""
        return free_constants(self.fitted)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fit(points: Sequence[Point]) -> Law:
    """Return the law of the points outside the check: Huber loss of log(loss), by L-BFGS from the best of a grid.

    Raises:
        ConfigError: if the runs cannot determine the constants, or one has diverged.
    """
    design = _Design(checked(points))
    return design.law(design.solve(design.losses, design.starts(design.losses)[:STARTS]))


def fit_all(points: Sequence[Point], resamples: int = RESAMPLES, seed: int = 0) -> FittedLaw:
    """Fit the law of all points outside the check, and of each source; dense twins of mixtures have their own law.

    Intervals: `resamples` times, random errors are added to the predicted losses, and the law is fitted to them. Resampling
    the runs themselves would leave too few sizes for the constants, since a ladder is a small grid. Runs of one size share
    initial weights and data, often a trunk; half of their variance is assumed to be common to them, because a few sizes
    cannot show how much is.

    Raises:
        ConfigError: see `fit`.
    """
    mixtures, twins = divided(points)
    whole = _fit_series(mixtures, resamples, seed)
    sources = sorted(set.intersection(*(set(point.losses) for point in mixtures)))
    try:
        dense = fit_all(twins, resamples, seed) if twins else None
    except ConfigError as error:
        raise ConfigError(f"dense twins: {error}") from None
    return replace(
        whole,
        sources={
            name: _fit_series([replace(one, loss=one.losses[name], losses={}) for one in mixtures], resamples, seed)
            for name in sources
        },
        dense=dense,
    )


def divided(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Return the mixtures and their dense twins, which have a law of their own; all points first if all are dense."""
    mixtures = [point for point in points if not point.dense] or list(points)
    return mixtures, [point for point in points if point.dense] if len(mixtures) < len(points) else []


def undetermined(points: Sequence[Point]) -> str:
    """Return why `fit_all` would reject these points, empty if it would not."""
    for series, name in zip(divided(points), ("", "dense twins: "), strict=True):
        try:
            if series:
                checked(series)
        except ConfigError as error:
            return f"{name}{error}"
    return ""


def _fit_series(points: list[Point], resamples: int, seed: int) -> FittedLaw:
    fitted = checked(points)
    design = _Design(fitted)
    best = design.solve(design.losses, design.starts(design.losses)[:STARTS])
    predicted, slopes = design.log_loss(best)
    models = np.array([(point.active, point.total) for point in fitted])
    covariance = ((models[:, None] == models).all(-1) + np.eye(len(fitted))) / 2
    slopes = slopes[[low < high for low, high in design.bounds]].T
    # The errors that the fitted constants leave, in units of a run's variance.
    left = float(np.trace((np.eye(len(fitted)) - slopes @ np.linalg.pinv(slopes)) @ covariance))
    # From absolute errors, since an outlier would dominate their squares.
    noise = float(np.abs(design.losses - predicted).mean() * math.sqrt(math.pi / 2) * len(fitted) / left)
    random, factor = np.random.default_rng(seed), np.linalg.cholesky(covariance)
    laws = []
    for _ in range(resamples):
        drawn = noise * math.sqrt(left / random.chisquare(left))  # the variance itself is uncertain
        losses = predicted + drawn * factor @ random.standard_normal(len(fitted))
        laws.append(design.law(design.solve(losses, [best])))
    return FittedLaw(design.law(best), laws, noise, points)


def distinct(values: Sequence[float]) -> int:
    """Return the number of values that differ by more than 2 %."""
    logs = np.sort(np.log(values))
    return min(len(logs), 1) + int((np.diff(logs) > ALIKE).sum())


def free_constants(points: Sequence[Point]) -> list[str]:
    """Return the constants that these points determine. `sparsity` needs points that differ in total weights almost alone,
    as by a router's columns for more experts: in a family with the same experts everywhere, their ratio to active weights
    changes only with size, and less than it."""
    names = ["E", "A", "B", "alpha", "beta"]
    logs = {(math.log(point.active), math.log(point.total / point.active)) for point in points}
    if any(abs(a[1] - b[1]) > ALIKE + 3 * abs(a[0] - b[0]) for a, b in combinations(logs, 2)):
        names.append("sparsity")
    if distinct([point.granularity for point in points]) > 1:
        names += ["g", "gamma"]
    return names


def checked(points: Sequence[Point]) -> list[Point]:
    """Return the points to fit; raise ConfigError if they cannot determine the law."""
    for point in points:
        if not (math.isfinite(point.loss) and point.loss > 0):
            raise ConfigError(
                f"{point.run or 'a run'} has loss {point.loss}, and a law needs finite ones; train it again with a lower "
                "rate, or remove it from the ladder."
            )
    points = [point for point in points if not point.held_out]
    sizes, tokens = (distinct([getattr(point, name) for point in points]) for name in ("active", "tokens"))
    constants = free_constants(points)
    granularities = distinct([point.granularity for point in points]) if "g" in constants else 3
    wanted = [
        f"{3 - number} more {what}"
        for number, what in ((sizes, "sizes"), (tokens, "numbers of tokens"), (granularities, "granularities"))
        if number < 3
    ]
    if not wanted and len(points) < sizes + 2:
        wanted = ["a second number of tokens for two of the sizes"]
    if not wanted and len(points) <= len(constants):
        wanted = [f"{len(constants) + 1 - len(points)} more runs"]
    if wanted:
        raise ConfigError(
            f"a law of {len(constants)} constants cannot be fitted to {len(points)} runs of {sizes} sizes and {tokens} "
            f"numbers of tokens; add {' and '.join(wanted)}."
        )
    return points


class _Design:
    """The points' logarithms, around their means, so that constants and exponents are nearly independent. `theta` has the
    logarithms of E, A, B and g, and the exponents, in the order of `Law`'s fields."""

    def __init__(self, points: Sequence[Point]) -> None:
        columns = [(p.active, p.tokens, p.total / p.active, p.granularity) for p in points]
        logs = np.log(np.array(columns))
        self.centers = logs.mean(0)
        self.active, self.tokens, self.ratio, self.granularity = (logs - self.centers).T
        self.losses = np.log([point.loss for point in points])
        free = free_constants(points)
        self.bounds = [
            (BOUNDS.get(name, (-12.0, 12.0)) if name in free else (0.0 if name in BOUNDS else NONE,) * 2)
            for name in NAMES
        ]

    def log_loss(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log(predicted loss) [points] and its gradient [constants, points]."""
        E, A, B, alpha, beta, sparsity, g, gamma = theta
        size = self.active + sparsity * self.ratio
        terms = np.stack(
            [0 * size + E, A - alpha * size, B - beta * self.tokens, g - gamma * self.granularity - alpha * size]
        )
        logs = np.logaddexp.reduce(terms, 0)
        irreducible, capacity, data, grain = np.exp(terms - logs)
        both = capacity + grain
        gradient = [irreducible, capacity, data, -both * size, -data * self.tokens, -both * alpha * self.ratio]
        return logs, np.stack([*gradient, grain, -grain * self.granularity])

    def objective(self, theta: np.ndarray, losses: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the Huber loss, in units of `HUBER` squared, with the exponents' prior, and its gradient [constants]."""
        logs, gradient = self.log_loss(theta)
        errors = (logs - losses) / HUBER
        clipped = np.clip(errors, -1, 1)
        prior = np.where(EXPONENTS, (theta - PRIOR[0]) / PRIOR[1], 0)
        value = (clipped * (errors - clipped / 2)).sum() + (prior**2).sum() / 2
        return value, gradient @ clipped / HUBER + prior / PRIOR[1]

    def starts(self, losses: np.ndarray) -> list[np.ndarray]:
        """Return starts for a grid of exponents, best first, each with the E, A, B and g of least squares."""
        grid = {"alpha": (0.1, 0.2, 0.35, 0.5, 0.8, 1.2), "sparsity": (0.0, 0.3, 0.6), "gamma": (0.3, 0.6, 1.2)}
        grid["beta"] = grid["alpha"]
        choices = [
            grid.get(name, (0.0,)) if low < high else (low,)
            for name, (low, high) in zip(NAMES, self.bounds, strict=True)
        ]
        found: list[tuple[float, int, np.ndarray]] = []
        linear = [index for index in np.flatnonzero(~EXPONENTS) if self.bounds[index][0] > NONE]
        for values in product(*choices):
            theta = np.array(values)
            logs, shares = self.log_loss(theta)
            columns = shares[linear] * np.exp(logs - losses)  # with E, A, B, g = 1: each term over the loss
            solved, _ = nnls(columns.T, np.ones(len(losses)))
            theta[linear] = np.log(np.maximum(solved, 1e-2))
            found.append((self.objective(theta, losses)[0], len(found), theta))
        return [theta for *_, theta in sorted(found)]

    def solve(self, losses: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
        """Return the best constants found from the starts."""
        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": 1e-7}
        tried = [
            minimize(self.objective, one, losses, "L-BFGS-B", jac=True, bounds=self.bounds, options=options)
            for one in starts
        ]
        return min(tried, key=lambda result: result.fun).x

    def law(self, theta: np.ndarray) -> Law:
        """Return the law without the shift to the points' means."""
        E, A, B, alpha, beta, sparsity, g, gamma = (float(value) for value in theta)
        active, tokens, ratio, granularity = self.centers
        size = alpha * (active + sparsity * ratio)
        grain = math.exp(g + size + gamma * granularity) if g > NONE else 0.0
        return Law(math.exp(E), math.exp(A + size), math.exp(B + beta * tokens), alpha, beta, sparsity, grain, gamma)
