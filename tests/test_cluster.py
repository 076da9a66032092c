"""Several hosts: healthy ones train like one process, and what differs or fails on one of them is named.

Each host is a set of kernel namespaces (cluster.py). Every test of a fault prints how long the job took to end, and its
message: `pytest -s` shows a table of them.
"""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
import warm
from cluster import Cluster, cluster, needs_hosts
from ranks import ROOT, Finished, rows_without_timing, run
from test_launchers import end, losses

from smolds_dist.config import load_config
from smolds_dist.rows import read_rows
from smolds_dist.training.trainer import train

pytestmark = needs_hosts
PORT = 29400


@pytest.fixture
def options(small_run):
    return [*small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--log.tensorboard=false", "--run.name=job",
            "--train.global_batch=12", "--train.compile=off", "--parallel.timeout=60"]  # fmt: skip


@dataclass
class Tried(Finished):
    """A job that ended, and what its launcher printed."""

    seconds: float = 0.0

    @property
    def message(self) -> str:
        """The only line for the user, in addition to what ranks print while they wait for others."""
        lines = [line for line in self.stderr.splitlines() if "smolds: " in line and "has waited 10 s" not in line]
        assert len(lines) == 1 and "Traceback" not in self.stderr, self.text
        return lines[0].partition("smolds: ")[2]


def launch_command(hosts: Cluster, arguments: list[str], *launch: str, cold: bool = False) -> list[str]:
    python = sys.executable if cold else hosts.python()
    shell = ["env", *(f"{name}={value}" for name, value in hosts.environment.items()), python]
    start = [*shell, "-m", "smolds_dist", "launch", "--hostfile", str(hosts.hostfile()), *launch]
    return hosts.command(0, [*start, "--", *arguments])


def launched(hosts: Cluster, arguments: list[str], *launch: str, timeout: float = 60, cold: bool = False) -> Tried:
    """Launch over all hosts and wait for the end; print the time and the message."""
    hosts.python()
    begun = time.monotonic()
    finished = run(launch_command(hosts, arguments, *launch, cold=cold), timeout)
    return printed(finished, begun)


def printed(finished: Finished, since: float) -> Tried:
    tried = Tried(finished.returncode, finished.stdout, finished.stderr, time.monotonic() - since)
    lines = [line for line in tried.stderr.splitlines() if "smolds: " in line]
    print(f"\n{tried.seconds:.1f} s, exit code {tried.returncode}:", *lines, sep="\n    ")
    return tried


def torchrun(hosts: Cluster, arguments: list[str], timeout: float = 60, cold: bool = False) -> list[Tried]:
    """Start `torchrun --nnodes` on every host, as a batch system would; wait for all."""
    begun, count = time.monotonic(), len(hosts.hosts)
    program = [sys.executable if cold else hosts.python(), "-m", "torch.distributed.run"]
    where = ["--nnodes", str(count), "--nproc-per-node", "1", "--master-addr", "host1", "--master-port", str(PORT)]
    jobs = [
        subprocess.Popen(
            hosts.command(n, [*program, *where, "--node-rank", str(n), "-m", "smolds_dist", "train", *arguments]),
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
    job = subprocess.Popen(
        launch_command(hosts, arguments, *launch), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=warm.environment(),
    )  # fmt: skip
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
        assert f"{count} ranks over gloo on {count} nodes" in finished.stdout and "[INFO]" not in finished.stdout
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


# ---- What differs on one host is named before the first step


@pytest.fixture
def two(tmp_path):
    with cluster(tmp_path / "hosts", 2) as hosts:
        yield hosts


def rejected(tried: Tried, *parts: str) -> None:
    """Check that a job of the user's mistake ended before the first step with all of `parts` in its message."""
    assert tried.returncode == 2, tried.text
    assert [part for part in parts if part not in tried.message] == [], tried.message


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("one byte", "trained"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in
          [("all", "trained"), ("one byte", "fixed"), ("all", "fixed")]),
    ],
)  # fmt: skip
def test_other_text_on_a_host_is_rejected(two, options, corpus, cache, tmp_path, text, tokenizer):
    other, name = tmp_path / "other", corpus / "07.txt"
    shutil.copytree(corpus, other)
    if text == "all":
        for path in other.iterdir():
            path.write_text(path.read_text().replace("the", "one"))
    else:
        (other / name.name).write_bytes(b"#" + name.read_bytes()[1:])
    if tokenizer == "fixed":
        train(load_config([*options, "--run.name=first", "--train.steps=1"]))
        options += [f"--data.tokenizer={tmp_path / 'runs' / 'first' / 'export'}"]
    two.mount(1, other, corpus)
    two.hide(1, cache)
    tried = launched(two, options)
    rejected(tried, "host2", "another", "copy the same files to all hosts")
    assert not losses(tmp_path / "runs" / "job")


