"""Files that are replaced as a whole: who reads one sees the old or the new, never half of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once all has gone well."""
    part = path.with_name(f"{path.name}.part")
    yield part
    part.replace(path)


def replace_text(path: Path, text: str) -> None:
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")
