"""Several hosts: healthy ones train like one process, and what differs or fails on one of them is named.

Each host is a set of kernel namespaces (cluster.py). Every test of a fault prints how long the job took to end, and its
message: `pytest -s` shows a table of them.
"""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import warm
from cluster import Cluster, cluster, needs_hosts
from ranks import Finished, rows_without_timing, run
from test_launchers import end, losses, start_and_wait_for_steps

from smolds_dist.config import load_config
from smolds_dist.training.trainer import train

pytestmark = needs_hosts
PORT = 29400


@pytest.fixture
def options(small_run):
    return [*small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--log.tensorboard=false", "--run.name=job",
            "--train.global_batch=12", "--train.compile=off"]  # fmt: skip


@dataclass
class Tried(Finished):
    """A job that ended, and what its launcher printed."""

    seconds: float = 0.0

    @property
    def message(self) -> str:
        """The only line for the user."""
        lines = [line for line in self.stderr.splitlines() if "smolds: " in line]
        assert len(lines) == 1 and "Traceback" not in self.stderr, self.text
        return lines[0].partition("smolds: ")[2]


def launch_command(hosts: Cluster, arguments: list[str], *launch: str, cold: bool = False) -> list[str]:
    python = sys.executable if cold else hosts.python()
    hostfile = str(hosts.hostfile())
    return hosts.command(0, [python, "-m", "smolds_dist", "launch", "--hostfile", hostfile, *launch, "--", *arguments])


def launched(hosts: Cluster, arguments: list[str], *launch: str, timeout: float = 60, cold: bool = False) -> Tried:
    """Launch over all hosts and wait for the end; print the time and the message."""
    hosts.python()
    begun = time.monotonic()
    finished = run(launch_command(hosts, arguments, *launch, cold=cold), timeout, **hosts.environment)
    return printed(finished, begun)


def printed(finished: Finished, since: float) -> Tried:
    tried = Tried(finished.returncode, finished.stdout, finished.stderr, time.monotonic() - since)
    lines = [line for line in tried.stderr.splitlines() if "smolds: " in line]
    print(f"\n{tried.seconds:.1f} s, exit code {tried.returncode}:", *lines, sep="\n    ")
    return tried


def torchrun(hosts: Cluster, arguments: list[str], timeout: float = 60) -> list[Tried]:
    """Start `torchrun --nnodes` on every host, as a batch system would; wait for all."""
    begun, count = time.monotonic(), len(hosts.hosts)
    program = str(Path(hosts.python()).with_name("torchrun"))
    where = ["--nnodes", str(count), "--nproc-per-node", "1", "--master-addr", "host1", "--master-port", str(PORT)]
    jobs = [
        subprocess.Popen(
            hosts.command(n, [program, *where, "--node-rank", str(n), "-m", "smolds_dist", "train", *arguments]),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=warm.environment(),
        )
        for n in range(count)
    ]  # fmt: skip
    try:
        return [printed(end(job, timeout=4 * timeout), begun) for job in jobs]
    finally:
        for job in jobs:
            job.kill()


@contextlib.contextmanager
def running(hosts: Cluster, arguments: list[str], run_dir: Path, *launch: str, steps: int = 1) -> Iterator:
    """Yield a job that has trained some steps; kill it if it does not end in the block."""
    hosts.python()
    job = start_and_wait_for_steps(launch_command(hosts, arguments, *launch), run_dir)
    try:
        wait_for(lambda: len(losses(run_dir)) >= steps, job)
        yield job
    finally:
        job.kill()


def wait_for(holds, job: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline or job.poll() is not None:
            job.kill()
            raise AssertionError(job.communicate(timeout=20))
        time.sleep(0.05)


def trained_rows(run_dir: Path) -> list[dict]:
    return [row for row in rows_without_timing(run_dir) if "event" not in row]


# ---- Healthy hosts


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_hosts_train_like_one_process(options, tmp_path, count):
    train(load_config([*options, "--run.name=single"]))
    single = losses(tmp_path / "runs" / "single")
    with cluster(tmp_path / "hosts", count) as hosts:
        finished = launched(hosts, options)
        assert finished.returncode == 0, finished.text
        assert f"{count} ranks over gloo on {count} nodes" in finished.stdout
        assert losses(tmp_path / "runs" / "job") == pytest.approx(single, rel=1e-5)
        if count == 3:
            assert all(one.returncode == 0 for one in torchrun(hosts, [*options, "--run.name=torchrun"]))
            assert losses(tmp_path / "runs" / "torchrun") == losses(tmp_path / "runs" / "job")


@pytest.mark.long
@pytest.mark.parametrize(
    "fault", ["clock ahead", "clock behind", "lost packets", "pulled cable", "own names", "own cache"]
)
def test_harmless_differences_change_no_loss(options, tmp_path, fault):
    options += ["--train.steps=30"]
    with cluster(tmp_path / "hosts", 2, faults=True) as hosts:
        undisturbed = launched(hosts, [*options, "--run.name=before"])
        assert undisturbed.returncode == 0, undisturbed.text
        make_host2_differ(hosts, fault, tmp_path, options)
        with running(hosts, options, tmp_path / "runs" / "job", steps=3) as job:
            if fault == "pulled cable":
                hosts.link(1, up=False)
                time.sleep(20)
                hosts.link(1, up=True)
            finished = end(job, timeout=240)
    assert finished.returncode == 0, finished.text
    assert "smolds: " not in finished.stderr
    assert trained_rows(tmp_path / "runs" / "job") == trained_rows(tmp_path / "runs" / "before")


def make_host2_differ(hosts: Cluster, fault: str, folder: Path, options: list[str]) -> None:
    if fault.startswith("clock"):
        hosts.clock(1, 600 if fault == "clock ahead" else -600)
    elif fault == "lost packets":
        hosts.lossy(1, 5)
    elif fault == "own names":  # as Debian's installer writes them
        for n, name in enumerate(hosts.names):
            own = folder / f"{name}.hosts"
            own.write_text(re.sub(rf"\S+ {name}\n", f"127.0.1.1 {name}\n", (hosts.folder / "hosts").read_text()))
            hosts.mount(n, own, Path("/etc/hosts"))
    elif fault == "own cache":
        hosts.hide(1, option(options, "data.cache_dir"))


def option(options: list[str], name: str) -> Path:
    return Path(next(o.partition("=")[2] for o in options if o.startswith(f"--{name}=")))
