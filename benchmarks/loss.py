"""`python -m benchmarks loss`: time to a validation loss, with Muon, with AdamW, and by transformers' Trainer.

smolds trains for --steps, by default with Muon; its final validation loss is the target. The others train on the same text,
with the same tokenizer, sequences and batch, and the best of several learning rates, for increasing numbers of steps until
they reach the target, each time with a full schedule: smolds itself with AdamW, and the Trainer with the same architecture
(ERNIE MoE), also with its default learning rate. With several --ranks the Trainer is excluded. Seconds are steps times the
median step time; evaluation and startup are excluded.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import rows_of_training, run_python
from benchmarks.trainer import Job
from smolds_dist.bench.common import bench_parser, parse, write_result
from smolds_dist.bench.train import log, processor
from smolds_dist.config import load_config

LONGER = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # multiples of smolds' steps
Train = Callable[[float | None, int], dict[str, Any]]  # of a learning rate (None: default) and a number of steps


def main(args: list[str]) -> None:
    """Train, print a table and, with --json, write all numbers.

    Raises:
        ConfigError: for unknown options, and if a run fails.
    """
    parser = bench_parser("python -m benchmarks loss", __doc__)
    parser.set_defaults(preset="debug")
    parser.add_argument("--steps", type=int, help="steps of smolds; default: the preset's")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of smolds; the Trainer runs only if 1")
    parser.add_argument("--longest", type=float, default=4.0, help="largest multiple of smolds' steps for the others")
    rates = "learning rates that the others try"
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help=rates)
    options, settings = parse(parser, args)
    with tempfile.TemporaryDirectory(prefix="bench-loss-") as folder:
        given = ["--preset", options.preset, "--train.optimizer=muon", *settings, f"--run.dir={folder}"]
        if options.steps is not None:
            given.append(f"--train.steps={options.steps}")
        result = measure(given, options, Path(folder))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor(),
        "preset": options.preset,
        "ranks": options.ranks,
        "settings": settings,
    } | result
    write_result(options, result)
    print(table(result))


def measure(given: list[str], options: Any, folder: Path) -> dict[str, Any]:
    """Measure the target, and the steps and seconds that each contender needs to reach it."""
    from smolds_dist.data.prepare import prepare_data

    config = load_config(given)
    target = config.train
    prepare_data(config)
    log(f"smolds, {target.steps} steps")
    ours = train_smolds(given, folder / "smolds", options.ranks)

    def adamw(rate: float | None, steps: int) -> dict[str, Any]:
        name = f"adamw-{rate}-{steps}"
        changed = ["--train.optimizer=adamw", f"--train.lr={rate}", f"--train.steps={steps}"]
        return train_smolds([*given, *changed], folder / name, options.ranks)

    def trainer(rate: float | None, steps: int) -> dict[str, Any]:
        job = json.dumps(asdict(Job(given, steps, rate)))
        return json.loads(run_python(["-m", "benchmarks.trainer", job]).splitlines()[-1])

    def train(name: str, contender: Train, rate: float | None, times: float) -> dict[str, Any]:
        steps = max(1, round(target.steps * times))
        log(f"{name}, {steps} steps, learning rate {rate or 'default'}")
        found = contender(rate, steps)
        log(f"  validation loss {found['val_loss']:.4f} (target {ours['val_loss']:.4f}), {found['seconds']:.0f} s")
        return found

    def until_target(
        name: str, contender: Train, rate: float | None, found: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        for times in LONGER:
            if found[-1]["val_loss"] > ours["val_loss"] and times <= options.longest:
                found.append(train(name, contender, rate, times))
        return found

    contenders: dict[str, Train] = {}
    if target.optimizer != "adamw":
        contenders["smolds with AdamW"] = adamw
    if options.ranks == 1:
        contenders["Trainer"] = trainer
    runs, losses = {}, {}
    for name, contender in contenders.items():
        tried = {rate: train(name, contender, rate, 1.0) for rate in options.learning_rates}
        best = min(tried, key=lambda rate: tried[rate]["val_loss"])
        runs[f"{name}, learning rate {best:g}"] = until_target(name, contender, best, [tried[best]])
        losses[name] = {f"{rate:g}": found["val_loss"] for rate, found in tried.items()}
    if options.ranks == 1:
        # If the longest run misses the target, skip all shorter ones.
        longest_run = train("Trainer", trainer, None, options.longest)
        too_far = longest_run["val_loss"] > ours["val_loss"]
        one = (
            [longest_run] if too_far else until_target("Trainer", trainer, None, [train("Trainer", trainer, None, 1.0)])
        )
        runs["Trainer as it comes"] = one
    return {"target": ours["val_loss"], "smolds": ours, "contenders": runs, "learning_rates": losses}


def train_smolds(given: list[str], run_dir: Path, ranks: int) -> dict[str, Any]:
    """Train smolds in its own processes, like the others."""
    rows = rows_of_training([*given, f"--run.name={run_dir.name}"], run_dir, ranks)
    steps = [row for row in rows if "tokens_per_s" in row]
    tokens = steps[0]["tokens"]
    seconds = median(tokens / row["tokens_per_s"] for row in steps) * len(steps)
    val_loss = next(row["val_loss"] for row in reversed(rows) if "val_loss" in row)
    return {"steps": len(steps), "tokens": steps[-1]["tokens"], "seconds": seconds, "val_loss": val_loss}


def table(result: dict[str, Any]) -> str:
    """Format each contender's run to the target, or its last one if it was not reached."""
    ours = result["smolds"]
    lines = [
        f"{result['preset']}, ranks: {result['ranks']}, until a validation loss of {result['target']:.4f}",
        f"{'':46}{'steps':>7}{'tokens':>12}{'seconds':>9}{'speedup':>16}{'loss':>9}",
        f"{'smolds':46}{ours['steps']:>7,}{ours['tokens']:>12,}{ours['seconds']:>9,.1f}{'':>16}{ours['val_loss']:>9.4f}",
    ]
    for name, runs in result["contenders"].items():
        last = runs[-1]
        reached = last["val_loss"] <= result["target"]
        ratio = f"{'' if reached else 'under '}{ours['seconds'] / last['seconds']:.2f}"
        lines.append(
            f"{name + ('' if reached else ', not reached'):46}{last['steps']:>7,}{last['tokens']:>12,}"
            f"{last['seconds']:>9,.1f}{ratio:>16}{last['val_loss']:>9.4f}"
        )
    return "\n".join(lines)
