"""Signals that ask a run to stop: it writes a checkpoint at the end of the step, on all ranks alike, and leaves.

SIGUSR1 is what Slurm sends ahead of a time limit, SIGTERM what scancel and launchers send, SIGINT is Ctrl-C. The second
one leaves at once. Exit codes: 75 after SIGUSR1 ("try again": the job may be requeued), 143 after SIGTERM, 130 after
SIGINT.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGUSR1: 75, signal.SIGTERM: 143, signal.SIGINT: 130}


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While the block lasts, `handler` is called for these signals."""
    before = {number: signal.signal(number, handler) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopRequest(ExitStack):
    """Remembers the signal that this process got; a context manager that puts the handlers back."""

    def __enter__(self) -> "StopRequest":
        self.requested: int | None = None
        self.enter_context(handled_by(self._handle))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)  # one that came early is delivered now
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # A launcher may pass one Slurm warning on by more than one way: only the others count as a second request.
        if self.requested in (signal.SIGINT, signal.SIGTERM) and number == self.requested:
            os._exit(EXIT_CODES[signal.Signals(number)])
        self.requested = number

    def counts(self) -> list[float]:
        """One number per signal; summed over the ranks they tell all of them what any was asked."""
        return [float(self.requested == number) for number in EXIT_CODES]

    @staticmethod
    def agree_on_stop(counts: list[float]) -> signal.Signals | None:
        """The signal that some rank got, the same on every rank."""
        return next((number for number, count in zip(EXIT_CODES, counts, strict=True) if count), None)
