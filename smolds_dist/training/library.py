"""Train from Python: `smolds train` and `smolds launch` as functions that return a result."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from smolds_dist.config import save_config
from smolds_dist.rules import validate
from smolds_dist.settings import RunConfig


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    run_dir: Path
    exit_code: int  # 0, or a code from the table in docs/training.md
    steps: int
    loss: float | None  # of the last step, in nats per token
    val_loss: float | None  # of the last evaluation, in nats per token
    val_bits_per_byte: float | None
    export: Path | None  # the model in Hugging Face format, once the run is complete


def train(config: RunConfig) -> RunResult:
    """Train in this process, or as this rank of a launched job.

    Raises:
        ConfigError: if the run cannot start; nothing has been written then.
    """
    from smolds_dist.training.trainer import train as run

    validate(config)
    return _result(config, run(config))


def launch(config: RunConfig, procs: int | None = None, launcher: str = "auto") -> RunResult:
    """Start ranks and wait for their end.

    Args:
        procs: ranks per machine; default: as many as fit.
        launcher: auto, none, torchrun, deepspeed, mpi or slurm.

    Raises:
        ConfigError: if the run cannot start.
    """
    from smolds_dist.launching.launcher import launch as start

    validate(config)
    options = ["--launcher", launcher] + ([] if procs is None else ["--nproc-per-node", str(procs)])
    # In the run's parent folder, which all nodes can access.
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=config.run.dir) as file:
        save_config(config, Path(file.name))
        return _result(config, start([*options, "--", "--config", str(Path(file.name).resolve())]))


def _result(config: RunConfig, code: int) -> RunResult:
    from smolds_dist.observe.rows import read_rows

    rows = read_rows(config.run_dir / "metrics.jsonl")
    last: dict = next((row for row in reversed(rows) if "loss" in row), {})
    evaluation: dict = next((row for row in reversed(rows) if "val_loss" in row), {})
    export = config.run_dir / "export"
    exported = export if (export / "config.json").is_file() else None
    losses = last.get("loss"), evaluation.get("val_loss"), evaluation.get("val_bits_per_byte")
    return RunResult(config.run_dir, code, last.get("step", 0), *losses, exported)
