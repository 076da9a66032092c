"""Progress of long tasks: a bar in a terminal, plain lines in a file."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm

from smolds_dist.activity import beat

FIRST_LOG = 5.0  # seconds of waiting before training logs the reason
LOG_EVERY = 15.0
NEW_WAIT = 2.0  # seconds without an update after which a new wait begins
UPDATE_EVERY = 0.5  # seconds between updates while waiting


def duration(seconds: float) -> str:
    """Format a duration in the largest unit of which it has at least two."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.1f} seconds"


def print_line(text: str, file: TextIO, end: str = "\n") -> None:
    """Print for a run, which continues without output if the reader of a pipe, such as `head`, or a terminal has gone."""
    try:
        print(text, end=end, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class ProgressBar:
    """A progress bar, or periodic lines if standard error is not a terminal, as in a Slurm job's log.

    Args:
        what: text before the number: "step" gives "step 3 of 10".
        total: final value, if known; may be set later and change.
        done: initial value.
        every: seconds between lines.
        shown: False = print only what `write` is called with.
    """

    def __init__(self, label: str, total: int | None = None, done: int = 0, every: float = 15.0, shown: bool = True):
        self._label, self.total, self._start, self._every, self._shown = label, total, done, every, shown
        self._began = self._last_log = time.monotonic()
        self._bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(desc=label, total=total, initial=done, dynamic_ncols=True, unit_scale=total is None)

    def show(self, done: int, text: str = "", line: bool = False) -> None:
        """Update the bar to `done`; `line`: also print a line."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        if line or (self._bar is None and self._shown and (done == self.total or now - self._last_log >= self._every)):
            self._last_log = now
            words = f"{self._label} {done:,}"
            if self.total:
                words += f" of {self.total:,}: {text}"
                left = (now - self._began) / max(1, done - self._start) * (self.total - done)
                words += f", {timedelta(seconds=round(left))} left" if left else ""
            self.write(words, sys.stderr)

    def write(self, text: str, file: TextIO) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=file)
        else:
            print_line(text, file)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._shown = False


class StoppedWaitingError(Exception):
    """The run was asked to stop while it waited for text; raised on all ranks, before a step."""


@dataclass(frozen=True)
class SourceProgress:
    """Tokenizing progress of a source."""

    name: str
    label: str  # the source as in the settings
    tokens: int
    shards: int  # complete shards
    all_shards: int


class Reporter:
    """Receives updates while text is tokenized or waited for: shows progress, records it for the job's watchdog, and raises
    an exception to end the work.

    Before training it draws a bar for each source; after `begin_training` it logs what the run waits for.

    Args:
        shown: draw bars.
    """

    def __init__(self, shown: bool = False):
        self.on_update: Callable[[], None] = beat
        self._log: Callable[[str], None] | None = None
        self._shown, self._stopped = shown, False
        self._bars: dict[str, ProgressBar] = {}
        self._began = self._logged = self._last_update = -1e9
        self._tokens = 0  # when the wait began
        self._last: SourceProgress | None = None

    @property
    def names(self) -> list[str]:
        """Names of the sources tokenized before training."""
        return list(self._bars)

    def update(self, done: SourceProgress) -> None:
        """Report progress; to be called repeatedly, also without any.

        Raises:
            StoppedWaitingError: after `stop`.
        """
        self._last = done
        self._on_update()
        if self._log is not None:
            self._log_wait(done, self._log)
            return
        if done.name not in self._bars:
            self._bars[done.name] = ProgressBar(f"Tokenizing {done.label}: token", shown=self._shown)
        self._bars[done.name].show(done.tokens)

    def _on_update(self) -> None:
        if self._stopped:
            raise StoppedWaitingError
        self.on_update()

    def _log_wait(self, done: SourceProgress, log: Callable[[str], None]) -> None:
        now = time.monotonic()
        if now - self._last_update > NEW_WAIT:
            self._began, self._logged, self._tokens = now, now + FIRST_LOG - LOG_EVERY, done.tokens
        self._last_update = now
        if now - self._logged >= LOG_EVERY:
            self._logged = now
            rate = (done.tokens - self._tokens) / (now - self._began)
            log(
                f"waiting for text of {done.name}: {done.shards:,}/{done.all_shards:,} shards tokenized, "
                f"{rate:,.0f} tokens/s"
            )

    def sleep(self, seconds: float) -> None:
        """Sleep, and repeat the last update in the background."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._last is not None:
                self.update(self._last)
            else:
                self._on_update()
            time.sleep(min(left, UPDATE_EVERY))

    def close_bars(self) -> None:
        """Close all bars and draw no more."""
        self._shown = False
        for bar in self._bars.values():
            bar.close()

    def begin_training(self, log: Callable[[str], None]) -> None:
        """Log what the run waits for from now on."""
        self._log, self._stopped = log, False

    def stop(self) -> None:
        """End the work or wait that calls `update`."""
        self._stopped = True

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the `current_reporter` of the thread within the block."""
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)


_current: ContextVar[Reporter] = ContextVar("reporter", default=Reporter())  # noqa: B039 - it only sleeps


def current_reporter() -> Reporter:
    """Return the active reporter, for functions too deep to receive one."""
    return _current.get()
