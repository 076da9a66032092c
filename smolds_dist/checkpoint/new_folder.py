"""Folders and files that are whole or absent."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from smolds_dist.errors import ConfigError


def check_free(to: Path) -> None:
    """Raises a `ConfigError` for a place that holds something."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} exists; choose another, or remove it.")


@contextmanager
def new_folder(to: Path, make: Callable[[Path], None] = Path.mkdir) -> Iterator[Path]:
    """A folder to fill, which becomes `to` once all has gone well, and goes away otherwise.

    Raises:
        ConfigError: where none can be made.
    """
    part = to.with_name(f".{to.name}.{uuid.uuid4().hex[:12]}.part")  # a name that nobody else has
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        make(part)
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be made ({error.strerror}); choose another place.") from None
    try:
        yield part
        part.rename(to)
    finally:
        if part.is_file():
            part.unlink()
        shutil.rmtree(part, ignore_errors=True)


def new_file(to: Path) -> AbstractContextManager[Path]:
    """As `new_folder`, for a file to write."""
    return new_folder(to, Path.touch)
