"""Reading of JSON and YAML that may be damaged or untrusted: bounded in size and depth, typed, one error.

A FIFO, device or folder is rejected without waiting for it. Nothing read here is code: YAML is plain data.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

from smolds_dist.errors import ConfigError

T = TypeVar("T")
JSON_BYTES, YAML_BYTES, ROWS_BYTES = 64 << 20, 4 << 20, 4 << 30
DEPTH = 64
NODES = 100_000  # in a YAML file with expanded aliases; more take over a second
_NUMBER = re.compile(r"[-+0-9a-fA-Fx_:.]{300,}")  # 1:00:00:... takes quadratic time

Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=10**12)]
Time = Annotated[float, msgspec.Meta(ge=0, le=2e11)]  # seconds since 1970, within the range of dates


def printable(text: str) -> str:
    """Return untrusted text as one line for a terminal, with control characters escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_bytes(path: Path, fix: str, most: int) -> bytes:
    """Read a regular file.

    Args:
        fix: what the user should do if the file is invalid.
        most: largest size in bytes.

    Raises:
        ConfigError: for a file that is missing, unreadable, too large or not a regular one.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _wrong(path, f"cannot be read ({getattr(error, 'strerror', error)})", fix) from None
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        os.close(file)
        regular = f"has {found.st_size:,} bytes, more than {most:,}"
        raise _wrong(path, regular if stat.S_ISREG(found.st_mode) else "is not a regular file", fix)
    try:
        with open(file, "rb") as opened:
            content = opened.read(most + 1)
    except OSError as error:
        raise _wrong(path, f"cannot be read ({error.strerror})", fix) from None
    if len(content) > most:  # it grew, or is in /proc
        raise _wrong(path, f"has more than {most:,} bytes", fix)
    return content


def read_text(path: Path, fix: str, most: int = YAML_BYTES) -> str:
    """Read a regular UTF-8 file; raises a `ConfigError` as `read_bytes`."""
    try:
        return read_bytes(path, fix, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(path, f"is not UTF-8 text (byte {error.start:,})", fix) from None


def read_json(path: Path, fix: str, kind: type[T], most: int = JSON_BYTES) -> T:
    """Read a JSON file as a type that `convert` accepts; raises a `ConfigError` that names file, field and fix."""
    return parse_json(read_bytes(path, fix, most), path, fix, kind)


def check_tokenizer_files(folder: Path, fix: str) -> None:
    """Raise a `ConfigError` if a tokenizer's file in the folder is not a JSON object."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            read_json(folder / name, fix, dict[str, Any])


def parse_json(content: bytes, path: Path, fix: str, kind: type[T]) -> T:
    """Parse JSON that was read from `path`; as `read_json`."""
    try:
        values = json.loads(content)
        too_deep = _is_deep(values)
        if not too_deep and re.search(rb"\\u[dD]", content):  # an unpaired surrogate cannot be encoded
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        too_deep = True
    except ValueError as error:  # also for invalid UTF-8 and for numbers with thousands of digits
        raise _wrong(path, f"is not valid JSON ({str(error).partition(';')[0]})", fix) from None
    if too_deep:
        raise _wrong(path, f"is nested more than {DEPTH} deep", fix)
    return convert(values, kind, path, fix)


def read_yaml(path: Path, fix: str, kind: type[T]) -> T:
    """Read a YAML file as a type that `convert` accepts; raises a `ConfigError` that names file, field and fix."""
    text = read_text(path, fix)
    try:
        _check_size(text)
        values = yaml.load(text, yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        where = f"line {mark.line + 1}: " if (mark := getattr(error, "problem_mark", None)) else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0].partition(";")[0]
        raise _wrong(path, f"is not valid YAML ({where}{reason})", fix) from None
    return convert(values, kind, path, fix)


def convert(values: Any, kind: type[T], path: Path, fix: str, strict: bool = True) -> T:
    """Convert plain values to a dataclass, ignoring unknown fields, or to any type that msgspec checks.

    Args:
        strict: reject a number that is written as text, such as YAML's 1e12.
    """
    try:
        return msgspec.convert(values, kind, strict=strict)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        reason, _, where = str(error).partition(" - at `")
        field = where.rstrip("`").removeprefix("$").lstrip(".")
        reason = f"{field}: {reason[:1].lower()}{reason[1:]}" if field else f"{reason[:1].lower()}{reason[1:]}"
        raise _wrong(path, f"is invalid ({reason})", fix) from None


def _wrong(path: Path, problem: str, fix: str) -> ConfigError:
    return ConfigError(printable(f"{path} {problem}; {fix}."))


def _is_deep(values: Any) -> bool:
    """Return True if lists and objects are nested more than `DEPTH` deep; works level by level."""
    level = [values]
    for _ in range(DEPTH + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return False
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return True


def _check_size(text: str) -> None:
    """Raise a `ValueError` for YAML that is too deep or, with expanded aliases, too large, without building it."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []
    nodes = 0
    for event in yaml.parse(text, yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} is inside its own anchor, or before it")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
            if _NUMBER.fullmatch(event.value):
                raise ValueError(f"a number of {len(event.value):,} digits")
        if len(opened) > DEPTH or nodes > NODES:
            limit = f"nested more than {DEPTH} deep" if len(opened) > DEPTH else f"more than {NODES:,} values"
            raise ValueError(limit)
