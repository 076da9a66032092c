"""Folders that are whole or absent."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smolds_dist.errors import ConfigError


def check_free(to: Path) -> None:
    """Refuses a place that holds something.

    Raises:
        ConfigError: naming it.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} exists; choose another, or remove it.")


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `to` once all has gone well, and goes away otherwise."""
    part = to.with_name(f"{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if to.exists():
            to.rmdir()
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
