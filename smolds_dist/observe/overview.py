"""Overview of a run: progress, losses, speed and events."""

import math
from collections import defaultdict
from itertools import pairwise

from smolds_dist.checkpoint.files import Manifest
from smolds_dist.observe.summary import facts
from smolds_dist.progress import duration

SMOOTHING = 0.9  # weight of the previous average, in the smoothed curves of plots
EVENTS = {
    "start": "after step {step}: started on {host}, {topology} ({versions})",
    "rollback": "step {step}: rolled back here from a loss spike in steps {spike_begin} to {spike_end}, {skipped_samples} "
    "samples skipped",
    "stage": "step {step}: stage {number} begins, {global_batch} sequences of {seq_len} tokens per step",
    "restart": "after step {step}: restart {number}, because after step {failed_after} {cause}",
    "slow_rank": "step {step}: rank {rank} on host {host} was a straggler: {times} times the others' compute time",
    "skipped": "step {step}: loss or gradient not finite, update skipped",
    "outlier": "step {step}: loss or gradient norm far above those of the steps before, update skipped",
}


def column_of(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of the rows that have this value."""
    found = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in found], [row[name] for row in found]


def smooth(values: list[float]) -> list[float]:
    """Return the exponential moving average, without bias towards the first value."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + 1 - SMOOTHING
        smooth.append(total / weight)
    return smooth


def overview(rows: list[dict], manifests: list[Manifest]) -> list[tuple]:
    """Return names and values from the rows of a metrics.jsonl with steps, and the checkpoints' manifests, newest first."""
    steps = [row for row in rows if "loss" in row]
    last = steps[-1]
    seconds = sum((after["tokens"] - before["tokens"]) / after["tokens_per_s"] for before, after in pairwise(steps))
    table: list[tuple] = [("steps", f"{last['step']:,}"), ("tokens", f"{last['tokens']:,}")]
    table.append(("time in steps", duration(seconds)))
    if last["loss"] is not None:
        table.append(("last training loss", f"{last['loss']:.4f}"))
    evaluations = [row for row in rows if "val_loss" in row]
    if evaluations:
        best = min(evaluations, key=lambda row: row["val_loss"])
        table.append(("best validation loss", f"{best['val_loss']:.4f} at step {best['step']}"))
    table += facts(rows).items()
    if manifests:
        table.append(("parameters", f"{parameters_of(manifests[-1].tensors):,}"))
        table.append(("versions", format_versions(manifests[-1].versions)))
    return table


def format_versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def events(rows: list[dict]) -> list[str]:
    """Return a line for each event of a run."""
    lines = []
    for row in rows:
        kind = next((name for name in ("outlier", "skipped") if row.get(name)), row.get("event"))
        if kind in EVENTS:
            known = defaultdict(lambda: "?", row | {"versions": format_versions(row.get("versions", {}))})
            lines.append(EVENTS[kind].format_map(known))
    return lines


def parameters_of(shapes: dict[str, list[int]]) -> int:
    return sum(map(math.prod, shapes.values()))
