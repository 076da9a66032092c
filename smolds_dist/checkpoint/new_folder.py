"""Folders and files that are whole or absent."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from smolds_dist.errors import ConfigError
from smolds_dist.files import path_in_errors, temp_path


def check_free(to: Path) -> None:
    """Raises a `ConfigError` for a place that holds something."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} exists; choose another, or remove it.")


@contextmanager
def new_folder(to: Path, make: Callable[[Path], None] = Path.mkdir) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `to` if all goes well, and is removed otherwise; so are parents made for it.

    Raises:
        ConfigError: if none can be made, or another process has made `to` meanwhile.
        OSError: naming `to`, if there is no room.
    """
    part = temp_path(to.with_name(f".{to.name}"))
    missing = [folder for folder in part.parents if not folder.exists()]
    try:
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            make(part)
        except OSError as error:
            raise ConfigError(f"--to {to} cannot be made ({error.strerror}); choose another place.") from None
        with path_in_errors(to, part):
            yield part
            if part.exists():  # else the block has given it its name
                check_free(to)
                part.rename(to)
    finally:
        if part.is_file():
            part.unlink()
        shutil.rmtree(part, ignore_errors=True)
        for folder in missing:  # from the innermost out, up to one that holds something
            with contextlib.suppress(OSError):
                folder.rmdir()


def new_file(to: Path) -> AbstractContextManager[Path]:
    """As `new_folder`, for a file to write."""
    return new_folder(to, Path.touch)
