"""Real processes for tests: one command, or several ranks, each with a time limit that ends the whole process group."""

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import psutil
import warm

from smolds_dist.observe.rows import read_rows

ROOT = Path(__file__).parents[1]
# accelerate, PEFT and lm-evaluation-harness, for processes with this path.
EXTRAS = Path(sysconfig.get_path("purelib", vars={"base": str(ROOT / ".venv" / "extras")}))
# A Python with transformers 4.57, and other packages from here.
TRANSFORMERS4 = ROOT / ".venv" / "transformers4" / "bin" / "python"
# A Python with llama.cpp (xllamacpp) and mlx-lm, and other packages from here.
READERS = ROOT / ".venv" / "readers" / "bin" / "python"
# Factor of time limits, which are for processes that hang: shared cores can be much slower than a quiet machine.
PATIENCE = 4
TIMING = {"tokens_per_s", "mfu", "seconds", "memory_gb", "time"}


@dataclass
class Finished:
    returncode: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return f"exit code {self.returncode}\n{self.stdout[-4000:]}\n{self.stderr[-6000:]}"


def is_running(pid: int) -> bool:
    """Return True if the process exists and is not a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def rows_without_timing(run_dir: Path) -> list[dict]:
    """Return a run's metrics rows that an identical run must repeat: without times, memory, and starts."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows if row.get("event") != "start"]


def run(
    command: list[str], timeout: float, cwd: Path | None = None, cold: bool = False, **environment: str
) -> Finished:
    """Run a command; after `PATIENCE` times `timeout` seconds kill it and all its children and fail the test.

    Args:
        timeout: seconds that suffice on a quiet machine.
        command: `sys.executable` is replaced by a Python that has imported everything, `warm.programs`.
        cold: start it without `warm`, as a user does.
    """
    timeout *= PATIENCE
    env = warm.environment() | environment
    if not cold and (folder := warm.programs()):
        command = [str(folder / "python") if command[0] == sys.executable else command[0], *command[1:]]
        env["PATH"] = f"{folder}{os.pathsep}{env['PATH']}"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):  # launched ranks have their own session
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"no end after {timeout} s: {command}\n{stdout[-4000:]}\n{stderr[-6000:]}") from None
    return Finished(process.returncode, stdout, stderr)


def smolds(
    *args: str, timeout: float = 120, cwd: Path | None = None, cold: bool = False, **environment: str
) -> Finished:
    """Run the `smolds` command."""
    return run([sys.executable, "-m", "smolds_dist", *args], timeout, cwd, cold, **environment)


def run_ranks(world: int, script: str, *args: str, timeout: float = 400, **environment: str) -> Finished:
    """Run `world` ranks of a script of this folder under torchrun, on a free port."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    finished = run([*start, str(ROOT / "tests" / script), *args], timeout, **environment)
    assert finished.returncode == 0, finished.text
    return finished
