"""Rows of JSON, a line each, of which the last may be unfinished."""

import functools
import json
import sys
from pathlib import Path

RESTARTS = "restarts.jsonl"  # in a run's folder, what `launching.restarts` notes there


def read_rows(path: Path) -> list[dict]:
    """The rows of a file such as metrics.jsonl, none if it is missing.

    A damaged line costs that line alone: it is skipped, and named on standard error. So is, without a word, a last line that
    a killed writer left unfinished.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            _warn_of_damage(path, number)
    return rows


def _row(line: bytes) -> dict | None:
    """The line's row, if it is one: an object with the number of its step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # a byte that is no UTF-8 among them
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


@functools.cache
def _warn_of_damage(path: Path, number: int) -> None:
    """Once in a process."""
    print(f"smolds: line {number} of {path} is damaged; it is skipped.", file=sys.stderr, flush=True)
