"""Trackers in addition to TensorBoard: Weights & Biases, MLflow and Trackio, fed with the rows of a run's metrics.jsonl.

`RUN/trackers.json` stores each tracker's run id and the last step sent. So a resumed run continues the same tracker run, and
missing rows, of a tracker that was added later or was unreachable, are sent at the next start or by `smolds report --send`.
Each tracker has its own thread: a slow or failing one does not delay training.
"""

import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from smolds_dist.errors import first_line
from smolds_dist.files import replace_text
from smolds_dist.launching.state import read_state
from smolds_dist.observe.curves import curves_of

PROJECT = "smolds"  # default for the trackers' environment variables
NOTES = "trackers.json"
CLOSE_SECONDS = 60.0  # limit for sending the last rows when the run ends
_writing = threading.Lock()


class Tracker:
    """A run in a tracker, with the interface of wandb and trackio."""

    _run: Any

    def log(self, points: dict[str, float], step: int, when: float) -> None:
        """Add a point to each named curve; `when` in seconds since 1970."""
        self._run.log(points, step=step)

    def close(self, code: int) -> None:
        """Wait until all points are sent; `code` is the exit code of the training."""
        self._run.finish()


class WeightsAndBiases(Tracker):
    """Supports WANDB_PROJECT, WANDB_MODE=offline and wandb's other variables; keeps its files in the run's folder."""

    def __init__(self, run_dir: Path, config: dict, note: dict):
        import wandb

        note.setdefault("id", uuid4().hex[:8])
        quiet = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=note["id"], name=run_dir.name, dir=run_dir,
            resume="allow", config=config, settings=quiet,
        )  # fmt: skip

    def close(self, code: int) -> None:
        self._run.finish(exit_code=code)


class MLflow(Tracker):
    """Supports MLFLOW_TRACKING_URI, default: mlflow.db next to the runs' folders, and MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, run_dir: Path, config: dict, note: dict):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        own = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", own))
        if old := note.pop("replaced", None):
            self._client.delete_run(old)
        if "id" not in note:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            note["id"] = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
            named = ((f"{part}.{name}", value) for part, settings in config.items() for name, value in settings.items())
            params = [Param(name, str(value)[:500]) for name, value in named]
            for first in range(0, len(params), 100):  # limit per request
                self._client.log_batch(note["id"], params=params[first : first + 100])
        self._id = note["id"]
        self._client.update_run(self._id, status="RUNNING")

    def log(self, points: dict[str, float], step: int, when: float) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, float(value), round(when * 1000), step) for name, value in points.items()]
        for first in range(0, len(metrics), 1000):  # limit per request
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])

    def close(self, code: int) -> None:
        self._client.set_terminated(self._id, {0: "FINISHED", 1: "FAILED"}.get(code, "KILLED"))


class Trackio(Tracker):
    """Supports TRACKIO_PROJECT and TRACKIO_SPACE_ID; without the latter, runs stay on this machine (TRACKIO_DIR).

    Trackio cannot store how a run ended.
    """

    def __init__(self, run_dir: Path, config: dict, note: dict):
        import trackio

        note.setdefault("id", f"{run_dir.name}-{uuid4().hex[:8]}" if "replaced" in note else run_dir.name)
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=note["id"], resume="allow", config=config,
            space_id=os.environ.get("TRACKIO_SPACE_ID"), embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip


CLASSES: dict[str, Callable[..., Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow, "trackio": Trackio}


def replace_runs(run_dir: Path) -> None:
    """Give every tracker a new run at the next start, because steps already sent are repeated with other samples."""
    notes = {name: note | {"settings": ""} for name, note in read_state(run_dir, NOTES).items()}
    if notes:
        replace_text(run_dir / NOTES, json.dumps(notes))


class Feed:
    """Sends rows to one tracker from a thread.

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
            tracker = CLASSES[self.name](self._run_dir, self._config, note)
            while not isinstance(row := self._waiting.get(), int):
                kind = next(name for name in ("val_loss", "tasks", "event", "step") if name in row)
                points = curves_of(row, self._config)
                if not points or row["step"] <= note.get(kind, 0):
                    continue
                tracker.log(points, row["step"], row["time"])
                note[kind] = row["step"]
                with _writing:
                    notes = read_state(self._run_dir, NOTES) | {self.name: note}
                    replace_text(self._run_dir / NOTES, json.dumps(notes))
            tracker.close(row)
        except Exception as error:  # any error of a client or its server
            self._log(f"failed ({first_line(error)})")

    def _read_note(self) -> dict[str, Any]:
        """Return the tracker's note; a new one if the run repeats already sent steps with other settings."""
        note: dict[str, Any] = read_state(self._run_dir, NOTES).get(self.name, {})
        text = json.dumps(
            [self._config[section] for section in ("model", "data", "train")], sort_keys=True, default=str
        )
        settings = hashlib.sha256(text.encode()).hexdigest()
        if note.get("step", 0) > self._last and note.get("settings", settings) != settings:
            note = {"replaced": note["id"]}
        return note | {"settings": settings}

    def _log(self, message: str) -> None:
        later = f"`smolds report --send {self.name} {self._run_dir}` sends the missing rows"
        print(f"\nsmolds: {self.name} {message}; training continues, and {later}.", file=sys.stderr, flush=True)
