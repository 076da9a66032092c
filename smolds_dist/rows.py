"""Rows of JSON, a line each, of which the last may be unfinished."""

import json
from pathlib import Path

RESTARTS = "restarts.jsonl"  # in a run's folder, what `launching.restarts` notes there


def read_rows(path: Path) -> list[dict]:
    """The rows of a file such as metrics.jsonl, none where it is missing; a last line that a killed writer left unfinished
    is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
