"""Hosts of a hostfile: their environment, whether they answer, and what a launcher says about a lost one.

Without root no second host can be simulated: here a program named `ssh` stands in for it. tests/test_launchers.py has the
real one.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import warm

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.launching import hosts
from smolds_dist.launching.environment import environment_file, file_option, on_hosts, passed_on
from smolds_dist.launching.failure import read_cause
from smolds_dist.launching.hosts import HostWatch, check_hosts, kill_command, wait_for_hosts
from smolds_dist.launching.launcher import Job, launch
from smolds_dist.launching.output import run_ranks
from smolds_dist.launching.plan import Plan
from smolds_dist.launching.restarts import Failure, faulty_hosts
from smolds_dist.launching.ssh import ssh_command
from smolds_dist.parallel.topology import Machine

CPU = Machine(("cpu",), 2, False, int(16e9))
PLAN = Plan("deepspeed", 4, 2, Path("hostfile"), ("a.lan", "root@b"))


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Make `ssh HOST COMMAND` run the command here if the returned folder has a file named after the host."""
    up, programs = tmp_path / "up", tmp_path / "programs"
    up.mkdir()
    programs.mkdir()
    text = (
        f'#!/bin/sh\nfor last; do host=$command; command=$last; done\ntest -e "{up}/$host" && eval "$command" && exit\n'
    )
    (programs / "ssh").write_text(f'{text}echo "ssh: connect to host $host port 22: No route to host" >&2\nexit 255\n')
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return up


def test_variables_of_the_list_and_of_export_are_passed_on():
    listed = """AWS_SECRET_ACCESS_KEY CUDA_LAUNCH_BLOCKING GLOO_SOCKET_IFNAME HF_TOKEN HTTPS_PROXY
        NCCL_DEBUG OMP_NUM_THREADS PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF TORCHINDUCTOR_CACHE_DIR TORCH_FR_BUFFER_SIZE
        TORCH_LOGS WANDB_API_KEY no_proxy""".split()
    own = "CUDA_VISIBLE_DEVICES HOME MASTER_PORT PATH RANK TORCHELASTIC_RUN_ID".split()
    environment = dict.fromkeys([*listed, *own, "MINE"], "x")
    assert [*passed_on(environment, [])] == sorted(listed)
    assert {*passed_on(environment, ["MINE", "PATH"])} == {*listed, "MINE", "PATH"}
    for name in ("RANK", "CUDA_VISIBLE_DEVICES", "MISSING"):
        with pytest.raises(ConfigError, match=f"--export {name} is .*(omit it|set it)"):
            passed_on(environment, [name])


def test_file_of_variables_is_the_users_alone_and_read_before_any_other_import(tmp_path):
    path = tmp_path / "a run" / "environment.json"
    rank = [sys.executable, "-X", "importtime", "-m", "smolds_dist", "train", file_option(path), "--train.steps=x"]
    with environment_file(path, {"HF_HOME": "/a b", "OMP_NUM_THREADS": "3"}):
        assert path.stat().st_mode & 0o777 == 0o600
        script = "from smolds_dist.launching.environment import read_environment as read; import os, sys; "
        script += (
            "print(read(sys.argv[1:]), os.environ['HF_HOME'], os.environ['OMP_NUM_THREADS'], 'torch' in sys.modules)"
        )
        shown = subprocess.run(
            [sys.executable, "-c", script, file_option(path), "--x"], capture_output=True, text=True,
            env=warm.environment() | {"HF_HOME": "/of/this/host"},
        )  # fmt: skip
        assert shown.stdout == "['--x'] /a b 3 False\n", shown.stderr
    assert not path.exists()
    finished = subprocess.run(rank, capture_output=True, text=True, env=warm.environment())
    assert finished.returncode == 2
    last = finished.stderr.splitlines()[-1]
    assert last.startswith(f"smolds: {path} cannot be read on host ") and "a folder that all hosts share" in last


