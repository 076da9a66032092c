"""`smolds bench balance`: how even the experts' load is and how low the loss gets, by way of balancing.

Every way trains the same model, from the same weights, on the same tokens, in one process. MaxVio is counted over the whole
held-out split together (the global MaxVio of arXiv 2408.15664, table 2: 0.04 with the bias, 0.72 with the auxiliary loss).
"""

import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from smolds_dist.bench.common import bench_parser, check_at_least_one, keep, parse, rows_of_training
from smolds_dist.bench.train import processor, say

WAYS = ("bias", "aux_loss", "none")


def bench_balance(args: list[str]) -> None:
    """Trains, prints a table and, with --json, writes all numbers.

    Raises:
        ConfigError: for options that are none, and where a training fails.
    """
    parser = bench_parser("balance", __doc__)
    parser.set_defaults(preset="debug")
    parser.add_argument("--steps", type=int, default=2000, help="of each training")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each way, from different weights")
    options, settings = parse(parser, args)
    check_at_least_one(options, "steps", "seeds")
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="bench-balance-") as folder:
        for seed, way in product(range(options.seeds), WAYS):
            say(f"{way}, {options.steps} steps, seed {seed}")
            given = [
                "--preset", options.preset, "--parallel.engine=local", f"--train.steps={options.steps}",
                f"--train.balance={way}", "--train.eval_sequences=1000000000", f"--train.seed={seed}",
                "--log.tensorboard=false",
                # Of many documents: those of a small split are not like all the others.
                "--data.val_fraction=0.05",
                f"--run.dir={folder}", f"--run.name={way}-{seed}", *settings,
            ]  # fmt: skip
            results[way].append(train(given, Path(folder) / f"{way}-{seed}"))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor(),
        "preset": options.preset,
        "settings": settings,
        "steps": options.steps,
        "ways": results,
    }
    keep(options, result)
    print(table(result))


def train(given: list[str], run_dir: Path) -> dict[str, float]:
    """What a run says at its end."""
    rows = rows_of_training(given, run_dir)
    evaluation = next(row for row in reversed(rows) if "val_loss" in row)
    last = next(row for row in reversed(rows) if "max_vio" in row)
    names = ("val_max_vio", "val_loss", "val_bits_per_byte")
    return {name: evaluation[name] for name in names} | {"max_vio_window": last["max_vio_window"]}


def table(result: dict[str, Any]) -> str:
    """Means over the seeds, by way of balancing."""
    lines = [
        f"{result['preset']}, {result['steps']:,} steps, held-out split",
        f"{'balance':10}{'MaxVio':>8}{'MaxVio, training':>18}{'loss':>9}{'bits per byte':>15}",
    ]
    for way, runs in result["ways"].items():
        mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
        lines.append(
            f"{way:10}{mean['val_max_vio']:>8.3f}{mean['max_vio_window']:>18.3f}{mean['val_loss']:>9.4f}"
            f"{mean['val_bits_per_byte']:>15.4f}"
        )
    return "\n".join(lines)
