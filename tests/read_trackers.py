"""Print the runs in a tracker as JSON: curve -> [[step, value], ...]. Run by test_trackers.py, in the trackers' environment.

Usage: read_trackers.py wandb|mlflow|trackio RUN_DIR
"""

import json
import os
import struct
import sys
from pathlib import Path


def id_at(name: str, run_dir: Path) -> str:
    return json.loads((run_dir / "trackers.json").read_text())[name]["id"]


def from_wandb(run_dir: Path) -> dict[str, list]:
    """Read the files for `wandb sync`: blocks of 32 kB with records of protocol buffers, as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    curves: dict[str, list] = {}
    for path in sorted((run_dir / "wandb").glob(f"offline-run-*/*{id_at('wandb', run_dir)}.wandb")):
        data, place, record = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            record += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind not in (1, 4):  # neither complete nor the last fragment
                continue
            parsed = wandb_internal_pb2.Record.FromString(record)
            record = b""
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in parsed.history.item}
            for name, value in items.items():
                curves.setdefault(name, []).append([items["_step"], value])
    return curves


def from_mlflow(run_dir: Path) -> dict[str, list]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "smolds"]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.mlflow.runName = '{run_dir.name}'")
    assert run.data.params["train.seed"] == "0" and run.info.status == "FINISHED", run
    names = run.data.metrics
    return {name: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, name)] for name in names}


def from_trackio(run_dir: Path) -> dict[str, list]:
    from trackio.sqlite_storage import SQLiteStorage

    curves: dict[str, list] = {}
    for row in SQLiteStorage.get_logs("smolds", id_at("trackio", run_dir)):
        for name in row.keys() - {"step", "timestamp"}:
            curves.setdefault(name, []).append([row["step"], row[name]])
    return curves


read = {"wandb": from_wandb, "mlflow": from_mlflow, "trackio": from_trackio}[sys.argv[1]]
found = read(Path(sys.argv[2]))
print(json.dumps(found))
sys.stdout.flush()
os._exit(0)
