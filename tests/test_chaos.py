"""Twenty random faults on three hosts: the job ends by itself with the losses of an undisturbed run.

The seed is printed; `SMOLDS_CHAOS_SEED=N` repeats its faults.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from cluster import Cluster, cluster, needs_hosts
from ranks import PATIENCE
from test_cluster import launch_command, launched, trained_rows

from smolds_dist.rows import RESTARTS, read_rows

FAULTS = 20
STEPS = 400
SECONDS = 1800 * PATIENCE
QUICK = {"PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=5 -oServerAliveCountMax=3"}  # to notice a dead link earlier


@pytest.fixture
def options(small_run):
    return [
        *small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--log.tensorboard=false", f"--train.steps={STEPS}",
        "--train.global_batch=12", "--train.compile=off", "--train.eval_every=50", "--log.sample_every=0",
        "--checkpoint.every=5", "--parallel.timeout=30", "--parallel.grace=3",
    ]  # fmt: skip


@pytest.mark.long
@needs_hosts
def test_job_survives_twenty_random_faults(options, tmp_path):
    seed = int(os.environ.get("SMOLDS_CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"\nSMOLDS_CHAOS_SEED={seed}")
    run_dir, whole = tmp_path / "runs" / "job", tmp_path / "runs" / "whole"
    with cluster(tmp_path / "hosts", 3, faults=True) as hosts:
        undisturbed = launched(hosts, [*options, "--run.name=whole"], timeout=200)
        assert undisturbed.returncode == 0, undisturbed.text
        hosts.environment |= QUICK
        command = launch_command(hosts, [*options, "--run.name=job"], "--restarts=40")
        with (tmp_path / "output").open("w") as output:
            job = subprocess.Popen(command, stdout=output, stderr=output, env=warm.environment())
        try:
            disturb(hosts, job, run_dir, random.Random(seed))
            job.wait(SECONDS)
        finally:
            job.kill()
            lines = (tmp_path / "output").read_text(errors="replace").splitlines()
            print(*(line for line in lines if "smolds: " in line), sep="\n")
    print(f"{len(read_rows(run_dir / RESTARTS))} restarts")
    assert job.returncode == 0, "\n".join(lines[-80:])
    assert read_rows(run_dir / RESTARTS)
    assert trained_rows(run_dir) == trained_rows(whole)


def disturb(hosts: Cluster, job: subprocess.Popen, run_dir: Path, dice: random.Random) -> None:
    """Inject the faults, each when a random step is reached and a few seconds later, so that some hit a restart."""
    begun = time.monotonic()
    for step in sorted(dice.randrange(1, STEPS - 20) for _ in range(FAULTS)):
        kind, host, pause = dice.choice(["kill", "reboot", "link", "disk"]), dice.randrange(3), dice.uniform(0, 3)
        while reached(run_dir) < step:
            assert job.poll() is None, f"the job ended before step {step}"
            assert time.monotonic() - begun < SECONDS, f"no step {step}"
            time.sleep(0.1)
        time.sleep(pause)
        if kind == "reboot" and host == 0:  # the launcher runs there
            host = 1
        text = f"{kind} of {hosts.names[host]} at step {reached(run_dir)}"
        print(f"{time.monotonic() - begun:7.1f} s: {text}, {inject(hosts, kind, host, run_dir, dice)}", file=sys.stderr)


def inject(hosts: Cluster, kind: str, host: int, run_dir: Path, dice: random.Random) -> str:
    """Make one fault, wait until it is over and return a description."""
    if kind == "kill":
        deadline = time.monotonic() + 120
        while not (killed := [pid for pid in ranks_on(hosts, host, run_dir) if kill(hosts, host, pid)]):
            assert time.monotonic() < deadline, "no rank to kill"
            time.sleep(0.1)
        return f"process {killed[0]}"
    seconds = dice.uniform(5, 60) if kind == "link" else dice.uniform(0, 15)
    if kind == "reboot":
        hosts.reboot(host, seconds)
    elif kind == "link":
        hosts.link(host, up=False)
        time.sleep(seconds)
        hosts.link(host, up=True)
    else:
        hosts.slow_disk(host, run_dir, dice.uniform(0.05, 0.5))
        time.sleep(seconds)
        hosts.slow_disk(host, run_dir, 0)
    return f"for {seconds:.0f} s"


def reached(run_dir: Path) -> int:
    return max((row["step"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row), default=0)


def ranks_on(hosts: Cluster, host: int, run_dir: Path) -> Iterator[int]:
    """Yield the process ids of the host's ranks."""
    for path in (run_dir / "ranks").glob("rank_*.json"):
        try:
            entry = json.loads(path.read_text())
        except (OSError, ValueError):  # being replaced
            continue
        if entry["host"] == hosts.names[host]:
            yield entry["pid"]


def kill(hosts: Cluster, host: int, pid: int) -> bool:
    return subprocess.run(hosts.command(host, ["kill", "-9", str(pid)]), capture_output=True).returncode == 0
