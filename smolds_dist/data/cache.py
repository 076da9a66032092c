"""Folders that are written once, by one of many processes and machines that want them.

A folder of that name is complete by construction: the writer fills a temporary folder, under a lock, and renames it when the
last byte is on disk.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from smolds_dist.errors import ConfigError


def cache_folder(name: str) -> Path:
    """`data.cache_dir`, made if it is not there.

    Raises:
        ConfigError: where it cannot be.
    """
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--data.cache_dir {name!r} cannot be made ({error.strerror}); choose another.") from None
    return folder


def key_of(*parts) -> str:
    """A folder's name from what its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def written_once(folder: Path, write: Callable[[Path], None], find_damage: Callable[[Path], str | None]) -> Path:
    """`folder`, filled by `write` if it is not there yet or damaged; the others wait for the one that writes."""
    if folder.is_dir() and not find_damage(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), _leftovers_removed(folder):
        if folder.is_dir() and (damage := find_damage(folder)):
            print(f"{folder} is damaged: {damage}; it is written again", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.writing-", dir=folder.parent))
            write(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
    return folder


@contextmanager
def _leftovers_removed(folder: Path) -> Iterator[None]:
    """Deletes what killed writers of `folder` left behind, before and after; call it with the lock held."""

    def remove() -> None:
        for leftover in folder.parent.glob(f"{folder.name}.writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    remove()
    try:
        yield
    finally:
        remove()
