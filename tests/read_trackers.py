"""Print a run in wandb's offline files as JSON: curves -> [[step, value], ...], and the exit codes of its starts.

Run by test_trackers.py, in the trackers' environment: read_trackers.py RUN_DIR
"""

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a file for `wandb sync`: blocks of 32 kB with protocol buffers, as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # complete, or the last fragment
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


run_dir = Path(sys.argv[1])
run_id = json.loads((run_dir / "trackers.json").read_text())["wandb"]["id"]
curves: dict[str, list] = {}
codes = []
for path in sorted((run_dir / "wandb").glob(f"offline-run-*/*{run_id}.wandb")):
    for record in records(path):
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in items.items():
            curves.setdefault(name, []).append([items["_step"], value])
        if record.WhichOneof("record_type") == "exit":
            codes.append(record.exit.exit_code)
print(json.dumps({"curves": curves, "codes": codes}))
sys.stdout.flush()
os._exit(0)
