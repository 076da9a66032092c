"""The planner compared with published throughput: the runs of `published.yaml`, each predicted from its layout alone.

Two parameters of a GPU generation are in no data sheet: `utilization` and `overhead` in `costs/hardware.yaml`. `fit` fits
them on one half of the runs; the other half tests the planner. A run's name decides its half.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.hardware import Hardware, load_hardware
from smolds_dist.costs.layout import Layout
from smolds_dist.costs.step_time import StepTime, step_time
from smolds_dist.settings import Model

FILE = Path(__file__).with_name("published.yaml")
WITHIN = 0.25  # relative error up to which a prediction is a hit
HALVES = ("fitted", "tested")
# Keys of `hardware.yaml` that share both parameters: the same chip with other memory or links.
GENERATIONS = (("a100", "a800"), ("h100", "h200", "h800"), ("b200",), ("gb200",))
UTILISATIONS = tuple(percent / 100 for percent in range(10, 91, 2))
OVERHEADS = tuple(half / 2000 for half in range(1, 25))  # seconds: 0.5 to 12 ms
ENOUGH = 4  # minimum runs to fit both; with fewer, a single run moves the pair across the grid


@dataclass(frozen=True)
class Run:
    """One published run, in the planner's terms."""

    name: str  # unique
    source: str
    model: Model
    hardware: str  # a key of `hardware.yaml`
    layout: Layout
    published: float  # tokens per second and device

    @property
    def half(self) -> str:
        """Half by the parity of the name's SHA-256, so that nobody chooses the fitted runs."""
        return HALVES[hashlib.sha256(self.name.encode()).digest()[-1] % 2]


@dataclass(frozen=True)
class Comparison:
    """One run and its prediction, in tokens per second and device."""

    run: Run
    predicted: float
    step: StepTime

    @property
    def ratio(self) -> float:
        return self.predicted / self.run.published

    @property
    def hit(self) -> bool:
        return abs(self.ratio - 1) <= WITHIN


def published_runs() -> list[Run]:
    """Return all runs of the file. A run's name has model, devices, number format, source and throughput, to be unique."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return [_run(entry, data) for entry in data["runs"]]


def _run(entry: dict[str, Any], data: dict[str, Any]) -> Run:
    model, key, source = Model(**data["models"][entry["model"]]), entry["hardware"], entry["source"]
    given = {"seq_len": 4096, "per_node": load_hardware(key).per_node, "zero": 1} | entry["layout"]
    layout = Layout(**given)
    if "tflops" in entry:
        figure = entry["tflops"]
        published = figure * 1e12 / flops_per_token(model, layout.seq_len)
    elif "gpu_hours_per_trillion" in entry:
        figure = entry["gpu_hours_per_trillion"]
        published = 1e12 / (figure * 3600)
    else:
        published = figure = entry["tokens_per_s"]
    name = f"{entry['model']} on {layout.world} {key}, {layout.dtype}, EP {layout.expert}, {source} {figure}"
    return Run(name, data["sources"][source], model, key, layout, published)


def predict_run(run: Run, machine: Hardware) -> Comparison:
    """Predict a run on a machine."""
    step = step_time(run.model, run.layout, machine)
    return Comparison(run, run.layout.tokens_per_step / run.layout.world / step.total, step)


def compare() -> list[Comparison]:
    """Return all published runs, each with its prediction by `hardware.yaml`."""
    return [predict_run(run, load_hardware(run.hardware)) for run in published_runs()]


def error_factor(found: Sequence[Comparison]) -> float:
    """Return the median factor by which predictions are off, up or down."""
    return math.exp(median(abs(math.log(one.ratio)) for one in found))


def fit() -> dict[str, tuple[float, float, int]]:
    """Return utilization, overhead in seconds, and the number of fitted runs, for each key of `GENERATIONS`.

    On the fitted half only: the pair of the grid with the least mean of |ln(predicted / published)|, which is less sensitive
    to outliers than a mean of squares; the first of equals. A generation with fewer than `ENOUGH` runs takes the overhead of
    the next one, and with none also its utilization.
    """
    runs = [run for run in published_runs() if run.half == "fitted"]
    machines = {run.hardware: load_hardware(run.hardware) for run in runs}
    found: dict[str, tuple[float, float, int]] = {}
    newer: tuple[float, float] | None = None
    for keys in reversed(GENERATIONS):
        own = [run for run in runs if run.hardware in keys]
        overheads = OVERHEADS if newer is None or len(own) >= ENOUGH else (newer[1],)
        pairs = [(share, seconds) for share in UTILISATIONS for seconds in overheads]
        if own or newer is None:
            newer = min(pairs, key=lambda pair: _misfit(own, machines, *pair))
        found |= {key: (*newer, len(own)) for key in keys}
    return found


def _misfit(runs: Sequence[Run], machines: dict[str, Hardware], utilization: float, overhead: float) -> float:
    tried = {key: replace(machine, utilization=utilization, overhead=overhead) for key, machine in machines.items()}
    return fmean(abs(math.log(predict_run(run, tried[run.hardware]).ratio)) for run in runs)
