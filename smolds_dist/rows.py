"""Rows of JSON, a line each, of which the last may be unfinished."""

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError
from smolds_dist.inputs import ROWS_BYTES, Count, Time, convert, parse_json, printable, read_bytes

RESTARTS = "restarts.jsonl"  # in a run's folder, what `launching.restarts` notes there


@dataclass
class Row:
    """What is read of a row, in metrics.jsonl, samples.jsonl and restarts.jsonl; a row of other types is damaged."""

    step: Count
    time: Time = 0.0
    tokens: Count = 0
    loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    val_max_vio: float | None = None
    tokens_per_s: float = 0.0
    mfu: float = 0.0
    memory_gb: float = 0.0
    max_logit: float = 0.0
    lr: float | None = None
    grad_norm: float | None = None
    max_vio: float | None = None
    max_vio_window: float | None = None
    seen_texts: Count = 0
    unique_texts: Count = 0
    dense_layers: Count = 0
    number: Count = 0
    failed_after: Count = 0
    event: str = ""
    text: str = ""
    prompt: str = ""
    cause: str = ""
    logs: str = ""
    epochs: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    grad_norms: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    router_entropy: list[float] = field(default_factory=list)
    load: list[list[float]] = field(default_factory=list)
    bias: list[list[float]] = field(default_factory=list)
    router_histogram: list[list[float]] = field(default_factory=list)


def read_rows(path: Path) -> list[dict]:
    """The rows of a file such as metrics.jsonl, none if it is missing.

    Raises:
        ConfigError: for a path that is not a regular file.

    A damaged line costs that line alone: it is skipped, and named on standard error. So is, without a word, a last line that
    a killed writer left unfinished.
    """
    if not path.exists():
        return []
    rows = []
    lines = read_bytes(path, "move it away", ROWS_BYTES).split(b"\n")
    for number, line in enumerate(lines, 1):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            _warn_of_damage(path, number)
    return rows


def parse_row(line: bytes) -> dict | None:
    """The line's row, if it is one: an object with the number of its step, and values of the types of `Row`."""
    try:
        row = parse_json(line, Path("row"), "", dict[str, Any])
        convert(row, Row, Path("row"), "")
    except ConfigError:
        return None
    return row


@functools.cache
def _warn_of_damage(path: Path, number: int) -> None:
    """Once in a process."""
    print(printable(f"smolds: line {number} of {path} is damaged; it is skipped."), file=sys.stderr, flush=True)
