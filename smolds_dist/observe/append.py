"""Files that grow record by record, and survive a full disk."""

import contextlib
import os
from pathlib import Path


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

    def close(self) -> None:
        self.append(b"")
        self._file.close()
