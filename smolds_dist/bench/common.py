"""What benchmarks share, those of `benchmarks/` among them: options and results."""

import argparse
import json
from pathlib import Path
from typing import Any

from smolds_dist.config import load_config
from smolds_dist.errors import OptionParser
from smolds_dist.parallel.topology import detect_machine


def bench_parser(command: str, doc: str | None) -> OptionParser:
    """The options that every benchmark has, described by the first line of its module's docstring."""
    parser = OptionParser(
        prog=command,
        description=(doc or "").partition("\n")[0],
        example=f"{command} --preset debug --json {command.split()[-1]}.json",
    )
    parser.add_argument("--preset", default="smollm2-deepseek-255m", help="model")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser


def add_dtype(parser: OptionParser) -> None:
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="bf16 where this machine multiplies it fast, else fp32"
    )


def parse(parser: OptionParser, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own options, and settings such as --model.num_hidden_layers=4, which change the preset.

    Raises:
        ConfigError: for options that are neither.
    """
    options, settings = parser.parse_known_args(args)
    load_config(["--preset", options.preset, *settings], parser.prog, benchmark=True)
    if getattr(options, "dtype", "") is None:
        options.dtype = "bf16" if detect_machine().bf16 else "fp32"
    return options, settings


def keep(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes a result to the file that --json names, if it does."""
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
