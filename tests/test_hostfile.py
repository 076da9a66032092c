"""`smolds launch --hostfile` on simulated hosts: environment, lost hosts, restarts."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import warm
from cluster import Cluster, available, cluster
from ranks import ROOT
from test_launchers import MPI_REASON, end, free_port, has_mpi4py, losses, start_and_wait_for_steps

from smolds_dist.checkpoint.files import checkpoints_in
from smolds_dist.config import load_config
from smolds_dist.rows import RESTARTS, read_rows
from smolds_dist.training.trainer import train

pytestmark = [
    pytest.mark.skipif(bool(available()), reason=str(available())),
    pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed"),
]
LAUNCHERS = ["deepspeed", pytest.param("mpi", marks=pytest.mark.skipif(not has_mpi4py(), reason=MPI_REASON))]
QUICK = {"PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=1 -oServerAliveCountMax=3"}  # to notice a dead link earlier


@pytest.fixture
def options(small_run):
    return [
        *small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--log.tensorboard=false", "--train.eval_every=0",
        "--log.sample_every=0", "--parallel.grace=3", "--checkpoint.keep=2",
    ]  # fmt: skip


@pytest.fixture
def hosts(tmp_path):
    with cluster(tmp_path / "hosts") as hosts:
        yield hosts


def command(hosts: Cluster, *options: str) -> list[str]:
    """Return the command that launches from the first host."""
    start = [sys.executable, "-m", "smolds_dist", "launch", "--hostfile", str(hosts.hostfile())]
    return hosts.command(0, [*start, *options])


def start(hosts: Cluster, tmp_path: Path, options: list[str], run_dir: Path, **environment: str) -> subprocess.Popen:
    """Launch from the first host, and wait for the first step."""
    full = ["env", *(f"{name}={value}" for name, value in environment.items()), *command(hosts, *options)]
    return start_and_wait_for_steps(full, run_dir, cwd=tmp_path)


def stop(hosts: Cluster) -> None:
    """Send SIGTERM to `smolds launch`, whose parent here would not forward it."""
    hosts.call(0, "pkill", "-TERM", "-f", "smolds_dist launch")


def entries(run_dir: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((run_dir / "ranks").glob("rank_*.json"))]


def hosts_of(run_dir: Path) -> list[str]:
    return [entry["host"] for entry in entries(run_dir) if entry["state"] == "running"]


def launched(hosts, options: list[str], folder: Path, timeout: float) -> subprocess.CompletedProcess:
    start, env = command(hosts, "--", *options), warm.environment()
    return subprocess.run(start, capture_output=True, text=True, cwd=folder, env=env, timeout=timeout)


def wait_until(holds, job: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline and job.poll() is None, job.communicate(timeout=20)
        time.sleep(0.1)


def test_host_that_does_not_answer_is_named_before_any_start(options, hosts, tmp_path):
    hosts.link(1, up=False)
    finished = launched(hosts, options, tmp_path, 120)
    assert finished.returncode == 2, finished
    assert finished.stderr.count("\n") == 1
    assert "lists hosts that do not answer: host2 (ssh: connect to host host2 port 22: " in finished.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_job_shrinks_when_a_host_is_lost_and_grows_when_it_is_back(options, hosts, tmp_path, launcher):
    """Its losses are those of an undisturbed process."""
    options = [*options, "--train.schedule=wsd", "--train.decay_fraction=0", "--train.global_batch=64"]
    run_dir = tmp_path / "runs" / "pair"
    launch = [f"--launcher={launcher}", "--restarts=1", "--restarts-shrink", "--restarts-grow", "--", *options]
    launch += ["--run.name=pair", "--checkpoint.every=5", "--train.steps=10000"]
    job = start(hosts, tmp_path, launch, run_dir, **QUICK)
    wait_until(lambda: checkpoints_in(run_dir / "checkpoints"), job)
    hosts.stop(1)
    wait_until(lambda: read_rows(run_dir / RESTARTS), job)
    reached = len(losses(run_dir))
    wait_until(lambda: len(losses(run_dir)) > reached + 1, job)
    assert (run_dir / "hostfile").read_text() == "host1 slots=1\n"
    hosts.start(1)
    wait_until(lambda: hosts_of(run_dir) == ["host1", "host2"], job)
    reached = len(losses(run_dir))
    wait_until(lambda: len(losses(run_dir)) > reached + 1, job)
    stop(hosts)
    finished = end(job, timeout=100)
    assert finished.returncode == 143, finished.text
    assert "smolds: host2 answers again; the ranks save and restart on 2 hosts." in finished.stderr
    (failure,) = read_rows(run_dir / RESTARTS)
    assert failure["cause"].startswith("rank 1 on host host2 was killed or lost its network"), failure
    train(load_config([*options, "--run.name=single", f"--train.steps={len(losses(run_dir))}"]))
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "runs" / "single"), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_restart_waits_for_a_host_that_reboots(options, hosts, tmp_path, launcher):
    run_dir = tmp_path / "runs" / "pair"
    launch = ["--restarts=1", f"--launcher={launcher}", "--", *options]
    launch += ["--run.name=pair", "--checkpoint.every=5", "--train.steps=60"]
    job = start(hosts, tmp_path, launch, run_dir, **QUICK)
    wait_until(lambda: checkpoints_in(run_dir / "checkpoints"), job)
    begun = time.monotonic()
    hosts.stop(1)
    wait_until(lambda: read_rows(run_dir / RESTARTS), job)
    print(f"noticed after {time.monotonic() - begun:.1f} s")
    time.sleep(8)
    hosts.start(1)
    finished = end(job, timeout=300)
    assert finished.returncode == 0, finished.text
    assert finished.stderr.count("smolds: the restart waits for host2 (ssh: connect to host host2 port 22: ") == 1
    (failure,) = read_rows(run_dir / RESTARTS)
    assert failure["cause"].startswith("rank 1 on host host2 was killed or lost its network"), failure
    assert len(losses(run_dir)) == 60
    train(load_config([*options, "--run.name=single", "--train.steps=60"]))
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "runs" / "single"), abs=1e-5)


@pytest.mark.long
def test_dead_link_ends_the_job_with_its_cause(options, hosts, tmp_path):
    run_dir = tmp_path / "runs" / "pair"
    launch = ["--", *options, "--run.name=pair", "--train.steps=10000", "--checkpoint.every=0"]
    job = start(hosts, tmp_path, launch, run_dir, **QUICK)
    begun = time.monotonic()
    hosts.link(1, up=False)
    finished = end(job, timeout=90)
    print(f"ended after {time.monotonic() - begun:.1f} s", finished.stderr)
    assert finished.returncode not in (0, 2), finished.text
    assert (
        "smolds: rank 1 on host host2 was killed or lost its network (ssh ended with exit code 255" in finished.stderr
    )
    deadline = time.monotonic() + 60  # the rank there reads the cause from the shared folder
    while "smolds_dist train" in hosts.call(1, "ps", "-eo", "args"):
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.long
def test_stop_signal_reaches_ranks_that_all_are_on_other_hosts(options, hosts, tmp_path):
    """A hostfile with one other host, whose only rank saves its step."""
    run_dir = tmp_path / "runs" / "away"
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("host2 slots=1\n")
    launch = [
        "--hostfile",
        str(hostfile),
        "--",
        *options,
        "--run.name=away",
        "--train.steps=10000",
        "--checkpoint.every=0",
    ]
    job = start(hosts, tmp_path, launch, run_dir)
    assert hosts_of(run_dir) == ["host2"]
    stop(hosts)
    finished = end(job, timeout=60)
    assert finished.returncode == 143, finished.text
    assert f"stopped by SIGTERM after step {len(losses(run_dir))}" in finished.stdout
    assert len(checkpoints_in(run_dir / "checkpoints")) == 1


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_variables_reach_all_hosts_without_secrets_in_their_process_lists(options, hosts, tmp_path, launcher):
    run_dir, port = tmp_path / "runs" / "pair", free_port()
    launch = [f"--launcher={launcher}", "--export=MINE", f"--master-port={port}", "--", *options]
    launch += ["--run.name=pair", "--train.steps=10000", "--checkpoint.every=0"]
    secrets = {
        "MINE": "secret-1",
        "HF_TOKEN": "secret-2",
        "WANDB_API_KEY": "secret-3",
        "AWS_SECRET_ACCESS_KEY": "secret-4",
    }
    job = start(hosts, tmp_path, launch, run_dir, TORCH_CPP_LOG_LEVEL="INFO", **secrets)
    file = run_dir / "environment.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert secrets.items() <= json.loads(file.read_text()).items()
    for host in range(2):
        commands = hosts.call(host, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        assert "smolds_dist train" in commands and not re.findall(r"secret-\d", commands)
    assert hosts_of(run_dir) == ["host1", "host2"]
    assert {entry["job"].split(":")[1] for entry in entries(run_dir)} == {port}
    stop(hosts)
    finished = end(job, timeout=60)
    assert finished.returncode == 143, finished.text
    assert not file.exists()
    assert {"host1", "host2"} <= set(
        re.findall(r"^(host\d): \[I\d+", finished.stderr, re.MULTILINE)
    ) or launcher == "mpi"


@pytest.mark.long
@pytest.mark.parametrize("missing", ["smolds", "python"])
def test_host_without_smolds_or_python_is_named(options, hosts, tmp_path, missing):
    installed = [ROOT / "smolds_dist", *Path(sysconfig.get_path("purelib")).glob("__editable__*smolds*.pth")]
    for path in installed if missing == "smolds" else [Path(sys.executable).resolve()]:
        hosts.hide(1, path)
    begun = time.monotonic()
    finished = launched(hosts, options, tmp_path, 240)
    print(finished, time.monotonic() - begun)
    assert finished.returncode == 2, finished
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("smolds: ")]
    assert line.startswith("smolds: host host2 did not start its ranks (ssh ended with exit code 1")
    assert {"smolds": "No module named", "python": "Permission denied"}[missing] in line
