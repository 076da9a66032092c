"""Data sets on the Hugging Face Hub: their files, where those are parquet or JSON lines, as `hf://` addresses.

Files are read as those of any other remote source: in parts, in parallel, block by block, and again where an answer does not
come whole. What else there is on the Hub is streamed by `datasets`, as one unit.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from smolds_dist.data.cache import json_damage, key_of, written_once
from smolds_dist.data.remote import file_system, retried
from smolds_dist.data.source import COMPRESSED, TRIES, File, files_of, hub_error, open_file, version_of
from smolds_dist.errors import ConfigError
from smolds_dist.settings import Source

LINES = (".jsonl", ".ndjson", ".json")


def resolve(source: Source, cache: Path) -> tuple[Source, list[File]]:
    """The source as it is read, and its files.

    The list of a Hub data set's files, with its revision, is kept in the cache: later runs have the same data, and can do
    without a network once all is tokenised. Delete `<cache>/listings` to see a newer revision.

    Raises:
        ConfigError: where there is no file, or the Hub does not answer.
    """
    if not source.source.startswith("hf:"):
        return source, files_of(source)
    if Path(source.source.removeprefix("hf:").partition(":")[0]).expanduser().exists():
        kind, files = _list(source)
    else:
        folder = cache / "listings" / key_of(source.source, source.split)

        def write(folder: Path) -> None:
            kind, files = _list(source)
            (folder / "files.json").write_text(json.dumps({"kind": kind, "files": [asdict(file) for file in files]}))

        listed = json.loads((written_once(folder, write, json_damage("files.json")) / "files.json").read_text())
        kind, files = listed["kind"], [File(**file) for file in listed["files"]]
    if kind is None:
        return source, files_of(source)
    return replace(source, source=f"{kind}:{source.source.removeprefix('hf:')}"), files


def _list(source: Source) -> tuple[str | None, list[File]]:
    """How the files of a split are read, and which they are; None and none where `datasets` has to do it."""
    import datasets

    name, _, config_name = source.source.removeprefix("hf:").partition(":")
    try:
        builder = retried(
            f"{source.source} could not be listed",
            lambda: datasets.load_dataset_builder(name, config_name or None),
            TRIES,
        )
    except Exception as error:  # of the network, the name, the files: datasets has no common type for them
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
        return kind, list(pool.map(_described, paths))


def _kind_of(paths: list[str]) -> str | None:
    plain = paths
    for ending in COMPRESSED:
        plain = [path.removesuffix(ending) for path in plain]
    if paths and all(path.endswith(".parquet") for path in paths):
        return "parquet"
    if paths and all(path.endswith(LINES) for path in plain) and _holds_lines(paths[0]):
        return "jsonl"
    return None


def _holds_lines(path: str) -> bool:
    """Whether a JSON file has an object in each line."""
    with open_file(path) as content:
        try:
            return isinstance(json.loads(content.readline()), dict)
        except ValueError:
            return False


def _described(path: str) -> File:
    if "://" not in path:
        status = Path(path).stat()
        return File(path, status.st_size, str(status.st_mtime_ns))
    system, name = file_system(path)
    info = retried(f"{path} does not answer", lambda: system.info(name))
    return File(path, int(info.get("size") or 0), version_of(info))
