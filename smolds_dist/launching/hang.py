"""Report hung ranks: all stacks in one file, which rank is stuck, and the collective in which each rank waits.

The first rank to time out creates a marker file; every rank that still can then writes what it does, in JSON. A rank that
does not is most likely the cause; else one that fell behind, or that works while the others wait in a collective.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolds_dist.activity import ACTIVITY
from smolds_dist.errors import ConfigError
from smolds_dist.files import replace_text
from smolds_dist.inputs import convert, read_json
from smolds_dist.parallel.flight_recorder import Collective, pending_collective
from smolds_dist.parallel.ranks import can_connect, process_state, system_name

HANG_MARKER = "hanging"
STACKS = "stacks.txt"
ANSWER_SECONDS = 5.0
# Files of the main thread's calls, from this package's innermost one, that show that it waits for other ranks
WAITING = re.compile(r"torch/distributed/|deepspeed/comm/|parallel/rendezvous\.py")


@dataclass
class Answer:
    """What a rank does while its job hangs."""

    passes: int  # forward passes that it has begun
    doing: str
    at: str  # the main thread's innermost function of this package
    waits: bool  # True if the main thread waits for other ranks
    connected: bool  # True if the ranks' store can be reached
    stacks: str
    collective: Collective | None = None  # which other ranks have not joined or not ended


def report_hang(folder: Path, own: dict[str, Any], entries: list[dict[str, Any]], idle: float) -> str:
    """Write this rank's answer, wait for the others', collect all stacks in `stacks.txt` and return the cause in one line.

    Args:
        entries: of all ranks that should be running.
        idle: seconds since any rank made progress.
    """
    mine = _own_answer(_pending(folder / f"rank_{own['rank']:05}.crash"))
    with contextlib.suppress(OSError):  # of a full disk
        replace_text(_path(folder, own), json.dumps(asdict(mine)))
    deadline = time.monotonic() + ANSWER_SECONDS
    while (
        len(answers := _answers(folder, entries) | {own["rank"]: mine}) < len(entries) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    texts = []
    for entry in entries:
        where, rank = f"rank {entry['rank']} on host {entry['host']}", entry["rank"]
        if answer := answers.get(rank):
            doing = f"{answer.passes} forward passes, {answer.doing}{_in_collectives({rank: answer})}"
            texts.append(f"{where}: {doing}\n{answer.stacks}")
        else:
            texts.append(f"{where}: no answer\n")
    with contextlib.suppress(OSError):
        replace_text(folder / STACKS, "\n".join(texts))
    return f"{_cause(entries, answers, idle)} (stacks of all ranks: {folder / STACKS})"


def _cause(entries: list[dict[str, Any]], answers: dict[int, Answer], idle: float) -> str:
    unresponsive = [entry for entry in entries if entry["rank"] not in answers]
    if unresponsive:
        stopped = [e for e in unresponsive if e["system"] == system_name() and process_state(e["pid"]) == "T"]
        why = "it was stopped by a signal" if stopped else "it hangs, or its host does"
        waiting = f"; the others wait{where}" if (where := _in_collectives(answers)) else ""
        return f"{format_entries(unresponsive)} did not answer for {idle:.0f} s: {why}{waiting}"
    home = entries[0]["host"]  # of rank 0, which has the store
    others = {entry["host"] for entry in entries} - {home}
    lost = {entry["host"] for entry in entries if not answers[entry["rank"]].connected} - {home}
    if lost:
        lost = {home} if lost == others and len(others) > 1 else lost
        cut = [entry for entry in entries if entry["host"] in lost]
        whose = "its" if len(cut) == 1 else "their"
        return f"{format_entries(cut)} lost {whose} network: no connection to the other hosts for {idle:.0f} s"
    most = max(answer.passes for answer in answers.values())
    behind = [entry for entry in entries if answers[entry["rank"]].passes < most]
    busy = [entry for entry in entries if not answers[entry["rank"]].waits]
    for stuck in (behind, busy):
        if 0 < len(stuck) < len(entries):
            first = answers[stuck[0]["rank"]]
            own = f", waiting{_in_collectives({stuck[0]['rank']: first})}" if first.collective else ""
            rest = {entry["rank"]: answers[entry["rank"]] for entry in entries if entry not in stuck}
            return (
                f"{format_entries(stuck)} was stuck for {idle:.0f} s while {first.doing}, in {first.at}{own}; "
                f"the others wait{_in_collectives(rest)}"
            )
    doing = answers[entries[0]["rank"]].doing
    return f"the ranks have waited for each other for {idle:.0f} s while {doing}{_in_collectives(answers)}"


def _in_collectives(answers: dict[int, Answer]) -> str:
    """Return the collectives in which ranks wait, as the end of a message; "" if unknown."""
    waiting = {rank: answer.collective for rank, answer in sorted(answers.items()) if answer.collective}
    ranks: dict[str, list[str]] = {}
    for rank, collective in waiting.items():
        ranks.setdefault(str(collective), []).append(str(rank))
    if len(ranks) < 2:
        return "".join(f" in {text}" for text in ranks)
    same = len({(one.name, one.number, one.group) for one in waiting.values()}) == 1
    shown = [
        f"rank{'s' * (len(some) > 1)} {', '.join(some[:8])}{', ...' * (len(some) > 8)} in {text}"
        for text, some in list(ranks.items())[:4]
    ]
    how = "with different sizes" if same else "in different collectives"
    return f" {how}: {'; '.join(shown)}{'; ...' * (len(ranks) > 4)}"


def kill_unresponsive(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Kill the ranks of this machine that did not answer; a stopped process ignores other signals."""
    answers = _answers(folder, entries)
    for entry in entries:
        if entry["system"] == system_name() and entry["rank"] not in answers and entry["pid"] != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.SIGKILL)


