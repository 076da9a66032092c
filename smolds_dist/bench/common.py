"""Options and results of benchmarks, also of those in `benchmarks/`."""

import argparse
import json
from pathlib import Path
from typing import Any

from smolds_dist.config import load_config
from smolds_dist.errors import OptionParser
from smolds_dist.parallel.topology import detect_machine


def bench_parser(command: str, doc: str | None) -> OptionParser:
    """Return a parser with the options of every benchmark, described by the first line of its module's docstring."""
    parser = OptionParser(
        prog=command,
        description=(doc or "").partition("\n")[0],
        example=f"{command} --preset debug --json {command.split()[-1]}.json",
    )
    parser.add_argument("--preset", default="smollm2-deepseek-255m", help="preset of the model")
    parser.add_argument("--json", type=Path, help="output file for the result")
    return parser


def add_dtype(parser: OptionParser) -> None:
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="default: bf16 if this machine has fast bf16 matmuls, else fp32"
    )


def parse(parser: OptionParser, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the benchmark's own options, and settings such as --model.num_hidden_layers=4, which override the preset's.

    Raises:
        ConfigError: for other options.
    """
    options, settings = parser.parse_known_args(args)
    load_config(["--preset", options.preset, *settings], parser.prog, benchmark=True)
    if getattr(options, "dtype", "") is None:
        options.dtype = "bf16" if detect_machine().bf16 else "fp32"
    return options, settings


def write_result(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write a result to the --json file, if set."""
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
