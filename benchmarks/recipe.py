"""`python -m benchmarks recipe`: minutes that a preset's full run takes on this machine, from some measured steps.

By default the local recipe: 10,000 steps of 8 x 512 tokens. Its text and tokenizer are on the Hub, so steps are measured on
the standard library's text, with as large a vocabulary. Evaluations, samples and checkpoints are excluded; the time from the
command to the first step, with compilation, is listed.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import OFFLINE, rows_of_training, run_python
from smolds_dist.bench.common import bench_parser, parse, write_result
from smolds_dist.bench.train import log, processor
from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.topology import detect_machine, has_compiler
from smolds_dist.training.compiling import should_compile

WARM_UP = 20  # steps that do not count: some allocate, and the first ten are measured in detail
WAYS = {
    "uncompiled": ("--train.compile=false",),
    "compiled": ("--train.compile=true",),
    "compiled, without document mask": ("--train.compile=true", "--data.document_mask=false"),
}


def main(args: list[str]) -> None:
    """Measure, print a table and, with --json, write all numbers.

    Raises:
        ConfigError: for unknown options, and if a run fails.
    """
    parser = bench_parser("python -m benchmarks recipe", __doc__)
    parser.set_defaults(preset="smollm2-deepseek-255m-local")
    parser.add_argument("--steps", type=int, default=100, help=f"measured steps, after {WARM_UP} to warm up")
    options, settings = parse(parser, args)
    with tempfile.TemporaryDirectory(prefix="bench-recipe-") as folder:
        result = measure(options, settings, Path(folder))
    write_result(options, result)
    print(table(result))


def measure(options: argparse.Namespace, settings: list[str], folder: Path) -> dict[str, Any]:
    """Return the seconds of a step and before the first one, in each way."""
    given = ["--preset", options.preset, *OFFLINE, *settings, f"--run.dir={folder}"]
    config, machine = load_config(given), detect_machine()
    steps, tokens = config.train.steps, config.train.global_batch * config.data.seq_len
    given += [f"--train.steps={WARM_UP + options.steps}", "--train.eval_sequences=1", "--log.sample_tokens=1"]
    log("tokenizing")
    run_python(["-m", "smolds_dist", "data", "prepare", "--", *given])
    ways: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for number, (name, more) in enumerate(WAYS.items()):
        log(name)
        began = time.time()
        try:
            rows = rows_of_training([*given, *more, f"--run.name=way_{number}"], folder / f"way_{number}")
        except ConfigError as error:
            log(f"  {error}")
            failed[name] = str(error)
            continue
        trained = [row | {"step_seconds": tokens / row["tokens_per_s"]} for row in rows if "tokens_per_s" in row]
        measured = trained[WARM_UP:]
        seconds = mean(row["step_seconds"] for row in measured)
        ways[name] = {
            "step_seconds": seconds,
            "minutes": seconds * steps / 60,
            "start_seconds": trained[0]["time"] - trained[0]["step_seconds"] - began,
            "peak_seconds": steps * mean(row["step_seconds"] * row["mfu"] for row in measured),
        }
    if not ways:
        raise ConfigError(next(iter(failed.values())))
    kind = machine.devices[0]
    matmuls = min(way["peak_seconds"] for way in ways.values())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor() if kind == "cpu" else machine.name,
        "preset": options.preset,
        "settings": settings,
        "steps": steps,
        "tokens_per_step": tokens,
        "ways": ways,
        "failed": failed,
        "auto_compiles": should_compile("auto", kind, matmuls, has_compiler(kind)),
    }


def table(result: dict[str, Any]) -> str:
    """Format the minutes of each way."""
    lines = [
        f"{result['preset']}: {result['steps']:,} steps of {result['tokens_per_step']:,} tokens on {result['machine']}; "
        f"--train.compile auto {'compiles' if result['auto_compiles'] else 'does not compile'}",
        f"{'':34}{'ms/step':>10}{'tokens/s':>11}{'minutes':>9}{'start, s':>10}{'matmuls at peak, minutes':>26}",
    ]
    for name, one in result["ways"].items():
        lines.append(
            f"{name:34}{1e3 * one['step_seconds']:>10,.1f}{result['tokens_per_step'] / one['step_seconds']:>11,.0f}"
            f"{one['minutes']:>9,.1f}{one['start_seconds']:>10,.0f}{one['peak_seconds'] / 60:>26,.2f}"
        )
    lines += [f"{name} failed: {text}" for name, text in result["failed"].items()]
    minutes = ", ".join(f"{one['minutes']:,.1f} {name}" for name, one in result["ways"].items())
    return "\n".join([*lines, f"minutes of {result['steps']:,} steps: {minutes}"])
