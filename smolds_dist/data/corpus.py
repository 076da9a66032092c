"""Documents of a source, in a fixed order: `stdlib`, `text:GLOB`, `jsonl:GLOB`, `parquet:GLOB` or `hf:NAME[:CONFIG]`."""

import glob
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from smolds_dist.config import Data
from smolds_dist.errors import ConfigError


def documents(data: Data) -> Iterator[str]:
    """The texts of `data.source`, files in the order of their names.

    Raises:
        ConfigError: where the source has nothing to read, or a record lacks `data.text_field`.
    """
    kind, _, rest = data.source.partition(":")
    if kind == "hf":
        yield from _hub_documents(rest, data)
        return
    readers = {"stdlib": _read_text, "text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    for path in _files(data.source):
        yield from readers[kind](path, data.text_field)


def fingerprint(data: Data) -> dict:
    """What the documents depend on, without reading them: it changes when a file is added, removed or edited."""
    described = {"source": data.source, "text_field": data.text_field, "split": data.split}
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


def _read_text(path: str, _field: str) -> Iterator[str]:
    yield Path(path).read_text(encoding="utf-8", errors="replace")


def _read_jsonl(path: str, field: str) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                # JSON can spell half a surrogate pair, which no tokenizer takes.
                yield str(json.loads(line)[field]).encode(errors="replace").decode()
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ConfigError(
                    f"{path}, line {number} is no JSON object with the field {field!r}; mend it or set --data.text_field."
                ) from None


def _read_parquet(path: str, field: str) -> Iterator[str]:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise ConfigError(
            f"{path} has no column {field!r}; set --data.text_field to one of {', '.join(file.schema_arrow.names)}."
        )
    for batch in file.iter_batches(columns=[field]):
        yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)


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
