"""Waiting: what is said while a run waits for text that is not tokenised yet."""

import time
from collections.abc import Callable

from smolds_dist.data.unit_source import UnitSource

FIRST_TOLD = 5.0  # seconds of waiting, until it is told
TOLD_EVERY = 15.0
PAUSE = 2.0  # seconds without a sign, after which it is another wait


class StoppedWaitingError(Exception):
    """The text that a run waits for does not come, and it was asked to stop: on all ranks alike, before a step."""


class Waiting:
    """As `unit_source.Progress`: gives the other ranks a sign of life, and now and then says what is waited for.

    Args:
        say: where the sentence goes.
        beat: the sign of life.
    """

    def __init__(self, say: Callable[[str], None], beat: Callable[[], None]):
        self._say, self._beat = say, beat
        self._began = self._told = self._last = -1e9
        self._tokens = 0

    def __call__(self, source: UnitSource, tokens: int) -> None:
        self._beat()
        now, there = time.monotonic(), source.tokens_found + tokens
        if now - self._last > PAUSE:
            self._began, self._told, self._tokens = now, now + FIRST_TOLD - TOLD_EVERY, there
        self._last = now
        if now - self._told >= TOLD_EVERY:
            self._told = now
            rate = (there - self._tokens) / (now - self._began)
            self._say(
                f"waiting for text of {source.name}: {source.num_found:,} of {len(source.units):,} parts are tokenised, "
                f"{rate:,.0f} tokens/s come in"
            )


def stop_waiting(_source: UnitSource, _tokens: int) -> None:
    """As `unit_source.Progress`: ends whatever waits or works."""
    raise StoppedWaitingError
