"""Write a run's checkpoints in the background.

Training pauses only while the state is copied to host memory. Then a thread on every rank writes the rank's file; rank 0's
thread waits for all files, adds the manifest and renames the folder. All ranks must share a file system.
"""

import contextlib
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolds_dist.activity import LONG
from smolds_dist.checkpoint import files
from smolds_dist.checkpoint.files import CheckpointReader, Manifest
from smolds_dist.files import replace_text
from smolds_dist.inputs import convert, read_json
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.topology import Topology
from smolds_dist.parallel.versions import package_versions
from smolds_dist.settings import RunConfig
from smolds_dist.stages import resolve_stages


@dataclass
class TrainState:
    """A run's progress, in addition to its tensors."""

    step: int = 0
    skipped_steps: int = 0  # of the data, by rollbacks
    rollbacks: int = 0
    tokens: int = 0  # trained on


class PeerError(Exception):
    """Another rank's error about its file of a checkpoint."""


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time.

    Args:
        tensors: shapes of all logical tensors of the model.
        identity: returns what the tokens of the run's first n samples depend on (`TrainingData.identity`).
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        tensors: dict[str, tuple[int, ...]],
        identity: Callable[[int], dict[str, Any]],
    ):
        self.config, self.stages = config, resolve_stages(config)
        self.topology = topology
        self.tensors = tensors
        self.identity = identity
        self.root = config.run_dir / "checkpoints"
        self.staging: dict[str, Tensor] = {}  # host buffers for the state, reused each time
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self.failed_step = 0
        if topology.rank == 0:
            files.remove_leftovers(self.root)

    def prepare(self, engine: Engine) -> None:
        """Allocate the host buffers in the background, once the optimizer has state.

        The first use of new memory can take ten times as long as a copy into it.
        """
        if self.config.checkpoint.every and self.config.checkpoint.background:
            self._start(self._allocate_staging, self._state_tensors(engine, None))

    def _start(self, work: Callable[..., None], *args: object) -> None:
        self._thread = threading.Thread(target=work, args=args, name="checkpoint", daemon=True)
        self._thread.start()

    def _allocate_staging(self, tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if key not in self.staging or self.staging[key].shape != tensor.shape:
                self.staging[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).zero_()

    def save(
        self,
        engine: Engine,
        balancer: Balancer,
        state: TrainState,
        val_loss: float | None,
        extra: dict[str, Tensor] | None = None,
        wait: bool = False,
    ) -> None:
        """Start writing `checkpoints/step_N`, after the previous one is done. Collective.

        Args:
            extra: tensors that this rank stores in addition to its share of the state, by key.
            wait: return only when the checkpoint is written.
        """
        self.wait()
        unfinished = self.root / f"unfinished_{files.checkpoint_name(state.step)}"
        if self.topology.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        engine.barrier()  # so that no other rank's file is deleted
        tensors = self._state_tensors(engine, balancer) | (extra or {})
        background = self.config.checkpoint.background and not wait
        tensors = self._stage(tensors) if background else {key: tensor.cpu() for key, tensor in tensors.items()}
        data_step = state.step + state.skipped_steps
        samples = self.stages.samples(data_step)
        of_step: dict[str, Any] = {"samples": samples, "optimizer_steps": engine.optimizer_steps, "files": {}}
        of_step["val_loss"] = val_loss
        manifest = new_manifest(
            self.stages.at(data_step).config, self.topology, state, self.identity(samples), self.tensors, **of_step
        )
        self._start(self._write, unfinished, tensors, manifest)
        if not background:
            self.wait()

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failure(self) -> str | None:
        """Return and clear the error of the last checkpoint; only rank 0 returns errors, including other ranks'."""
        error, self._error = self._error, None
        return error if self.topology.rank == 0 else None

    def _state_tensors(self, engine: Engine, balancer: Balancer | None) -> dict[str, Tensor]:
        """Return this rank's share of the state by key, as views of the training's tensors."""
        tensors: dict[str, Tensor] = {}
        for fragment in engine.fragments():
            share = fragment.share()
            if len(share.tensors["value"]):
                tensors |= {f"{share.name}:{kind}:{share.start}": t for kind, t in share.tensors.items()}
        if self.topology.rank == 0 and balancer is not None:
            tensors |= {f"{name}:{kind}:0": tensor for (name, kind), tensor in balancer.state().items()}
        # Training does not use torch's generators once the model is built.
        states = {"cpu": torch.get_rng_state()}
        if self.topology.device == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        for kind, state in states.items():
            tensors[f"{files.RANDOM}rank_{self.topology.rank:05}:{kind}:0"] = state
        return tensors

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self._allocate_staging(tensors)
        for key, tensor in tensors.items():
            self.staging[key].copy_(tensor, non_blocking=True)
        if self.topology.device == "cuda":
            torch.cuda.synchronize()
        return {key: self.staging[key] for key in tensors}

    def _write(self, unfinished: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Write a checkpoint in the background. On success the folder has its final name, else `failure()` has the error."""
        path = unfinished / f"rank_{self.topology.rank:05}.safetensors"
        entry = path.with_suffix(".json")
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            written = files.write_tensors(path, tensors)
            replace_text(entry, json.dumps(written))
            if self.topology.rank == 0:
                manifest.files.update(self._collect_rank_files(unfinished))
                CheckpointReader(unfinished, manifest).check_coverage()
                self._prune(files.finalize(unfinished, manifest))
        except Exception as error:  # any error must be reported
            from_peer = isinstance(error, PeerError)
            self._error = str(error) if from_peer else f"rank {self.topology.rank}: {_reason(error)}"
            self.failed_step = manifest.step
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # frees space for the next line
                replace_text(entry, json.dumps({"error": self._error}))
            if self.topology.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)

    def _collect_rank_files(self, unfinished: Path) -> dict[str, dict[str, Any]]:
        """Wait for each rank's file and return the files' entries.

        Raises:
            PeerError: if a rank could not write its file, or timed out.
        """
        entries = {}
        deadline = time.monotonic() + max(LONG, self.config.parallel.timeout or math.inf)
        for rank in range(self.topology.world_size):
            path = unfinished / f"rank_{rank:05}.json"
            while not path.exists():
                if time.monotonic() > deadline:
                    raise PeerError(f"rank {rank} has not written its file")
                time.sleep(0.02)
            entry = read_json(path, "save again", dict[str, Any])
            if "error" in entry:
                raise PeerError(str(entry["error"]))
            convert(entry, files.FileEntry, path, "save again")
            entries[path.with_suffix(".safetensors").name] = entry
            path.unlink()
        return entries

    def _prune(self, newest: Path) -> None:
        """Delete checkpoints that no setting keeps. The one just written is complete, so one always stays."""
        settings = self.config.checkpoint
        manifests = files.manifests_of(self.root)  # without damaged ones, left for the user to inspect
        kept = {newest, *list(manifests)[: settings.keep]}
        if settings.keep_every:
            kept |= {folder for folder in manifests if files.step_of(folder) % settings.keep_every == 0}
        if settings.keep_best and (best := files.best_checkpoint(manifests)):
            kept.add(best)
        for folder in manifests.keys() - kept:
            files.remove(folder)


def new_manifest(
    config: RunConfig,
    topology: Topology,
    state: TrainState,
    data: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    **extra: Any,
) -> Manifest:
    """Make the manifest of a new checkpoint; `extra` are its remaining fields."""
    return Manifest(
        **asdict(state),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        config=asdict(config),
        topology=asdict(topology),
        data=data,
        versions=package_versions(),
        tensors={name: list(shape) for name, shape in tensors.items()},
        **extra,
    )


def _reason(error: Exception) -> str:
    """Return the system's message alone, such as "No space left on device"."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    match = re.search(r"I/O error: (.*?)(?: \(os error \d+\))?$", str(error))
    return match.group(1) if match else str(error)
