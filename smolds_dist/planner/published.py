"""The planner against published throughput: `published.yaml`'s runs, each predicted from its layout alone."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from smolds_dist.config import Model
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.hardware import load_hardware
from smolds_dist.costs.layout import Layout
from smolds_dist.costs.step_time import StepTime, step_time

FILE = Path(__file__).with_name("published.yaml")
WITHIN = 0.25  # of the published figure counts as a hit


@dataclass(frozen=True)
class Comparison:
    """One run: tokens per second and device."""

    name: str
    source: str
    published: float
    predicted: float
    step: StepTime

    @property
    def ratio(self) -> float:
        return self.predicted / self.published

    @property
    def hit(self) -> bool:
        return abs(self.ratio - 1) <= WITHIN


def compare() -> list[Comparison]:
    """Every published run with its prediction."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    found = []
    for run in data["runs"]:
        model, machine = Model(**data["models"][run["model"]]), load_hardware(run["hardware"])
        layout = Layout(**({"seq_len": 4096, "per_node": machine.per_node, "zero": 1} | run["layout"]))
        if "tflops" in run:
            published = run["tflops"] * 1e12 / flops_per_token(model, layout.seq_len)
        elif "gpu_hours_per_trillion" in run:
            published = 1e12 / (run["gpu_hours_per_trillion"] * 3600)
        else:
            published = run["tokens_per_s"]
        step = step_time(model, layout, machine)
        predicted = layout.tokens_per_step / layout.world / step.total
        name = f"{run['model']} on {layout.world} {run['hardware']}, {layout.dtype}"
        found.append(Comparison(name, data["sources"][run["source"]], published, predicted, step))
    return found
