"""Create folders and files atomically: complete or absent."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from smolds_dist.errors import ConfigError
from smolds_dist.files import path_in_errors, temp_path


def check_free(to: Path) -> None:
    """Raise a `ConfigError` if the path exists and is not an empty folder."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} exists; choose another, or remove it.")


@contextmanager
def new_folder(to: Path, make: Callable[[Path], None] = Path.mkdir) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `to` on success; on failure it and new parents are removed.

    Raises:
        ConfigError: if it cannot be created, or another process has created `to` in the meantime.
        OSError: naming `to`, if the disk is full.
    """
    part = temp_path(to.with_name(f".{to.name}"))
    missing = [folder for folder in part.parents if not folder.exists()]
    try:
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            make(part)
        except OSError as error:
            raise ConfigError(f"--to {to} cannot be created ({error.strerror}); choose another folder.") from None
        with path_in_errors(to, part):
            yield part
            if part.exists():  # else the block has renamed it
                check_free(to)
                part.rename(to)
    finally:
        if part.is_file():
            part.unlink()
        shutil.rmtree(part, ignore_errors=True)
        for folder in missing:  # from the innermost out, until one is not empty
            with contextlib.suppress(OSError):
                folder.rmdir()


def new_file(to: Path) -> AbstractContextManager[Path]:
    """Yield a file to write, like `new_folder`."""
    return new_folder(to, Path.touch)
