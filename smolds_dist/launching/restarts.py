"""Restart the ranks of a failed job from the newest complete checkpoint.

A job restarts after a rank was killed, hung or lost its GPU, and after a non-finite loss, which faulty hardware can cause.
It does not after a configuration mistake (exit code 2), a stop signal, or repeated failures at the same step.

Every failure is a row of `RUN/restarts.jsonl`, which the next start copies into the run's metrics. Its ranks' files
(`RUN/ranks`: logs, stacks, cause) are kept in `RUN/ranks-1`, `RUN/ranks-2`, ...
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.launching.signals import EXIT_CODES, blocked
from smolds_dist.progress import print_line
from smolds_dist.rows import RESTARTS, read_rows

MAX_STUCK_STARTS = 3  # starts in a row without a step, after which the job ends
MIN_PAUSE, MAX_PAUSE = 1.0, 300.0  # seconds of pause, doubled by each start without a step
TRACEBACK_LINES = 30  # of a traceback
# Messages of `launching.failure`, `launching.hang` and `training.rank_checks`.
SIGNS = (
    r"(?:was killed|lost (?:its|their) network)(?!.*out of memory)|crashed|did not answer|was stuck|"
    r"differs from its replicas|failed: .*CUDA error"
)
BLAMED = re.compile(rf"([^:;(]*\bon host [^:;(]*?) (?:{SIGNS})")  # may name several hosts


@dataclass(frozen=True)
class Failure:
    """One failure of the job, a row of `restarts.jsonl`."""

    number: int  # of this run, from 1
    time: float
    step: int  # the last completed one; 0 = none
    code: int  # the launcher's exit code
    cause: str
    logs: str  # the folder of the ranks' files


def run_with_restarts(
    start: Callable[[list[Failure]], tuple[int, str]],
    run_dir: Path,
    restarts: int,
    hand_over: Callable[[list[Failure]], bool] = lambda failures: False,
) -> int:
    """Run a job and restart it after failures; return the last exit code.

    Args:
        start: starts the job, given the failures so far; returns its exit code and, if it failed, the cause.
        restarts: the maximum number of restarts.
        hand_over: leaves the restart to the batch system if it should happen there; returns True if it has.
    """
    failures: list[Failure] = []
    code, cause = start(failures)
    while code not in (0, 2, *EXIT_CODES.values()):
        failures.append(record_failure(run_dir, code, cause))
        stuck = starts_without_progress(failures)
        if stuck == MAX_STUCK_STARTS:
            for failure in failures[-2:]:
                log(f"failure {failure.number}, after step {failure.step}: {failure.cause}")
                print_line(last_traceback(failure), sys.stderr, end="")
            log(f"{MAX_STUCK_STARTS} starts in a row failed after step {failures[-1].step}; no further restart.")
            break
        if len(failures) > restarts:
            log(f"the limit of {restarts} restarts is reached.")
            break
        if hand_over(failures):
            break
        pause = min(MAX_PAUSE, MIN_PAUSE * 2 ** (stuck - 1))
        log(f"restart {len(failures)} of {restarts} in {pause:.0f} s.")
        with blocked() as wait:
            stopped = wait(pause)
        if stopped:
            return stopped
        code, cause = start(failures)
    return code


def add_options(parser: OptionParser) -> None:
    """Add the restart options of `smolds launch` and of `smolds slurm`, which writes them into its script."""
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="maximum restarts after failures, each from the newest complete checkpoint (default: 0)",
    )
    parser.add_argument(
        "--restarts-shrink",
        action="store_true",
        help="restart on fewer GPUs or nodes if some are lost",
    )
    parser.add_argument(
        "--spares",
        type=int,
        default=0,
        metavar="N",
        help="spare nodes of a Slurm allocation, which replace failed ones (default: 0)",
    )


def check_options(options: argparse.Namespace) -> None:
    """Raise a `ConfigError` for options that need --restarts."""
    for name in ("spares", "restarts_shrink"):
        if getattr(options, name) and not options.restarts:
            raise ConfigError(f"--{name.replace('_', '-')} needs --restarts; set it too.")


def record_failure(run_dir: Path, code: int, cause: str) -> Failure:
    """Add a row to `restarts.jsonl` and move the ranks' files to `ranks-N`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    number = len(read_rows(run_dir / RESTARTS)) + 1
    logs = run_dir / f"ranks-{number}"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    if (run_dir / "ranks").is_dir():
        (run_dir / "ranks").replace(logs)
    steps = [row["step"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]
    failure = Failure(number, round(time.time(), 3), max(steps, default=0), code, cause, str(logs))
    with (run_dir / RESTARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(failure)) + "\n")
    return failure


def starts_without_progress(failures: list[Failure]) -> int:
    """Count the last failures that came after the same step."""
    return len(list(takewhile(lambda failure: failure.step == failures[-1].step, reversed(failures))))


def faulty_hosts(failures: list[Failure]) -> list[str]:
    """Return the hosts that caused these failures, the newest last: a process there was killed, crashed, hung or lost its
    GPU. A bug in the program blames no host, because it fails on every one."""
    found = [BLAMED.search(failure.cause) for failure in failures]
    names = [re.findall(r"\bon host ([^\s,]+)", match.group(1)) if match else [] for match in found]
    return list(dict.fromkeys(host for hosts in reversed(names) for host in reversed(hosts)))[::-1]


def last_traceback(failure: Failure) -> str:
    """Return the last lines of the failed rank's traceback, or "" if there is none."""
    logs = sorted(Path(failure.logs).glob("rank_*.log"))
    named = [path for path in logs if path.name in failure.cause]
    lines = (named or logs)[0].read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if logs else []
    return "".join(lines[-TRACEBACK_LINES:])


def resume_options(run_dir: Path, train_args: list[str], asked: str) -> list[str]:
    """Return the training options for a restart.

    Args:
        asked: `checkpoint.resume` of the first start. If that was another run's checkpoint and this run has none yet, the
            restart resumes from it too; rows of the steps it will repeat move to the logs.
    """
    from smolds_dist.checkpoint.files import checkpoints_in  # imports torch

    if asked in ("never", "auto") or asked.isdecimal() or checkpoints_in(run_dir / "checkpoints"):
        return [*train_args, "--checkpoint.resume=auto"]
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        metrics.replace(run_dir / f"ranks-{len(read_rows(run_dir / RESTARTS))}" / metrics.name)
    return train_args


def log(text: str) -> None:
    """Print a message of the launcher."""
    print_line(f"smolds: {text}", sys.stderr)
