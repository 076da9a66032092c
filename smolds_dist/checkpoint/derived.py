"""Runs made from another run's checkpoints: averages of several, and branches from one."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from smolds_dist.checkpoint.new_folder import new_folder
from smolds_dist.config import save_config
from smolds_dist.errors import ConfigError
from smolds_dist.inputs import Count, Time, read_json
from smolds_dist.rules import validate
from smolds_dist.settings import RunConfig

PARENT = "parent.json"


@dataclass
class Parent:
    """Origin of a derived run, as stored in its `PARENT`."""

    run: str  # the other run's folder, relative to this run's
    steps: list[Count]  # of its checkpoints; several if their weights were averaged
    created: Time

    def __str__(self) -> str:
        first, last = self.steps[0], self.steps[-1]
        return f"from step {first}" if first == last else f"mean of steps {first} to {last}"


@contextmanager
def derived_run(to: Path, source: Path, config: RunConfig, steps: list[int]) -> Iterator[Path]:
    """Yield the folder of a new run to add checkpoints to, with settings, tokenizer and parent; it becomes `to` on success.

    Args:
        source: folder of the run that the checkpoints of `steps` belong to.
        config: settings; their `run` section is set to `to`.

    Raises:
        ConfigError: if a setting is invalid, or `to` cannot be created or is inside `source`.
    """
    if to.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"--to {to} is inside the run {source}; choose a folder outside, such as {source}-2.")
    config.run.dir, config.run.name = str(to.parent), to.name
    validate(config)
    with new_folder(to) as unfinished:
        save_config(config, unfinished / "config.yaml")
        if (source / "tokenizer").is_dir():
            shutil.copytree(source / "tokenizer", unfinished / "tokenizer")
        parent = Parent(os.path.relpath(source.resolve(), to.resolve()), steps, round(time.time(), 3))
        (unfinished / PARENT).write_text(json.dumps(asdict(parent)) + "\n", encoding="utf-8")
        (unfinished / "checkpoints").mkdir()
        yield unfinished


def read_parent(run: Path) -> Parent | None:
    """Return the origin of a derived run; None for other runs. Raise a `ConfigError` if its file is damaged."""
    path = run / PARENT
    return read_json(path, "delete it", Parent) if path.exists() else None
