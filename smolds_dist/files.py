"""Files that are never half there: replaced as a whole, or grown record by record."""

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
    """Return the error number of a write without room; NumPy's errors and those of libraries in Rust have only a text."""
    text = "" if isinstance(error, OSError) and error.errno else str(error)
    if re.search(r"\d+ requested and \d+ written", text):
        return errno.ENOSPC
    match = re.search(r"\(os error (\d+)\)", text)
    number = int(match[1]) if match else getattr(error, "errno", None)
    return number if number in FULL else None


def file_message(error: Exception) -> str | None:
    """Return one sentence about a file that cannot be read or written, or None if the error is another."""
    if isinstance(error, OSError) and error.filename is not None and error.errno:
        name, number = f"{error.filename}: ", error.errno
    else:
        name, number = "", _full(error) or 0
    return f"{name}{os.strerror(number)}; check that it is there, writable, and has room." if number else None


@contextmanager
def path_in_errors(path: Path, part: Path | None = None) -> Iterator[None]:
    """Raise an `OSError` that names `path` for a write without room that names no file, and for one of what is in `part`."""
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
    """Return a name beside `path` that nobody else has."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a file to write, which replaces `path` if all goes well: who reads that sees the old or the new."""
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
    """Appends whole records; what a full disk does not take waits in memory until it does, and no record is torn."""

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
                os.ftruncate(self._file.fileno(), size)  # a full disk may take part of a record

    def close(self) -> bool:
        """Return True if everything has been written."""
        self.append(b"")
        self._file.close()
        return not self._waiting
