"""Files of rows of which a line is damaged."""

import json

import pytest

from smolds_dist.observe.rows import truncate_rows
from smolds_dist.rows import read_rows

ROWS = [{"step": step, "loss": 4.0 - step, "text": "é \u2028"} for step in range(6)]
DAMAGE = [
    lambda line: line[: len(line) // 2],
    lambda line: line.replace(b'"loss"', b"\xff\x00"),
    lambda line: b"null",
    lambda line: b"[1, 2]",
    lambda line: b"{}",
    lambda line: b'{"step": "3"}',
    lambda line: b"[" * 100_000,
]


@pytest.mark.parametrize("place", range(len(ROWS)))
@pytest.mark.parametrize("damage", DAMAGE)
def test_only_a_damaged_line_is_lost(tmp_path, capsys, place, damage):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[place] = damage(lines[place])
    path.write_bytes(b"\n".join(lines) + b"\n")
    rest = ROWS[:place] + ROWS[place + 1 :]
    assert truncate_rows(path, 5) == rest
    assert f"line {place + 1} of {path} is damaged; it is skipped." in capsys.readouterr().err
    assert read_rows(path) == rest and not capsys.readouterr().err


def test_an_unfinished_last_line_is_dropped_silently(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 6, "lo')
    assert read_rows(path) == ROWS
    assert not capsys.readouterr().err
