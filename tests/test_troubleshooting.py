"""Messages quoted in docs/troubleshooting.md are those that the package prints."""

import ast
import re

import pytest
from ranks import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^\| (`.+?`) \|", PAGE.read_text(), re.MULTILINE)
# What varies in a quoted message: an ellipsis, a quoted name, a placeholder, a number.
VARYING = re.compile(r"\.\.\.|'\w+'|\bNAME\b|\d+")
HOLE = "\0"


def literals(source: str) -> set[str]:
    """Return the string literals of a module except docstrings, with a hole for each formatted value."""
    tree = ast.parse(source)
    ignored = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.add("".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in ignored:
            found.add(node.value)
    return found


def is_printed(message: str, messages: set[str]) -> bool:
    """Return True if one literal has all constant pieces of the quoted message, in their order."""
    pieces = [re.escape(piece.strip()) for piece in VARYING.split(message.strip("`")) if piece.strip()]
    return any(re.search(".*".join(pieces), literal, re.DOTALL) for literal in messages)


@pytest.fixture(scope="module")
def messages():
    return set().union(*(literals(path.read_text()) for path in (ROOT / "smolds_dist").rglob("*.py")))


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_message_is_printed(message, messages):
    assert is_printed(message, messages), f"no message of smolds_dist reads {message}; quote it as it is printed"


def test_every_row_but_one_quotes_a_message():
    rows = PAGE.read_text().split("|---|")[-1].count("\n| ")
    assert rows == len(QUOTED) + 1


def test_changed_message_is_noticed():
    source = 'def f(n):\n    """rank 0 hangs"""\n    print(f"rank {n} did not answer for {n:.0f} s: why")\n'
    assert is_printed("`... did not answer for 600 s: ...`", literals(source))
    assert not is_printed("`... did not reply for 600 s: ...`", literals(source))
    assert not is_printed("`rank 0 hangs`", literals(source))
