"""Source: the files it names, local, on the Hugging Face Hub or on any fsspec file system, plain or compressed.

Parquet and JSON-lines files of Hub datasets are `hf://` addresses and are read like other remote files: in chunks, in
parallel, block by block, with retries after truncated responses. Other Hub datasets are streamed by `datasets` as one shard.
"""

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from smolds_dist.data.cache import build_once, json_damage, key_of
from smolds_dist.data.remote import file_system, open_remote, with_retries
from smolds_dist.errors import ConfigError, first_line
from smolds_dist.settings import Data, Source

TRIES = 4  # to list a remote source
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
LINES = (".jsonl", ".ndjson", ".json")  # on the Hub
# Endings searched for in a folder, by kind; a text source takes any file.
ENDINGS = {
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather", ".ipc"),
    "tokens": (".bin", ".npy", ".ds"),
}


class BadFileError(Exception):
    """The problem with a file, as the end of a sentence that begins with its path."""


@dataclass(frozen=True)
class File:
    """A file of a source in its current version."""

    path: str
    size: int  # bytes
    version: str  # changes with the content, as far as the file system reports it


class FileChunk(NamedTuple):
    """One of `of` chunks of a file."""

    file: int  # index among the source's files
    number: int
    of: int


def files_of(source: Source) -> list[File]:
    """Return the files of a source sorted by name; an `hf` source counts as one.

    Raises:
        ConfigError: if there are none, or the file system does not answer.
    """
    kind, _, pattern = source.source.partition(":")
    if kind == "hf":
        return [File(source.source, 0, "")]
    if kind == "stdlib":
        # Machines with the same Python share these shards: modification times are ignored.
        return [File(path, os.path.getsize(path), sys.version) for path in _stdlib_files()]
    found = _remote_files(source, kind, pattern) if "://" in pattern else _local_files(kind, pattern)
    if kind == "arrow":
        found = [file for file in found if not _is_leftover(file.path)]
    if kind == "tokens":
        found = [_with_index(file) for file in found if not file.path.endswith((".idx", ".index", ".metadata"))]
    if not found:
        raise ConfigError(
            f"--data.source {source.source!r} matches no file; check the pattern and the working directory."
        )
    return found


def _is_leftover(path: str) -> bool:
    """Return True if `datasets` left the file next to a saved dataset as the cache of a `map` or `filter`."""
    folder, name = os.path.split(path)
    return name.startswith("cache-") and os.path.exists(os.path.join(folder, "state.json"))


def index_of(path: str) -> str | None:
    """Return the path of the index that a pre-tokenized file may have."""
    stem, ending = os.path.splitext(path)
    return {".bin": f"{stem}.idx", ".ds": f"{path}.index"}.get(ending)


def _with_index(file: File) -> File:
    """Return the file with a version that also covers its index."""
    if index := index_of(file.path):
        with contextlib.suppress(FileNotFoundError):
            described = _stat_file(index)
            return replace(file, version=f"{file.version} {described.size} {described.version}")
    return file


def _local_files(kind: str, pattern: str) -> list[File]:
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        paths = [path for path in glob.glob(f"{glob.escape(pattern)}/**", recursive=True) if _is_kind(path, kind)]
    else:
        paths = glob.glob(_literal_path(pattern), recursive=True)
    status = {path: os.stat(path) for path in sorted(paths) if os.path.isfile(path)}
    return [File(path, s.st_size, f"{os.path.abspath(path)} {s.st_mtime_ns}") for path, s in status.items()]


def _literal_path(pattern: str) -> str:
    """Return the pattern with its existing leading folders taken literally, such as `corpus[v2]/*.txt`."""
    head, rest = pattern, list[str]()
    while head and not os.path.exists(head):
        head, tail = os.path.split(head)
        rest.insert(0, tail)
    return os.path.join(glob.escape(head), *rest)


def _is_kind(path: str, kind: str) -> bool:
    return kind not in ENDINGS or _decompressed_name(path).endswith(ENDINGS[kind])


def _decompressed_name(path: str) -> str:
    stem, ending = os.path.splitext(path)
    return stem if ending in COMPRESSED else path


def _remote_files(source: Source, kind: str, pattern: str) -> list[File]:
    def listed() -> tuple[Any, list[tuple[str, dict]]]:
        system, path = file_system(pattern)
        web = pattern.startswith("http")
        signs = "*[" if web else "*?["  # a web address may have a query
        if any(sign in path for sign in signs):
            paths = system.glob(path)
        elif web and not path.endswith("/"):  # `isdir` would download it
            paths = [path]
        elif system.isdir(path) and not system.isfile(path):
            paths = [found for found in system.find(path) if _is_kind(found, kind)]
        else:
            paths = [path] if system.exists(path) else []
        return system, [(found, system.info(found)) for found in sorted(paths)]

    try:
        system, described = with_retries(f"{pattern} could not be listed", listed, TRIES)
    except FileNotFoundError:
        return []
    except Exception as error:  # each file system has its own errors; some are not installed
        raise ConfigError(
            f"--data.source {source.source!r} could not be listed ({first_line(error)}); check the address, the network and "
            "the credentials."
        ) from None
    return [
        File(system.unstrip_protocol(found), int(info.get("size") or 0), version_of(info))
        for found, info in described
        if info.get("type", "file") == "file"
    ]


def version_of(info: dict[str, Any]) -> str:
    """Return the version of a file's content under any name that file systems use for it."""
    names = (
        "ETag", "etag", "blob_id", "sha256", "md5Hash", "LastModified", "Last-Modified", "last_modified", "mtime", "created"
    )  # fmt: skip
    return next((str(info[name]) for name in names if info.get(name)), "")


