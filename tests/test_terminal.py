"""Terminal output of a training run: in a file, in a terminal, quiet and verbose."""

import fcntl
import os
import re
import struct
import subprocess
import termios

import pytest
import warm
from ranks import smolds

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.training.trainer import train

STEP = re.compile(
    r"step (\d+) of 6: loss \d\.\d{3}, [\d,]+ tokens/s, MaxVio \d\.\d\d(, \d:\d\d:\d\d left)?$", re.MULTILINE
)


def test_output_in_a_file_is_plain_lines_of_rank_0_alone(small_run):
    finished = smolds(
        "launch", "--nproc-per-node=2", "--", *small_run, "--run.name=file", "--log.every=0", "--parallel.device=cpu"
    )
    assert finished.returncode == 0, finished.text
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", finished.stdout + finished.stderr), finished.text
    assert [match[1] for match in STEP.finditer(finished.stderr)] == list("123456"), finished.text
    assert len(finished.stderr.splitlines()) == 6, finished.text
    for text in (
        "validation loss:",
        "speed:",
        "time of a step:",
        "memory:",
        "experts:",
        "share of routed tokens per expert",
    ):
        assert finished.stdout.count(text) == 1, finished.text


@pytest.mark.parametrize("start", [["train"], ["launch", "--nproc-per-node=2", "--"]])
def test_run_continues_when_the_reader_of_its_output_has_gone(small_run, tmp_path, start):
    """As with `smolds train ... 2>&1 | head -1`."""
    command = [warm.python(), "-m", "smolds_dist", *start, *small_run, "--run.name=one", "--log.every=0"]
    reading, writing = os.pipe()
    process = subprocess.Popen(command, stdout=writing, stderr=writing, env=warm.environment())
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    assert process.wait(120) == 0
    assert (tmp_path / "runs" / "one" / "checkpoints" / "step_00000006").is_dir()
    assert (tmp_path / "runs" / "one" / "export" / "config.json").exists()


def test_lines_come_as_often_as_asked(small_run, capsys):
    train(load_config([*small_run, "--run.name=seldom", "--log.every=1000"]))
    shown = capsys.readouterr().err
    assert [match[1] for match in STEP.finditer(shown)] == ["6"], shown


def test_terminal_gets_a_bar_that_is_redrawn(small_run):
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [warm.python(), "-m", "smolds_dist", "train", *small_run, "--run.name=terminal"]
    process = subprocess.Popen(command, stdout=writing, stderr=writing, env=warm.environment())
    os.close(writing)
    shown = b""
    while True:
        try:
            data = os.read(reading, 4096)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        shown += data
    assert process.wait(timeout=60) == 0, shown
    assert b"6/6" in shown and b"\r" in shown and b"step 6: validation loss" in shown
    assert not STEP.search(shown.decode())


def test_quiet_run_prints_nothing(small_run):
    finished = smolds("train", *small_run, "--run.name=quiet", "-q")
    assert finished.returncode == 0, finished.text
    assert finished.stdout == finished.stderr == ""


def test_verbose_run_shows_its_configuration_and_every_step(small_run, capsys):
    train(load_config([*small_run, "--run.name=verbose", "-v"]))
    shown = capsys.readouterr()
    assert "num_experts: 8" in shown.out
    lines = [line for line in shown.err.splitlines() if "gradient norm" in line and "MFU" in line]
    assert len(lines) == 6, shown.err


@pytest.mark.parametrize("steps", ["10", "5:3", "0:2", "3:7", "a:b"])
def test_profile_of_impossible_steps_raises_error(small_run, steps):
    with pytest.raises(ConfigError, match="FIRST:LAST"):
        load_config([*small_run, f"--profile.steps={steps}"])
