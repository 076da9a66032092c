"""Starting the ranks of a job again after a failure, from the newest whole checkpoint.

Whatever ends a job unasked is worth another try: a rank that was killed, hangs or lost its GPU, and a loss that is not
finite, which broken hardware makes too. Not a mistake in the configuration (exit code 2), nor a signal that asked the job
to stop. And a failure that comes back at the same step is none that another try mends.

Every failure is a row of `RUN/restarts.jsonl`, which the next start takes over into the run's metrics; what its ranks left
(`RUN/ranks`: logs, stacks, cause) is kept in `RUN/ranks-1`, `RUN/ranks-2`, ...
"""

import argparse
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.launching.signals import EXIT_CODES
from smolds_dist.progress import print_line
from smolds_dist.rows import RESTARTS, read_rows

MAX_STUCK = 3  # starts in a row that made no step, after which the job ends
SHORTEST, LONGEST = 1.0, 300.0  # seconds of pause; each start that made no step doubles it
LINES = 30  # of a traceback
# Sentences of `launching.failure`, `launching.hang` and `training.rank_checks`.
SIGNS = r"was killed(?!.*out of memory)|crashed|did not answer|holds other values|failed: .*CUDA error"
BLAMED = re.compile(rf"on host (\S+) (?:{SIGNS})")


@dataclass(frozen=True)
class Failure:
    """One unasked end of the job, as `restarts.jsonl` has it."""

    number: int  # of this run, from 1
    time: float
    step: int  # the last one that was made, 0 for none
    code: int  # exit code of what started the ranks
    cause: str
    logs: str  # what the ranks left


def run_with_restarts(
    start: Callable[[list[Failure]], tuple[int, str]],
    run_dir: Path,
    restarts: int,
    hand_over: Callable[[list[Failure]], bool] = lambda failures: False,
) -> int:
    """Runs a job, again and again where it fails; returns the last exit code.

    Args:
        start: starts the job after these failures, the first time after none; returns its exit code and, where it has
            failed, why.
        restarts: how often it is started again, at most.
        elsewhere: leaves the next start to others, if they are to make it; whether it has.
    """
    failures: list[Failure] = []
    code, cause = start(failures)
    while code not in (0, 2, *EXIT_CODES.values()):
        failures.append(note_failure(run_dir, code, cause))
        stuck = starts_without_progress(failures)
        if stuck == MAX_STUCK:
            for failure in failures[-2:]:
                _log(f"failure {failure.number}, after step {failure.step}: {failure.cause}")
                print_line(last_traceback(failure), sys.stderr, end="")
            _log(f"{MAX_STUCK} starts in a row ended after step {failures[-1].step}: another one would not help.")
            break
        if len(failures) > restarts:
            _log(f"that was the last of {restarts} restarts.")
            break
        if hand_over(failures):
            break
        pause = min(LONGEST, SHORTEST * 2 ** (stuck - 1))
        _log(f"restart {len(failures)} of {restarts} in {pause:.0f} s.")
        if asked := wait(pause):
            return EXIT_CODES[asked]
        code, cause = start(failures)
    return code


def add_options(parser: OptionParser) -> None:
    """The options of `smolds launch` and `smolds slurm`, which writes them into its script."""
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="where the ranks fail, start them again from the newest whole checkpoint, up to N times",
    )
    parser.add_argument(
        "--restarts-shrink",
        action="store_true",
        help="start again on fewer GPUs or nodes where some are lost; the checkpoint takes any layout",
    )
    parser.add_argument(
        "--spares",
        type=int,
        default=0,
        metavar="N",
        help="nodes of a Slurm allocation that wait to take the place of one that failed",
    )


def check_options(options: argparse.Namespace) -> None:
    """Raises a `ConfigError` for options that need another."""
    for name in ("spares", "restarts_shrink"):
        if getattr(options, name) and not options.restarts:
            raise ConfigError(f"--{name.replace('_', '-')} is for another start; give --restarts too.")


def note_failure(run_dir: Path, code: int, cause: str) -> Failure:
    """Adds a row to `restarts.jsonl`, and puts aside what the ranks left."""
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
    """How many of the last failures came after the same step."""
    return len(list(takewhile(lambda failure: failure.step == failures[-1].step, reversed(failures))))


def faulty_hosts(failures: list[Failure]) -> list[str]:
    """Hosts that these failures are to be blamed on, the newest last: a process there was killed, crashed, hung or lost its
    GPU. What a program itself does wrong, it does on every host."""
    found = [BLAMED.search(failure.cause) for failure in failures]
    names = [match.group(1) for match in reversed(found) if match]
    return list(dict.fromkeys(names))[::-1]


def last_traceback(failure: Failure) -> str:
    """The last lines of the failing rank's traceback, or nothing, where none was left."""
    logs = sorted(Path(failure.logs).glob("rank_*.log"))
    named = [path for path in logs if path.name in failure.cause]
    lines = (named or logs)[0].read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if logs else []
    return "".join(lines[-LINES:])


def resume_options(run_dir: Path, train_args: list[str], asked: str) -> list[str]:
    """The training's options for another start.

    Args:
        asked: `checkpoint.resume` of the first start. Where that was another run's checkpoint and this run has none yet, the
            next start begins there again; rows of the steps that it will repeat go to the logs.
    """
    from smolds_dist.checkpoint.files import checkpoints_in  # imports torch

    if asked in ("never", "auto") or asked.isdecimal() or checkpoints_in(run_dir / "checkpoints"):
        return [*train_args, "--checkpoint.resume=auto"]
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        metrics.replace(run_dir / f"ranks-{len(read_rows(run_dir / RESTARTS))}" / metrics.name)
    return train_args


def wait(seconds: float) -> signal.Signals | None:
    """Waits so long; the signal that ended the waiting, where one asked to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    try:
        got = signal.sigtimedwait(EXIT_CODES, seconds)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return signal.Signals(got.si_signo) if got else None


def _log(text: str) -> None:
    print_line(f"smolds: {text}", sys.stderr)
