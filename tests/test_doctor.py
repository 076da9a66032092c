"""`smolds doctor`: the report of a working machine, and secrets that must never be printed."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import smolds

from smolds_dist.bench.calibrate import memory_bandwidth
from smolds_dist.launching.doctor_checks import check_folder, check_hub
from smolds_dist.launching.doctor_probes import ANSWER, Probe, link_speed

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc shows the processes")


def levels(output: str) -> dict[str, str]:
    """Return the level of each line by its check's name; the last one of equal names."""
    rows = [re.match(r"(ok|warn|fail)\s+(.+?)  +(\S.*)", line) for line in output.splitlines()]
    assert all(rows), output
    return {row[2]: row[1] for row in rows}


def test_report_has_every_check_and_no_secret(tmp_path):
    secrets = {
        "HF_TOKEN": "hf_tokenof40letters",
        "HF_ENDPOINT": "http://alice:pa55word@127.0.0.1:9x",  # not a port, so a message may contain the address
        "https_proxy": "http://bobby:hunter22@127.0.0.1:9",
        "HTTPS_PROXY": "http://token-of-proxy@127.0.0.1:9",
    }
    options = ["--device=cpu", f"--dir={tmp_path / 'runs'}"]
    began = time.perf_counter()
    report = smolds("doctor", *options, cold=True, HF_HUB_OFFLINE="0", RANK="0", **secrets)
    taken = time.perf_counter() - began
    assert report.returncode == 0, report.text
    found = levels(report.stdout)
    assert found["hub"] == found["ranks"] == "warn"
    assert "HF_TOKEN set" in report.stdout
    for secret in ("hf_tokenof40letters", "alice", "pa55word", "bobby", "hunter22", "token-of-proxy"):
        assert secret not in report.stdout + report.stderr
    for name in ("python", "cpu", "memory", "torch", "deepspeed", "deepspeed import", "torchrun", "mpirun", "runs"):
        assert name in found
    assert not (tmp_path / "runs").exists()
    speed = re.search(r"ok +all-to-all .* over gloo: (\d+) us median latency, ([\d.]+) GB/s", report.stdout)
    assert speed, report.text
    latency, bandwidth = int(speed[1]) / 1e6, float(speed[2]) * 1e9
    # Half of the 300 exchanges took at least the latency, and 3 of the 5 large ones their time; no link inside a machine is
    # faster than its memory.
    assert 0 < 150 * latency + 3 * 2**24 / bandwidth < taken
    assert bandwidth < 2 * memory_bandwidth(torch.device("cpu"))


def test_hub_is_not_contacted_in_offline_mode():
    (finding,) = check_hub(None)
    assert finding.level == "ok" and "offline mode is set" in finding.detail


def test_bandwidth_counts_bytes_sent_to_other_ranks():
    found = link_speed([1e-3, 5e-5, 4e-5], [9.0, 0.5, 0.25], 8_000_000, world=4)
    assert found == {"latency": 5e-5, "bandwidth": 12e6}


def test_answers_of_two_ranks_may_share_a_line():
    """mpirun forwards partial lines of each rank; seen in one of six starts on a busy machine."""
    answer = ANSWER + '{"size": 2}'
    with Probe([sys.executable, "-c", f"print({answer!r} + {answer!r} + 2 * chr(10) + 'a warning')"], 20) as probe:
        assert probe.answer() == ({"size": 2}, "")


def test_read_only_folder_fails(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = check_folder("runs", tmp_path / "file" / "runs")
    assert finding.level == "fail" and "cannot be written" in finding.detail
    (finding,) = check_folder("runs", tmp_path / "new" / "runs")
    assert "GB free" in finding.detail
    assert not (tmp_path / "new").exists()


@needs_proc
def test_hung_probe_is_killed_with_its_children():
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
