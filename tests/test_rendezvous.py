"""Ranks that wait for others print so, name the variable that set the world size, and time out."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
import warm
from ranks import Finished, run, smolds

from smolds_dist.errors import ConfigError, RankError
from smolds_dist.parallel.process_group import _check_allocator, set_group_timeouts, start_process_group
from smolds_dist.parallel.ranks import RankInfo, join_ranks
from smolds_dist.parallel.rendezvous import WaitPolicy, rendezvous
from smolds_dist.progress import StoppedWaitingError


@pytest.fixture
def free_port(monkeypatch):
    """Return a free port, set as the rendezvous address in the environment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    return port


def come(ranks: list[int], world: int, timeout: float = 1.0) -> dict[int, object]:
    """Return the result or error of `rendezvous` for each of these ranks of `world`."""

    def one(rank: int):
        try:
            return rendezvous(RankInfo(rank, rank, world), WaitPolicy(timeout))
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(one, ranks), strict=True))


def test_complete_rendezvous_prints_nothing(free_port, capsys):
    ranks = come([2, 0, 1, 3], 4, timeout=30)
    ranks[1].store.set("from 1", "here")
    assert ranks[3].store.get("from 1") == b"here"
    assert capsys.readouterr().err == ""


def test_first_rank_names_the_missing_ones(free_port, capsys, monkeypatch):
    monkeypatch.setattr("smolds_dist.parallel.rendezvous.LOG_AFTER", 0.3)
    errors = come([0, 1, 4], 6)
    words = f"rank 0 has waited 1 s for ranks 2, 3, 5 at 127.0.0.1:{free_port}, because WORLD_SIZE sets "
    assert str(errors[0]).startswith(words)
    assert "`unset RANK WORLD_SIZE`" in str(errors[0])
    assert [type(errors[rank]) for rank in (0, 1, 4)] == [RankError, ConfigError, ConfigError]
    printed = capsys.readouterr().err
    assert printed.count("smolds: ") == 1 and "rank 0 has waited 0 s for ranks 2, 3, 5 at" in printed


def test_every_rank_reports_a_missing_rank_0(free_port, capsys, monkeypatch):
    monkeypatch.setattr("smolds_dist.parallel.rendezvous.LOG_AFTER", 0.3)
    errors = come([1], 2)
    assert isinstance(errors[1], RankError)
    assert f"rank 1 has waited 1 s for rank 0 at 127.0.0.1:{free_port}" in str(errors[1])
    assert capsys.readouterr().err.count("for rank 0 at") == 1


def test_port_in_use_is_an_error(free_port):
    with socket.create_server(("", int(free_port))):
        (error,) = come([0], 2).values()
    assert isinstance(error, RankError)
    assert f"127.0.0.1:{free_port}" in str(error) and "set MASTER_PORT to a free port" in str(error)


def test_wait_ends_on_request(free_port):
    begun = time.monotonic()
    with pytest.raises(StoppedWaitingError):
        rendezvous(RankInfo(0, 0, 2), WaitPolicy(should_stop=lambda: time.monotonic() > begun + 0.5))
    assert time.monotonic() < begun + 5


@pytest.mark.parametrize(("timeout", "seconds"), [(600.0, 86400), (200_000.0, 200_000)])
def test_every_process_group_gets_the_timeout(free_port, timeout, seconds):
    """Of at least a day: the watchdog ends a job that hangs."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]
        set_group_timeouts(timeout)
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    finally:
        dist.destroy_process_group()
    assert [one.total_seconds() for one in timeouts] == [seconds, seconds]


BIND = """
import torch
from dataclasses import replace
from smolds_dist.config import load_config
from smolds_dist.parallel import process_group
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import Machine, plan_topology
torch.cuda.set_device = process_group._check_allocator = lambda *_: None
topology = plan_topology(load_config(["--preset=debug"]), Machine(("cuda",), 4, True), RankInfo(1, 1, 2))
process_group.start_process_group(replace(topology, device_index=3))
"""


def test_process_group_over_nccl_is_bound_to_the_ranks_gpu(free_port):
    """By DeepSpeed. A PyTorch without CUDA has no device with this index, and names it."""
    if torch.cuda.is_available():
        pytest.skip("it would wait for the other rank")
    finished = run([sys.executable, "-c", BIND], 60, **left_over(1, free_port), DS_ACCELERATOR="cuda")
    assert "ValueError: device_id cuda:3 does not match" in finished.stderr, finished.text


@pytest.mark.parametrize("setting", ["expandable_segments:True", "max_split_size_mb:64"])
def test_gpu_that_cannot_map_memory_trains_without_expandable_segments(monkeypatch, capsys, setting):
    """Unless the user set the allocator. The GPU is a stand-in, the allocator's setting is not."""

    def fail(*_, **__):
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "empty", fail)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", setting)
    with nullcontext() if "expandable" in setting else pytest.raises(RuntimeError):
        _check_allocator()
    assert ("GPU rejects (CUDA driver error: operation not" in capsys.readouterr().err) == ("expandable" in setting)


NCCL_SAYS = """NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.28.9
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
{}"""


def test_ranks_on_one_gpu_get_nccls_reason(monkeypatch):
    """Its other errors keep their type, for which a job may be restarted."""
    topology = SimpleNamespace(device="cpu", engine="deepspeed", backend="nccl")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    duplicate = "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"
    for last, kind, message in (
        (duplicate, ConfigError, rf"^NCCL: {duplicate}; start one rank per GPU"),
        ("socketStartConnect: Connect to 10.0.0.7<43219> failed", torch.distributed.DistBackendError, "socketStart"),
    ):
        error = torch.distributed.DistBackendError(NCCL_SAYS.format("invalid usage", last))
        monkeypatch.setattr(deepspeed, "init_distributed", Mock(side_effect=error))
        with pytest.raises(kind, match=message):
            start_process_group(topology)


