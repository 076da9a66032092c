"""`python -m benchmarks.kernels RUN`: the GPU's kernels in the traces of a run's `profile/`, by their total time.

The GPU is busy while any kernel runs. The rest of the traced time it waits, usually for the host.
"""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError

SHOWN = 20  # kernels
NAME = 90  # characters of a kernel's name


def main(args: list[str]) -> None:
    """Print a table for each trace.

    Raises:
        ConfigError: if there is none.
    """
    files = sorted(Path(args[0]).glob("profile/*.pt.trace.json.gz")) if args else []
    if not files:
        raise ConfigError(
            f"{args[0] if args else 'RUN'} has no trace; name a run that was started with --profile.steps."
        )
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            print(f"{file}\n{table(kernels_of(json.load(stream)['traceEvents']))}")


def kernels_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the kernels' calls and seconds by name, and the seconds traced and busy. Copies and fills count as kernels."""
    spans = [(one["ts"], one["ts"] + one["dur"]) for one in events if one.get("ph") == "X"]
    on_gpu = [
        one for one in events if one.get("ph") == "X" and str(one.get("cat")) in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    calls, seconds = Counter[str](), Counter[str]()
    for one in on_gpu:
        calls[one["name"]] += 1
        seconds[one["name"]] += one["dur"] / 1e6
    busy, end = 0.0, float("-inf")
    for begin, finish in sorted((one["ts"], one["ts"] + one["dur"]) for one in on_gpu):
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    traced = max(one for _, one in spans) - min(one for one, _ in spans) if spans else 0.0
    return {"calls": calls, "seconds": seconds, "busy": busy / 1e6, "traced": traced / 1e6}


def table(found: dict[str, Any]) -> str:
    """Format the kernels with the most time, and the busy share."""
    calls, seconds = found["calls"], found["seconds"]
    if not calls:
        return "no kernels: not a trace of a GPU"
    total = sum(seconds.values())
    lines = [f"{'calls':>7}{'ms':>10}{'share':>8}  kernel"]
    for name, spent in seconds.most_common(SHOWN):
        lines.append(f"{calls[name]:>7,}{1e3 * spent:>10,.2f}{spent / total:>8.1%}  {name[:NAME]}")
    return "\n".join([
        *lines,
        f"{calls.total():,} kernels of {len(calls)} kinds; the GPU is busy for {1e3 * found['busy']:,.1f} of "
        f"{1e3 * found['traced']:,.1f} ms, {found['busy'] / found['traced']:.1%}",
    ])  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"benchmarks: {error}")
