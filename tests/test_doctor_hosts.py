"""`smolds doctor --hostfile` on hosts that are network namespaces of this machine."""

import re
import sys

import pytest
import two_hosts
from ranks import run

from smolds_dist.launching.doctor_hosts import rounds

needs_hosts = pytest.mark.skipif(bool(two_hosts.available()), reason=str(two_hosts.available()))


def check(hosts, folder, lines, *options, cwd=None):
    """Run the doctor on the first host; return the result, and the lines of its report by their first word."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{line}\n" for line in lines))
    command = [sys.executable, "-m", "smolds_dist", "doctor", "--hostfile", str(hostfile), *options]
    return run(hosts.command(0, command), timeout=60, cwd=cwd or folder, cold=True, **hosts.environment)


@needs_hosts
def test_two_hosts_agree_and_a_third_is_down(tmp_path):
    with two_hosts.two_hosts(tmp_path / "hosts") as hosts:
        report = check(hosts, tmp_path, ["host1 slots=1", "host2 slots=1", "10.77.0.9 slots=1"], "--device=cpu")
    assert report.returncode == 1, report.text
    head, first, second, third, blank, *rest = report.stdout.splitlines()
    columns = re.split("  +", head)
    cells = [dict(zip(columns, re.split("  +", line), strict=True)) for line in (first, second)]
    assert [cell.pop("host") for cell in cells] == ["host1", "host2"]
    assert cells[0]["ssh"] == "ok" and cells[0]["shared"] == "yes" and cells[0]["torch"][0].isdigit()
    assert cells[0] == cells[1] and "*" not in str(cells), report.text
    assert third.split(maxsplit=1)[0] == "10.77.0.9" and "ssh: connect to host" in third and not blank
    links = [re.fullmatch(r"(\S+)  (\S+)  ([\d.]+) [GM]B/s +([\d.]+) ms", line) for line in rest[1:3]]
    assert [link.group(1, 2) for link in links] == [("host1", "host2"), ("host2", "host1")]
    assert all(float(link[3]) > 0 and 0 < float(link[4]) < 1000 for link in links)
    assert [line.split()[:2] for line in rest[4:]] == [["fail", "10.77.0.9"]]
    assert not list(tmp_path.glob(".doctor-*")) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("count", range(1, 10))
def test_rounds_pair_every_two_hosts_once(count):
    found = list(rounds(list("abcdefghi"[:count])))
    assert all(len({host for pair in pairs for host in pair}) == 2 * len(pairs) for pairs in found)
    every = [frozenset(pair) for pairs in found for pair in pairs]
    assert len(every) == len(set(every)) == count * (count - 1) // 2
    assert len(found) <= count
