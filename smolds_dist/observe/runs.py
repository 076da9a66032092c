"""`smolds runs`: list all runs of a folder, and compare two of them.

Everything is read from the runs' folders, so it works on any host that can access them, such as a login node. A run that
was killed on another host is recognized by its missing rows.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from smolds_dist.checkpoint.derived import Parent, read_parent
from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.inputs import printable
from smolds_dist.launching.failure import CAUSE, read_cause
from smolds_dist.launching.state import STATE, SUBMITTED, read_state
from smolds_dist.observe.curves import CURVES
from smolds_dist.observe.rows import read_settings
from smolds_dist.parallel.ranks import process_state, system_name
from smolds_dist.rows import RESTARTS, parse_row, read_rows
from smolds_dist.stages import resolve_stages

TAIL = 1 << 18  # bytes read from the end of a metrics.jsonl
SILENT_SECONDS = 120.0  # without a row, and the time of `STEPS` steps, until a run on another host counts as silent
STEPS = 20


@dataclass(frozen=True)
class Run:
    """State of a run, from its folder."""

    name: str
    state: str
    step: int
    steps: int
    loss: float | None
    tokens_per_s: float | None
    started: float | None  # seconds since 1970
    left: float | None  # seconds, while it runs


def runs(args: list[str]) -> None:
    """Print the table, repeatedly with --watch; with `diff`, print how two runs differ."""
    if args[:1] == ["diff"]:
        print(difference(*_parse_diff(args[1:])))
        return
    parser = OptionParser(
        prog="smolds runs",
        usage="smolds runs [DIR] [--watch] | smolds runs diff RUN RUN",
        description="List the runs in a folder: state, step, loss, speed; branches and averages below the run they come "
        "from. `diff` compares two runs.",
        example="smolds runs --watch",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="folder of runs")
    parser.add_argument("--watch", action="store_true", help="repeat until Ctrl-C")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between updates with --watch")
    options = parser.parse_args(args)
    if not options.folder.is_dir():
        raise ConfigError(f"{options.folder} is not a folder; use the one that --run.dir names.")
    while True:
        shown = table(replace(read_run(run), name=name) for run, name in tree(find_runs(options.folder)))
        if not options.watch:
            print(shown)
            return
        if sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")  # to the top left corner, and clear
        print(shown, flush=True)
        time.sleep(options.every)


def find_runs(folder: Path) -> list[Path]:
    """Return the runs in a folder, newest last: every folder that training or `smolds slurm --submit` has written to."""
    found = [path for path in folder.iterdir() if any((path / name).exists() for name in ("config.yaml", SUBMITTED))]
    return sorted(found, key=lambda path: (_started(path) or 0.0, path.name))


def tree(found: list[Path]) -> list[tuple[Path, str]]:
    """Return runs and their indented names, each followed by the runs made from its checkpoints (`checkpoint.derived`)."""
    at = {run.resolve(): run for run in found}
    children: dict[Path | None, list[tuple[Path, str]]] = {}
    for run in found:
        parent = _parent(run)
        above = at.get((run / parent.run).resolve()) if parent else None
        children.setdefault(above, []).append((run, f"{run.name} ({parent})" if parent and above else run.name))
    lines: list[tuple[Path, str]] = []

    def add(run: Path | None, depth: int) -> None:
        for child, name in children.pop(run, ()):
            lines.append((child, "  " * depth + name))
            add(child, depth + 1)

    add(None, 0)
    for left in list(children):  # only damaged files make a run its own ancestor
        add(left, 0)
    return lines


def _parent(run: Path) -> Parent | None:
    with contextlib.suppress(ConfigError):  # shown as the run's state
        return read_parent(run)
    return None


def read_run(folder: Path, now: float | None = None) -> Run:
    """Return a run's state, or that its folder is damaged."""
    try:
        return _read_run(folder, time.time() if now is None else now)
    except ConfigError as error:
        return Run(folder.name, f"damaged: {str(error).removeprefix(f'{folder}/')}", 0, 0, None, None, None, None)


def _read_run(folder: Path, now: float) -> Run:
    """Read a run from its folder; reads only the beginning and the end of metrics.jsonl."""
    rows = last_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    seconds = median(b.get("time", 0.0) - a.get("time", 0.0) for a, b in pairwise(steps)) if len(steps) > 1 else None
    config = _config(folder)
    total = config.get("train", {}).get("steps", 0)
    step = steps[-1]["step"] if steps else 0
    parent = read_parent(folder)
    if parent and not (folder / STATE).exists() and not (folder / SUBMITTED).exists():
        state, total = ("not started", total) if len(parent.steps) == 1 else ("weights only", 0)
    else:
        state = state_of(folder, rows[-1].get("time") if rows else None, seconds, now)
    running = state.startswith("running")
    return Run(
        folder.name,
        state,
        step,
        total,
        next((row["loss"] for row in reversed(steps) if row["loss"] is not None), None),
        median(row.get("tokens_per_s", 0.0) for row in steps[-STEPS:]) if steps else None,
        _started(folder),
        (total - step) * seconds if running and seconds else None,
    )


