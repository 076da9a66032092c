"""Folders and files that are whole or absent."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smolds_dist.errors import ConfigError


def check_free(to: Path) -> None:
    """Raises a `ConfigError` for a place that holds something."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} exists; choose another, or remove it.")


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `to` once all has gone well, and goes away otherwise.

    Raises:
        ConfigError: where none can be made.
    """
    part = _beside(to, Path.mkdir)
    try:
        yield part
        if to.exists():
            to.rmdir()
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def new_file(to: Path) -> Iterator[Path]:
    """As `new_folder`, for a file to write."""
    part = _beside(to, Path.touch)
    try:
        yield part
        part.rename(to)
    finally:
        part.unlink(missing_ok=True)


def _beside(to: Path, make: Callable[[Path], None]) -> Path:
    """Makes something beside `to`, under a name that nobody else has."""
    part = to.with_name(f".{to.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        make(part)
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be made ({error.strerror}); choose another place.") from None
    return part
