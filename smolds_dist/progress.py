"""How far something long has come: a bar in a terminal, plain lines in a file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm

FIRST_LOG = 5.0  # seconds of waiting before a training logs what it waits for
LOG_EVERY = 15.0
NEW_WAIT = 2.0  # seconds without an update, after which it is another wait
HEARTBEAT_EVERY = 0.5  # seconds between two heartbeats


def duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.1f} seconds"


class ProgressBar:
    """A bar that is redrawn in place, or a line now and then where standard error is no terminal, as in a Slurm job's file.

    Args:
        what: goes before the number: "step" gives "step 3 of 10".
        total: where it ends, if that is known; it may be set later and change.
        done: where it starts.
        every: seconds between two lines.
        shown: off: says nothing, but for what is written through it.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0, every: float = 15.0, shown: bool = True):
        self._what, self.total, self._start, self._every, self._shown = what, total, done, every, shown
        self._began = self._last_log = time.monotonic()
        self._bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(desc=what, total=total, initial=done, dynamic_ncols=True, unit_scale=total is None)

    def show(self, done: int, text: str = "", line: bool = False) -> None:
        """Now at `done`; `line`: gives it a line in any case."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        if line or (self._bar is None and self._shown and (done == self.total or now - self._last_log >= self._every)):
            self._last_log = now
            words = f"{self._what} {done:,}"
            if self.total:
                words += f" of {self.total:,}: {text}"
                left = (now - self._began) / max(1, done - self._start) * (self.total - done)
                words += f", {timedelta(seconds=round(left))} left" if left else ""
            self.write(words, sys.stderr)

    def write(self, text: str, file: TextIO) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=file)
        else:
            print(text, file=file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._shown = False


class StoppedWaitingError(Exception):
    """The text that a run waits for does not come, and it was asked to stop: on all ranks alike, before a step."""


@dataclass(frozen=True)
class SourceProgress:
    """How far a source has come."""

    name: str
    label: str  # the source as the settings have it
    tokens: int
    shards: int  # that are complete
    all_shards: int


class Reporter:
    """Hears from a process that tokenizes text or waits for it, every moment: shows how far that has come, gives the sign of
    life that others need, and ends the work where it is to end.

    Before training it draws a bar for each source; from `begin_training` on it logs what the run waits for.

    Args:
        shown: whether there are bars.
    """

    def __init__(self, shown: bool = False):
        self.heartbeat: Callable[[], None] = lambda: None
        self._log: Callable[[str], None] | None = None
        self._shown, self._stopped = shown, False
        self._bars: dict[str, ProgressBar] = {}
        self._began = self._logged = self._last_update = -1e9
        self._tokens = 0  # when the wait began
        self._last: SourceProgress | None = None

    @property
    def names(self) -> list[str]:
        """Of the sources that were worked on before training."""
        return list(self._bars)

    def update(self, done: SourceProgress) -> None:
        """To be called again and again, also while nothing comes.

        Raises:
            StoppedWaitingError: after `stop`.
        """
        self._last = done
        self._heartbeat()
        if self._log is not None:
            self._log_wait(done, self._log)
            return
        if done.name not in self._bars:
            self._bars[done.name] = ProgressBar(f"Tokenising {done.label}: token", shown=self._shown)
        self._bars[done.name].show(done.tokens)

    def _heartbeat(self) -> None:
        if self._stopped:
            raise StoppedWaitingError
        self.heartbeat()

    def _log_wait(self, done: SourceProgress, log: Callable[[str], None]) -> None:
        now = time.monotonic()
        if now - self._last_update > NEW_WAIT:
            self._began, self._logged, self._tokens = now, now + FIRST_LOG - LOG_EVERY, done.tokens
        self._last_update = now
        if now - self._logged >= LOG_EVERY:
            self._logged = now
            rate = (done.tokens - self._tokens) / (now - self._began)
            log(
                f"waiting for text of {done.name}: {done.shards:,} of {done.all_shards:,} parts are tokenised, "
                f"{rate:,.0f} tokens/s come in"
            )

    def sleep(self, seconds: float) -> None:
        """Sleeps, and repeats the last update meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._last is not None:
                self.update(self._last)
            else:
                self._heartbeat()
            time.sleep(min(left, HEARTBEAT_EVERY))

    def close_bars(self) -> None:
        """No bar is drawn from now on."""
        self._shown = False
        for bar in self._bars.values():
            bar.close()

    def begin_training(self, log: Callable[[str], None], heartbeat: Callable[[], None]) -> None:
        """From now on logs what is waited for.

        Args:
            heartbeat: gives the other ranks a sign of life.
        """
        self._log, self.heartbeat, self._stopped = log, heartbeat, False

    def stop(self) -> None:
        """Ends whatever works or waits."""
        self._stopped = True

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the block lasts, `current_reporter` of this thread is this one."""
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)


_current: ContextVar[Reporter] = ContextVar("reporter", default=Reporter())  # noqa: B039 - it only sleeps


def current_reporter() -> Reporter:
    """That of the work under way; for what is too far down to be handed one."""
    return _current.get()