def left_over(rank: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


# The timeout, and the seconds after which a rank prints: with ten or more, once before the timeout.
PATIENCES = [(2, [2]), pytest.param(12, [10, 12], marks=pytest.mark.long)]


@pytest.mark.parametrize(("timeout", "logged_after"), PATIENCES)
def test_leftover_variables_are_one_sentence(small_run, free_port, timeout, logged_after):
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": free_port}
    cases = {
        "first": left_over(0, free_port),
        "second": left_over(1, str(int(free_port) - 1)),
        "slurm": slurm | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(int(free_port) - 2)},
    }

    def train(name: str) -> Finished:
        options = [*small_run, f"--run.name={name}", f"--parallel.timeout={timeout}"]
        return smolds("train", *options, timeout=90, **cases[name])

    with ThreadPoolExecutor() as pool:
        finished = dict(zip(cases, pool.map(train, cases), strict=True))
    for name, (rank, other, variable, unset) in {
        "first": (0, 1, "WORLD_SIZE", "RANK WORLD_SIZE"),
        "second": (1, 0, "WORLD_SIZE", "RANK WORLD_SIZE"),
        "slurm": (1, 0, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_TASKS"),
    }.items():
        assert finished[name].returncode == 2, finished[name].text
        lines = [line for line in finished[name].stderr.splitlines() if line.startswith("smolds: ")]
        for line, seconds in zip(lines, logged_after, strict=True):
            assert line.startswith(f"smolds: rank {rank} has waited {seconds} s for rank {other} at 127.0.0.1:"), line
            assert (
                f"because {variable} sets the world size to 2; `unset {unset}` to train in this process alone" in line
            )


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "'LOCAL_RANK' is missing"),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "but not MASTER_ADDR and MASTER_PORT"),
        (
            {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
            "RANK=2 in the environment is not below WORLD_SIZE=2",
        ),
    ],
)
def test_contradictory_variables_are_rejected_immediately(small_run, tmp_path, variables, words):
    finished = smolds("train", *small_run, timeout=30, **variables)
    assert finished.returncode == 2, finished.text
    assert words in finished.stderr and "`unset RANK WORLD_SIZE`" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_first_rank_has_time_to_report_the_mistake(small_run, free_port):
    """A launcher ends all ranks after the first exits, so the others must not exit first."""
    command = [warm.python(), "-m", "smolds_dist", "train", *small_run, "--model.num_experts=0"]
    ranks = {}
    for rank in ("1", "0"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks[rank] = subprocess.Popen(command, env=warm.environment() | variables, stderr=subprocess.PIPE, text=True)
        time.sleep(1)
    try:
        assert "model.num_experts" in ranks["0"].communicate(timeout=60)[1] and ranks["0"].returncode == 2
        assert ranks["1"].poll() is None
        assert ranks["1"].communicate(timeout=60)[1] == "" and ranks["1"].returncode == 2
    finally:
        for process in ranks.values():
            process.kill()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_wrong_mpi_size_is_rejected_immediately(small_run, tmp_path, rank):
    pytest.importorskip("mpi4py")
    variables = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": rank}
    finished = smolds("train", *small_run, timeout=30, **variables)
    assert finished.returncode == 2, finished.text
    assert "OMPI_COMM_WORLD_SIZE is 2, but MPI's world size is 1; `unset OMPI_COMM" in finished.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_without_an_mpi_library_the_variable_is_named(monkeypatch, size):
    monkeypatch.setenv(size, "2")
    monkeypatch.setenv("MPI4PY_LIBMPI", "/nowhere/libmpi.so")
    with pytest.raises(ConfigError, match=f"{size} is 2, but mpi4py cannot be loaded .*`unset {size}` to train"):
        join_ranks()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no Open MPI here")
@pytest.mark.parametrize(("timeout", "logged_after"), PATIENCES)
def test_mpi_rank_reports_missing_ranks(small_run, timeout, logged_after):
    pytest.importorskip("mpi4py")
    train = [sys.executable, "-m", "smolds_dist", "train", *small_run, f"--parallel.timeout={timeout}"]
    script = 'if [ "$OMPI_COMM_WORLD_RANK" = 0 ]; then exec "$@"; else sleep 60; fi'
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    finished = run([*mpirun, "bash", "-c", script, "bash", *train], timeout=50)
    assert finished.returncode == 2, finished.text
    waits = re.findall(
        r"smolds: rank 0 has waited (\d+) s for the other ranks of its MPI job, because OMPI", finished.stderr
    )
    assert waits == [str(seconds) for seconds in logged_after]
    assert "`unset OMPI_COMM_WORLD_SIZE` to train in this process alone" in finished.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_the_wait_immediately(small_run, tmp_path, free_port, number, code):
    command = [warm.python(), "-m", "smolds_dist", "train", *small_run, "--run.name=waiting"]
    environment = warm.environment() | left_over(1, free_port)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    entry = tmp_path / "runs" / "waiting" / "ranks" / "rank_00001.json"
    try:
        deadline = time.monotonic() + 60
        while not entry.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        begun = time.monotonic()
        process.send_signal(number)
        assert process.wait(30) == code, process.stderr.read()
        assert time.monotonic() < begun + 10
    finally:
        process.kill()
