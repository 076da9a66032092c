"""What a run writes while it trains: metrics.jsonl and TensorBoard scalars, by rank 0 alone.

Shape letters: L layers, E experts.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from smolds_dist.config import RunConfig
from smolds_dist.parallel.balancer import max_violation
from smolds_dist.train.append import AppendedFile


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and the same numbers to TensorBoard.

    Rows after `start_step`, which a resumed run will repeat, are removed from both and from `samples.jsonl`. A full disk
    stops neither training nor the file: rows wait in memory until they can be written.
    """

    def __init__(self, config: RunConfig, start_step: int):
        self._samples = config.run_dir / "samples.jsonl"
        for path in (config.run_dir / "metrics.jsonl", self._samples):
            keep_rows(path, start_step)
        self._file = AppendedFile(config.run_dir / "metrics.jsonl")
        self._board = None
        if config.log.tensorboard:
            from smolds_dist.train.tensorboard import Board

            size = config.model.num_hidden_layers, config.model.num_experts
            self._board = Board(config.run_dir / "tensorboard", start_step + 1, asdict(config), size)

    def training_row(self, row: dict, counts_LE: Tensor | None) -> dict:
        """Writes a step's row, with MaxVio and load from the routed tokens of the whole global batch; returns it.

        Args:
            counts_LE: None for a step whose update was skipped, because something was not finite; the row says so.
        """
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}
        if counts_LE is None:
            row["skipped"] = True
        else:
            load = counts_LE / counts_LE.sum(-1, keepdim=True)
            row["max_vio"] = round(max_violation(counts_LE).mean().item(), 5)
            row["load"] = [[round(share, 5) for share in layer] for layer in load.tolist()]
        return self.row(row)

    def row(self, row: dict) -> dict:
        """Writes any row: of training, an evaluation (`val_loss`, `val_bits_per_byte`), or an `event`; returns it."""
        row["time"] = round(time.time(), 3)
        self._file.append(json.dumps(row).encode() + b"\n")
        if self._board is not None:
            self._board.show(row)
        return row

    def samples(self, step: int, texts: dict[str, str]) -> None:
        """Adds a row to `samples.jsonl` for each prompt: step, prompt, text (the prompt included); none on a full disk."""
        rows = [{"step": step, "prompt": prompt, "text": text} for prompt, text in texts.items()]
        file = AppendedFile(self._samples)
        file.append("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.close()
        for row in rows:
            if self._board is not None:
                self._board.show_sample(row)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def keep_rows(path: Path, last_step: int) -> None:
    """Removes the rows of later steps, and a line that a killed writer left unfinished; the file is never half there."""
    if path.exists():
        part = path.with_suffix(".part")
        kept = [row for row in read_rows(path) if row["step"] <= last_step]
        part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        part.replace(path)


def recent_losses(path: Path, last_step: int) -> list[float]:
    """The losses of the steps up to `last_step` that were trained on."""
    return [row["loss"] for row in read_rows(path) if row["step"] <= last_step and row.get("loss") is not None]


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a killed writer left unfinished is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def load_table(rows: list[dict], last: int = 20) -> str:
    """Each expert's share of the routed tokens per layer, over the last training rows, as text."""
    loads = [row["load"] for row in rows if "load" in row][-last:]
    if not loads:
        return "(no training steps)"
    layers, experts = len(loads[0]), len(loads[0][0])
    lines = ["layer " + "".join(f"{f'e{expert}':>7}" for expert in range(experts)) + "  MaxVio"]
    for layer in range(layers):
        shares = [sum(load[layer][expert] for load in loads) / len(loads) for expert in range(experts)]
        cells = "".join(f"{share:>7.1%}" for share in shares)
        lines.append(f"{layer:>5} {cells}  {max(shares) * experts - 1:>6.2f}")
    return "\n".join(lines)
