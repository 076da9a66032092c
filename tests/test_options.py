"""Commands and settings, whatever is given to them."""

import io
import sys

import pytest

from smolds_dist import cli


def exit_code(*words: str) -> int:
    """Run a command in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*words])
    return ended.value.code or 0


def test_text_that_a_terminal_cannot_show_is_replaced(kept_run, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert exit_code("generate", str(kept_run[0]), "--prompt", "日本 oak", "--max-new-tokens", "2") == 0
    sys.stdout.flush()
    assert shown.getvalue().startswith(b"?? oak")


def test_options_that_are_not_utf8_are_named(capsys):
    assert exit_code("generate", "runs/none", "--prompt", b"\xc3\xa9".decode("ascii", "surrogateescape")) == 2
    assert "the option '\\udcc3\\udca9' is not UTF-8 text; set LC_ALL=C.UTF-8" in capsys.readouterr().err
