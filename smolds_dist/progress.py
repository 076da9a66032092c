"""How far something long has come: a bar in a terminal, plain lines in a file."""

import sys
import time
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm


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
        self._began = self._told = time.monotonic()
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
        if line or (self._bar is None and self._shown and (done == self.total or now - self._told >= self._every)):
            self._told = now
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