def change_file(hosts: Cluster, path: Path, old: str, new: str) -> None:
    """Let host2 see another content of a file."""
    text = path.read_text()
    assert old in text
    changed = hosts.folder / f"changed-{path.name}"
    changed.write_text(text.replace(old, new, 1))
    hosts.mount(1, changed, path.resolve())


@pytest.mark.parametrize(
    "package", ["transformers", *(pytest.param(n, marks=pytest.mark.long) for n in ["torch", "smolds"])]
)
def test_other_version_on_a_host_is_named_within_seconds(two, options, tmp_path, package):
    if package == "smolds":  # its source, as in another checkout of the same version
        change_file(two, ROOT / "smolds_dist" / "errors.py", '"""', '"""Another. ')
        parts = ["source of smolds"]
    else:
        installed = distribution(package)
        change_file(two, Path(installed.locate_file(next(f for f in installed.files or [] if f.name == "METADATA"))),
                    f"Version: {installed.version}", "Version: 0.1")  # fmt: skip
        parts = [f"{package} 0.1", installed.version]
    tried = launched(two, options)
    rejected(tried, "host2", "host1", *parts, "install the same versions on all hosts")
    assert not (tmp_path / "runs" / "job" / "metrics.jsonl").exists()


@pytest.mark.long
def test_missing_package_on_a_host_is_named(two, options):
    two.hide(1, Path(str(distribution("deepspeed").locate_file("deepspeed"))))
    tried = launched(two, options, cold=True)
    assert tried.returncode in (1, 2), tried.text
    assert "host2" in tried.message and "deepspeed" in tried.message and "install" in tried.message


@pytest.mark.parametrize("start", ["hostfile", pytest.param("torchrun", marks=pytest.mark.long)])
def test_run_folder_that_a_host_does_not_share_is_rejected(two, options, tmp_path, start):
    """The host's own folder has the files of an earlier run."""
    (tmp_path / "runs").mkdir()
    own = tmp_path / "own"
    (own / "job" / "ranks").mkdir(parents=True)
    (own / "job" / "lock").touch()
    two.mount(1, own, tmp_path / "runs")
    if start == "hostfile":
        rejected(launched(two, options), "host2", "job", "share")
        return
    first, second = torchrun(two, options)
    assert first.returncode != 0 and second.returncode != 0
    assert "host2" in first.stderr + second.stderr and "all hosts share" in first.stderr + second.stderr
    assert not losses(tmp_path / "runs" / "job")


@pytest.mark.long
def test_mistake_that_only_one_host_has_is_printed(two, options, tmp_path):
    """Its configuration is another file."""
    (tmp_path / "own.yaml").write_text("train:\n  lr: 0.001\n")
    change_file(two, tmp_path / "own.yaml", "0.001", "fast")
    tried = launched(two, ["--config", str(tmp_path / "own.yaml"), *options])
    rejected(tried, "on host host2: ", "train.lr", "fast")


@pytest.mark.long
def test_closed_ports_are_named(two, options):
    for host in (0, 1):
        two.firewall(host, [22, PORT])
    tried = launched(two, options, f"--master-port={PORT}")
    rejected(tried, "cannot connect to 10.77.0.", "open all TCP ports")


@pytest.mark.long
def test_closed_rendezvous_port_is_named(two, options):
    two.firewall(0, [22])
    tried = launched(two, [*options, "--parallel.timeout=15"], f"--master-port={PORT}")
    assert tried.returncode == 2 and f"rank 0 at 10.77.0.1:{PORT}" in tried.stderr, tried.text
    assert "or open this port between the hosts" in tried.stderr


# ---- Hosts that differ and train together


