"""`--profile.steps 10:13`: trace the time of every operation in some steps."""

import os
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import RunConfig


class Profiler:
    """Traces the configured steps on each rank of the first node, into `profile/` of the run.

    A trace is Chrome's JSON, which Perfetto (ui.perfetto.dev) and TensorBoard's profile plugin open. On CUDA there is also a
    memory snapshot for pytorch.org/memory_viz.
    """

    def __init__(self, config: RunConfig, topology: Topology):
        first, last = map(int, (config.profile.steps or "0:-1").split(":"))
        here = topology.rank < topology.world_size // topology.nodes
        self._steps = range(first, last + 1) if here else range(0)
        self._name = config.run_dir / "profile" / f"steps_{first}-{last}.rank_{topology.rank}"
        self._cuda = topology.device == "cuda"
        self._trace: profile | None = None

    def begin(self, step: int) -> None:
        if step in self._steps and self._trace is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # hides its start and stop messages
            self._trace = profile(activities=activities, record_shapes=True, profile_memory=self._cuda)
            self._trace.start()
            if self._cuda:
                torch.cuda.memory._record_memory_history(max_entries=100_000)

    def end(self, step: int) -> str | None:
        """End a step; return a message with the trace's path once it is written."""
        if self._trace is None:
            return None
        self._trace.step()
        return self.close() if step == self._steps[-1] else None

    def close(self) -> str | None:
        """Write the trace so far, also of a run that ends early; a full disk gives only a warning."""
        if self._trace is None:
            return None
        trace, self._trace = self._trace, None
        trace.stop()
        path = self._name.with_name(f"{self._name.name}.pt.trace.json.gz")
        try:
            path.parent.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(path))
            if self._cuda:
                torch.cuda.memory._dump_snapshot(str(self._name.with_name(f"{self._name.name}.memory.pickle")))
        except (OSError, RuntimeError) as error:
            print(f"warning: {path} could not be written ({error})", file=sys.stderr, flush=True)
            return None
        finally:
            if self._cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
        return f"trace of steps {self._steps[0]} to {self._steps[-1]}: {path} (opens in ui.perfetto.dev)"
