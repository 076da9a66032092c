"""`smolds ladder run`: train what a ladder lacks, each an ordinary run in its own process."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from smolds_dist.checkpoint.files import MANIFEST, checkpoint_name
from smolds_dist.errors import ConfigError
from smolds_dist.ladder.costs import short
from smolds_dist.ladder.plan import Ladder, LadderRun
from smolds_dist.ladder.results import all_runs, final_loss, gather, measure_noise, open_ladder, sweep
from smolds_dist.launching.output import die_with_parent
from smolds_dist.launching.signals import EXIT_CODES, handled_by
from smolds_dist.parallel.cpu_binding import gpu_addresses
from smolds_dist.parallel.rank_environment import threads_per_rank
from smolds_dist.progress import duration
from smolds_dist.training.branch import branch

TICK = 0.2  # seconds between looks at the running processes
LOOK = 2.0  # and at the runs' folders, which takes longer, while fewer than `jobs` are running
RATES = "rates"  # --only: the sweep of learning rates


@dataclass
class Child:
    """A run's process."""

    run: LadderRun
    process: subprocess.Popen
    slot: int
    began: float


class Trainer:
    """Trains the runs of a ladder, several at a time, and stops them on a signal.

    Args:
        jobs: most runs at a time, which divide the machine's CPU threads, or its GPUs (untested with several).
        procs: ranks of each run; 1: one process without a launcher.
    """

    def __init__(self, ladder: Ladder, folder: Path, jobs: int, procs: int):
        self.ladder, self.folder, self.jobs, self.procs = ladder, folder, jobs, procs
        self.children: list[Child] = []
        self.failed: dict[str, str] = {}  # why, by name
        self.done: set[str] = set()
        self.stopped_by: int | None = None

    def train(self, only: str | None) -> int:
        """Train until nothing is left that can be; return the exit code."""
        with handled_by(self._stop):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # see `ladder.command.run`
            looked = -LOOK
            while True:
                ended = self._collect()
                if len(self.children) < self.jobs and (ended or time.monotonic() > looked + LOOK):
                    todo, looked = self._todo(only), time.monotonic()
                    while todo and len(self.children) < self.jobs and not self.stopped_by:
                        self._start(todo.pop(0))
                if not self.children:
                    break
                time.sleep(TICK)
        if self.stopped_by:
            return EXIT_CODES[signal.Signals(self.stopped_by)]
        if self.failed:
            print(f"smolds: {len(self.failed)} runs failed: {', '.join(self.failed)}.", file=sys.stderr)
        left = list(self._without_checkpoint(only))
        for run, trunk in left:
            print(
                f"smolds: {run.name} cannot begin, because {self.folder / trunk.name} no longer has the checkpoint of step "
                f"{run.first}; delete that folder to train both again.",
                file=sys.stderr,
            )
        return 1 if self.failed or left else 0

    def _without_checkpoint(self, only: str | None) -> Iterator[tuple[LadderRun, LadderRun]]:
        """Yield branches that cannot begin, with their trunks, which have finished."""
        for run in all_runs(self.ladder, self.folder):
            wanted = only in (None, run.rung.name) and run.name not in self.done | self.failed.keys()
            if wanted and run.trunk and math.isfinite(final_loss(self.folder, run.trunk) or math.inf):
                yield run, run.trunk

    def _todo(self, only: str | None) -> list[LadderRun]:
        """Return the runs that can start now, the sweep's before all others."""
        runs, best = sweep(self.ladder, self.folder)
        if best is not None:
            runs = [one for one in all_runs(self.ladder, self.folder) if only in (None, one.rung.name)]
        active = {child.run.name for child in self.children}
        found = []
        for run in runs:
            if run.name in self.done or run.name in active or run.name in self.failed:
                continue
            if final_loss(self.folder, run) is not None:
                self.done.add(run.name)
            elif run.trunk is None or (self._checkpoint(run) / MANIFEST).exists() or (self.folder / run.name).exists():
                found.append(run)
        return found

    def _checkpoint(self, run: LadderRun) -> Path:
        """Return the trunk's checkpoint that a run branches from."""
        trunk = run.trunk or run
        return self.folder / trunk.name / "checkpoints" / checkpoint_name(run.first)

    def _start(self, run: LadderRun) -> None:
        log = self.log_of(run)
        options = [*self.ladder.options, *run.options(self.folder)]
        with log.open("a", encoding="utf-8") as output:
            if run.trunk:
                to = self.folder / run.name
                options = ["--config", str(to / "config.yaml"), f"--run.dir={self.folder}", f"--run.name={run.name}"]
                if not to.exists():
                    source = [str(self.folder / run.trunk.name), "--step", str(run.first), "--to", str(to)]
                    try:
                        with contextlib.redirect_stdout(output):
                            branch([*source, "--", *run.options(self.folder)])
                    except ConfigError as error:
                        return self._fail(run, f"cannot branch from {run.trunk.name}: {error}")
                    output.flush()
            launch = ["launch", "--launcher=torchrun", f"--nproc-per-node={self.procs}", "--"]
            command = launch if self.procs > 1 else ["train"]
            slot = min(set(range(self.jobs)) - {child.slot for child in self.children})
            process = subprocess.Popen(
                [sys.executable, "-m", "smolds_dist", *command, *options, "--checkpoint.resume=auto"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment(slot),
                start_new_session=True, preexec_fn=_prepare_train if self.procs == 1 else die_with_parent,
            )  # fmt: skip
        self.children.append(Child(run, process, slot, time.monotonic()))
        if self.stopped_by:  # while the process was made
            process.send_signal(self.stopped_by)

    def _environment(self, slot: int) -> dict[str, str]:
        env = dict(os.environ)
        if self.jobs > 1:
            env.setdefault("OMP_NUM_THREADS", str(threads_per_rank(self.jobs * self.procs)))
            if self.procs == 1 and len(gpus := gpu_addresses()) > 1:
                env.setdefault("CUDA_VISIBLE_DEVICES", str(slot % len(gpus)))
        return env

    def _fail(self, run: LadderRun, why: str) -> None:
        self.failed[run.name] = why
        print(f"{run.name} failed: {why}", flush=True)

    def log_of(self, run: LadderRun) -> Path:
        return self.folder / f"{run.name}.log"

    def _collect(self) -> bool:
        """Report processes that have ended; return True if some have."""
        ended = [child for child in self.children if child.process.poll() is not None]
        for child in ended:
            self.children.remove(child)
            run, loss = child.run, final_loss(self.folder, child.run)
            if loss is None:
                if not self.stopped_by:
                    log, code = self.log_of(run), child.process.returncode
                    lines = log.read_text("utf-8", errors="replace").splitlines() if code == 2 else []
                    errors = [line for line in lines if line.startswith("smolds: ")]  # of the user
                    self._fail(run, "; ".join([f"exit code {code}", f"see {log}", *errors[-1:]]))
                continue
            self.done.add(run.name)
            tokens, time_ = (
                short(run.steps * self.ladder.step_tokens(run.rung)),
                duration(time.monotonic() - child.began),
            )
            print(f"{run.name}: validation loss {loss:.4f} after {tokens} tokens, in {time_}", flush=True)
        return bool(ended)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        """Pass a signal to the runs, which save a checkpoint and end."""
        self.stopped_by = number
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(number)


def _prepare_train() -> None:
    """Keep Slurm's warning pending in a new process until training handles it."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def _end(number: int, _frame: FrameType | None) -> None:
    """Exit on a signal while no runs are trained, after SIGUSR1 such that Slurm requeues the task."""
    sys.exit(EXIT_CODES[signal.Signals(number)])


def run_ladder(folder: Path, jobs: int, only: str | None, procs: int) -> int:
    """Train what is missing, write the results and return the exit code.

    Raises:
        ConfigError: if the plan is invalid, has no rung `only`, or its runs have other settings.
    """
    ladder = open_ladder(folder)
    names = [RATES, *(rung.name for rung in ladder.rungs)]
    if only not in (None, *names):
        raise ConfigError(f"--only {only!r} is not a rung of {folder}; use one of {', '.join(names)}.")
    with handled_by(_end):
        code = Trainer(ladder, folder, jobs, procs).train(only)
        try:
            if code in (0, 1):  # not stopped
                measure_noise(ladder, folder, only)
        finally:
            results = gather(ladder, folder)
    for line in report(results):
        print(line)
    return code


def report(results: dict) -> Iterator[str]:
    """Yield the best rate with the sweep's losses, that of the hold-out, and the number of runs."""
    losses = {entry["run"]: entry["loss"] for entry in results["runs"]}
    if results["best_rate"] and results["sweep"]:
        found = ", ".join(
            f"{one['lr']:g}: " + ("diverged" if losses[one["run"]] is None else f"{losses[one['run']]:.4f}")
            for one in results["sweep"]
        )
        yield f"best learning rate: {results['best_rate']:g} (validation loss by rate: {found})"
        if results["best_rate"] in (results["sweep"][0]["lr"], results["sweep"][-1]["lr"]):
            yield "it is at the border of the rates tried; add rates beyond it to ladder.yaml, and run again"
    if found := results["hold_out_best_rate"]:
        yield f"best learning rate of the hold-out: {found:g}, {found / results['best_rate']:.2f} times the ladder's"
    yield f"{len(results['runs'])} runs finished, {len(results['points'])} of them at the best rate"
