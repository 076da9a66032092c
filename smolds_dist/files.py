"""Atomic writes: files are replaced as a unit, or appended record by record."""

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _full(error: Exception) -> int | None:
    """Return the error number of a write to a full disk; NumPy and libraries in Rust have it only in the message."""
    text = "" if isinstance(error, OSError) and error.errno else str(error)
    if re.search(r"\d+ requested and \d+ written", text):
        return errno.ENOSPC
    match = re.search(r"\(os error (\d+)\)", text)
    number = int(match[1]) if match else getattr(error, "errno", None)
    return number if number in FULL else None


def file_message(error: Exception) -> str | None:
    """Return one sentence about an unreadable or unwritable file, or None for other errors."""
    if isinstance(error, OSError) and error.filename is not None and error.errno:
        name, number = f"{error.filename}: ", error.errno
    else:
        name, number = "", _full(error) or 0
    return (
        f"{name}{os.strerror(number)}; check that it exists and is writable, and the disk's free space."
        if number
        else None
    )


@contextmanager
def path_in_errors(path: Path, part: Path | None = None) -> Iterator[None]:
    """Raise an `OSError` that names `path` for a full disk, and for errors of files in `part`."""
    try:
        yield
    except Exception as error:
        number = _full(error)
        if isinstance(error, OSError) and error.filename is not None:
            number = error.errno if part and str(error.filename).startswith(str(part)) else None
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def temp_path(path: Path) -> Path:
    """Return a unique temporary name in the folder of `path`."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write, which atomically replaces `path` on success."""
    part = temp_path(path)
    try:
        with path_in_errors(path, part):
            yield part
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


class AppendedFile:
    """Appends complete records; if the disk is full, they are buffered in memory until it has space."""

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def append(self, record: bytes) -> None:
        self._waiting += record
        size = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(self._waiting)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._waiting = b""
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), size)  # a full disk may hold a partial record

    def close(self) -> bool:
        """Return True if everything has been written."""
        self.append(b"")
        self._file.close()
        return not self._waiting
