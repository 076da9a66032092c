"""Stop signals: all ranks write a checkpoint at the end of the same step and exit.

Slurm sends SIGUSR1 before a time limit, scancel and launchers send SIGTERM, Ctrl-C sends SIGINT. A repeated SIGTERM or
SIGINT exits immediately. Exit codes: 75 after SIGUSR1 (EX_TEMPFAIL: the job may be requeued), 143 after SIGTERM, 130
after SIGINT.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGUSR1: 75, signal.SIGTERM: 143, signal.SIGINT: 130}


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install `handler` for these signals inside the block."""
    before = {number: signal.signal(number, handler) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def blocked() -> Iterator[Callable[[float], int | None]]:
    """Keep these signals pending inside the block.

    Yields:
        A function that waits some seconds, or until a signal; it returns the signal's exit code, None without one.
    """

    def wait(seconds: float) -> int | None:
        got = signal.sigtimedwait(EXIT_CODES, seconds)
        return EXIT_CODES[signal.Signals(got.si_signo)] if got else None

    before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    try:
        yield wait
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest(ExitStack):
    """Records the stop signal that this process received; a context manager, to be entered repeatedly, that restores the
    handlers. A signal that came in an earlier block stays requested."""

    def __init__(self) -> None:
        super().__init__()
        self.requested: int | None = None

    def __enter__(self) -> "StopRequest":
        self.enter_context(handled_by(self._record))
        before = signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)  # delivers one that came earlier
        self.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        return self

    def _record(self, number: int, _frame: FrameType | None) -> None:
        # A launcher may deliver one Slurm warning (SIGUSR1) twice, so only repeats of the other signals count.
        if self.requested in (signal.SIGINT, signal.SIGTERM) and number == self.requested:
            os._exit(EXIT_CODES[signal.Signals(number)])
        self.requested = number

    def counts(self) -> list[float]:
        """Return one number per signal; their sums over the ranks show which signals any rank received."""
        return [float(self.requested == number) for number in EXIT_CODES]

    @staticmethod
    def agree_on_stop(counts: list[float]) -> signal.Signals | None:
        """Return the signal that some rank received, the same on every rank."""
        return next((number for number, count in zip(EXIT_CODES, counts, strict=True) if count), None)
