"""Commands and settings with arbitrary values."""

import contextlib
import copy
import functools
import io
import math
import re
import sys
from dataclasses import fields
from typing import Any, get_args

import pytest
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st

from smolds_dist import cli
from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.rules import MAY_BE_EMPTY, RANGES, validate
from smolds_dist.settings import RunConfig, Source, Stage, Yarn


def exit_code(*words: str) -> int:
    """Run a command in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*words])
    return ended.value.code or 0


def test_text_that_a_terminal_cannot_encode_is_replaced(kept_run, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert exit_code("generate", str(kept_run[0]), "--prompt", "日本 oak", "--max-new-tokens", "2") == 0
    sys.stdout.flush()
    assert shown.getvalue().startswith(b"?? oak")


def test_options_that_are_not_utf8_are_errors(capsys):
    assert exit_code("generate", "runs/none", "--prompt", b"\xc3\xa9".decode("ascii", "surrogateescape")) == 2
    assert "the option '\\udcc3\\udca9' is not UTF-8 text; set LC_ALL=C.UTF-8" in capsys.readouterr().err


FINE = (-1, 0, 1, 2**63, "x", "/", "/nowhere/x", "[", "9" * 400)  # for some settings
NUMBERS = [-1, 0, 1, math.nan, math.inf, 1e300, 2**63, 10**400]
TEXTS = ["", " ", "x", "a\0b", "\ud800", "a" * 300, "/", "/nowhere/x", "[", "9" * 400]
PARTS = {"yarn": Yarn, "source": Source, "stage": Stage} | {
    part.name: part.default_factory for part in fields(RunConfig)
}
SETTINGS = [(kind, one.name, {one.type, *get_args(one.type)}) for kind, part in PARTS.items() for one in fields(part)]


def test_every_number_has_a_range():
    numbers = {f"{kind}.{name}" for kind, name, types in SETTINGS if {int, float} & types}
    assert numbers == {*RANGES, "parallel.zero", "stage.until", "stage.lr_until"}


def own_part(config: RunConfig, kind: str) -> Any:
    return {"yarn": Yarn(2.0, 64), "source": Source("stdlib"), "stage": Stage()}.get(kind) or getattr(config, kind)


def test_odd_values_of_settings_are_accepted_or_errors():
    base = load_config(["--preset=debug"])
    for kind, name, types in SETTINGS:
        for value in [
            *(NUMBERS if {int, float} & types else ()),
            *(TEXTS if str in types and f"{kind}.{name}" not in MAY_BE_EMPTY else ()),
        ]:
            config = copy.deepcopy(base)
            part = own_part(config, kind)
            config.data.sources = {"stdlib": part} if kind == "source" else None
            config.train.stages = [part] if kind == "stage" else None
            config.model.rope_scaling = part if kind == "yarn" else None
            setattr(part, name, value)
            with (
                contextlib.suppress(ConfigError) if value in FINE else pytest.raises(ConfigError, match=f"{name}.*[.]$")
            ):
                validate(config)


@functools.cache
def debug_preset() -> RunConfig:
    return load_config(["--preset=debug"])


ANY = {int: st.integers(), float: st.floats(), str: st.text(), bool: st.booleans()}


@cases()
@given(data=st.data())
def test_any_value_of_a_setting_is_accepted_or_an_error(data):
    config = copy.deepcopy(debug_preset())
    for _ in range(2):
        kind, name, types = data.draw(st.sampled_from([one for one in SETTINGS if ANY.keys() & one[2]]))
        part = own_part(config, kind)
        config.train.stages = [part] if kind == "stage" else config.train.stages
        config.data.sources = {"stdlib": part} if kind == "source" else config.data.sources
        config.model.rope_scaling = part if kind == "yarn" else config.model.rope_scaling
        setattr(part, name, data.draw(st.one_of(*(ANY[one] for one in ANY if one in types))))
    told = "."
    try:
        validate(config)
    except ConfigError as error:
        told = str(error)
    assert told.endswith(".") and "\n" not in told


@pytest.mark.parametrize("option", ["--train.steps", "--train.lr", "--data.workers", "--model.rope_scaling"])
@pytest.mark.parametrize("value", ["", "x", "1" + "0" * 5000, "[", "{a: 1}", "nan"])
def test_odd_values_on_the_command_line_are_errors(option, value):
    with pytest.raises(ConfigError, match=f"{option}(?s:.*)[.]$"):
        load_config(["--preset=debug", f"{option}={value}"])


WORDS = ["", "x", "-1", "0", "nan", "1e300", str(2**63), "1" + "0" * 400, "/", "/nowhere/x", "a" * 300, "a\0b"]
NONE = ["--", "--preset=none"]  # an error that ends a command whose own options are valid
COMMANDS = {
    "launch": NONE, "slurm": ["--time=5", *NONE], "plan": NONE, "bench train": ["--model.none=1"], "doctor": ["--none"],
    **{f"checkpoint {name}": ["nowhere"] for name in ("ls", "verify", "rm")},
    "ladder plan": ["--to=a", *NONE], "ladder run": ["nowhere"], "ladder slurm": ["nowhere", "--time=5"],
    "checkpoint convert": ["nowhere", "--to=a"], "data show": ["nowhere", "--step=1"],
    **{f"data {name}": NONE for name in ("prepare", "stats", "order")},
    "runs": ["nowhere"], "runs diff": ["nowhere", "none"], "report": ["nowhere"], "board": ["nowhere"],
    "export": ["nowhere", "--to=a"], "import": ["nowhere", "--to=a"], "generate": ["nowhere"], "eval": ["nowhere"],
    "experts": ["nowhere"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_values_of_a_commands_options_are_errors(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exit_code(*command.split(), "--help")
    options = sorted(set(re.findall(r"(?<![\\w-])--[a-z][a-z-]*(?= |,|$)", capsys.readouterr().out)) - {"--help"})
    for option in options:
        for value in WORDS:
            if option == "--calibrate" and value not in ("/", "/nowhere/x"):
                continue  # would measure this machine
            words = [*command.split(), f"{option}={value}", *COMMANDS[command]]
            assert exit_code(*words) == 2, words
            error = capsys.readouterr().err
            assert error.startswith("smolds: ") and error.endswith((".\n", "?\n")), (words, error)
    assert not [*tmp_path.iterdir()]


def test_output_paths_are_checked_before_the_work(kept_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "none" / "a.json", tmp_path / "file" / "a.json"):
        assert exit_code("eval", str(kept_run[0]), f"--json={path}") == 2
        assert "cannot be written" in capsys.readouterr().err
    assert exit_code("report", str(kept_run[0]), f"--to={tmp_path / 'file'}") == 2
    for command, option in {"generate": "--seed", "board": "--port", "eval": "--limit", "export": "--step"}.items():
        words = [command, str(kept_run[0]), f"{option}={10**20}", *(["--to=a"] if command == "export" else [])]
        assert exit_code(*words) == 2
        assert f"{option} {10**20} is out of range; it must be at most" in capsys.readouterr().err
    assert exit_code("slurm", "--time=1:99:99", "--", "--preset=debug") == 2
    assert "is not a time limit" in capsys.readouterr().err
