"""`smolds bench balance`: how even the experts' load is and how low the loss gets, by way of balancing.

Every way trains the same model, from the same weights, on the same tokens, in one process. MaxVio is counted over the whole
held-out split together (the global MaxVio of arXiv 2408.15664, table 2: 0.04 with the bias, 0.72 with the auxiliary loss).
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from smolds_dist.bench import bench_parser, check_at_least_one, parse
from smolds_dist.bench.train import processor, say
from smolds_dist.errors import ConfigError
from smolds_dist.training.metrics import read_rows

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
    folder = Path(tempfile.mkdtemp(prefix="bench-balance-"))
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        for seed in range(options.seeds):
            for way in WAYS:
                say(f"{way}, {options.steps} steps, seed {seed}")
                given = [
                    "--preset", options.preset, "--parallel.engine=local", f"--train.steps={options.steps}",
                    f"--train.balance={way}", "--train.eval_every=0", "--train.eval_sequences=1000000000",
                    f"--train.seed={seed}", "--checkpoint.every=0", "--log.sample_every=0", "--log.tensorboard=false",
                    # Of many documents: those of a small split are not like all the others.
                    "--data.val_fraction=0.05",
                    f"--run.dir={folder}", f"--run.name={way}-{seed}", *settings,
                ]  # fmt: skip
                results[way].append(train(given, folder / f"{way}-{seed}"))
    finally:
        shutil.rmtree(folder)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor(),
        "preset": options.preset,
        "settings": settings,
        "steps": options.steps,
        "ways": results,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def train(args: list[str], run_dir: Path) -> dict[str, float]:
    """What a run of `smolds train` has written at its end.

    Raises:
        ConfigError: with the last thing that it said, where it fails.
    """
    command = [sys.executable, "-m", "smolds_dist", "train", "-q", *args]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise ConfigError(f"{' '.join(command)} failed: {finished.stderr.strip().splitlines()[-1]}")
    rows = read_rows(run_dir / "metrics.jsonl")
    evaluation = next(row for row in reversed(rows) if "val_loss" in row)
    last = next(row for row in reversed(rows) if "max_vio" in row)
    return {
        "val_max_vio": evaluation["val_max_vio"],
        "max_vio_window": last["max_vio_window"],
        "val_loss": evaluation["val_loss"],
        "val_bits_per_byte": evaluation["val_bits_per_byte"],
    }


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
