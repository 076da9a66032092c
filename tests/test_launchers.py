"""Every launcher with real ranks: start, stop by a signal, and the report of a dead rank."""

import argparse
import base64
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from cluster import cluster, needs_hosts
from ranks import Finished, is_running, run, smolds

from smolds_dist.checkpoint.files import checkpoints_in
from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.launching.launcher import launch, plan_launch, rank_command
from smolds_dist.launching.output import NoiseFilter, run_ranks
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.topology import Machine
from smolds_dist.training.trainer import train

needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
MPI_REASON = "mpirun or mpi4py is not installed"


def has_mpi4py() -> bool:
    return subprocess.run([sys.executable, "-c", "import mpi4py.MPI"], capture_output=True).returncode == 0


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]


@pytest.fixture
def options(small_run):
    return [*small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--log.tensorboard=false"]


@pytest.fixture
def long_run(options):
    return [*options, "--train.steps=100000", "--train.eval_every=0", "--log.sample_every=0", "--checkpoint.every=0"]


def start_launch(
    launcher: str, arguments: list[str], run_dir: Path, python: str | None = None, options: list[str] | None = None
) -> subprocess.Popen:
    start = [python or warm.python(), "-m", "smolds_dist", "launch", "--nproc-per-node=2", f"--launcher={launcher}"]
    return start_and_wait_for_steps([*start, *(options or []), "--", *arguments], run_dir)


def start_and_wait_for_steps(command: list[str], run_dir: Path, **options) -> subprocess.Popen:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=warm.environment(), **options,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not losses(run_dir):
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.2)
    return process


def end(process: subprocess.Popen, timeout: float) -> Finished:
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Finished(process.returncode, stdout, stderr)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", pytest.param("mpi", marks=needs_mpi)])
def test_killed_rank_ends_the_job_and_is_named(long_run, tmp_path, launcher):
    if launcher == "mpi" and not has_mpi4py():
        pytest.skip(MPI_REASON)
    run_dir = tmp_path / "runs" / "killed"
    process = start_launch(launcher, [*long_run, "--run.name=killed"], run_dir)
    os.kill(json.loads((run_dir / "ranks" / "rank_00001.json").read_text())["pid"], signal.SIGKILL)
    finished = end(process, timeout=15)
    assert finished.returncode not in (0, 2), finished.text
    lines = [line for line in finished.stderr.splitlines() if line.startswith("smolds: ")]
    assert len(lines) == 1, finished.text
    assert lines[0].startswith("smolds: rank 1 on host ")
    assert "was killed by signal 9" in lines[0]
    assert "Traceback" not in finished.text


def test_killed_launch_leaves_no_ranks_behind(long_run, tmp_path):
    run_dir = tmp_path / "runs" / "orphans"
    process = start_launch("torchrun", [*long_run, "--run.name=orphans"], run_dir, sys.executable)
    pids = [json.loads(path.read_text())["pid"] for path in (run_dir / "ranks").glob("*.json")]
    process.kill()
    process.communicate(timeout=30)  # returns when no process holds its pipes
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "ranks are still there"
        time.sleep(0.2)


def test_failed_rank_is_reported_with_its_last_line(long_run, tmp_path):
    """A real failure in the middle of a run: a folder has the name of the samples' file."""
    run_dir = tmp_path / "runs" / "broken"
    arguments = [*long_run, "--run.name=broken", "--log.sample_every=100"]
    process = start_launch("torchrun", arguments, run_dir)
    (run_dir / "samples.jsonl").mkdir()
    finished = end(process, timeout=60)
    assert finished.returncode == 1, finished.text
    lines = [line for line in finished.stderr.splitlines() if line.startswith("smolds: ")]
    assert len(lines) == 1, finished.text
    assert "rank 0 on host" in lines[0] and "Error" in lines[0] and "rank_00000.log" in lines[0]
    assert "Traceback" not in finished.stderr
    assert "Traceback" in (run_dir / "ranks" / "rank_00000.log").read_text()


