"""Trackers with their real clients, without servers: they hold the content of metrics.jsonl."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from ranks import ROOT, run, smolds

from smolds_dist.errors import ConfigError
from smolds_dist.observe.rows import read_rows
from smolds_dist.rules import trackers_in

TRACKERS = Path(sysconfig.get_path("purelib", vars={"base": str(ROOT / ".venv" / "trackers")}))
needs_trackers = pytest.mark.skipif(not TRACKERS.is_dir(), reason="no .venv/trackers; ./launch/test.sh makes it")
NAMES = ("wandb", "mlflow", "trackio")


@pytest.fixture
def environment(tmp_path):
    return {
        "PYTHONPATH": os.pathsep.join((str(TRACKERS), str(ROOT))), "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }  # fmt: skip


def held(name: str, run_dir: Path, environment: dict[str, str]) -> dict[str, dict[int, float]]:
    """Return the curves of a tracker; each step occurs once."""
    command = [str(ROOT / ".venv" / "trackers" / "bin" / "python"), str(ROOT / "tests" / "read_trackers.py")]
    shown = subprocess.run(
        [*command, name, str(run_dir)], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )
    assert shown.returncode == 0, shown.stderr
    curves = json.loads(shown.stdout.splitlines()[-1])
    assert all(len({step for step, _ in points}) == len(points) for points in curves.values())
    return {curve: dict(points) for curve, points in curves.items()}


def assert_holds_all(name: str, run_dir: Path, environment: dict[str, str]) -> None:
    rows, curves = read_rows(run_dir / "metrics.jsonl"), held(name, run_dir, environment)
    assert curves["train/loss"] == {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert curves["validation/loss"] == {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    loads = {row["step"]: row["load"][1][3] for row in rows if "load" in row}
    assert curves["load_layer_01/expert_03"] == loads and len(loads) == max(loads)


@pytest.mark.long
@needs_trackers
def test_trackers_match_the_metrics_after_a_resume(small_run, tmp_path, environment):
    run_dir = tmp_path / "runs" / "tracked"
    options = [*small_run, "--run.name=tracked", "--train.schedule=wsd", "--train.decay_fraction=0"]
    first = smolds("train", *options, "--log.to=wandb,mlflow", cold=True, **environment)
    assert first.returncode == 0 and "failed (" not in first.stderr, first.text
    for name in ("wandb", "mlflow"):
        assert_holds_all(name, run_dir, environment)
    ids = json.loads((run_dir / "trackers.json").read_text())
    more = [*options, "--train.steps=9", "--checkpoint.resume=4", f"--log.to={','.join(NAMES)}"]
    smolds("checkpoint", "rm", str(run_dir), "--after", "4")
    second = smolds("train", *more, cold=True, **environment)
    assert second.returncode == 0 and "failed (" not in second.stderr, second.text
    for name in NAMES:  # the last one was added later, and has all previous steps too
        assert_holds_all(name, run_dir, environment)
    later = json.loads((run_dir / "trackers.json").read_text())
    assert all(
        later[name]["id"] != ids[name]["id"] for name in ids
    )  # with more steps it is another run, which repeats two


@needs_trackers
def test_failing_tracker_does_not_stop_training_and_gets_rows_later(small_run, tmp_path, environment):
    run_dir = tmp_path / "runs" / "unreached"
    nobody = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    options = [*small_run, "--run.name=unreached", "--log.to=mlflow"]
    finished = smolds("train", *options, cold=True, **environment, **nobody)
    assert finished.returncode == 0, finished.text
    assert finished.stderr.count("smolds: mlflow failed (") == 1
    assert f"`smolds report --send mlflow {run_dir}` sends the missing rows" in finished.stderr
    sent = smolds("report", "--send", "mlflow", str(run_dir), cold=True, **environment)
    assert sent.returncode == 0 and "failed (" not in sent.stderr, sent.text
    assert_holds_all("mlflow", run_dir, environment)


FEED = """
import sys
from pathlib import Path
from mlflow import MlflowClient
from smolds_dist.observe.trackers import Feed, replace_runs
run = Path(sys.argv[1])
client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")

def feed(losses, code, lr=1.0):
    rows = [{"step": step, "loss": loss, "lr": lr, "grad_norm": 1.0, "time": step} for step, loss in enumerate(losses, 1)]
    settings = {"model": {}, "data": {}, "train": {"lr": lr, "steps": 9}}
    one = Feed("mlflow", run, settings, rows[:3])
    for row in rows[3:]:
        one.show(row)
    one.close(code)
    (found,) = client.search_runs([client.get_experiment_by_name("smolds").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    print(found.info.status, *(round(point.value) for point in sorted(history, key=lambda point: point.step)))

feed([1, 2, 3, 4], 1)
feed([1, 2, 3, 4, 5], 143)
feed([1, 2, 3, 14, 15], 0, lr=2.0)
replace_runs(run)
feed([1, 2, 3, 24], 0, lr=2.0)
"""


@needs_trackers
def test_tracker_has_the_end_of_a_run_and_its_metrics(tmp_path, environment):
    """After `checkpoint rm` and a resume with other settings, or a rollback, the same steps have other values."""
    (tmp_path / "run").mkdir()
    finished = run([sys.executable, "-c", FEED, str(tmp_path / "run")], 120, cold=True, **environment)
    assert finished.returncode == 0, finished.text
    assert finished.stdout.split("\n")[:4] == [
        "FAILED 1 2 3 4", "KILLED 1 2 3 4 5", "FINISHED 1 2 3 14 15", "FINISHED 1 2 3 24"
    ]  # fmt: skip


def test_names_and_packages_are_checked_before_anything_runs(small_run, monkeypatch):
    assert trackers_in("") == []
    with pytest.raises(ConfigError, match="'tensorbored' is not a tracker; choose from wandb, mlflow"):
        trackers_in("tensorbored")
    monkeypatch.setattr("smolds_dist.rules.find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(ConfigError, match=r"--log.to wandb needs its package; pip install 'smolds-dist\[wandb\]'"):
        trackers_in("trackio, wandb")
    assert trackers_in("trackio,mlflow,trackio") == ["trackio", "mlflow"]
    refused = smolds("train", *small_run, "--log.to=none-such")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