def _pending(crash: Path) -> Collective | None:
    """Return this rank's pending collective. If a broken driver blocks the question, the process ends, because it would
    hang indefinitely; `crash` then has its stacks."""
    with contextlib.suppress(Exception), crash.open("a") as file:  # the report must not depend on torch's internals
        faulthandler.dump_traceback_later(ANSWER_SECONDS, exit=True, file=file)
        try:
            return pending_collective()
        finally:
            faulthandler.cancel_dump_traceback_later()
    return None


def _own_answer(collective: Collective | None) -> Answer:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    main = traceback.extract_stack(frames[threading.main_thread().ident or 0])
    ours = [frame for frame in main if "smolds_dist" in frame.filename] or list(main)
    stacks = [
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
        if ident != threading.get_ident()
    ]
    return Answer(
        passes=ACTIVITY.passes,
        doing=str(ACTIVITY),
        at=f"{ours[-1].name} ({Path(ours[-1].filename).name}:{ours[-1].lineno})",
        waits=collective is not None
        or any(WAITING.search(frame.filename) for frame in list(main)[main.index(ours[-1]) :]),
        connected=can_connect(os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))),
        stacks="\n".join(stacks),
        collective=collective,
    )


def _path(folder: Path, entry: dict[str, Any]) -> Path:
    return folder / f"rank_{entry['rank']:05}.stacks"


def _answers(folder: Path, entries: Iterable[dict[str, Any]]) -> dict[int, Answer]:
    """Return the answers that ranks have written so far, by rank."""
    found = {}
    for entry in entries:
        if (path := _path(folder, entry)).exists():
            with contextlib.suppress(ConfigError, OSError):  # damaged, or being replaced
                found[entry["rank"]] = convert(read_json(path, "delete it", dict[str, Any]), Answer, path, "delete it")
    return found


def format_entries(entries: list[dict[str, Any]]) -> str:
    """Format ranks with the first one's host."""
    ranks = ", ".join(str(entry["rank"]) for entry in entries[:8]) + (", ..." if len(entries) > 8 else "")
    return f"rank{'s' if len(entries) > 1 else ''} {ranks} on host {entries[0]['host']}"