def settings_of(source: Source, data: Data) -> dict[str, Any]:
    """Return the settings that the documents in a file of the source depend on."""
    kind = source.source.partition(":")[0]
    if kind == "stdlib":
        return {"kind": kind}
    described: dict[str, Any] = {"kind": kind, "text_field": source.text_field}
    if kind == "hf":
        described |= {"source": source.source, "split": source.split}
    for name in ("on_bad_file", "on_bad_row"):
        if getattr(data, name) == "skip":
            described[name] = "skip"
    if kind == "tokens":
        described["token_dtype"] = source.token_dtype
    return described


def fingerprint(source: Source, files: list[File], data: Data) -> dict:
    """Return what the documents of a source depend on; it changes when a file is added, removed or edited."""
    described: dict[str, Any] = {"source": source.source}
    if source.source == "stdlib":
        return described | {"python": sys.version, "sizes": [file.size for file in files]}
    described |= {"text_field": source.text_field, "split": source.split} | settings_of(source, data)
    del described["kind"]
    return described | {"files": [(file.path, file.size, file.version) for file in files]}


def _stdlib_files() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (f for f in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.relative_to(root).parts))
    return [str(f) for f in sorted(files)]


def hub_error(source: Source, error: Exception) -> ConfigError:
    """Return the error for a Hub dataset that cannot be read."""
    return ConfigError(
        f"--data.source {source.source!r} could not be read ({first_line(error)}); "
        "check the name, the network, and HF_TOKEN for a gated dataset."
    )


def open_file(path: str, seekable: bool = False) -> BinaryIO:
    """Open a file, decompressed.

    Args:
        seekable: allow seeking; a compressed file is then held in memory.
    """
    file: Any = open_remote(path) if "://" in path else open(path, "rb")  # noqa: SIM115 - the caller closes it
    ending = os.path.splitext(path)[1]
    if ending not in COMPRESSED:
        return file
    content = _decompressed(file, ending)
    if not seekable:
        return content
    with content:
        return io.BytesIO(content.read())


def _decompressed(file: Any, ending: str) -> Any:
    if ending == ".zst":
        import pyarrow

        # Not `zstandard` (nor fsspec, which uses it): its reader accepts a truncated file, or the first of several
        # frames, as the complete file.
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    opened: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return opened[ending](file, "rb")


def resolve(source: Source, cache: Path) -> tuple[Source, list[File]]:
    """Return the source as it is read, and its files.

    The file list and revision of a Hub dataset are kept in the cache: later runs have the same data, and need no network
    once everything is tokenized. Delete `<cache>/listings` to get a newer revision.

    Raises:
        ConfigError: if no file matches, or the Hub does not answer.
    """
    if not source.source.startswith("hf:"):
        return source, files_of(source)
    here = Path(source.source.removeprefix("hf:").partition(":")[0]).expanduser()
    if saved := next(
        (folder for folder in (here, here / str(source.split)) if (folder / "state.json").is_file()), None
    ):
        source = replace(source, source=f"arrow:{saved}")  # written by `save_to_disk`
        return source, files_of(source)
    if here.exists():
        kind, files = _list(source)
    else:
        folder = cache / "listings" / key_of(source.source, source.split)

        def write(folder: Path) -> None:
            kind, files = _list(source)
            (folder / "files.json").write_text(json.dumps({"kind": kind, "files": [asdict(file) for file in files]}))

        listed = json.loads((build_once(folder, write, json_damage("files.json")) / "files.json").read_text())
        kind, files = listed["kind"], [File(**file) for file in listed["files"]]
    if kind is None:
        return source, files_of(source)
    return replace(source, source=f"{kind}:{source.source.removeprefix('hf:')}"), files


def _list(source: Source) -> tuple[str | None, list[File]]:
    """Return the kind and the files of a split; None and no files if `datasets` has to read it."""
    import datasets

    name, _, config_name = source.source.removeprefix("hf:").partition(":")
    try:
        builder = with_retries(
            f"{source.source} could not be listed",
            lambda: datasets.load_dataset_builder(name, config_name or None),
            TRIES,
        )
    except Exception as error:  # datasets has no common type for errors of network, name and files
        raise hub_error(source, error) from None
    by_split: Any = builder.config.data_files or {}
    if by_split and str(source.split) not in by_split:
        raise ConfigError(
            f"--data.source {source.source!r} has no split {source.split!r}; set --data.split to one of "
            f"{', '.join(map(str, by_split))}."
        )
    paths = sorted(map(str, by_split.get(str(source.split), ())))
    kind = _kind_of(paths)
    if kind is None:
        return None, []
    with ThreadPoolExecutor(16) as pool:
        return kind, list(pool.map(_stat_file, paths))


def _kind_of(paths: list[str]) -> str | None:
    if paths and all(path.endswith(".parquet") for path in paths):
        return "parquet"
    if paths and all(_decompressed_name(path).endswith(LINES) for path in paths) and _holds_lines(paths[0]):
        return "jsonl"
    return None


def _holds_lines(path: str) -> bool:
    """Return True if the first line of a JSON file is an object."""
    with open_file(path) as content:
        try:
            return isinstance(json.loads(content.readline()), dict)
        except ValueError:
            return False


def _stat_file(path: str) -> File:
    if "://" not in path:
        status = Path(path).stat()
        return File(path, status.st_size, str(status.st_mtime_ns))
    system, name = file_system(path)
    info = with_retries(f"{path} does not answer", lambda: system.info(name))
    return File(path, int(info.get("size") or 0), version_of(info))
