"""Processes forked by `warm` behave like normally started ones."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm
from ranks import is_running


@pytest.fixture(autouse=True)
def forks():
    if warm.programs() is None:
        pytest.skip("tests start all their processes for real here")


def start(tmp_path: Path, code: str, *args: str, **environment: str) -> subprocess.Popen:
    (tmp_path / "script.py").write_text(f"import os, sys, signal, subprocess, time\n{code}\n")
    return subprocess.Popen(
        [warm.python(), str(tmp_path / "script.py"), *args], cwd=tmp_path, text=True, env=warm.environment() | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_arguments_folder_environment_and_files_are_forwarded(tmp_path):
    code = "print(sys.argv[1:], os.getcwd(), os.environ['MINE'], sys.stdin.read(), 'torch' in sys.modules)\nsys.exit(7)"
    process = start(tmp_path, code, "a b", "--c", MINE="yes")
    assert process.communicate("typed", timeout=30) == (f"['a b', '--c'] {tmp_path} yes typed True\n", "")
    assert process.returncode == 7


@pytest.mark.parametrize(
    ("code", "returncode", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("sys.exit('why')", 1, "why\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import atexit; atexit.register(sys.stderr.write, 'bye')", 0, "bye"),
    ],
)
def test_client_exits_like_the_forked_process(tmp_path, code, returncode, said):
    process = start(tmp_path, code)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == returncode and said in errors


def test_signals_are_forwarded(tmp_path):
    code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nprint('ready', flush=True)\ntime.sleep(60)"
    process = start(tmp_path, code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 5


def test_killed_client_leaves_no_process(tmp_path):
    code = "child = subprocess.Popen(['sleep', '60'])\nprint(os.getpid(), child.pid, flush=True)\ntime.sleep(60)"
    process = start(tmp_path, code)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "OMPI_COMM_WORLD_RANK"])  # from deepspeed and mpirun
def test_variables_read_after_import_still_fork(tmp_path, name):
    process = start(tmp_path, "print('torch' in sys.modules)", **{name: "1"})
    assert process.communicate(timeout=30)[0] == "True\n"


@pytest.mark.parametrize("name", ["HF_HOME", "OMP_NUM_THREADS", "PYTHONPATH"])
def test_variables_read_during_import_start_normally(tmp_path, name):
    # not the working directory, which is in sys.path anyway
    process = start(tmp_path, "print('torch' in sys.modules, sys.executable)", **{name: str(tmp_path / "other")})
    shown, _ = process.communicate(timeout=30)
    assert shown.split()[0] == "False"
    assert os.path.basename(warm.python()) == "python" and warm.python() not in shown
