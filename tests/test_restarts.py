"""`smolds launch --restarts`: jobs with real failures finish with the rows of an undisturbed run."""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import warm
from ranks import rows_without_timing, smolds
from test_launchers import end, losses, start_and_wait_for_steps

from smolds_dist.checkpoint.files import checkpoints_in
from smolds_dist.launching import restarts
from smolds_dist.launching.restarts import (
    Failure,
    faulty_hosts,
    resume_options,
    run_with_restarts,
    starts_without_progress,
)
from smolds_dist.launching.signals import blocked
from smolds_dist.launching.state import read_state
from smolds_dist.rows import RESTARTS, read_rows


@pytest.fixture
def options(small_run):
    return [
        *small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--checkpoint.every=2", "--train.eval_every=0",
        "--log.sample_every=0", "--checkpoint.keep=2",
    ]  # fmt: skip


def launch_command(*options: str) -> list[str]:
    return [warm.python(), "-m", "smolds_dist", "launch", *options]


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    files = sorted((run_dir / "ranks").glob("rank_*.json"))
    return [psutil.Process(json.loads(path.read_text())["pid"]) for path in files]


def torchrun_of(run_dir: Path) -> psutil.Process:
    """Return the parent of the ranks' processes, or of their stand-ins if ranks fork (see warm.py)."""
    parents = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if {"train", f"--run.name={run_dir.name}"} <= set(words) and "torch.distributed.run" not in words:
                parents.add(process.ppid())
    (parent,) = parents
    return psutil.Process(parent)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_job_with_killed_processes_finishes_with_the_undisturbed_losses(options, tmp_path, kills):
    """Single ranks and their launcher are killed, each time a few steps later."""
    options += [f"--train.steps={10 * kills}"]
    whole = smolds("launch", "--nproc-per-node=2", "--", *options, "--run.name=whole", timeout=200)
    assert whole.returncode == 0, whole.text
    run_dir, dice = tmp_path / "runs" / "killed", random.Random(0)
    command = launch_command("--nproc-per-node=2", f"--restarts={kills}", "--", *options, "--run.name=killed")
    job, failed = start_and_wait_for_steps(command, run_dir), 0
    for kill in range(kills):
        reached = failed + dice.randrange(1, 5)
        wait_until(lambda: len(losses(run_dir)) >= reached, job)  # noqa: B023  called at once
        [*ranks_of(run_dir), torchrun_of(run_dir)][kill % 3].kill()
        wait_until(lambda: len(read_rows(run_dir / RESTARTS)) == kill + 1, job)  # noqa: B023
        failed = read_rows(run_dir / RESTARTS)[-1]["step"]
        wait_until(lambda: any(r.get("number") == kill + 1 for r in read_rows(run_dir / "metrics.jsonl")), job)  # noqa: B023
    finished = end(job, timeout=200)
    assert finished.returncode == 0, finished.text
    assert finished.stderr.count(f" of {kills} in 1 s.") == kills
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == "restart"]
    assert [row["number"] for row in rows] == list(range(1, kills + 1))
    assert all(row["cause"].endswith("was killed by signal 9") for row in rows)
    assert sum(row["cause"].startswith("the launcher was killed") for row in rows) == kills // 3, rows
    assert without_events(run_dir) == without_events(tmp_path / "runs" / "whole")
    report = smolds("report", str(run_dir))
    assert report.returncode == 0, report.text
    assert f"restart {kills}, because after step" in (run_dir / "log_training.md").read_text()