def state_of(folder: Path, last_row: float | None, step_seconds: float | None, now: float) -> str:
    """Return the state as text: running and where, finished, stopped, failed and why, waiting in Slurm, or silent.

    Args:
        last_row: time of the last row of metrics.jsonl.
        step_seconds: duration of a step.
    """
    state, submitted = (read_state(folder, name, damaged_is_none=False) for name in (STATE, SUBMITTED))
    if submitted and submitted["time"] > state.get("started", 0.0) and submitted["time"] > (last_row or 0.0):
        return f"waiting in Slurm, job {submitted['job']}"
    silent = now - max(state.get("started", 0.0), last_row or 0.0)
    is_silent = silent > max(SILENT_SECONDS, STEPS * (step_seconds or 0.0))
    if not state:  # the state file could not be written
        return "ended" if is_silent else "running"
    restarts = len(read_rows(folder / RESTARTS))
    again = f", {restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
    where = state["host"] + (f", {state['ranks']} ranks" if state["ranks"] > 1 else "")
    cause = folder / "ranks" / CAUSE
    noted = cause.exists() and cause.stat().st_mtime >= state["started"]
    why = read_cause(cause.parent) if noted else state.get("why")
    if state["state"] == "failed":
        return f"failed: {why or 'see its output'}{again}"
    if state["state"] != "running":
        return state["state"] + again
    here = state["system"] == system_name()
    if here and process_state(state["pid"]) in "ZX":
        return f"failed: {why or 'its process is gone'}{again}"
    if is_silent and not here:
        return f"silent for {_duration(silent)} on {where}{again}"
    return f"running on {where}{again}"


def last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the last rows of a metrics.jsonl."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        lines = file.read().splitlines()
    rows = map(parse_row, lines[1:] if size > TAIL else lines)  # the last one may be incomplete
    return [row for row in rows if row is not None]


def table(found: Iterable[Run]) -> str:
    """Return a table with one line per run, fitted to the width of a terminal."""
    lines: list[tuple[str, ...]] = [("run", "state", "step", "loss", "tokens/s", "started", "left")]
    for run in found:
        step = f"{run.step:,} of {run.steps:,}" if run.steps else ""
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        speed = "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}"
        started = datetime.fromtimestamp(run.started).strftime("%Y-%m-%d %H:%M") if run.started else ""
        left = "" if run.left is None else _duration(run.left)
        lines.append((printable(run.name), printable(run.state), step, loss, speed, started, left))
    if len(lines) == 1:
        return "no runs in this folder"
    if sys.stdout.isatty():
        name_width, _, *widths = (max(map(len, column)) + 2 for column in zip(*lines, strict=True))
        most = max(10, shutil.get_terminal_size().columns - name_width - sum(widths) - 2)
        lines = [(n, s if len(s) <= most else s[: most - 3] + "...", *rest) for n, s, *rest in lines]
    return _aligned(lines, right={"step", "loss", "tokens/s", "left"})


def _aligned(lines: list[tuple[str, ...]], right: Container[str] = ()) -> str:
    """Align cells in columns, to the right for the heads in `right`."""
    columns = []
    for head, *cells in zip(*lines, strict=True):
        width = max(map(len, (head, *cells)))
        columns.append([cell.rjust(width) if head in right else cell.ljust(width) for cell in (head, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _parse_diff(args: list[str]) -> tuple[Path, Path]:
    parser = OptionParser(
        prog="smolds runs diff",
        description="Print the settings that differ between two runs, and the last values of their curves.",
        example="smolds runs diff runs/first runs/second",
    )
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="folder of a run (runs/NAME)")
    options = parser.parse_args(args)
    for run in options.runs:
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"{run} is not a run; use a run's folder, such as runs/NAME.")
    return tuple(options.runs)


def difference(first: Path, second: Path) -> str:
    """Return a table of three columns: parents, settings that differ, each curve's last value, and losses of the last step
    that both have, after a branch of one from the other."""
    lines: list[tuple[str, ...]] = [("", first.name, second.name)]
    parents = [read_parent(run) for run in (first, second)]
    if any(parents):
        lines.append(("parent", *(f"{Path(one.run).name} {one}" if one else "" for one in parents)))
    lines += differing_settings([first, second])
    rows = [read_rows(run / "metrics.jsonl") for run in (first, second)]
    lines.append(("last step", *(str(max((row["step"] for row in own), default=0)) for own in rows)))
    for name in CURVES:
        values = [next((row[name] for row in reversed(own) if row.get(name) is not None), None) for own in rows]
        if values != [None, None]:
            lines.append((name, *(_short(value) for value in values)))
    shared = max((one.steps[-1] for one in parents if one), default=0)
    for name in ("loss", "val_loss"):
        values_at = [{row["step"]: row[name] for row in own if row.get(name) is not None} for own in rows]
        if step := max((step for step in values_at[0].keys() & values_at[1].keys() if step > shared), default=0):
            lines.append((f"{name} at step {step}", *(_short(values[step]) for values in values_at)))
    return _aligned(lines)


def differing_settings(found: list[Path]) -> list[tuple[str, ...]]:
    """Return the settings that differ between runs, each with every run's value."""
    settings = [_flat(_with_stages(run, _config(run))) for run in found]
    names = dict.fromkeys(name for one in settings for name in one if name != "run.name")
    values = {name: [one.get(name) for one in settings] for name in names}
    return [(name, *map(_short, several)) for name, several in values.items() if any(v != several[0] for v in several)]


def _with_stages(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with each stage's own, in effect, by its number."""
    if not config.get("train", {}).get("stages"):
        return config
    resolved = resolve_stages(load_config(["--config", str(run / "config.yaml")])).at(1).config.train.stages or []
    stages = {str(number): asdict(stage) for number, stage in enumerate(resolved, 1)}
    return config | {"train": config["train"] | {"stages": stages}}


def _flat(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else printable(str(value))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    return read_settings(folder, filled=False) if path.exists() else {}


def _started(folder: Path) -> float | None:
    """Return when the run first started, or was made from another, in seconds since 1970."""
    if parent := _parent(folder):
        return parent.created
    path = folder / "metrics.jsonl"
    if path.is_file():
        with path.open("rb") as file:
            if (row := parse_row(file.readline(TAIL))) and "time" in row:
                return row["time"]
    return read_state(folder).get("started")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
