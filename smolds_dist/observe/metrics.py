"""What a run writes while it trains: metrics.jsonl, and the curves of TensorBoard and other trackers, by rank 0 alone.

Shape letters: L layers, E experts.
"""

import json
import math
import time
from collections import deque
from dataclasses import asdict

import torch
from torch import Tensor

from smolds_dist.files import AppendedFile
from smolds_dist.observe.rows import WINDOW, keep_rows, rounded
from smolds_dist.observe.trackers import Feed
from smolds_dist.parallel.balancer import max_violation
from smolds_dist.rules import trackers_in
from smolds_dist.settings import RunConfig


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and the same numbers to TensorBoard.

    Rows after `start_step`, which a resumed run will repeat, are removed from both and from `samples.jsonl`. A full disk
    stops neither training nor the file: rows wait in memory until they can be written.
    """

    def __init__(self, config: RunConfig, start_step: int):
        self._samples = config.run_dir / "samples.jsonl"
        path = config.run_dir / "metrics.jsonl"
        keep_rows(self._samples, start_step)
        rows = keep_rows(path, start_step)
        loads = [row["load"] for row in rows if "load" in row]
        self._recent = deque((torch.tensor(load) for load in loads[-WINDOW:]), maxlen=WINDOW)
        self._file = AppendedFile(path)
        self._board = None
        if config.log.tensorboard:
            from smolds_dist.observe.tensorboard import Board

            self._board = Board(config.run_dir / "tensorboard", start_step + 1, asdict(config))
        self._feeds = [Feed(name, config.run_dir, asdict(config), rows) for name in trackers_in(config.log.to)]

    def training_row(self, row: dict, counts_LE: Tensor | None) -> dict:
        """Writes a step's row, with load and MaxVio from the routed tokens of the whole global batch; returns it.

        `max_vio` is that of the batch, `max_vio_window` that of the last `WINDOW` batches together; both are means over the
        layers.

        Args:
            counts_LE: None for a step whose update was skipped, because something was not finite; the row says so.
        """
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        if counts_LE is None:
            row["skipped"] = True
        else:
            row["max_vio"] = round(max_violation(counts_LE).mean().item(), 5)
            row["load"] = rounded(counts_LE / counts_LE.sum(-1, keepdim=True))
            self._recent.append(torch.tensor(row["load"]))
            row["max_vio_window"] = round(max_violation(torch.stack(list(self._recent)).mean(0)).mean().item(), 5)
        return self.row(row)

    def row(self, row: dict) -> dict:
        """Writes any row: of training, an evaluation (see `inference.held_out`), or an `event`; returns it."""
        row["time"] = round(time.time(), 3)
        self._file.append(json.dumps(row).encode() + b"\n")
        if self._board is not None:
            self._board.show(row)
        for feed in self._feeds:
            feed.show(dict(row))
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
        for feed in self._feeds:
            feed.close()
