"""`smolds runs`: states of finished, running, stopped, failed, waiting and silent runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import warm
from ranks import run, smolds
from test_launchers import end, losses, start_and_wait_for_steps, start_launch

from smolds_dist.errors import ConfigError
from smolds_dist.launching.state import SUBMITTED, read_state, write_state
from smolds_dist.observe.runs import SILENT_SECONDS, TAIL, difference, find_runs, last_rows, read_run, runs
from smolds_dist.parallel.ranks import host_name, system_name


@pytest.fixture
def long_run(small_run):
    options = [*small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--log.tensorboard=false"]
    return [*options, "--train.steps=100000", "--train.eval_every=0", "--log.sample_every=0", "--checkpoint.every=0"]


def lines_of(folder) -> dict[str, str]:
    finished = smolds("runs", str(folder))
    assert finished.returncode == 0, finished.text
    return {line.split()[0]: line for line in finished.stdout.splitlines()}


def test_states_of_real_runs(long_run, tmp_path):
    folder = tmp_path / "runs"
    job = start_launch("torchrun", [*long_run, "--run.name=pair"], folder / "pair")
    while len(losses(folder / "pair")) < 3:  # the remaining time is unknown before the second step
        assert job.poll() is None
        time.sleep(0.1)
    line = lines_of(folder)["pair"]
    assert re.search(rf"running on {host_name()}, 2 ranks +[\d,]+ of 100,000 +\d\.\d{{4}} +[\d,]+ +20\d\d-", line), line
    assert re.search(r" \d+:\d\d:\d\d$", line), line
    os.kill(json.loads((folder / "pair" / "ranks" / "rank_00001.json").read_text())["pid"], signal.SIGKILL)
    end(job, timeout=20)
    assert f"failed: rank 1 on host {host_name()} was killed by signal 9" in lines_of(folder)["pair"]

    train = [warm.python(), "-m", "smolds_dist", "train", *long_run]
    job = start_and_wait_for_steps([*train, "--run.name=stopped"], folder / "stopped")
    job.send_signal(signal.SIGTERM)
    assert end(job, timeout=20).returncode == 143
    job = start_and_wait_for_steps([*train, "--run.name=gone"], folder / "gone")
    job.kill()
    end(job, timeout=20)
    short = [*long_run, "--train.steps=2"]
    assert smolds("train", *short, "--run.name=whole").returncode == 0
    assert smolds("train", *short, "--run.name=diverged", "--train.steps=50", "--train.lr=1e30").returncode == 1
    lines = lines_of(folder)
    assert list(lines) == ["run", "pair", "stopped", "gone", "whole", "diverged"]
    assert re.search(r"stopped +[\d,]+ of 100,000", lines["stopped"])
    assert "failed: its process is gone" in lines["gone"]
    assert re.search(r"finished +2 of 2 ", lines["whole"])
    assert "failed: loss or gradient was NaN or infinite" in lines["diverged"]


def write_run(folder, seconds_ago: float, now: float, **state):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {steps: 500, lr: 0.1}\nrun: {name: x}\n")
    rows = [
        {"step": n, "loss": 3.0 - n / 100, "tokens_per_s": 100.0, "time": now - seconds_ago - (40 - n)}
        for n in range(40)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {
        "state": "running",
        "host": "n7",
        "pid": 1,
        "system": "another",
        "ranks": 8,
        "started": now - 9e4,
        "why": "",
    }
    write_state(folder, entry | state)
    return read_run(folder, now)


def test_run_on_another_host_counts_as_running_until_silent(tmp_path):
    now = time.time()
    run = write_run(tmp_path / "fresh", 5, now)
    assert run.state == "running on n7, 8 ranks" and (run.step, run.steps, run.left) == (39, 500, 461.0)
    run = write_run(tmp_path / "silent", SILENT_SECONDS + 3600, now)
    assert run.state == "silent for 1:02:01 on n7, 8 ranks" and run.left is None
    (tmp_path / "fresh" / "restarts.jsonl").write_text('{"step": 0}\n{"step": 0}\n')
    assert read_run(tmp_path / "fresh", now).state == "running on n7, 8 ranks, 2 restarts"
    assert write_run(tmp_path / "here", 5, now, system=system_name(), pid=os.getpid()).state.startswith("running on n7")


def test_submitted_run_waits_until_it_has_begun(tmp_path):
    now = time.time()
    write_run(tmp_path / "run", 50, now, state="stopped")
    write_state(tmp_path / "run", {"job": "12", "time": now - 20}, SUBMITTED)
    assert read_run(tmp_path / "run", now).state == "waiting in Slurm, job 12"
    write_state(tmp_path / "run", read_state(tmp_path / "run") | {"state": "running", "started": now - 10})
    assert read_run(tmp_path / "run", now).state == "running on n7, 8 ranks"
    new = tmp_path / "new"
    new.mkdir()
    write_state(new, {"job": "13", "time": now}, SUBMITTED)
    assert [path.name for path in find_runs(tmp_path)] == ["new", "run"]
    assert read_run(new, now).state == "waiting in Slurm, job 13"


def test_only_the_end_of_long_metrics_is_read(tmp_path):
    rows = [json.dumps({"step": n, "filler": "x" * 100}) for n in range(TAIL // 50)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n" + '{"step": 9')
    read = last_rows(tmp_path / "metrics.jsonl")
    assert 0 < len(read) < len(rows) and read[-1]["step"] == len(rows) - 1
    assert last_rows(tmp_path / "none.jsonl") == []


def test_diff_lists_settings_and_last_values(kept_run, tmp_path):
    write_run(tmp_path / "a", 5, time.time())
    write_run(tmp_path / "b", 5, time.time())
    (tmp_path / "b" / "config.yaml").write_text("train: {steps: 500, lr: 0.2}\nmodel: {layers: 3}\nrun: {name: y}\n")
    lines = [line.split() for line in difference(tmp_path / "a", tmp_path / "b").splitlines()]
    assert lines[0] == ["a", "b"]
    assert ["train.lr", "0.1", "0.2"] in lines and ["model.layers", "3"] in lines and ["loss", "2.61", "2.61"] in lines
    assert not any(line[0] in ("train.steps", "run.name") for line in lines)
    shown = smolds("runs", "diff", str(kept_run[0]), str(tmp_path / "a"))
    assert shown.returncode == 0 and "val_loss" in shown.stdout, shown.text


def test_watch_repeats_until_ctrl_c(kept_run):
    command = [warm.python(), "-m", "smolds_dist", "runs", str(kept_run[0].parent), "--watch", "--every=0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=warm.environment())
    assert process.stdout is not None
    heads = 0
    while heads < 3:
        heads += process.stdout.readline().startswith("run ")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("args", "words"),
    [(["nowhere"], "is not a folder"), (["diff", "nowhere", "."], "is not a run"), ([".", "--every=0"], "more than 0")],
)
def test_mistake_is_one_sentence(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        runs(args)
    assert run([sys.executable, "-m", "smolds_dist", "runs", *args], 60, cwd=tmp_path).returncode == 2


def test_folder_without_runs_is_reported(tmp_path, capsys):
    runs([str(tmp_path)])
    assert capsys.readouterr().out == "no runs in this folder\n"
