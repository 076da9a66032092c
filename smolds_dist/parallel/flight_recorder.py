"""The collective in which this rank waits, by PyTorch's flight recorder: a ring of the last collectives of a process."""

import json
import sys
from dataclasses import dataclass
from typing import Any

# One recorder for NCCL, only in CUDA builds, and one for gloo.
DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")


@dataclass
class Collective:
    """A collective that has begun and not ended."""

    name: str
    number: int  # in its group, from 1
    group: str  # torch's name of the process group, the same on all ranks
    ranks: list[int]  # of the group
    types: list[str]  # of this rank's inputs
    sizes: list[list[int]]

    def __str__(self) -> str:
        consecutive = self.ranks == list(range(self.ranks[0], self.ranks[-1] + 1)) if self.ranks else False
        ranks = f"{self.ranks[0]}-{self.ranks[-1]}" if consecutive else ", ".join(map(str, self.ranks))
        shown = [f"{kind.lower()} {size}" for kind, size in zip(self.types[:3], self.sizes, strict=False)]
        more = [f"{len(self.sizes) - 3} more"] if len(self.sizes) > 3 else []
        return f"{self.name} {self.number} of group {self.group} ({'; '.join([f'ranks {ranks}', *shown, *more])})"


def pending_collective() -> Collective | None:
    """Return this rank's oldest collective that has not ended; None if there is none, or no recorder.

    NCCL's recorder is untested.
    """
    c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is None or not c10d.is_initialized():
        return None
    bindings = sys.modules["torch._C._distributed_c10d"]
    entries = [entry for name in DUMPS if hasattr(bindings, name) for entry in _entries(getattr(bindings, name)())]
    pending = [entry for entry in entries if not entry["retired"] and entry["state"] != "completed"]
    if not pending:
        return None
    first = min(pending, key=lambda entry: entry["time_created_ns"])
    group = first["process_group"][0]
    members = (c10d.get_process_group_ranks(one) for one in list(c10d._world.pg_map) if one.group_name == group)
    return Collective(
        name=first["profiling_name"].rpartition(":")[2],
        number=first["p2p_seq_id" if first["is_p2p"] else "collective_seq_id"],
        group=group,
        ranks=next(members, []),
        types=first["input_dtypes"],
        sizes=first["input_sizes"],
    )


def _entries(dump: str | bytes) -> list[dict[str, Any]]:
    return json.loads(dump).get("entries", [])