def test_no_secret_reaches_a_command_line_and_the_users_ssh_options_precede(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222 -oConnectTimeout=9")
    environment = on_hosts({"MLFLOW_TRACKING_PASSWORD": "x", "PATH": "/bin", "OMPI_MCA_plm_rsh_agent": "mine"})
    assert "MLFLOW_TRACKING_PASSWORD" not in environment and environment["PATH"] == "/bin"
    assert environment["PDSH_SSH_ARGS_APPEND"].startswith(
        "-p 2222 -oConnectTimeout=9 -oBatchMode=yes -oConnectTimeout=5 "
    )
    assert "-oServerAliveInterval=15" in environment["PDSH_SSH_ARGS_APPEND"]
    assert environment["OMPI_MCA_plm_rsh_agent"] == "mine"
    assert ssh_command("h", "true")[:4] == ["ssh", "-p", "2222", "-oConnectTimeout=9"]


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (["--export=HOME"], "--hostfile; omit it"),
        (["--restarts=1", "--restarts-shrink", "--restarts-grow"], "needs --restarts-shrink and --hostfile"),
        (["--master-port=70000"], "at most 65,535"),
        (["--hostfile=HOSTS", "--export=NOT_SET"], "--export NOT_SET is not a variable"),
        (
            ["--hostfile=HOSTS"],
            "do not answer: b (ssh: connect to host b port 22: No route to host); make `ssh HOST true`",
        ),
    ],
)
def test_mistakes_are_found_before_any_rank_starts(options, fix, tmp_path, small_run, ssh, capsys):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    (ssh / "a").touch()
    options = [option.replace("HOSTS", str(tmp_path / "hosts")) for option in options]
    with pytest.raises(ConfigError) as error:
        launch([*options, "--", *small_run, "--parallel.device=cpu"], CPU)
    assert fix in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_port_in_use_is_a_mistake(small_run):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--master-port {port} cannot be used .Address already in use.; choose"):
            launch([f"--master-port={port}", "--nproc-per-node=2", "--", *small_run, "--parallel.device=cpu"], CPU)


def test_restart_waits_for_a_missing_host_or_uses_the_others(ssh, monkeypatch):
    monkeypatch.setattr(hosts, "MAX_PAUSE", 0.2)
    (ssh / "a").touch()
    lines = []
    assert wait_for_hosts(["a", "b"], lambda up: PLAN if up == ["a"] else None, lines.append) is PLAN
    assert not lines
    threading.Timer(1.5, (ssh / "b").touch).start()
    begun = time.monotonic()
    assert wait_for_hosts(["a", "b"], lambda up: PLAN if up == ["a", "b"] else None, lines.append) is PLAN
    assert time.monotonic() - begun > 1
    assert lines == [
        "the restart waits for b (ssh: connect to host b port 22: No route to host); Ctrl-C ends the wait."
    ]
    with pytest.raises(ConfigError, match="hostfile lists hosts that do not answer: c"):
        check_hosts(["a", "c"], Path("hostfile"))


