"""The rows of a run's files, metrics.jsonl and samples.jsonl: written, read and put together."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from smolds_dist.files import replace_text
from smolds_dist.inputs import convert, read_yaml
from smolds_dist.rows import read_rows
from smolds_dist.settings import RunConfig

WINDOW = 100  # steps of the wider MaxVio


def is_kept(step: int, digits: int) -> bool:
    """Steps with nothing but zeros after their first `digits` digits: 9 x 10^(digits - 1) of them per power of ten."""
    return step % max(1, 10 ** (len(str(step)) - digits)) == 0


def rounded(values: Tensor) -> list:
    """Nested lists of numbers that are short in JSON."""
    return values.double().cpu().round(decimals=5).tolist()


def read_settings(run: Path, filled: bool = True) -> dict[str, Any]:
    """A run's config.yaml, its values of the settings' types; raises a `ConfigError` for one that is damaged.

    Args:
        filled: with defaults for what it lacks.
    """
    path, fix = run / "config.yaml", "restore it from a copy, or from `config` in a checkpoint's manifest.json"
    settings = read_yaml(path, fix, dict[str, dict[str, Any]])
    config = convert(settings, RunConfig, path, fix)
    return asdict(config) if filled else settings


def truncate_rows(path: Path, last_step: int) -> list[dict]:
    """Removes the rows of later steps, and a line that a killed writer left unfinished; returns the others.

    The file is never half there.
    """
    if not path.exists():
        return []
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def recent_losses(path: Path, last_step: int) -> list[float]:
    """The losses of the steps up to `last_step` that were trained on."""
    return [row["loss"] for row in read_rows(path) if row["step"] <= last_step and row.get("loss") is not None]


def dense_layers(rows: list[dict]) -> int:
    """How many leading layers of a run have no experts: what rows say of layers begins after these."""
    return next((row["dense_layers"] for row in reversed(rows) if "dense_layers" in row), 0)


def load_table(rows: list[dict], last: int = 20) -> str:
    """Each expert's share of the routed tokens per layer, over the last training rows, as text."""
    loads = [row["load"] for row in rows if "load" in row][-last:]
    if not loads:
        return "(no training steps)"
    load_LE = np.mean(loads, 0)
    lines = ["layer " + "".join(f"{f'e{expert}':>7}" for expert in range(load_LE.shape[1])) + "  MaxVio"]
    for layer, shares in enumerate(load_LE, dense_layers(rows)):
        cells = "".join(f"{share:>7.1%}" for share in shares)
        lines.append(f"{layer:>5} {cells}  {max(shares) * len(shares) - 1:>6.2f}")
    return "\n".join(lines)
