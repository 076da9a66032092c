"""Files that are never half there: replaced as a whole, or grown record by record."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once all has gone well: who reads that sees the old or the new."""
    part = path.with_name(f"{path.name}.part")
    yield part
    part.replace(path)


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
