"""Weights & Biases with its real client, without a server: it holds the content of metrics.jsonl."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from ranks import ROOT, run, smolds

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.observe.rows import read_rows

TRACKERS = Path(sysconfig.get_path("purelib", vars={"base": str(ROOT / ".venv" / "trackers")}))
needs_trackers = pytest.mark.skipif(not TRACKERS.is_dir(), reason="no .venv/trackers; ./launch/test.sh makes it")
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join((str(TRACKERS), str(ROOT))), "WANDB_MODE": "offline"}


def read_tracker(run_dir: Path) -> tuple[dict[str, dict[int, float]], list[int]]:
    """Return the curves of the tracker's run, where each step occurs once, and the exit codes of its starts."""
    command = [str(ROOT / ".venv" / "trackers" / "bin" / "python"), str(ROOT / "tests" / "read_trackers.py")]
    shown = subprocess.run(
        [*command, str(run_dir)], capture_output=True, text=True, timeout=120, env=os.environ | ENVIRONMENT
    )
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout.splitlines()[-1])
    assert all(len({step for step, _ in points}) == len(points) for points in found["curves"].values())
    return {curve: dict(points) for curve, points in found["curves"].items()}, found["codes"]


def assert_holds_all(run_dir: Path) -> None:
    rows, (curves, _) = read_rows(run_dir / "metrics.jsonl"), read_tracker(run_dir)
    assert curves["train/loss"] == {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert curves["validation/loss"] == {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    loads = {row["step"]: row["load"][1][3] for row in rows if "load" in row}
    assert curves["load_layer_01/expert_03"] == loads and len(loads) == max(loads)


@pytest.mark.long
@needs_trackers
def test_tracker_matches_the_metrics_after_a_resume(small_run, tmp_path):
    run_dir = tmp_path / "runs" / "tracked"
    options = [*small_run, "--run.name=tracked", "--train.schedule=wsd", "--train.decay_fraction=0", "--log.to=wandb"]
    first = smolds("train", *options, cold=True, **ENVIRONMENT)
    assert first.returncode == 0 and "failed (" not in first.stderr, first.text
    assert_holds_all(run_dir)
    before = json.loads((run_dir / "trackers.json").read_text())
    smolds("checkpoint", "rm", str(run_dir), "--after", "4")
    more = [*options, "--train.steps=9", "--checkpoint.resume=4"]
    second = smolds("train", *more, cold=True, **ENVIRONMENT)
    assert second.returncode == 0 and "failed (" not in second.stderr, second.text
    assert_holds_all(run_dir)
    later = json.loads((run_dir / "trackers.json").read_text())
    assert later["wandb"]["id"] != before["wandb"]["id"]  # with more steps it is another run, which repeats two


@needs_trackers
def test_failing_tracker_does_not_stop_training_and_gets_rows_later(small_run, tmp_path):
    run_dir = tmp_path / "runs" / "unreached"
    options = [*small_run, "--run.name=unreached", "--log.to=wandb"]
    finished = smolds("train", *options, cold=True, **ENVIRONMENT | {"WANDB_MODE": "none such"})
    assert finished.returncode == 0, finished.text
    assert finished.stderr.count("smolds: wandb failed (") == 1
    assert f"`smolds report --send wandb {run_dir}` sends the missing rows" in finished.stderr
    sent = smolds("report", "--send", "wandb", str(run_dir), cold=True, **ENVIRONMENT)
    assert sent.returncode == 0 and "failed (" not in sent.stderr, sent.text
    assert_holds_all(run_dir)


FEED = """
import sys
from pathlib import Path
from smolds_dist.observe.trackers import Feed, replace_run
run, code, lr, *losses = sys.argv[1:]
if lr == "2":
    replace_run(Path(run))
rows = [{"step": step, "loss": float(loss), "lr": 1.0, "grad_norm": 1.0} for step, loss in enumerate(losses, 1)]
settings = {"model": {}, "data": {}, "train": {"lr": lr, "steps": 9}}
one = Feed("wandb", Path(run), settings, rows[:3])
for row in rows[3:]:
    one.show(row)
one.close(int(code))
"""


@needs_trackers
def test_tracker_has_the_end_of_a_run_and_its_metrics(tmp_path):
    """After `checkpoint rm` and a resume with other settings, or a rollback, the same steps have other values."""

    def feed(code: int, lr: int, *losses: int) -> tuple[list[float], list[int]]:
        given = [str(tmp_path), *map(str, (code, lr, *losses))]
        finished = run([sys.executable, "-c", FEED, *given], 120, cold=True, **ENVIRONMENT)
        assert finished.returncode == 0 and not finished.stderr, finished.text
        curves, codes = read_tracker(tmp_path)
        return list(curves["train/loss"].values()), codes

    assert feed(1, 0, 1, 2, 3, 4) == ([1, 2, 3, 4], [1])
    assert feed(143, 0, 1, 2, 3, 4, 5) == ([1, 2, 3, 4, 5], [1, 143])
    assert feed(0, 1, 1, 2, 3, 14, 15) == ([1, 2, 3, 14, 15], [0])
    assert feed(0, 2, 1, 2, 3, 24) == ([1, 2, 3, 24], [0])


def test_name_and_package_are_checked_before_anything_runs(small_run, monkeypatch):
    monkeypatch.setattr("smolds_dist.rules.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--log.to wandb needs its package; pip install 'smolds-dist\[wandb\]'"):
        load_config([*small_run, "--log.to=wandb"])
    refused = smolds("train", *small_run, "--log.to=none-such")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