def test_restart_uses_as_many_hosts_as_have_a_valid_layout(small_run, tmp_path):
    hosts = ("a", "b", "c")
    plan = Plan("deepspeed", 6, 2, tmp_path / "hosts", hosts)

    def largest(answering, shrink, global_batch=12):
        config = load_config([*small_run, "--parallel.device=cpu", f"--train.global_batch={global_batch}"])
        job = Job(argparse.Namespace(restarts_shrink=shrink), config, [], CPU, plan, {})
        return (found := job._largest(answering)) and (found.hosts, found.procs)

    assert largest(["c", "b", "a"], shrink=False) == (hosts, 6)
    assert largest(["a", "c"], shrink=False) is None and largest([], shrink=True) is None
    assert largest(["c", "a"], shrink=True) == (("a",), 2)  # four ranks cannot share 12 sequences by twos
    assert largest(["c", "a"], shrink=True, global_batch=24) == (("a", "c"), 4)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_stop_signal_ends_the_wait_for_hosts(ssh, number, code):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})  # a signal before the wait must not end pytest
    try:
        threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), number)).start()
        assert wait_for_hosts(["a"], lambda up: None, lambda text: None) == code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_entry(folder: Path, rank: int, host: str, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entry = {
        "rank": rank,
        "host": host,
        "pid": 1,
        "system": "s",
        "started": 1.0,
        "state": "running",
        "job": "j",
    } | changes
    (folder / f"rank_{rank:05}.json").write_text(json.dumps(entry))


def make_watch(folder: Path) -> HostWatch:
    return HostWatch(folder, PLAN, "--environment=/x", grace=0.2)


def test_host_whose_ssh_ended_is_named_and_blamed(tmp_path):
    write_entry(tmp_path, 2, "of an earlier job")
    watch = make_watch(tmp_path)
    for rank, host in enumerate(("a", "a", "bee", "bee")):
        write_entry(tmp_path, rank, host, started=2.0)
    watch.read("b: Timeout, server b not responding.\n")
    assert watch.cause() == ""
    watch.read("pdsh@here: b: ssh exited with exit code 255\n")
    watch.read("pdsh@here: a: ssh exited with exit code 1\n")
    found = watch.cause()
    assert found == (
        "one of the ranks 2, 3 on host bee was killed or lost its network (ssh ended with exit code 255: "
        "Timeout, server b not responding)"
    )
    assert watch.started()
    watch.report()
    assert read_cause(tmp_path) == found
    assert faulty_hosts([Failure(1, 0.0, 1, 1, found, "")]) == ["bee"]


def test_rank_killed_for_memory_on_another_host_is_named_with_the_limit(tmp_path, ssh):
    (ssh / "root@b").touch()
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 3\n")
    (tmp_path / "memory.max").write_text("2000000000\n")
    watch = make_watch(tmp_path / "ranks")
    write_entry(tmp_path / "ranks", 2, "b", memory_events=str(tmp_path / "memory.events"), kills_before=2)
    watch.read("pdsh@here: b: ssh exited with exit code 247\n")
    watch.report()
    cause = read_cause(tmp_path / "ranks")
    assert ": its control group, which is limited to 2.0 GB, is out of memory (ssh ended with exit code 247)" in cause
    assert not faulty_hosts([Failure(1, 0.0, 1, 1, cause, "")])


def test_host_without_smolds_is_named_with_its_last_line(tmp_path):
    write_entry(tmp_path, 2, "of an earlier job")
    watch = make_watch(tmp_path)
    watch.read("b: /usr/bin/python: No module named smolds_dist\n")
    watch.read("pdsh@here: b: ssh exited with exit code 1\n")
    assert not watch.started()
    assert watch.cause() == (
        "host root@b did not start its ranks (ssh ended with exit code 1: /usr/bin/python: No module named smolds_dist); "
        "install smolds and Python at the same paths as here"
    )


def test_host_that_mpirun_has_lost_is_found_by_ssh(tmp_path, ssh):
    (ssh / "a.lan").touch()
    watch = make_watch(tmp_path)
    for rank, host in enumerate(("a", "a", "b", "b")):
        write_entry(tmp_path, rank, host)
    assert not watch.has_lost_host()
    watch.read("ORTE was unable to reliably start one or more daemons.\n")
    assert watch.has_lost_host()
    assert watch.cause().startswith("one of the ranks 2, 3 on host b was killed or lost its network")


def test_ranks_that_stopped_or_reported_are_not_lost(tmp_path):
    watch = make_watch(tmp_path)
    for rank, state in enumerate(("stopped", "done", "failed", "refused")):
        write_entry(tmp_path, rank, "h", state=state)
    watch.read("pdsh@here: a: ssh exited with exit code 75\n")
    watch.read("pdsh@here: b: ssh exited with exit code 2\n")
    assert watch.cause() == "" and watch.started() and watch.rejected


def test_launcher_ends_when_ranks_of_a_known_failure_do_not(tmp_path, ssh, monkeypatch, capfd):
    """A stand-in for a launcher whose ssh to a dead host never ends."""
    monkeypatch.setattr(hosts, "EXIT_SECONDS", 0.5)
    ranks = tmp_path / "run" / "ranks"
    for rank, host in enumerate(("a", "a", "b", "b")):
        write_entry(ranks, rank, host)
    write = f"cp {ranks}/rank_00002.json {tmp_path}/x; sed s/1.0/2.0/ {tmp_path}/x >{ranks}/rank_00002.json; "
    script = f"{write} echo 'pdsh@h: b: ssh exited with exit code 255' >&2; sleep 60 & wait"
    begun = time.monotonic()
    code, cause = run_ranks(["sh", "-c", script], dict(os.environ), tmp_path / "run", False, make_watch(ranks))
    assert time.monotonic() - begun < 20
    assert code == 1
    assert cause == "rank 2 on host b was killed or lost its network (ssh ended with exit code 255)"
    assert capfd.readouterr().err == f"\nsmolds: {cause}; the other ranks stop.\n"


def test_killed_pdsh_is_a_failure_although_deepspeed_exits_with_code_0(tmp_path, ssh, monkeypatch):
    monkeypatch.setattr(hosts, "SHARED_SECONDS", 0.5)
    watch = make_watch(tmp_path / "ranks")
    write_entry(tmp_path / "ranks", 0, "a")
    assert run_ranks(["true"], dict(os.environ), tmp_path, False, watch)[0] == 1
    write_entry(tmp_path / "ranks", 0, "a", state="done")
    assert run_ranks(["true"], dict(os.environ), tmp_path, False, watch)[0] == 0


def test_kill_command_kills_this_runs_processes_only():
    sleeps = [[sys.executable, "-c", "import time; time.sleep(60)", f"--environment=/runs/{name}"] for name in "ab"]
    running = [subprocess.Popen(command) for command in sleeps]
    try:
        assert subprocess.run(["sh", "-c", kill_command("--environment=/runs/a")]).returncode == 0
        assert running[0].wait(20) == -signal.SIGKILL
        assert running[1].poll() is None
    finally:
        running[1].kill()
    assert subprocess.run(["sh", "-c", kill_command("--environment=/runs/a")]).returncode == 0  # none
