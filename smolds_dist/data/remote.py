"""Remote files, on any file system that fsspec knows: read block by block, and again where an answer does not come whole.

A server that does not answer is waited for, however long: each file was there when it was listed. What cannot change by
itself (a file that is gone, a refusal) is an error at once.
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

BLOCK = 2**22  # bytes of one request, where the reader does not want more
LONGEST_PAUSE = 60.0  # seconds between two tries
TIMEOUT = 60.0  # seconds without a byte
FINAL = (400, 401, 403, 404, 405, 410, 451)  # HTTP's answers that another try does not change

T = TypeVar("T")


class TruncatedError(Exception):
    """An answer that is shorter than it should be."""


class NoRangesError(Exception):
    """A server that sends whole files only."""


def file_system(path: str) -> tuple[Any, str]:
    """The file system of an address, and what the file is called there."""
    if not path.startswith(("http://", "https://")):
        return fsspec.core.url_to_fs(path)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    return fsspec.core.url_to_fs(path, client_kwargs={"timeout": timeout})


def with_retries(message: str, action: Callable[[], T], tries: int | None = None) -> T:
    """What `action` returns, once it does; it is tried again after pauses that double.

    Args:
        what: begins the sentence that tells of a pause.
        tries: at most; None: until it works.

    Raises:
        Exception: that of the last try, or one that another try does not change.
    """
    pause, tried = 1.0, 0
    while True:
        try:
            return action()
        except Exception as error:  # each file system has errors of its own
            tried += 1
            if tried == tries or _is_permanent(error):
                raise
            why = reason(error)
        print(f"{message} ({why}); trying again in {pause:.0f} s", file=sys.stderr, flush=True)
        current_reporter().sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _is_permanent(error: Exception) -> bool:
    """Whether another try would end alike."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and not isinstance(cause, FileNotFoundError):
        return (_status(cause) or 404) in FINAL  # fsspec takes any answer of a web server for this
    kinds = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ImportError, ValueError)
    return isinstance(error, (*kinds, NoRangesError)) or _status(error) in FINAL


def _status(error: BaseException | None) -> int | None:
    """The number of a web server's answer, as aiohttp or the Hub's library has it."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def reason(error: Exception) -> str:
    """In words; a web server's answer by its number."""
    status = _status(error) or _status(error.__cause__)
    return f"HTTP {status}" if status else first_line(error)


def _read(message: str, action: Callable[[], T]) -> T:
    """As `with_retries`, until it works.

    Raises:
        OSError: where it never will.
        NoRangesError: by `action`.
    """
    try:
        return with_retries(message, action)
    except (OSError, NoRangesError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, reason(error)) from error


def open_remote(path: str) -> Any:
    """The bytes of a remote file, in which one can go back and forth.

    Raises:
        OSError: where it is not there.
    """
    system, name = file_system(path)
    size = _read(f"{path} does not answer", lambda: system.info(name).get("size"))
    if size:
        try:
            return io.BufferedReader(RemoteFile(path, system, name, int(size)), BLOCK)
        except NoRangesError:
            pass

    def whole() -> bytes:
        content = system.cat_file(name)
        if size and len(content) < size:
            raise TruncatedError(f"sent {len(content):,} of {size:,} bytes")
        return content

    return io.BytesIO(_read(f"{path} did not come whole", whole))


class RemoteFile(AbstractBufferedFile):
    """A file of known size, read by ranges of bytes; its first block is kept.

    Raises:
        NoRangesError: where the server has none.
    """

    def __init__(self, address: str, system: Any, name: str, size: int):
        super().__init__(system, name, block_size=BLOCK, cache_type="first", size=size)
        self._address = address
        self.read(1)  # to see whether the server takes ranges
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

        return _read(f"{self._address} did not come whole", once) if length > 0 else b""
