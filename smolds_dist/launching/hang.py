"""Report hung ranks: all stacks in one file, and which rank did not answer.

The first rank to time out creates a marker file; every rank that still can then writes its threads' stacks. A rank that
does not is most likely the cause.
"""

import contextlib
import faulthandler
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from smolds_dist.files import replace_text, replaced
from smolds_dist.parallel.ranks import process_state, system_name

HANG_MARKER = "hanging"
STACKS = "stacks.txt"
ANSWER_SECONDS = 5.0


def report_hang(folder: Path, own: dict[str, Any], entries: list[dict[str, Any]], idle: float, passes: int) -> str:
    """Write this rank's stacks, wait for the others', collect all in `stacks.txt` and return the cause in one line.

    Args:
        entries: of all ranks that should be running.
        idle: seconds since this rank's last heartbeat.
        passes: forward passes that this rank has begun.
    """
    (folder / HANG_MARKER).touch()
    with replaced(_stacks_path(folder, own)) as part, part.open("w") as file:
        file.write(f"rank {own['rank']} on host {own['host']}: {passes} forward passes, the last {idle:.0f} s ago\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    deadline = time.monotonic() + ANSWER_SECONDS
    while _unresponsive(folder, entries) and time.monotonic() < deadline:
        time.sleep(0.1)
    texts, made = [], {}
    for entry in entries:
        path = _stacks_path(folder, entry)
        texts.append(
            path.read_text(errors="replace")
            if path.exists()
            else f"rank {entry['rank']} on host {entry['host']}: no answer\n"
        )
        if match := re.search(r": (\d+) forward passes", texts[-1]):
            made[entry["rank"]] = int(match.group(1))
    replace_text(folder / STACKS, "\n".join(texts))

    location = f"stacks of all ranks: {folder / STACKS}"
    unresponsive = _unresponsive(folder, entries)
    if unresponsive:
        stopped = [e for e in unresponsive if e["system"] == system_name() and process_state(e["pid"]) == "T"]
        why = "it was stopped by a signal" if stopped else "it hangs, or its host does"
        return f"{_format_ranks(unresponsive)} did not answer for {idle:.0f} s: {why} ({location})"
    behind = [e for e in entries if made.get(e["rank"], 0) < max(made.values(), default=0)]
    who = f"; {_format_ranks(behind)} fell behind the others" if behind else ""
    return f"the ranks have waited for each other for {idle:.0f} s{who} ({location})"


def kill_unresponsive(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Kill the ranks of this machine that did not answer; a stopped process ignores other signals."""
    for entry in _unresponsive(folder, entries):
        if entry["system"] == system_name():
            with contextlib.suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.SIGKILL)


def _stacks_path(folder: Path, entry: dict[str, Any]) -> Path:
    return folder / f"rank_{entry['rank']:05}.stacks"


def _unresponsive(folder: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if not _stacks_path(folder, entry).exists()]


def _format_ranks(entries: list[dict[str, Any]]) -> str:
    ranks = ", ".join(str(entry["rank"]) for entry in entries)
    return f"rank{'s' if len(entries) > 1 else ''} {ranks} on host {entries[0]['host']}"
