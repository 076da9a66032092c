"""`smolds doctor --hostfile` on hosts that are network namespaces of this machine."""

import importlib.metadata
import re
import sys
import time
from pathlib import Path

import cluster
import pytest
from ranks import ROOT, run

from smolds_dist.launching import doctor_host_probe
from smolds_dist.launching.doctor_hosts import START_SECONDS


def check(hosts, folder, *options):
    """Run the doctor on the first host; return the result."""
    command = [sys.executable, "-m", "smolds_dist", "doctor", "--hostfile", str(hosts.folder / "hostfile"), *options]
    return run(hosts.command(0, command), timeout=60, cwd=folder, cold=True, **hosts.environment)


def read(report):
    """Return the hosts' cells, their clocks, and the findings as (level, host, text)."""
    lines = report.stdout.splitlines()
    columns = re.split("  +", lines[0])
    table, rest = lines[1 : lines.index("")], lines[lines.index("") + 1 :]
    rows = [dict(zip(columns, re.split("  +", line), strict=False)) for line in table]
    clocks = {row["host"]: float(row.pop("clock").split()[0]) for row in rows if "clock" in row}
    found = [re.fullmatch(r"(ok|warn|fail) +(\S+)  +(.*)", line) for line in rest]
    return {row["host"]: row for row in rows}, clocks, [match.groups() for match in found if match]


@cluster.needs_hosts
def test_two_hosts_agree_and_a_third_is_down(tmp_path):
    with cluster.cluster(tmp_path / "hosts") as hosts:
        with hosts.hostfile().open("a") as file:
            file.write("10.77.0.9 slots=1\n")
        report = check(hosts, tmp_path, "--device=cpu")
        deadline = time.monotonic() + 20
        while hosts.call(1, "sh", "-c", "pgrep -fc '[d]octor_' || true").strip() != "0":
            assert time.monotonic() < deadline, "a probe still runs"
    assert report.returncode == 1, report.text
    rows, clocks, findings = read(report)
    assert clocks == pytest.approx({"host1": 0, "host2": 0}, abs=1)
    assert [row.pop("host") for row in rows.values()] == ["host1", "host2", "10.77.0.9"]
    assert rows["host1"]["ssh"] == "ok" and rows["host1"]["shared"] == "yes" and rows["host1"]["torch"][0].isdigit()
    assert rows["host1"] == rows["host2"] and "*" not in str(rows), report.text
    assert rows["10.77.0.9"] == {"ssh": "ssh: connect to host 10.77.0.9 port 22: No route to host"}
    assert [finding[:2] for finding in findings] == [("fail", "10.77.0.9")], report.text
    assert not list(tmp_path.glob(".doctor-*")) and not (tmp_path / "runs").exists()


def change_probe(hosts, host, old, new):
    """Let a host have another source of the probe."""
    path = Path(doctor_host_probe.__file__)
    (hosts.folder / "probe.py").write_text(path.read_text().replace(old, new))
    hosts.mount(host, hosts.folder / "probe.py", path)


@pytest.mark.long
@cluster.needs_hosts
def test_every_fault_of_a_host_is_named(tmp_path):
    (metadata,) = (file for file in importlib.metadata.files("deepspeed") if file.name == "METADATA")
    text = metadata.read_text()
    version = importlib.metadata.version("deepspeed")
    with cluster.cluster(tmp_path / "hosts", 3, faults=True) as hosts:
        hosts.hostfile(slots=4)
        hosts.memory(2, 2 << 30)
        hosts.clock(2, -600)
        (tmp_path / "METADATA").write_text(text.replace(f"\nVersion: {version}\n", "\nVersion: 0.19.1\n"))
        (tmp_path / "work" / "runs").mkdir(parents=True)
        hosts.mount(2, tmp_path / "METADATA", metadata.locate())
        hosts.hide(2, tmp_path / "work" / "runs")
        hosts.firewall(2, [22])
        change_probe(hosts, 2, "LIFETIME = 120", "LIFETIME = 121")
        report = check(hosts, tmp_path / "work", "--device=cpu", "--master-port=7777")
    assert report.returncode == 1, report.text
    rows, clocks, findings = read(report)
    assert rows["host3"]["deepspeed"] == "0.19.1*" and rows["host3"]["shared"] == "no*"
    assert rows["host3"]["source"].endswith("*") and clocks == pytest.approx(
        {"host1": 0, "host2": 0, "host3": -600}, abs=2
    )
    assert rows["host3"]["memory"] == "2.1 GB"
    assert rows["host1"] == rows["host2"] | {"host": "host1"}
    expected = [
        ("warn", "host1", "slots=4 exceeds its"),
        ("warn", "host2", "slots=4 exceeds its"),
        ("fail", "host3", f"deepspeed is 0.19.1, but {version} on host1; install the same version"),
        ("fail", "host3", "source of smolds is "),
        ("warn", "host3", "slots=4 exceeds its"),
        ("warn", "host3", "its clock is "),
        ("fail", "host3", "cannot use the folder for runs"),
        ("fail", "host3", "10.77.0.3 port 7777 did not answer host1, host2: timed out; open it"),
        ("fail", "host3", "10.77.0.3 port "),
    ]
    assert len(findings) == len(expected), report.text
    for (level, host, text), (want_level, want_host, start) in zip(findings, expected, strict=True):
        assert (level, host) == (want_level, want_host) and text.startswith(start), report.text


@pytest.mark.long
@cluster.needs_hosts
@pytest.mark.parametrize("fault", ["link down", "hangs", "no smolds", "no torch", "port in use"])
def test_a_host_that_cannot_answer_costs_its_limit_once(fault, tmp_path):
    with cluster.cluster(tmp_path / "hosts", 3) as hosts:
        hosts.hostfile()
        broken = 0 if fault == "port in use" else 2
        if fault == "link down":
            hosts.link(2, up=False)
        elif fault == "hangs":
            change_probe(hosts, 2, "    ports = ", "    time.sleep(999)\n    ports = ")
        elif fault == "no smolds":
            hosts.hide(2, ROOT / "smolds_dist")
        elif fault == "no torch":
            hosts.hide(2, Path(importlib.metadata.distribution("torch").locate_file("torch")))
        else:
            listen = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(999)"
            hosts.call(0, "sh", "-c", f'{sys.executable} -c "{listen}" >/dev/null 2>&1 &')
        began = time.monotonic()
        report = check(hosts, tmp_path, "--device=cpu", "--master-port=29500")
        taken = time.monotonic() - began
    assert report.returncode == 1, report.text
    rows, _, findings = read(report)
    findings = [finding for finding in findings if "source of smolds" not in finding[2]]  # the source that hangs
    assert [finding[:2] for finding in findings if finding[0] == "fail"] == [("fail", f"host{broken + 1}")]
    expected = {
        "link down": "ssh: connect to host host3 port 22: ",
        "hangs": "no answer to `listen` within 15 s; check this host",
        "no smolds": "No module named",
        "no torch": "torch import: ",
        "port in use": "port 29500: Address already in use; end the program",
    }
    assert expected[fault] in findings[0][2], report.text
    assert rows["host2"]["shared"] == "yes"
    assert taken < 2 * START_SECONDS, report.text
