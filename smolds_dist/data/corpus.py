"""Documents of a source, in a fixed order: `stdlib`, `text:GLOB`, `jsonl:GLOB`, `parquet:GLOB` or `hf:NAME[:CONFIG]`."""

import glob
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from smolds_dist.config import Data
from smolds_dist.errors import ConfigError


class _BadFileError(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its path."""


def documents(data: Data, say: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """The texts of `data.source`, files in the order of their names.

    Args:
        say: told of each file that is empty or damaged, where `data.on_bad_file` is skip.

    Raises:
        ConfigError: where the source has nothing to read, a file is empty or damaged and not to be skipped, or a record
            lacks `data.text_field`.
    """
    kind, _, rest = data.source.partition(":")
    if kind == "hf":
        yield from _hub_documents(rest, data)
        return
    readers = {"stdlib": _read_source, "text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    for path in _files(data.source):
        try:
            yield from readers[kind](path, data)
        except (_BadFileError, OSError) as error:
            why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
            if data.on_bad_file == "refuse":
                raise ConfigError(f"{path} {why}; mend or remove it, or use --data.on_bad_file skip.") from None
            say(f"{path} {why}; left out.")


def fingerprint(data: Data) -> dict:
    """What the documents depend on, without reading them: it changes when a file is added, removed or edited."""
    described = {"source": data.source, "text_field": data.text_field, "split": data.split}
    if data.on_bad_file == "skip":
        described["on_bad_file"] = "skip"
    if data.source.startswith("hf:"):
        return described
    files = _files(data.source)
    if data.source == "stdlib":
        # Several machines with the same Python share these shards: installation times don't count.
        return {"source": "stdlib", "python": sys.version, "sizes": [os.path.getsize(f) for f in files]}
    return described | {"files": [(os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]}


def _files(source: str) -> list[str]:
    kind, _, pattern = source.partition(":")
    if kind == "stdlib":
        return _stdlib_files()
    files = sorted(f for f in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(f))
    if not files:
        raise ConfigError(
            f"--data.source {source!r} matches no file; check the pattern and the folder it is read from."
        )
    return files


def _stdlib_files() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (f for f in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.relative_to(root).parts))
    return [str(f) for f in sorted(files)]


def _read_source(path: str, _data: Data) -> Iterator[str]:
    # Python's own tests hold files that are empty or in no encoding, on purpose.
    yield Path(path).read_text(encoding="utf-8", errors="replace")


def _read_text(path: str, _data: Data) -> Iterator[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _BadFileError(f"is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise _BadFileError("is empty")
    yield text


def _read_jsonl(path: str, data: Data) -> Iterator[str]:
    bad, rows = [], 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                # JSON can spell half a surrogate pair, which no tokenizer takes.
                yield str(json.loads(line)[data.text_field]).encode(errors="replace").decode()
                rows += 1
            except (json.JSONDecodeError, KeyError, TypeError):
                bad.append(number)
                if data.on_bad_file == "refuse":
                    break
    if bad:
        others = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
        raise _BadFileError(
            f"has in line {bad[0]}{others} no JSON object with the field {data.text_field!r}, which --data.text_field names"
        )
    if not rows:
        raise _BadFileError("is empty")


def _read_parquet(path: str, data: Data) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    rows = 0
    try:
        file = parquet.ParquetFile(path)
        if data.text_field not in file.schema_arrow.names:
            raise ConfigError(
                f"{path} has no column {data.text_field!r}; set --data.text_field to one of "
                f"{', '.join(file.schema_arrow.names)}."
            )
        for batch in file.iter_batches(columns=[data.text_field]):
            texts = [str(text) for text in batch.column(0).to_pylist() if text is not None]
            rows += len(texts)
            yield from texts
    except (pyarrow.ArrowException, OSError) as error:
        raise _BadFileError(f"is damaged ({str(error).splitlines()[0].rstrip('.')})") from None
    if not rows:
        raise _BadFileError("is empty")


def _hub_documents(rest: str, data: Data) -> Iterator[str]:
    import datasets

    name, _, config_name = rest.partition(":")
    try:
        rows = iter(datasets.load_dataset(name, config_name or None, split=data.split, streaming=True))
        first = next(rows)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--data.source {data.source!r} could not be opened ({reason}); "
            "check the name, the network, and HF_TOKEN for a gated data set."
        ) from None
    if data.text_field not in first:
        raise ConfigError(
            f"{data.source!r} has no column {data.text_field!r}; set --data.text_field to one of {', '.join(first)}."
        )
    yield first[data.text_field]
    for row in rows:
        yield row[data.text_field]
