"""Markdown helpers that keep arbitrary text literal."""

import re


def table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def fenced(text: str, language: str = "") -> str:
    """Return a code block whose fence is longer than any in the text."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def inline(text: str) -> str:
    """Return a code span of the text on one line."""
    fence, space = _fence(text, 1), " " * ("`" in text)
    return fence + space + re.sub(r"\s*[\r\n]\s*", " ", text) + space + fence


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
