"""JSON-lines files whose last line may be incomplete."""

import functools
import sys
from pathlib import Path
from typing import Any

from msgspec import defstruct

from smolds_dist.errors import ConfigError
from smolds_dist.inputs import ROWS_BYTES, Count, Time, convert, parse_json, printable, read_bytes

RESTARTS = "restarts.jsonl"  # in a run's folder, written by `launching.restarts`


# Fields read from rows of metrics.jsonl, samples.jsonl and restarts.jsonl in addition to step, by type; a row with other
# types is damaged.
_FIELDS: tuple[tuple[Any, str], ...] = (
    (Count, "tokens seen_texts unique_texts dense_layers number failed_after"),
    (Time, "time"),
    (float, "tokens_per_s mfu memory_gb max_logit"),
    (float | None, "loss val_loss val_bits_per_byte val_max_vio lr grad_norm max_vio max_vio_window"),
    (str, "event text prompt cause logs"),
    (dict[str, float], "epochs seconds grad_norms tasks"),
    (dict[str, str], "versions"),
    (dict[str, Any], "data"),
    (list[float], "router_entropy max_activation max_logits"),
    (dict[str, list[float | None]], "weight gradient update"),
    (list[list[float]], "load bias router_histogram"),
)
_OPTIONAL = [(name, kind, None) for kind, names in _FIELDS for name in names.split()]
Row: Any = defstruct("Row", [("step", Count), *_OPTIONAL], module=__name__)


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a file such as metrics.jsonl; no rows if it is missing.

    A damaged line is skipped with a warning, an incomplete last line, as a killed writer leaves it, silently.

    Raises:
        ConfigError: for a path that is not a regular file.
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
    """Parse a line as an object with a step and values of the types of `Row`; return None for any other."""
    try:
        row = parse_json(line, Path("row"), "", dict[str, Any])
        convert(row, Row, Path("row"), "")
    except ConfigError:
        return None
    return row


@functools.cache
def _warn_of_damage(path: Path, number: int) -> None:
    """Warn once per process."""
    print(printable(f"smolds: line {number} of {path} is damaged; it is skipped."), file=sys.stderr, flush=True)
