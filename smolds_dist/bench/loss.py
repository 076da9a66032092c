"""`smolds bench loss`: seconds and tokens until a validation loss, against transformers' Trainer.

smolds trains for --steps, with Muon unless told otherwise; the loss that it reaches is the target. The Trainer trains the
same architecture (ERNIE MoE) on the same text, with the same tokenizer, sequences and batch: once as it comes, and with
the best of several learning rates, for longer and longer until it reaches the target, each time with its whole schedule.
Seconds are steps times the median of a step's seconds; evaluation and start are left out.
"""

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from smolds_dist.bench.common import bench_parser, check_at_least_one, keep, parse, rows_of_training, run_python
from smolds_dist.bench.train import processor, say
from smolds_dist.bench.trainer import Job
from smolds_dist.config import load_config

LONGER = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # times the steps of smolds


def bench_loss(args: list[str]) -> None:
    """Trains, prints a table and, with --json, writes all numbers.

    Raises:
        ConfigError: for options that are none, and where a training fails.
    """
    parser = bench_parser("loss", __doc__)
    parser.set_defaults(preset="debug")
    parser.add_argument("--steps", type=int, help="of smolds; the preset's where not given")
    parser.add_argument("--longest", type=float, default=4.0, help="give the Trainer up after so many times its steps")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="of the Trainer")
    options, settings = parse(parser, args)
    with tempfile.TemporaryDirectory(prefix="bench-loss-") as folder:
        given = [
            "--preset", options.preset, "--train.optimizer=muon", *settings, f"--run.dir={folder}", "--run.name=smolds",
        ]  # fmt: skip
        if options.steps is not None:
            check_at_least_one(options, "steps")
            given.append(f"--train.steps={options.steps}")
        result = measure(given, Path(folder), options.longest, options.learning_rates)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor(),
        "preset": options.preset,
        "settings": settings,
    } | result
    keep(options, result)
    print(table(result))


def measure(given: list[str], folder: Path, longest: float, rates: list[float]) -> dict[str, Any]:
    """The target, and what everyone needs for it."""
    from smolds_dist.data.prepare import prepare_data

    steps = load_config(given).train.steps
    prepare_data(load_config(given))
    say(f"smolds, {steps} steps")
    ours = train_smolds(given, folder / "smolds")

    def trainer(rate: float | None, times: float = 1.0) -> dict[str, Any]:
        job = Job(given, max(1, round(steps * times)), rate)
        say(f"Trainer, {job.steps} steps, learning rate {rate or 'as it comes'}")
        found = json.loads(run_python(["-m", "smolds_dist.bench.trainer", json.dumps(asdict(job))]).splitlines()[-1])
        say(f"  validation loss {found['val_loss']:.4f} (target {ours['val_loss']:.4f}), {found['seconds']:.0f} s")
        return found

    tried = {rate: trainer(rate) for rate in rates}
    best = min(tried, key=lambda rate: tried[rate]["val_loss"])

    def until_target(rate: float | None, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for times in LONGER:
            if found[-1]["val_loss"] > ours["val_loss"] and times <= longest:
                found.append(trainer(rate, times))
        return found

    runs = {f"Trainer, learning rate {best:g}": until_target(best, [tried[best]])}
    longest_way = trainer(None, longest)  # most likely far from the target, which spares all shorter ways
    too_far = longest_way["val_loss"] > ours["val_loss"]
    runs["Trainer as it comes"] = [longest_way] if too_far else until_target(None, [trainer(None)])
    return {
        "target": ours["val_loss"],
        "smolds": ours,
        "trainer": runs,
        "learning_rates": {f"{rate:g}": found["val_loss"] for rate, found in tried.items()},
    }


def train_smolds(given: list[str], run_dir: Path) -> dict[str, Any]:
    """Our own training, in a process of its own as the others."""
    rows = rows_of_training(given, run_dir)
    steps = [row for row in rows if "tokens_per_s" in row]
    tokens = steps[0]["tokens"]
    seconds = median(tokens / row["tokens_per_s"] for row in steps) * len(steps)
    val_loss = next(row["val_loss"] for row in reversed(rows) if "val_loss" in row)
    return {"steps": len(steps), "tokens": steps[-1]["tokens"], "seconds": seconds, "val_loss": val_loss}


def table(result: dict[str, Any]) -> str:
    """Everyone's way to the target; the last try of those that did not reach it."""
    ours = result["smolds"]
    lines = [
        f"{result['preset']}, until a validation loss of {result['target']:.4f}",
        f"{'':34}{'steps':>7}{'tokens':>12}{'seconds':>9}{'of its seconds':>16}{'loss':>9}",
        f"{'smolds':34}{ours['steps']:>7,}{ours['tokens']:>12,}{ours['seconds']:>9,.1f}{'':>16}{ours['val_loss']:>9.4f}",
    ]
    for name, runs in result["trainer"].items():
        last = runs[-1]
        reached = last["val_loss"] <= result["target"]
        ratio = f"{'' if reached else 'under '}{ours['seconds'] / last['seconds']:.2f}"
        lines.append(
            f"{name + ('' if reached else ', not reached'):34}{last['steps']:>7,}{last['tokens']:>12,}"
            f"{last['seconds']:>9,.1f}{ratio:>16}{last['val_loss']:>9.4f}"
        )
    return "\n".join(lines)
