"""`python -m benchmarks drift`: losses of compiled code and CUDA graphs, compared with those of plain code.

Three runs train the same model on the same batches: plain, plain again, and compiled with CUDA graphs where these are
possible. Compiled code rounds fewer intermediate results, and in bf16 a token may then choose another expert. The second plain
run shows what a GPU's own order of sums changes. Fails if a loss differs by more than --tolerance, or nothing was compiled.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import OFFLINE, QUIET, run_python
from smolds_dist.bench.common import bench_parser, parse, write_result
from smolds_dist.bench.train import log, processor
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.topology import detect_machine

PLAIN = ("--train.compile=false", "--train.cuda_graphs=false")
RUNS = {"plain": PLAIN, "plain again": PLAIN, "compiled": ("--train.compile=true", "--train.cuda_graphs=auto")}


def main(args: list[str]) -> None:
    """Train, print a table and, with --json, write all numbers.

    Raises:
        ConfigError: for unknown options, if a run fails, and if losses differ by more than the tolerance.
    """
    parser = bench_parser("python -m benchmarks drift", __doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--sequences", type=int, default=16, help="sequences per step")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference of a step's loss")
    options, settings = parse(parser, args)
    with tempfile.TemporaryDirectory(prefix="bench-drift-") as folder:
        result = measure(options, settings, Path(folder))
    write_result(options, result)
    print(table(result))
    if not result["compiled"]:
        raise ConfigError("nothing was compiled, so there is nothing to compare; read the run's log for the reason.")
    largest = result["differences"]["compiled"]["largest"]
    if not largest <= options.tolerance:
        raise ConfigError(f"losses differ by up to {largest:.1e}, more than --tolerance {options.tolerance:g}.")


def measure(options: argparse.Namespace, settings: list[str], folder: Path) -> dict[str, Any]:
    """Return the losses of all runs, and the differences from the first."""
    from smolds_dist.observe.rows import read_rows

    machine = detect_machine()
    given = ["--preset", options.preset, *OFFLINE, *settings, *QUIET, f"--run.dir={folder}"]
    given += [f"--train.steps={options.steps}", f"--train.global_batch={options.sequences}", "--train.eval_sequences=1"]
    losses: dict[str, list[float]] = {}
    for name, more in RUNS.items():
        log(f"{name}, {options.steps} steps")
        shown = run_python(["-m", "smolds_dist", "train", *given, *more, f"--run.name={name}"])
        losses[name] = [row["loss"] for row in read_rows(folder / name / "metrics.jsonl") if "lr" in row]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor() if machine.devices[0] == "cpu" else machine.name,
        "preset": options.preset,
        "settings": settings,
        "steps": options.steps,
        "compiled": "compiled in" in shown,
        "graphs": "micro batches run as CUDA graphs" in shown,
        "differences": {name: differences(losses["plain"], losses[name]) for name in RUNS if name != "plain"},
        "losses": losses,
    }


def differences(expected: list[float], actual: list[float]) -> dict[str, float]:
    """Return the largest relative difference and its step, the mean size, and the mean with its sign."""
    relative = [(ours - theirs) / theirs for ours, theirs in zip(actual, expected, strict=True)]
    sizes = [abs(one) for one in relative]
    return {"largest": max(sizes), "mean": mean(sizes), "at_step": 1 + sizes.index(max(sizes)), "bias": mean(relative)}


def table(result: dict[str, Any]) -> str:
    """Format the differences."""
    lines = [
        f"{result['preset']}, {result['steps']} steps on {result['machine']}: relative difference of losses from a plain run",
        f"{'':44}{'largest':>10}{'at step':>9}{'mean':>10}{'bias':>10}",
    ]
    ways = [way for way in ("compiled", "graphs") if result[way]]
    for name, one in result["differences"].items():
        shown = " and ".join({"graphs": "CUDA graphs"}.get(way, way) for way in ways) if name == "compiled" else name
        lines.append(f"{shown:44}{one['largest']:>10.1e}{one['at_step']:>9}{one['mean']:>10.1e}{one['bias']:>10.1e}")
    return "\n".join(lines)
