"""`python -m benchmarks drift`: losses of compiled code and CUDA graphs, compared with those of plain code.

Runs train the same model on the same batches. In bf16 no two ways to compute a step give the same losses for long: compiled
code rounds fewer intermediate results, a token then chooses another expert, and the difference grows from step to step. So
there are two yardsticks: the plain run again, for a GPU's own order of sums, and a plain run with half of the micro batch,
for another rounding of the same sums. Fails if a loss of the first ten steps differs by more than --tolerance, a later one
by more than that and twice the yardsticks, or if nothing was compiled.
"""

import argparse
import math
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

FIRST = 10  # steps in which rounding has not grown yet
YARDSTICKS = ("plain again", "half micro batches")
GRAPHS = "with CUDA graphs"


def main(args: list[str]) -> None:
    """Train, print a table and, with --json, write all numbers.

    Raises:
        ConfigError: for unknown options, if a run fails, and if losses differ too much.
    """
    parser = bench_parser("python -m benchmarks drift", __doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--sequences", type=int, default=16, help="sequences per step, an even number")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference of a loss")
    options, settings = parse(parser, args)
    if options.sequences % 2:
        raise ConfigError(f"--sequences {options.sequences} is odd, and one run has two micro batches; add one.")
    with tempfile.TemporaryDirectory(prefix="bench-drift-") as folder:
        result = measure(options, settings, Path(folder))
    write_result(options, result)
    print(table(result))
    if wrong := check(result):
        raise ConfigError(wrong)


def measure(options: argparse.Namespace, settings: list[str], folder: Path) -> dict[str, Any]:
    """Return the losses of all runs, and the differences from the first."""
    from smolds_dist.observe.rows import read_rows

    machine = detect_machine()
    size = f"--train.micro_batch={options.sequences}"
    plain, compiled = (f"--train.compile={value}" for value in ("false", "true"))
    off = "--train.cuda_graphs=false"
    runs = {
        "plain": [size, plain, off],
        YARDSTICKS[0]: [size, plain, off],
        YARDSTICKS[1]: [f"--train.micro_batch={options.sequences // 2}", plain, off],
        "compiled": [size, compiled, off],
        **({GRAPHS: [size, compiled]} if machine.devices[0] == "cuda" else {}),
    }
    given = ["--preset", options.preset, *OFFLINE, *settings, *QUIET, f"--run.dir={folder}"]
    given += [f"--train.steps={options.steps}", f"--train.global_batch={options.sequences}", "--train.eval_sequences=1"]
    losses, shown = {}, {}
    for number, (name, more) in enumerate(runs.items()):
        log(f"{name}, {options.steps} steps")
        shown[name] = run_python(["-m", "smolds_dist", "train", *given, *more, f"--run.name=run_{number}"])
        rows = read_rows(folder / f"run_{number}" / "metrics.jsonl")
        losses[name] = [math.nan if row["loss"] is None else row["loss"] for row in rows if "lr" in row]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor() if machine.devices[0] == "cpu" else machine.name,
        "preset": options.preset,
        "settings": settings,
        "steps": options.steps,
        "tolerance": options.tolerance,
        "compiled": all("compiled in" in shown[name] for name in ("compiled", GRAPHS) if name in shown),
        "graphs": "micro batches run as CUDA graphs" in shown.get(GRAPHS, ""),
        "differences": {name: differences(losses["plain"], losses[name]) for name in runs if name != "plain"},
        "losses": losses,
    }


def differences(expected: list[float], actual: list[float]) -> dict[str, float]:
    """Return the largest relative difference in the first steps and in all, the mean size, and the mean with its sign."""
    relative = [(ours - theirs) / theirs for ours, theirs in zip(actual, expected, strict=True)]
    sizes = [abs(one) for one in relative]
    first, largest = (math.nan if any(map(math.isnan, some)) else max(some) for some in (sizes[:FIRST], sizes))
    return {"first": first, "largest": largest, "mean": mean(sizes), "bias": mean(relative)}


def check(result: dict[str, Any]) -> str | None:
    """Return why the result is not good, if it is not."""
    found = result["differences"]
    if not result["compiled"]:
        return "the model was not compiled, so there is nothing to compare; the run's log has the reason."
    if GRAPHS in found and not result["graphs"]:
        return "no CUDA graphs were recorded; the run's log has the reason."
    limit = max(result["tolerance"], *(2 * found[name]["largest"] for name in YARDSTICKS))
    for name in ("compiled", GRAPHS):
        one = found.get(name, found["compiled"])
        if not one["first"] <= result["tolerance"]:
            return (
                f"{name}: losses of the first {FIRST} steps differ by up to {one['first']:.1e}, more than --tolerance."
            )
        if not one["largest"] <= limit:
            return f"{name}: losses differ by up to {one['largest']:.1e}, more than {limit:.1e}, twice the yardsticks."
    return None


def table(result: dict[str, Any]) -> str:
    """Format the differences."""
    lines = [
        f"{result['preset']}, {result['steps']} steps on {result['machine']}: relative difference from a plain run's losses",
        f"{'':24}{f'first {FIRST}':>10}{'largest':>10}{'mean':>10}{'bias':>10}",
    ]
    for name, one in result["differences"].items():
        lines.append(f"{name:24}" + "".join(f"{one[kind]:>10.1e}" for kind in ("first", "largest", "mean", "bias")))
    return "\n".join(lines)
