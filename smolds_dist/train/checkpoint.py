"""Checkpoints at intervals, and the way back into a run of the same topology."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from smolds_dist.config import RunConfig
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.topology import Topology

# What a checkpoint's tensors depend on; everything else may differ between the run and its continuation.
LAYOUT = ("world_size", "engine", "expert", "zero", "dtype")


def latest_checkpoint(config: RunConfig) -> Path | None:
    """The newest complete checkpoint of the run."""
    found = sorted((config.run_dir / "checkpoints").glob("step_*[0-9]"))
    return found[-1] if found else None


def check_resumable(config: RunConfig, topology: Topology) -> Path | None:
    """The checkpoint to continue from, or None for a new run.

    Raises:
        ConfigError: where the run exists but is not to be resumed, or was made by another topology or model.
    """
    latest = latest_checkpoint(config)
    metrics = config.run_dir / "metrics.jsonl"
    if config.checkpoint.resume == "never":
        if latest or (metrics.exists() and metrics.stat().st_size):
            raise ConfigError(
                f"{config.run_dir} already holds a run; continue it with --checkpoint.resume auto, choose another "
                "--run.name, or delete the folder."
            )
        return None
    if latest is None:
        return None
    saved = json.loads((latest / "meta.json").read_text())
    for name in LAYOUT:
        if saved["topology"][name] != getattr(topology, name):
            raise ConfigError(
                f"{latest} was written with {name} {saved['topology'][name]}, this run has {getattr(topology, name)}; "
                "resume with the topology that wrote it."
            )
    for section, names in (
        ("model", saved["model"]),
        ("data", ("source", "tokenizer", "tokenizer_vocab_size", "seq_len", "val_fraction", "max_tokens")),
        ("train", ("seed", "global_batch", "optimizer")),
    ):
        for name in names:
            now = getattr(getattr(config, section), name)
            if saved[section][name] != now:
                raise ConfigError(
                    f"{latest} was written with --{section}.{name} {saved[section][name]}, this run has {now}; "
                    "resume with the same value, or start a new --run.name."
                )
    return latest


def save_checkpoint(config: RunConfig, topology: Topology, engine: Engine, balancer: Balancer, step: int) -> None:
    """Writes `checkpoints/step_N` and removes the oldest beyond `checkpoint.keep`. Collective.

    The folder gets its name when it is complete, so that one which was being written when the run died never counts.
    """
    root = config.run_dir / "checkpoints"
    unfinished = root / f"unfinished_step_{step:08}"
    if topology.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    engine.barrier()
    engine.save(unfinished)
    engine.barrier()
    if topology.rank == 0:
        torch.save(balancer.state_dict(), unfinished / "balancer.pt")
        meta = asdict(config) | {"step": step, "topology": asdict(topology)}
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=2))
        finished = root / f"step_{step:08}"
        shutil.rmtree(finished, ignore_errors=True)
        unfinished.rename(finished)
        for old in sorted(root.glob("step_*[0-9]"))[: -config.checkpoint.keep]:
            shutil.rmtree(old)
    engine.barrier()


def load_checkpoint(folder: Path, engine: Engine, balancer: Balancer) -> int:
    """Loads what `save_checkpoint` wrote and returns its step. Collective."""
    engine.load(folder)
    balancer.load_state_dict(torch.load(folder / "balancer.pt", weights_only=True))
    return json.loads((folder / "meta.json").read_text())["step"]