@pytest.mark.parametrize(
    ("launcher", "number", "code"),
    [("torchrun", signal.SIGINT, 130), ("deepspeed", signal.SIGTERM, 143), ("mpi", signal.SIGUSR1, 75)],
)
def test_signal_saves_the_step_on_all_ranks(long_run, tmp_path, launcher, number, code):
    if launcher == "mpi" and not (shutil.which("mpirun") and has_mpi4py()):
        pytest.skip(MPI_REASON)
    run_dir = tmp_path / "runs" / "stopped"
    port = free_port()
    process = start_launch(launcher, [*long_run, "--run.name=stopped"], run_dir, options=[f"--master-port={port}"])
    entry = json.loads((run_dir / "ranks" / "rank_00001.json").read_text())
    assert entry["job"].split(":")[1] == port
    process.send_signal(number)
    finished = end(process, timeout=30)
    assert finished.returncode == code, finished.text
    assert f"stopped by {number.name} after step {len(losses(run_dir))}" in finished.stdout
    assert [path.name for path in checkpoints_in(run_dir / "checkpoints")] == [f"step_{len(losses(run_dir)):08}"]
    assert not (run_dir / "ranks" / "cause.txt").exists()
    assert "smolds:" not in finished.stderr


def test_unrequested_stop_exit_code_is_a_failure(tmp_path):
    """srun returns the highest code of all tasks, including one it sent SIGTERM after another failed."""
    code, cause = run_ranks(["sh", "-c", "exit 143"], dict(os.environ), tmp_path, remote=True)
    assert (code, cause) == (1, "the ranks ended with exit code 143")


def test_single_process_stops_on_a_signal_too(long_run, tmp_path):
    command = [warm.python(), "-m", "smolds_dist", "train", *long_run, "--run.name=alone"]
    run_dir = tmp_path / "runs" / "alone"
    process = start_and_wait_for_steps(command, run_dir)
    process.send_signal(signal.SIGTERM)
    finished = end(process, timeout=30)
    assert finished.returncode == 143, finished.text
    assert len(list((run_dir / "checkpoints").glob("step_*"))) == 1


def test_deepspeed_command_equals_one_process(options, tmp_path):
    train(load_config([*options, "--run.name=single"]))
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()]
    by_hand = [*start, "--module", "smolds_dist", "train", *options, "--run.name=by_hand", "--parallel.expert=2"]
    finished = run(by_hand, timeout=120)
    assert finished.returncode == 0, finished.text
    assert losses(tmp_path / "runs" / "by_hand") == pytest.approx(losses(tmp_path / "runs" / "single"), rel=1e-3)


@needs_mpi
def test_mpirun_equals_one_process_also_as_a_command(options, tmp_path):
    if not has_mpi4py():
        pytest.skip(MPI_REASON)
    train(load_config([*options, "--run.name=single"]))
    options += ["--parallel.expert=2"]
    finished = smolds(
        "launch", "--nproc-per-node=2", "--launcher=mpi", "--", *options, "--run.name=launched", timeout=120
    )
    assert finished.returncode == 0, finished.text
    assert "expert parallel size 2" in finished.stdout
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    by_hand = ["mpirun", *root, "--oversubscribe", "-n", "2", warm.python(), "-m", "smolds_dist", "train", *options]
    finished = run([*by_hand, "--run.name=by_hand"], timeout=120)
    assert finished.returncode == 0, finished.text
    for name in ("launched", "by_hand"):
        assert losses(tmp_path / "runs" / name) == pytest.approx(losses(tmp_path / "runs" / "single"), rel=1e-3)


def test_stale_build_locks_stop_no_run(options, tmp_path):
    """DeepSpeed would wait indefinitely: it builds its shared-memory op in `init_distributed`, which smolds skips."""
    extensions = tmp_path / "extensions"
    for name in ("deepspeed_shm_comm", "py311_cpu/deepspeed_shm_comm"):
        (extensions / name).mkdir(parents=True)
        (extensions / name / "lock").touch()
    before = sorted(extensions.rglob("*"))
    arguments = [*options, "--run.name=locked", "--train.steps=1"]
    finished = smolds(
        "launch", "--nproc-per-node=2", "--", *arguments, timeout=90, TORCH_EXTENSIONS_DIR=str(extensions)
    )
    assert finished.returncode == 0, finished.text
    assert sorted(extensions.rglob("*")) == before  # no build starts, so none can be killed


