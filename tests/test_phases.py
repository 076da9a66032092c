"""Signals, mistakes and failures while ranks start, prepare data and end: exit codes, one line, and no harm to others."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from filelock import FileLock
from test_faults import needs_mount
from test_launchers import end, free_port, start_and_wait_for_steps

from smolds_dist.launching.failure import rank_entries
from smolds_dist.parallel.ranks import host_name


def wait_until(doing: str, run_dir: Path, ranks: int = 2) -> list[dict]:
    """Return the entries of all ranks once they do this."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        entries = rank_entries(run_dir / "ranks")
        if sum(entry["doing"].startswith(doing) for entry in entries) == ranks:
            return entries
        time.sleep(0.02)
    raise AssertionError([entry["doing"] for entry in entries])


@contextlib.contextmanager
def ranks_of(options: list[str], world: int = 2, **variables: str):
    """Start ranks as srun does: rank 0 has the store."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)} | variables
    started = [
        subprocess.Popen(
            [warm.python(), "-m", "smolds_dist", "train", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=warm.environment() | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143)])
def test_signal_while_ranks_import_is_a_stop_and_no_failure(small_run, tmp_path, number, code):
    command = [sys.executable, "-m", "smolds_dist", "launch", "--nproc-per-node=2", "--restarts=2", "--", *small_run]
    run_dir = tmp_path / "runs" / "importing"
    process = subprocess.Popen(
        [*command, "--run.name=importing"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=warm.environment(),
    )  # fmt: skip
    wait_until("importing packages", run_dir)
    process.send_signal(number)
    finished = end(process, timeout=60)
    assert finished.returncode == code and finished.stderr == "", finished.text
    assert [entry["state"] for entry in rank_entries(run_dir / "ranks")] == ["stopped"] * 2


def test_slurms_warning_while_a_process_imports_is_kept_until_the_first_step(small_run):
    command = [sys.executable, "-m", "smolds_dist", "train", *small_run, "--parallel.device=cpu", "--run.name=warned"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=warm.environment()
    )
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().partition("SigBlk:")[2].split()[0], 16) & 1 << signal.SIGUSR1 - 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    finished = end(process, timeout=60)
    assert finished.returncode == 75 and "stopped by SIGUSR1 after step 1 (saved)" in finished.stdout, finished.text


@pytest.fixture
def held_data(kept_run, cache, tmp_path):
    """Return options of a run that cannot prepare its data while the locks are held, and the locks."""
    keys = [folder.name for folder in (cache / "tokenizers").iterdir() if folder.is_dir()]
    (tmp_path / "cache" / "tokenizers").mkdir(parents=True)
    with contextlib.ExitStack() as locks:
        for key in keys:
            locks.enter_context(FileLock(tmp_path / "cache" / "tokenizers" / f"{key}.lock"))
        yield [f"--data.cache_dir={tmp_path / 'cache'}", "--parallel.device=cpu"], locks


@pytest.mark.parametrize(
    ("number", "code", "steps"), [(signal.SIGUSR1, 75, 1), pytest.param(signal.SIGTERM, 143, 0, marks=pytest.mark.long)]
)
def test_signal_while_data_is_prepared(small_run, held_data, tmp_path, number, code, steps):
    """Slurm's warning waits for the first step; a stop ends the ranks."""
    options, locks = held_data
    run_dir = tmp_path / "runs" / "preparing"
    with ranks_of([*small_run, *options, "--run.name=preparing"]) as ranks:
        wait_until("waiting for another process", run_dir)
        for rank in ranks:
            rank.send_signal(number)
        time.sleep(1)
        locks.close()
        finished = [end(rank, timeout=60) for rank in ranks]
    assert [one.returncode for one in finished] == [code] * 2, finished
    assert not any("killed" in one.stderr for one in finished)
    assert len(list(run_dir.glob("checkpoints/step_*"))) == steps


@pytest.mark.long
def test_long_wait_for_another_jobs_files_is_no_hang(small_run, held_data, tmp_path):
    options, locks = held_data
    run_dir = tmp_path / "runs" / "waiting"
    with ranks_of([*small_run, *options, "--run.name=waiting", "--parallel.timeout=4", "--train.steps=2"]) as ranks:
        wait_until("waiting for another process", run_dir)
        time.sleep(7)
        locks.close()
        finished = [end(rank, timeout=60) for rank in ranks]
    assert [one.returncode for one in finished] == [0, 0], finished


@needs_mount
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "rank 1 on host {} was killed by signal 9; the other ranks stop."),
        pytest.param(signal.SIGSTOP, "rank 1 on host {} did not answer for ", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "the checkpoint of step ", marks=pytest.mark.long),
    ],
)
def test_failure_on_a_full_disk_is_one_line(small_run, tmp_path, number, words):
    small = tmp_path / "small"
    options = [
        *small_run, f"--run.dir={small}", "--run.name=full", "--parallel.device=cpu", "--train.steps=100000",
        "--train.eval_every=0", "--log.sample_every=0", "--checkpoint.every=0", "--log.tensorboard=false",
        "--parallel.timeout=4", "--parallel.grace=2",
    ]  # fmt: skip
    launch = [warm.python(), "-m", "smolds_dist", "launch", "--nproc-per-node=2", "--", *options]
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(small)], check=True)
    try:
        process = start_and_wait_for_steps(launch, small / "full")
        pid = rank_entries(small / "full" / "ranks")[1]["pid"]
        with contextlib.suppress(OSError), (small / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.kill(pid, number)
        finished = end(process, timeout=60)
        assert finished.returncode == 1, finished.text
        (line,) = [line for line in finished.stderr.splitlines() if line.startswith("smolds: ")]
        assert line.startswith(f"smolds: {words.format(host_name())}")
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