def wait_until(holds, job: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline and job.poll() is None, job.communicate(timeout=20)
        time.sleep(0.02)


def without_events(run_dir: Path) -> list[dict]:
    return [row for row in rows_without_timing(run_dir) if "event" not in row]


def test_repeated_failure_at_a_step_ends_the_job_with_both_tracebacks(options, tmp_path):
    """A rank is killed; from then on a file has the name of a folder that every start creates."""
    run_dir = tmp_path / "runs" / "same"
    options += ["--run.name=same", "--train.steps=100000"]
    job = start_and_wait_for_steps(launch_command("--nproc-per-node=2", "--restarts=9", "--", *options), run_dir)
    wait_until(lambda: checkpoints_in(run_dir / "checkpoints"), job)
    (run_dir / "tensorboard").rename(run_dir / "before")
    (run_dir / "tensorboard").touch()
    ranks_of(run_dir)[1].kill()
    finished = end(job, timeout=200)
    assert finished.returncode == 1, finished.text
    failures = read_rows(run_dir / RESTARTS)
    assert len({row["step"] for row in failures[-3:]}) == 1 and len(failures) in (3, 4), failures
    assert f"3 starts in a row failed after step {failures[-1]['step']}; no further restart." in finished.stderr
    assert finished.stderr.count("Traceback") == 2 and finished.stderr.count("FileExistsError") >= 4, finished.text
    assert all((Path(row["logs"]) / "rank_00000.log").exists() for row in failures[1:])


def test_single_process_is_restarted_too(options, tmp_path):
    run_dir = tmp_path / "runs" / "one"
    options += ["--run.name=one", "--train.steps=60", "--checkpoint.every=20"]
    job = start_and_wait_for_steps(launch_command("--launcher=none", "--restarts=1", "--", *options), run_dir)
    os.kill(read_state(run_dir)["pid"], signal.SIGKILL)
    finished = end(job, timeout=120)
    assert finished.returncode == 0, finished.text
    (failure,) = read_rows(run_dir / RESTARTS)
    assert failure["cause"] == "the process was killed by signal 9" and failure["code"] == 137
    assert len(losses(run_dir)) == 60


def started(codes: list[int], run_dir: Path, steps: list[int] | None = None):
    """A stand-in for a job that ends with these codes after these steps; it records its arguments."""
    asked = []

    def start(failures: list[Failure]) -> tuple[int, str]:
        number = len(asked)
        asked.append(len(failures))
        if steps:
            run_dir.mkdir(exist_ok=True)
            (run_dir / "metrics.jsonl").write_text(json.dumps({"step": steps[number], "loss": 1.0}) + "\n")
        return codes[number], f"cause {number}"

    return start, asked


@pytest.mark.parametrize("code", [0, 2, 75, 130, 143])
def test_success_mistake_and_signal_do_not_restart(tmp_path, code):
    start, asked = started([code], tmp_path)
    assert run_with_restarts(start, tmp_path, 5) == code
    assert asked == [0] and not (tmp_path / RESTARTS).exists()


def test_restarts_are_limited_and_progress_resets_the_stuck_count(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(restarts, "MIN_PAUSE", 0.01)
    start, asked = started([1, 1, 137, 1, 1], tmp_path / "run", [3, 3, 4, 4, 9])
    assert run_with_restarts(start, tmp_path / "run", 4) == 1
    assert asked == [0, 1, 2, 3, 4]
    assert [row["step"] for row in read_rows(tmp_path / "run" / RESTARTS)] == [3, 3, 4, 4, 9]
    assert "the limit of 4 restarts is reached" in capsys.readouterr().err
    start, asked = started([1, 0], tmp_path / "run", [9, 12])
    assert run_with_restarts(start, tmp_path / "run", 4) == 0
    assert [row["number"] for row in read_rows(tmp_path / "run" / RESTARTS)] == [1, 2, 3, 4, 5, 6]


def test_failures_without_a_step_between_them_are_counted_from_the_last():
    failures = [Failure(n, 0.0, step, 1, "", "") for n, step in enumerate((5, 5, 7, 7, 7))]
    assert [starts_without_progress(failures[:n]) for n in (1, 2, 3, 4, 5)] == [1, 2, 1, 2, 3]


def test_hosts_are_blamed_only_for_hardware_failures():
    causes = [
        "rank 1 on host n2 was killed by signal 9",
        "rank 0 on host n1 failed: ValueError: no (traceback: runs/x/ranks/rank_00000.log)",
        "rank 5 on host n3 did not answer for 600 s: it hangs, or its host does (stacks of all ranks: x)",
        "rank 1 on host n2 failed: torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "the ranks ended with exit code 1",
        "rank 1 on host n2 was killed by signal 9: the machine is out of memory",
        "rank 2 on host n4 differs from its replicas in lm_head.weight at step 9; a device or its memory is faulty",
    ]
    failures = [Failure(n, 0.0, n, 1, cause, "") for n, cause in enumerate(causes)]
    assert [faulty_hosts(failures[n : n + 1]) for n in range(7)] == [["n2"], [], ["n3"], ["n2"], [], [], ["n4"]]
    assert faulty_hosts(failures) == ["n3", "n2", "n4"] and faulty_hosts([]) == []
    two = "rank 2 on host n4, rank 3 on host n5.lan differs from its replicas in lm_head.weight at step 9; a GPU is faulty"
    both = "ranks 0, 1 on host n1 and rank 2 on host n2 did not answer for 600 s: they hang (stacks of all ranks: x)"
    assert [faulty_hosts([Failure(1, 0.0, 1, 1, cause, "")]) for cause in (two, both)] == [
        ["n4", "n5.lan"],
        ["n1", "n2"],
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_signal_ends_the_pause(number, code):
    with blocked() as wait:
        assert wait(0.01) is None
        threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), number)).start()
        begun = time.monotonic()
        assert wait(30) == code
        assert time.monotonic() - begun < 20


def test_restart_resumes_from_its_own_checkpoint_or_the_first_ones(tmp_path):
    for asked in ("never", "auto", "40"):
        assert resume_options(tmp_path, ["--a"], asked) == ["--a", "--checkpoint.resume=auto"]
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / RESTARTS).write_text('{"step": 0}\n')
    (tmp_path / "ranks-1").mkdir()
    assert resume_options(tmp_path, ["--a"], "runs/other") == ["--a"]
    assert not (tmp_path / "metrics.jsonl").exists() and (tmp_path / "ranks-1" / "metrics.jsonl").exists()
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert resume_options(tmp_path, ["--a"], "runs/other") == ["--a", "--checkpoint.resume=auto"]