@pytest.mark.long
def test_layout_is_planned_for_the_smallest_memory(two, options, tmp_path):
    """Alone, each host would choose another micro-batch."""
    options += ["--train.micro_batch=null"]
    two.memory(1, 500_000_000)
    tried = launched(two, options)
    assert tried.returncode == 0, tried.text
    assert "2 x 6 x 1 sequences per step" in tried.stdout and "of 0.5 GB" in tried.stdout
    train(load_config([*options, "--run.name=single"]))
    assert losses(tmp_path / "runs" / "job") == pytest.approx(losses(tmp_path / "runs" / "single"), rel=1e-5)


@pytest.mark.long
def test_host_without_a_compiler_trains_with_the_others(two, options, tmp_path):
    for name in ("g++", "clang++"):
        if found := shutil.which(name):
            two.hide(1, Path(found).resolve())
    assert "g++" not in two.call(1, "sh", "-c", "command -v g++ || true")
    options += ["--train.compile=auto", "--train.steps=100000"]
    with running(two, options, tmp_path / "runs" / "job", steps=3) as job:
        begun = time.monotonic()
        two.call(0, "pkill", "-TERM", "-f", "smolds_dist launch")
        assert printed(end(job, timeout=240), begun).returncode == 143


# ---- The watchdog


@pytest.mark.long
@pytest.mark.parametrize("work", ["writing", "reading"])
def test_slow_checkpoints_are_no_hang(options, tmp_path, work):
    """They take longer than the timeout."""
    options += ["--parallel.timeout=8", "--checkpoint.every=3", "--checkpoint.background=off", "--train.eval_every=0"]
    folder = tmp_path / "runs" / "job" / "checkpoints"
    with cluster(tmp_path / "hosts", 2, faults=True) as hosts:
        if work == "reading":
            assert launched(hosts, options).returncode == 0
            options += ["--train.steps=9", "--checkpoint.resume=auto"]
        hosts.slow_disk(1, folder, 1)
        tried = launched(hosts, options, timeout=120)
    assert tried.returncode == 0 and "smolds: " not in tried.stderr, tried.text


@pytest.mark.long
def test_rank_that_is_stuck_before_the_first_step_is_named(options, cache, tmp_path):
    with cluster(tmp_path / "hosts", 2, faults=True) as hosts:
        hosts.slow_disk(1, cache, 1000)
        tried = launched(hosts, [*options, "--parallel.timeout=8"])
    assert tried.returncode not in (0, 2) and tried.seconds < 60, tried.text
    assert "rank 1 on host host2 was stuck for 8 s while preparing the data" in tried.message


@pytest.mark.long
def test_slow_imports_are_no_hang(options, tmp_path):
    """Ranks import DeepSpeed after they have met; here for longer than the timeout."""
    with cluster(tmp_path / "hosts", 2, faults=True) as hosts:
        hosts.slow_disk(1, Path(str(distribution("deepspeed").locate_file("deepspeed"))), 0.03)
        tried = torchrun(hosts, [*options, "--parallel.timeout=10"], timeout=60, cold=True)
    assert [one.returncode for one in tried] == [0, 0], tried[0].text + tried[1].text


@pytest.mark.long
def test_memory_limit_is_named_if_a_rank_is_killed_while_it_starts(two, options):
    two.memory(1, 200_000_000)
    tried = launched(two, options, cold=True)
    assert tried.returncode not in (0, 2), tried.text
    assert all(part in tried.message for part in ("host2", "out of memory", "0.2 GB")), tried.message


# ---- Hosts that fail


@pytest.mark.long
def test_pulled_cable_ends_the_job(two, options, tmp_path):
    options += ["--train.steps=100000", "--parallel.timeout=100"]
    with running(two, options, tmp_path / "runs" / "job", steps=3) as job:
        begun = time.monotonic()
        two.link(1, up=False)
        tried = printed(end(job, timeout=240), begun)
    assert tried.returncode == 1 and tried.seconds < 120, tried.text
    assert "host2" in tried.message


