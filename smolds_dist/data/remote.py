"""Remote files on any fsspec file system, read block by block with retries after truncated responses.

A server that does not answer is retried indefinitely, because each file existed when it was listed. Permanent failures (a
missing file, denied access) raise an error immediately.
"""

import errno
import io
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.spec import AbstractBufferedFile

from smolds_dist.errors import first_line
from smolds_dist.progress import current_reporter

BLOCK = 2**22  # bytes per request, unless the reader asks for more
LONGEST_PAUSE = 60.0  # seconds between tries
TIMEOUT = 60.0  # seconds without a byte
FINAL = (400, 401, 403, 404, 405, 410, 451)  # HTTP statuses that a retry does not change

T = TypeVar("T")


class TruncatedError(Exception):
    """A response that is shorter than it should be."""


class NoRangesError(Exception):
    """A server that sends only complete files."""


def file_system(path: str) -> tuple[Any, str]:
    """Return the file system of an address, and the file's name there."""
    if not path.startswith(("http://", "https://")):
        return fsspec.core.url_to_fs(path)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    return fsspec.core.url_to_fs(path, client_kwargs={"timeout": timeout})


def with_retries(message: str, action: Callable[[], T], tries: int | None = None) -> T:
    """Return the result of `action`, retrying with pauses that double.

    Args:
        message: problem that the log line about a pause begins with.
        tries: maximum; None = until it works.

    Raises:
        Exception: of the last try, or one that a retry does not change.
    """
    pause, tried = 1.0, 0
    while True:
        try:
            return action()
        except Exception as error:  # each file system has its own errors
            tried += 1
            if tried == tries or _is_permanent(error):
                raise
            why = reason(error)
        print(f"{message} ({why}); retrying in {pause:.0f} s", file=sys.stderr, flush=True)
        current_reporter().sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _is_permanent(error: Exception) -> bool:
    """Return True if a retry would fail in the same way."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and not isinstance(cause, FileNotFoundError):
        return (_status(cause) or 404) in FINAL  # fsspec raises it for any HTTP error
    kinds = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ImportError, ValueError)
    return isinstance(error, (*kinds, NoRangesError)) or _status(error) in FINAL


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error of aiohttp or the Hub's library."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def reason(error: Exception) -> str:
    """Return the reason for an error: the HTTP status, or the first line of its message."""
    status = _status(error) or _status(error.__cause__)
    return f"HTTP {status}" if status else first_line(error)


def _read(message: str, action: Callable[[], T]) -> T:
    """Return `with_retries` without a limit of tries.

    Raises:
        OSError: if it fails permanently.
        NoRangesError: from `action`.
    """
    try:
        return with_retries(message, action)
    except (OSError, NoRangesError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, reason(error)) from error


def open_remote(path: str) -> Any:
    """Open a remote file as seekable bytes.

    Raises:
        OSError: if it does not exist.
    """
    system, name = file_system(path)
    size = _read(f"{path} does not answer", lambda: system.info(name).get("size"))
    if size:
        try:
            return io.BufferedReader(RemoteFile(path, system, name, int(size)), BLOCK)
        except NoRangesError:
            pass

    def download() -> bytes:
        content = system.cat_file(name)
        if size and len(content) < size:
            raise TruncatedError(f"sent {len(content):,} of {size:,} bytes")
        return content

    return io.BytesIO(_read(f"{path} did not arrive completely", download))


class RemoteFile(AbstractBufferedFile):
    """A file of known size, read by byte ranges; its first block is cached.

    Raises:
        NoRangesError: if the server does not support ranges.
    """

    def __init__(self, address: str, system: Any, name: str, size: int):
        super().__init__(system, name, block_size=BLOCK, cache_type="first", size=size)
        self._address = address
        self.read(1)  # to test whether the server supports ranges
        self.seek(0)

    def _fetch_range(self, start: int, end: int) -> bytes:
        length = min(end, self.size) - start

        def once() -> bytes:
            content = self.fs.cat_file(self.path, start=start, end=start + length)
            if len(content) > length:
                raise NoRangesError
            if len(content) < length:
                raise TruncatedError(f"sent {len(content):,} of {length:,} bytes")
            return content

        return _read(f"{self._address} did not arrive completely", once) if length > 0 else b""
