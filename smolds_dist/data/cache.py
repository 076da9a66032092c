"""Folders that are written once, by one of any number of processes and machines.

A folder with its final name is always complete: the writer fills a temporary folder under a lock and renames it when the
last byte is on disk.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from smolds_dist.activity import LONG, doing
from smolds_dist.errors import ConfigError
from smolds_dist.files import file_message, path_in_errors


def cache_folder(name: str) -> Path:
    """Return `data.cache_dir`, created if missing.

    Raises:
        ConfigError: if it cannot be created.
    """
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--data.cache_dir {name!r} cannot be created ({error.strerror}); choose another.") from None
    return folder


def key_of(*parts) -> str:
    """Return a folder's name: a digest of everything its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


# From a folder to its damage, or None.
FindDamage = Callable[[Path], str | None]


def json_damage(name: str) -> FindDamage:
    """Return a check of folders with a JSON file of this name."""

    def find(folder: Path) -> str | None:
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"{name} cannot be read"
        return None

    return find


def checksums(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Return the CRC-32 of these files of a folder by name."""
    found = dict.fromkeys(names, 0)
    for name in found:
        with (folder / name).open("rb") as content:
            while block := content.read(2**20):
                found[name] = zlib.crc32(block, found[name])
    return found


def file_damage(folder: Path, sizes_of: Callable[[dict], dict[str, int]], content: bool = True) -> str | None:
    """Return a description of damage to the files of a folder, or None.

    Args:
        sizes_of: bytes of the other files, from the content of `meta.json`.
        content: also compare checksums (`sums` in `meta.json`), which reads all files.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = sizes_of(meta)
        for name, expected in sizes.items():
            size = (folder / name).stat().st_size
            if size != expected:
                return f"{name} has {size:,} bytes instead of {expected:,}"
        sums = checksums(folder, sizes) if content else {}
        if changed := [name for name, found in sums.items() if found != meta["sums"][name]]:
            return f"{changed[0]} has another checksum than when it was written"
    except (OSError, ValueError, TypeError, KeyError):
        return "a file is missing or cannot be read"
    return None


def build_once(folder: Path, write: Callable[[Path], None], find_damage: FindDamage) -> Path:
    """Return `folder`; `write` fills it if it is missing or damaged, while other processes wait."""
    try_build(folder, write, find_damage, timeout=-1)
    return folder


def try_build(folder: Path, write: Callable[[Path], None], find_damage: FindDamage, timeout: float = 0) -> bool:
    """Fill `folder` with `write` if it is missing or damaged, unless another process is writing it; return True if complete.

    The lock belongs to the operating system and ends with the process that holds it.

    Args:
        timeout: seconds to wait for another writer; -1 = until it finishes.

    Raises:
        ConfigError: for a file that cannot be read or written; no partial files are left.
    """
    if folder.is_dir() and not find_damage(folder):
        return True
    try:
        return _try_build(folder, write, find_damage, timeout)
    except OSError as error:
        if (message := file_message(error)) is None:
            raise
        raise ConfigError(message) from None


def _try_build(folder: Path, write: Callable[[Path], None], find_damage: FindDamage, timeout: float) -> bool:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        with doing(f"waiting for another process to write {folder}", LONG):
            held = lock.acquire(timeout=timeout)
    except Timeout:
        return False
    with held:
        for leftover in folder.parent.glob(f"{folder.name}.writing-*"):  # of writers that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        if folder.is_dir() and (damage := find_damage(folder)):
            print(f"{folder} is damaged: {damage}; writing it again", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
        if not folder.is_dir():
            prefix = f"{folder.name}.writing-"
            with tempfile.TemporaryDirectory(None, prefix, folder.parent, ignore_cleanup_errors=True) as name:
                unfinished = Path(name)
                with path_in_errors(folder, unfinished):
                    write(unfinished)
                unfinished.chmod(0o755)
                unfinished.rename(folder)  # leaves nothing to remove
        # Processes that wait for this lock find the folder; others do not need a lock.
        Path(lock.lock_file).unlink(missing_ok=True)
    return True