@pytest.mark.long
@pytest.mark.parametrize("fault", ["pulled cable", "power"])
def test_restart_goes_on_without_a_lost_host(options, tmp_path, fault):
    options += ["--train.steps=40", "--parallel.timeout=100", "--parallel.expert=1"]
    with cluster(tmp_path / "hosts", 3) as hosts:
        assert launched(hosts, [*options, "--run.name=before"]).returncode == 0
        run_dir = tmp_path / "runs" / "job"
        with running(hosts, options, run_dir, "--restarts=5", "--restarts-shrink", steps=5) as job:
            begun = time.monotonic()
            hosts.link(2, up=False) if fault == "pulled cable" else hosts.stop(2)
            wait_for(lambda: (run_dir / "restarts.jsonl").exists(), job)
            print(
                f"\nnoticed after {time.monotonic() - begun:.1f} s: {read_rows(run_dir / 'restarts.jsonl')[0]['cause']}"
            )
            tried = printed(end(job, timeout=400), begun)
    assert tried.returncode == 0, tried.text
    assert "host3" in read_rows(run_dir / "restarts.jsonl")[0]["cause"]
    assert "2 ranks over gloo on 2 nodes" in tried.stdout
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "runs" / "before"), rel=1e-5)


@pytest.mark.long
def test_restart_waits_until_the_cable_is_back(options, tmp_path):
    options += ["--train.steps=40", "--parallel.timeout=100"]
    with cluster(tmp_path / "hosts", 2) as hosts:
        assert launched(hosts, [*options, "--run.name=before"]).returncode == 0
        run_dir = tmp_path / "runs" / "job"
        with running(hosts, options, run_dir, "--restarts=5", steps=5) as job:
            begun = time.monotonic()
            hosts.link(1, up=False)
            wait_for(lambda: (run_dir / "restarts.jsonl").exists(), job)
            print(f"\nnoticed after {time.monotonic() - begun:.1f} s")
            time.sleep(15)
            hosts.link(1, up=True)
            tried = printed(end(job, timeout=400), begun)
    assert tried.returncode == 0, tried.text
    assert "host2" in read_rows(run_dir / "restarts.jsonl")[0]["cause"]
    assert "the restart waits for host2" in tried.stderr
    assert len(read_rows(run_dir / "restarts.jsonl")) == 1
    assert trained_rows(run_dir) == trained_rows(tmp_path / "runs" / "before")


# ---- The hosts themselves


def test_switches_of_hosts_work_while_processes_run(tmp_path):
    """What the other tests rely on: each switch changes what a running process on the host sees."""
    script = """
import os, sys, time
for line in sys.stdin:
    begun = time.monotonic()
    try:
        open(line.split()[0], "ab", buffering=0).write(b"x")
        result = "written"
    except OSError as error:
        result = error.strerror
    print(result, time.monotonic() - begun > 0.5, round(time.time()), flush=True)
"""
    folder = tmp_path / "folder"
    folder.mkdir()
    reach = ["ssh", "-o", "ConnectTimeout=1", "host2", "hostname"]
    with cluster(tmp_path / "hosts", 2, faults=True) as hosts:

        def reached() -> bool:
            return subprocess.run(hosts.command(0, reach), capture_output=True, text=True).stdout == "host2\n"

        process = subprocess.Popen(
            hosts.command(1, [sys.executable, "-c", script]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def answer() -> list[str]:
            process.stdin.write(f"{folder}/file\n")
            process.stdin.flush()
            return process.stdout.readline().split()

        assert answer()[:2] == ["written", "False"] and (folder / "file").exists()
        hosts.slow_disk(1, folder, 0.3)
        assert answer()[:2] == ["written", "True"]
        hosts.slow_disk(1, folder, 0)
        hosts.clock(1, 600)
        assert answer()[1] == "False" and 500 < int(answer()[2]) - time.time() < 700
        hosts.hide(1, folder)
        size = (folder / "file").stat().st_size
        assert answer()[0] == "written" and (folder / "file").stat().st_size == size
        hosts.firewall(1, [80])
        assert not reached()
        hosts.firewall(1, None)
        hosts.link(1, up=False)
        assert not reached()
        hosts.link(1, up=True)
        hosts.lossy(1, 100)
        assert not reached()
        hosts.lossy(1, 0)
        assert process.poll() is None
        hosts.memory(1, 50_000_000)
        assert (
            subprocess.run(hosts.command(1, [sys.executable, "-c", "bytearray(10**8)"])).returncode == -signal.SIGKILL
        )
        hosts.memory(1, 10**9)
        hosts.reboot(1)
        assert process.wait(10) and reached()
        assert hosts.call(1, "cat", f"{folder}/file") == "x"  # on the disk of its own
