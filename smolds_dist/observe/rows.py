"""The rows of a run's files, metrics.jsonl and samples.jsonl: written, read and summarized."""

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
    """Return True for steps with only zeros after their first `digits` digits: 9 x 10^(digits - 1) per power of ten."""
    return step % max(1, 10 ** (len(str(step)) - digits)) == 0


def rounded(values: Tensor) -> list:
    """Return values rounded to five decimals, as nested lists for JSON."""
    return values.double().cpu().round(decimals=5).tolist()


def read_settings(run: Path, filled: bool = True) -> dict[str, Any]:
    """Return a run's config.yaml with values of the settings' types; raise a `ConfigError` if it is damaged.

    Args:
        filled: add defaults for missing settings.
    """
    path, fix = run / "config.yaml", "restore it from a copy, or from `config` in a checkpoint's manifest.json"
    settings = read_yaml(path, fix, dict[str, dict[str, Any]])
    config = convert(settings, RunConfig, path, fix)
    return asdict(config) if filled else settings


def truncate_rows(path: Path, last_step: int) -> list[dict]:
    """Remove rows after `last_step`, and an unfinished last line of a killed writer; return the others.

    The file is replaced atomically.
    """
    if not path.exists():
        return []
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def recent_losses(path: Path, before: int, last_step: int) -> list[float]:
    """Return the losses of the steps after `before` and up to `last_step` that were trained on."""
    return [row["loss"] for row in read_rows(path) if before < row["step"] <= last_step and row.get("loss") is not None]


def dense_layers(rows: list[dict]) -> int:
    """Return how many leading layers have no experts; per-layer lists in rows begin after them."""
    return next((row["dense_layers"] for row in reversed(rows) if "dense_layers" in row), 0)


def load_table(rows: list[dict], last: int = 20) -> str:
    """Return a text table of each expert's share of the routed tokens per layer, over the `last` training rows."""
    loads = [row["load"] for row in rows if "load" in row][-last:]
    if not loads:
        return "(no training steps)"
    load_LE = np.mean(loads, 0)
    lines = ["layer " + "".join(f"{f'e{expert}':>7}" for expert in range(load_LE.shape[1])) + "  MaxVio"]
    for layer, shares in enumerate(load_LE, dense_layers(rows)):
        cells = "".join(f"{share:>7.1%}" for share in shares)
        lines.append(f"{layer:>5} {cells}  {max(shares) * len(shares) - 1:>6.2f}")
    return "\n".join(lines)
