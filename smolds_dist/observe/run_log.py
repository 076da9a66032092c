"""Output of a run during training: log lines and progress bar on the terminal, metrics.jsonl, samples.jsonl, and curves for
TensorBoard and a tracker.

Shape letters: L layers, E experts.
"""

import json
import math
import sys
import time
from collections import deque
from dataclasses import asdict

import torch
from torch import Tensor

from smolds_dist.files import AppendedFile
from smolds_dist.observe.rows import WINDOW, rounded, truncate_rows
from smolds_dist.observe.trackers import Feed
from smolds_dist.parallel.balancer import max_violation
from smolds_dist.progress import ProgressBar
from smolds_dist.settings import RunConfig


class RunLog:
    """Logs on rank 0, to the terminal depending on `log.level`; does nothing on other ranks, so all ranks may call it.

    Rows after `start_step`, which a resumed run repeats, are removed from all files. On a full disk training continues; rows
    stay in memory until they can be written.

    Args:
        start_step: the last step before the first logged one.
        main: True on rank 0.
    """

    def __init__(self, config: RunConfig, start_step: int, main: bool):
        self.shown = main and config.log.level != "quiet"
        self.verbose = main and config.log.level == "verbose"
        self._main = main
        self._bar = ProgressBar("step", config.train.steps, start_step, config.log.every, self.shown)
        if not main:
            return
        self._samples = config.run_dir / "samples.jsonl"
        path = config.run_dir / "metrics.jsonl"
        truncate_rows(self._samples, start_step)
        rows = truncate_rows(path, start_step)
        loads = [row["load"] for row in rows if "load" in row]
        self._recent = deque((torch.tensor(load) for load in loads[-WINDOW:]), maxlen=WINDOW)
        self._file = AppendedFile(path)
        self._board = None
        if config.log.tensorboard:
            from smolds_dist.observe.tensorboard import Board

            self._board = Board(config.run_dir / "tensorboard", start_step + 1, asdict(config))
        self._feed = Feed(config.log.to, config.run_dir, asdict(config), rows) if config.log.to else None

    def info(self, text: str) -> None:
        """Print a line to standard output."""
        if self.shown:
            self._bar.write(text, sys.stdout)

    def warning(self, text: str) -> None:
        """Print a warning at any log level."""
        if self._main:
            self._bar.write(f"warning: {text}", sys.stderr)

    def training_row(self, row: dict, counts_LE: Tensor | None) -> None:
        """Log a step, with load and MaxVio from the routed tokens of the global batch.

        `max_vio` is of the batch, `max_vio_window` of the last `WINDOW` batches together; both are means over the layers.

        Args:
            counts_LE: None for a step whose update was skipped, because of values that are not finite, or as an outlier.
        """
        if not self._main:
            return
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        text = f"loss {loss}, {row['tokens_per_s']:,.0f} tokens/s"
        if counts_LE is None:
            row["skipped"] = True
            why = f"outlier {row['outliers']} of the run" if "outlier" in row else "not finite"
            text += f", update skipped: {why}"
        else:
            row["max_vio"] = round(max_violation(counts_LE).mean().item(), 5)
            row["load"] = rounded(counts_LE / counts_LE.sum(-1, keepdim=True))
            self._recent.append(torch.tensor(row["load"]))
            row["max_vio_window"] = round(max_violation(torch.stack(list(self._recent)).mean(0)).mean().item(), 5)
            text += f", MaxVio {row['max_vio']:.2f}"
        shown = self.verbose or (self.shown and "outlier" in row)
        if shown:
            norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
            text += f", gradient norm {norm}, learning rate {row['lr']:.2e}, MFU {row['mfu']:.1%}"
        self.row(**row)
        self._bar.show(row["step"], text, line=shown)

    def row(self, step: int, **values: object) -> None:
        """Write a row of metrics: a training step, an evaluation (see `inference.validation`), or an `event`."""
        if not self._main:
            return
        row = {"step": step, **values, "time": round(time.time(), 3)}
        self._file.append(json.dumps(row).encode() + b"\n")
        if self._board:
            self._board.show(row)
        if self._feed:
            self._feed.show(row)

    def samples(self, step: int, texts: dict[str, str]) -> None:
        """Append a row to `samples.jsonl` per prompt: step, prompt, text (prompt included); nothing on a full disk."""
        if not self._main:
            return
        rows = [{"step": step, "prompt": prompt, "text": text} for prompt, text in texts.items()]
        file = AppendedFile(self._samples)
        file.append("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.close()
        if self._board:
            for row in rows:
                self._board.show_sample(row)

    def fit(self, steps: int) -> None:
        """Set the run's number of steps."""
        self._bar.total = steps

    def close_bar(self) -> None:
        self._bar.close()

    def close(self, code: int) -> None:
        """Close all files; the tracker gets the exit code of the training."""
        self.close_bar()
        if self._main:
            self._file.close()
            if self._board:
                self._board.close()
            if self._feed:
                self._feed.close(code)
