"""`smolds doctor`: the report of a sound machine, stale build locks, and what must never be printed."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import smolds

import smolds_dist.launching.doctor_checks as doctor_module
from smolds_dist.launching.doctor_checks import LOCK_AGE, check_folder, check_locks
from smolds_dist.launching.doctor_probes import ANSWER, Probe

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc shows the processes")


def levels(output: str) -> dict[str, str]:
    """Level of each line by the name of its check; the last where several have one name."""
    rows = [re.match(r"(ok|warn|fail)\s+(.+?)  +(\S.*)", line) for line in output.splitlines()]
    assert all(rows), output
    return {row[2]: row[1] for row in rows}


@pytest.fixture
def stale_lock(tmp_path):
    """A lock as a build leaves it that was killed an hour ago."""
    lock = tmp_path / "extensions" / "py311_cpu" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    return lock


def test_stale_lock_fails_until_it_is_fixed_and_no_secret_is_printed(stale_lock, tmp_path):
    secrets = {
        "HF_TOKEN": "hf_tokenof40letters",
        "HF_ENDPOINT": "http://alice:pa55word@127.0.0.1:9x",  # no port, so a message could repeat the address
        "https_proxy": "http://bobby:hunter22@127.0.0.1:9",
        "HTTPS_PROXY": "http://token-of-proxy@127.0.0.1:9",
    }
    place = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "RANK": "0"}
    options = ["--device=cpu", f"--dir={tmp_path / 'runs'}"]
    broken = smolds("doctor", *options, cold=True, HF_HUB_OFFLINE="0", **secrets, **place)
    assert broken.returncode == 1, broken.text
    assert [name for name, level in levels(broken.stdout).items() if level == "fail"] == ["build lock"]
    assert levels(broken.stdout)["hub"] == levels(broken.stdout)["ranks"] == "warn"
    assert str(stale_lock) in broken.stdout and "smolds doctor --fix" in broken.stdout
    assert "HF_TOKEN set" in broken.stdout
    for secret in ("hf_tokenof40letters", "alice", "pa55word", "bobby", "hunter22", "token-of-proxy"):
        assert secret not in broken.stdout + broken.stderr
    assert stale_lock.exists()

    fixed = smolds("doctor", "--fix", *options, cold=True, **place)
    assert fixed.returncode == 0, fixed.text
    assert f"removed {stale_lock}" in fixed.stdout
    assert not stale_lock.exists()
    speed = re.search(r"ok +all-to-all .* over gloo: (\d+) us median latency, ([\d.]+) GB/s", fixed.stdout)
    assert speed, fixed.text
    assert int(speed[1]) > 0 and float(speed[2]) > 0
    found = levels(fixed.stdout)
    for name in ("python", "cpu", "memory", "torch", "deepspeed", "deepspeed import", "torchrun", "mpirun", "hub"):
        assert name in found
    assert "offline by choice" in fixed.stdout
    assert not (tmp_path / "runs").exists()


def test_answers_of_two_ranks_may_share_a_line():
    """mpirun passes on what each rank has written so far, newline or not; seen in one of six starts on a busy machine."""
    answer = ANSWER + '{"size": 2}'
    with Probe([sys.executable, "-c", f"print({answer!r} + {answer!r} + 2 * chr(10) + 'a warning')"], 20) as probe:
        assert probe.answer() == ({"size": 2}, "")


@needs_proc
def test_lock_of_a_running_build_is_left_alone(stale_lock, tmp_path):
    """However old: the first extension of a large project compiles for longer than that."""
    hold = f"held = open({str(stale_lock)!r}); print('holds', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"holds\n"
        (finding,) = check_locks(tmp_path, fix=True)
        holder.communicate(b"\n")
    assert finding.level == "ok" and f"process {holder.pid}" in finding.detail
    assert stale_lock.exists()
    assert [finding.level for finding in check_locks(tmp_path)] == ["fail"]


def test_lock_without_a_holder_is_stale_at_once_or_on_a_shared_disk_after_a_while(stale_lock, tmp_path, monkeypatch):
    """Its build may run on another node, where its processes can't be seen."""
    written = stale_lock.with_name("kernel.o")
    written.touch()
    assert [finding.level for finding in check_locks(tmp_path)] == ["fail"]
    monkeypatch.setattr(doctor_module, "_may_be_held_unseen", lambda _lock: True)  # no shared disk to be had in a test
    assert [finding.level for finding in check_locks(tmp_path, fix=True)] == ["warn"]
    assert stale_lock.exists()
    os.utime(written, (time.time() - LOCK_AGE - 1,) * 2)
    assert [finding.level for finding in check_locks(tmp_path, fix=True)] == ["ok"]
    assert not stale_lock.exists()


def test_folder_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = check_folder("runs", tmp_path / "file" / "runs")
    assert finding.level == "fail" and "cannot be written" in finding.detail
    (finding,) = check_folder("runs", tmp_path / "new" / "runs")
    assert "GB free" in finding.detail
    assert not (tmp_path / "new").exists()


@needs_proc
def test_probe_that_hangs_ends_with_all_its_children():
    begin = time.monotonic()
    with Probe(["sh", "-c", "sleep 61.5 & echo $!; sleep 61.5"], 0.5) as probe:
        assert probe.answer() == (None, "no answer after 0.5 s")
        child = int(probe.result()[1])
    assert time.monotonic() - begin < 10
    for _ in range(50):  # until init has collected it
        try:
            if " Z " in Path(f"/proc/{child}/stat").read_text():
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} still runs")


@pytest.mark.parametrize("option", ["--device=tpu", "--repair"])
def test_unknown_option_ends_with_exit_code_2(option):
    result = smolds("doctor", option)
    assert result.returncode == 2, result.text
    assert option.removeprefix("--device=") in result.stderr