@pytest.mark.long
@needs_hosts
def test_hostfile_run_on_two_hosts_equals_one_process(options, tmp_path):
    train(load_config([*options, "--run.name=single"]))
    with cluster(tmp_path / "hosts") as hosts:
        start = [hosts.python(), "-m", "smolds_dist", "launch", "--hostfile", str(hosts.hostfile()), "--"]
        train_options = [*options, "--run.name=pair", '--log.sample_prompts=["$(touch ran)"]', "--parallel.expert=2"]
        finished = run(hosts.command(0, [*start, *train_options]), timeout=180, cwd=tmp_path, **hosts.environment)
        assert finished.returncode == 0, finished.text
        assert "2 ranks over gloo on 2 nodes" in finished.stdout
        run_dir = tmp_path / "runs" / "pair"
        assert losses(run_dir) == pytest.approx(losses(tmp_path / "runs" / "single"), rel=1e-3)
        ranks = [json.loads(path.read_text()) for path in sorted((run_dir / "ranks").glob("*.json"))]
        assert not (tmp_path / "ran").exists()
        assert [entry["host"] for entry in ranks] == hosts.names


@pytest.mark.long
@needs_hosts
def test_rank_killed_on_another_host_ends_the_job_and_is_named(long_run, tmp_path):
    run_dir = tmp_path / "runs" / "killed"
    with cluster(tmp_path / "hosts") as hosts:
        start = [hosts.python(), "-m", "smolds_dist", "launch", "--hostfile", str(hosts.hostfile()), "--"]
        command = hosts.command(0, [*start, *long_run, "--run.name=killed"])
        process = start_and_wait_for_steps(command, run_dir, cwd=tmp_path)
        entry = json.loads((run_dir / "ranks" / "rank_00001.json").read_text())
        # The rank's pid is valid on its host.
        assert run(hosts.command(1, ["kill", "-9", str(entry["pid"])]), timeout=10).returncode == 0
        finished = end(process, timeout=15)
    assert finished.returncode not in (0, 2), finished.text
    lines = [line for line in finished.stderr.splitlines() if "smolds: " in line]
    assert len(lines) == 1, finished.text
    assert "rank 1 on host host2 was killed or lost its network" in lines[0]
    assert "Traceback" not in finished.text


GPU = Machine(("cuda", "cpu"), 1, True, int(80e9))
GPUS = Machine(("cuda", "cpu"), 8, True, int(80e9))
APPLE = Machine(("mps", "cpu"), 1, False, int(32e9))
CPU = Machine(("cpu",), 2, False, int(16e9))


@pytest.mark.parametrize(
    ("machine", "args", "expected"),
    [
        (GPU, [], "-m smolds_dist train"),
        (APPLE, [], "-m smolds_dist train"),
        (GPUS, [], "-m torch.distributed.run --standalone --nproc-per-node 8 -m smolds_dist train"),
        (CPU, [], "-m torch.distributed.run --standalone --nproc-per-node 2 -m smolds_dist train"),
        (GPUS, ["--launcher=deepspeed"], "--num_gpus 8"),
        (GPUS, ["--launcher=mpi", "--nproc-per-node=4"], "mpirun -n 4"),
        (GPUS, ["--hostfile=HOSTS"], "--launcher pdsh --force_multi --no_ssh_check --module smolds_dist train --env"),
        (GPUS, ["--hostfile=HOSTS", "--launcher=mpi"], "mpirun -n 32 --bind-to none --hostfile"),
        (GPUS, ["--hostfile=HOSTS", "--master-port=2950"], "runner --master_port 2950 "),
        (GPUS, ["--master-port=2950"], "run --master-addr 127.0.0.1 --master-port 2950 --nproc-per-node 8"),
    ],
)
def test_dry_run_shows_the_command_for_the_machine(machine, args, expected, tmp_path, monkeypatch, capsys, small_run):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    hosts = tmp_path / "hosts"
    hosts.write_text("# four nodes\n" + "".join(f"node{n} slots=8\n" for n in range(4)))
    args = [arg.replace("HOSTS", str(hosts)) for arg in args]
    assert launch([*args, "--dry-run", "--", *small_run, "--train.global_batch=64"], machine) == 0
    shown = capsys.readouterr().out
    assert expected in shown
    last = shlex.split(shown)[-1]
    if last.startswith("--encoded="):  # a shell on the hosts would expand the corpus' asterisk
        last = json.loads(base64.urlsafe_b64decode(last.removeprefix("--encoded=")))[-1]
    assert last == "--train.global_batch=64"
    assert not (tmp_path / "runs").exists()


