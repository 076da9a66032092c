"""Weights & Biases in addition to TensorBoard, fed with the rows of a run's metrics.jsonl.

`RUN/trackers.json` stores the tracker's run id and the last step sent. So a resumed run continues the same tracker run, and
missing rows, of a tracker that was added later or was unreachable, are sent at the next start or by `smolds report --send`.
The tracker has its own thread: a slow or failing one does not delay training.
"""

import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from smolds_dist.errors import first_line
from smolds_dist.files import replace_text
from smolds_dist.launching.state import read_state
from smolds_dist.observe.curves import curves_of

PROJECT = "smolds"  # default of WANDB_PROJECT
NOTES = "trackers.json"
CLOSE_SECONDS = 60.0  # limit for sending the last rows when the run ends


def open_run(run_dir: Path, config: dict, id: str) -> Any:
    """Return a run of wandb, which keeps its files in the run's folder; its variables apply, such as WANDB_MODE=offline."""
    import wandb

    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), id=id, name=run_dir.name, dir=run_dir, resume="allow",
        config=config, settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )  # fmt: skip


def replace_run(run_dir: Path) -> None:
    """Give the tracker a new run at the next start, because steps already sent are repeated with other samples."""
    notes = {name: note | {"settings": ""} for name, note in read_state(run_dir, NOTES).items()}
    if notes:
        replace_text(run_dir / NOTES, json.dumps(notes))


class Feed:
    """Sends rows to the tracker from a thread.

    Args:
        rows: of metrics.jsonl so far; only those not yet sent are sent.
    """

    def __init__(self, name: str, run_dir: Path, config: dict, rows: Sequence[dict]):
        self.name, self._run_dir, self._config = name, run_dir, config
        self._last = max((row["step"] for row in rows), default=0)
        self._waiting: queue.SimpleQueue[dict | int] = queue.SimpleQueue()
        for row in rows:
            self._waiting.put(row)
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def show(self, row: dict) -> None:
        """Queue a row of metrics.jsonl."""
        self._waiting.put(row)

    def close(self, code: int) -> None:
        """Give the tracker time to send the queued rows, and the training's exit code."""
        self._waiting.put(code)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._log(f"did not accept all rows within {CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        try:
            note = self._read_note()
            tracker = open_run(self._run_dir, self._config, note["id"])
            while not isinstance(row := self._waiting.get(), int):
                kind = next(name for name in ("val_loss", "tasks", "event", "step") if name in row)
                points = curves_of(row, self._config)
                if not points or row["step"] <= note.get(kind, 0):
                    continue
                tracker.log(points, step=row["step"])
                note[kind] = row["step"]
                replace_text(self._run_dir / NOTES, json.dumps({self.name: note}))
            tracker.finish(exit_code=row)
        except Exception as error:  # any error of a client or its server
            self._log(f"failed ({first_line(error)})")

    def _read_note(self) -> dict[str, Any]:
        """Return the tracker's note; one with a new id if the run repeats already sent steps with other settings."""
        note: dict[str, Any] = read_state(self._run_dir, NOTES).get(self.name, {})
        text = json.dumps(
            [self._config[section] for section in ("model", "data", "train")], sort_keys=True, default=str
        )
        settings = hashlib.sha256(text.encode()).hexdigest()
        if note.get("step", 0) > self._last and note.get("settings", settings) != settings:
            note = {}
        return {"id": uuid4().hex[:8]} | note | {"settings": settings}

    def _log(self, message: str) -> None:
        later = f"`smolds report --send {self.name} {self._run_dir}` sends the missing rows"
        print(f"\nsmolds: {self.name} {message}; training continues, and {later}.", file=sys.stderr, flush=True)