def test_dry_run_in_an_allocation_uses_srun(monkeypatch, capsys, small_run):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    command = ["--dry-run", "--", *small_run, "--train.global_batch=64"]
    assert launch(command, GPUS) == 0
    srun = "srun --nodes 4 --ntasks 32 --ntasks-per-node 8"
    assert capsys.readouterr().out.startswith(f"{srun} --kill-on-bad-exit=1")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")  # ignored by srun since Slurm 22.05
    assert launch(command, GPUS) == 0
    assert capsys.readouterr().out.startswith(f"{srun} --cpus-per-task 4 ")


ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        # As Slurm 22.05 sets them
        ({"SLURM_NTASKS": "7", "SLURM_TASKS_PER_NODE": "3(x2),1", "SLURM_JOB_CPUS_PER_NODE": "3(x2),1"}, "--ntasks 3"),
        ({"SLURM_TASKS_PER_NODE": "3(x2),2", "SLURM_JOB_CPUS_PER_NODE": "3(x2),2"}, "--ntasks 3"),  # --exclusive
        (
            {"SLURM_NTASKS": "6", "SLURM_GPUS_PER_TASK": "a100:1"},
            "--ntasks 6 --ntasks-per-node 2 --gpus-per-task a100:1 ",
        ),
    ],
)
def test_ranks_per_node_fit_the_smallest_node(variables, expected):
    options = argparse.Namespace(launcher="slurm", nproc_per_node="auto", hostfile=None, spares=0, master_port=None)
    command = shlex.join(rank_command(plan_launch(options, CPU, "cpu", ALLOCATION | variables), [], True, []))
    assert command.startswith("srun --nodes 3 ") and expected in command, command


@pytest.mark.parametrize(
    ("variables", "asked", "fix"),
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "8(x2),3"}, "4", "lower --nproc-per-node"),
        (
            {"SLURM_JOB_CPUS_PER_NODE": "8(x2),4", "SLURM_CPUS_PER_TASK": "3"},
            "2",
            "2 ranks with 3 cores each exceed the 4",
        ),
        ({"SLURM_GPUS_PER_TASK": "2"}, "auto", "each rank uses one GPU"),
        ({"SLURM_HET_SIZE": "2"}, "auto", "one component"),
    ],
)
def test_ranks_that_do_not_fit_an_allocation_are_an_error(variables, asked, fix):
    options = argparse.Namespace(launcher="slurm", nproc_per_node=asked, hostfile=None, spares=0, master_port=None)
    with pytest.raises(ConfigError, match=fix):
        plan_launch(options, CPU, "cpu", ALLOCATION | variables)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("node1 slots=8\nnode2\n", "line 2"),
        ("node1 slots=8\nnode1 slots=8\n", "each host once"),
        ("node1 slots=8\nnode2 slots=4\n", "make them equal"),
        ("# none\n", "lists no host"),
        ("Knoten\xe4 slots=8\n", "is not UTF-8 text"),
    ],
)
def test_bad_hostfile_is_one_sentence(text, fix, tmp_path, small_run):
    (tmp_path / "hosts").write_bytes(text.encode("latin-1"))
    finished = smolds("launch", "--hostfile", str(tmp_path / "hosts"), "--dry-run", "--", *small_run)
    assert finished.returncode == 2, finished.text
    assert fix in finished.stderr and finished.stderr.count("\n") == 1


def test_killed_task_is_named_if_srun_ends_the_others_before_they_name_it(tmp_path, capfd):
    lines = ["n2: task 1: Killed", "n1: task 0: Terminated"]
    srun = f"printf 'srun: error: %s\\n' {shlex.join(lines)} >&2; exit 143"
    code, cause = run_ranks(["sh", "-c", srun], dict(os.environ), tmp_path, remote=True)
    assert (code, cause) == (1, "rank 1 on host n2 was killed by signal 9")
    assert capfd.readouterr().err == f"\nsmolds: {cause}; the other ranks stop.\n"


def test_launchers_own_lines_are_hidden():
    ours = ["  3%|  | 3/100 [00:01<00:10]\n", "smolds: rank 1 on host a failed: ValueError: b (traceback: c)\n", "\n"]
    table = ["=" * 60 + "\n", "train FAILED\n", "-" * 60 + "\n", "Failures:\n", "=" * 60 + "\n"]
    trace = [
        "Traceback (most recent call last):\n",
        '  File "run.py", line 1\n',
        "    main()\n",
        "ChildFailedError: \n",
    ]
    logs = ["E1124 15:52:59.524000 1 torch/distributed/api.py:10] failed\n", "srun: error: n2: task 1: Killed\n"]
    noise = NoiseFilter()
    lines = [*ours, *trace, *table, ours[0], *logs, ours[1]]
    assert [line for line in lines if not noise.is_noise(line)] == [*ours, ours[0], ours[1]]
