"""`smolds doctor --hostfile`: check all hosts in parallel and print what differs and what is closed.

Each host runs a probe (`doctor_host_probe`) over one ssh connection. A host that does not answer a request within its
limit is reported and asked nothing more, so it costs one limit.
"""

import contextlib
import json
import os
import queue
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smolds_dist.launching.doctor_checks import GB, Finding, nearest_folder
from smolds_dist.launching.doctor_probes import ANSWER, PROBE_LIMITS
from smolds_dist.launching.hosts import read_hostfile
from smolds_dist.launching.ssh import ssh_command

START_SECONDS, ANSWER_SECONDS = 30, 15  # limits of ssh with Python's start, and of a request
CLOCK_SECONDS = 1.0  # largest difference without a warning


class Host:
    """A host of the hostfile and the connection to its probe; `problem` says why it no longer answers."""

    def __init__(self, name: str, slots: int):
        self.name, self.slots, self.problem = name, slots, ""
        self.facts: dict[str, Any] = {}
        self.clock = 0.0  # seconds ahead of this host
        self.torch: dict[str, Any] = {"gpus": []}
        self.ports: dict[str, int] = {}
        self.token = self.busy = ""
        variables = [f"{n}={v}" for n, v in os.environ.items() if n.startswith("PYTHON")]
        probe = shlex.join(["env", *variables, sys.executable, "-m", "smolds_dist.launching.doctor_host_probe"])
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by __exit__
        self.process = subprocess.Popen(
            ssh_command(name, f"cd {shlex.quote(os.getcwd())}; exec {probe}"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, errors="replace",
        )  # fmt: skip
        self.lines: queue.Queue[tuple[float, str]] = queue.Queue()
        self.asked = time.time()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # a request that was never read
            self.process.stdin.close()  # type: ignore[union-attr]
        self.errors.close()

    def _read(self) -> None:
        """Pass the probe's answers on, each with its time; "" at the end. A shell's own output is dropped."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                self.lines.put((time.time(), line.removeprefix(ANSWER)))
        self.lines.put((time.time(), ""))

    def ask(self, *request: Any) -> None:
        assert self.process.stdin
        self.asked = time.time()
        with contextlib.suppress(OSError):  # it has ended; the answer says why
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def answer(self, what: str, limit: float) -> Any:
        """Return the answer, or None and set `problem`."""
        try:
            arrived, line = self.lines.get(timeout=max(0.0, self.asked + limit - time.time()))
        except queue.Empty:
            self.problem = f"no answer to `{what}` within {limit:g} s"
            self.process.kill()
            return None
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            printed = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            self.problem = printed[-1][:200] if printed else f"the connection ended with exit code {code}"
            return None
        if what == "clock":
            return json.loads(line) - (self.asked + arrived) / 2
        return json.loads(line)

    @property
    def devices(self) -> str:
        """Return the devices as "8 x NAME" or "cpu"."""
        names = [gpu["name"] for gpu in self.torch["gpus"]]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "cpu"


def ask(hosts: list[Host], what: str, request: Callable[[Host], list], limit: float = ANSWER_SECONDS) -> dict:
    """Send a request to all hosts that still answer; return the answers by host."""
    alive = [host for host in hosts if not host.problem]
    for host in alive:
        host.ask(what, *request(host))
    answers = {host: host.answer(what, limit) for host in alive}
    return {host: answer for host, answer in answers.items() if not host.problem}


def report_hosts(hostfile: Path, device: str, folder: Path, port: int | None) -> Iterator[str | Finding]:
    """Yield the table of hosts, and one finding per problem."""
    slots = read_hostfile(hostfile)
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(Host(*one)) for one in slots.items()]
        findings = [*_facts(hosts, device), *_shared_folder(hosts, folder)]
        closed = _connections(hosts, port)
    lost = [Finding("fail", host.name, host.problem, _advice(host)) for host in hosts if host.problem]
    yield from _table([HEADER, *(_row(host, hosts) for host in hosts)])
    yield ""
    findings = [*lost, *findings, *_port_findings(hosts, closed, port)]
    yield from findings or [Finding("ok", "hosts", f"{len(hosts)} hosts agree and reach each other")]


def _advice(host: Host) -> str:
    if host.facts or host.process.returncode < 0:  # killed at its limit
        return "check this host and its network, then run this again"
    if host.process.returncode == 255:
        return f"start the host, allow `ssh {host.name}` without a password, or remove it from the hostfile"
    return f"install smolds there as here, with the same path of Python ({sys.executable})"


# Facts


def _facts(hosts: list[Host], device: str) -> Iterator[Finding]:
    """Ask for facts; compare each host with the first that answers, and its slots with its devices."""
    for host, facts in ask(hosts, "facts", lambda _: [], START_SECONDS).items():
        host.facts = facts
    for host, ahead in ask(hosts, "clock", lambda _: []).items():
        host.clock = ahead
    for host, (found, error) in ask(hosts, "torch", lambda _: [], PROBE_LIMITS["torch"] + 5).items():
        host.torch = found or host.torch
        if error:
            yield Finding("fail", host.name, f"torch import: {error}", "see `python -c 'import torch'` there")
    alive = [host for host in hosts if not host.problem]
    for host in alive:
        own, first = host.facts["versions"], alive[0].facts["versions"]
        for name in sorted(own | first):
            if own.get(name) != first.get(name):
                text = f"{name} is {own.get(name, 'missing')}, but {first.get(name, 'missing')} on {alive[0].name}"
                yield Finding("fail", host.name, text, "install the same version on all hosts")
        if device != "cpu" and host.devices != alive[0].devices:
            text = f"devices are {host.devices}, but {alive[0].devices} on {alive[0].name}"
            yield Finding("fail", host.name, text, "use hosts with the same devices, or --device cpu")
        gpus = len(host.torch["gpus"]) if device != "cpu" else 0
        if device == "cuda" and not gpus:
            yield Finding("fail", host.name, "torch cannot use a GPU", "run `smolds doctor` there, or use --device cpu")
        for number, gpu in enumerate(host.torch["gpus"] if gpus else []):
            if gpu["error"]:
                yield Finding("fail", host.name, f"GPU {number}: {gpu['error']}", "restart the host or replace the GPU")
        if host.slots > (count := gpus or host.facts["cores"]):
            text = f"slots={host.slots} exceeds its {count:g} {'GPUs' if gpus else 'cores'}"
            yield Finding("fail" if gpus else "warn", host.name, text, "lower the slots of all hosts")
        if abs(host.clock) > CLOCK_SECONDS:
            text = f"its clock is {abs(host.clock):.1f} s {'ahead' if host.clock > 0 else 'behind'}"
            yield Finding(
                "warn", host.name, text, "synchronize it with NTP: logs and files of hosts are compared by time"
            )


def _shared_folder(hosts: list[Host], folder: Path) -> Iterator[Finding]:
    """Write a file with a random content here; every host must read it, and write into its folder."""
    folder, content = nearest_folder(folder), secrets.token_hex(16)
    try:
        file = tempfile.NamedTemporaryFile("w", dir=folder, prefix=".doctor-")  # noqa: SIM115  closed below
    except OSError as error:
        yield Finding("fail", "shared folder", f"{folder}: {error.strerror}", "set --dir to a writable folder")
        return
    with file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        arguments = [str(folder), Path(file.name).name, content]
        for host, problem in ask(hosts, "folder", lambda _: arguments).items():
            host.facts["shared"] = not problem
            if problem:
                advice = f"mount the same {folder} on all hosts, or set --dir to a shared folder"
                yield Finding("fail", host.name, f"cannot use the folder for runs ({problem})", advice)


# Connections

Pair = tuple[Host, Host]


def _connections(hosts: list[Host], port: int | None) -> dict[str, dict[Pair, str]]:
    """Try all pairs of hosts on a free port and on the master port, if set; return the error of each that failed."""
    for host, (ports, token, busy) in ask(hosts, "listen", lambda host: [host.facts["address"], port]).items():
        host.ports, host.token, host.busy = ports, token, busy
    alive = [host for host in hosts if host.token and not host.problem]

    def others(host: Host) -> list[tuple[str, Host]]:
        return [(kind, other) for other in alive if other is not host for kind in other.ports]

    def request(host: Host) -> list:
        return [[[other.facts["address"], other.ports[kind], other.token] for kind, other in others(host)]]

    closed: dict[str, dict[Pair, str]] = {"random": {}, "master": {}}
    for host, errors in ask(alive, "connect", request).items():
        for (kind, other), error in zip(others(host), errors, strict=True):
            if error:
                closed[kind][host, other] = error
    return closed


def _port_findings(hosts: list[Host], closed: dict[str, dict[Pair, str]], port: int | None) -> Iterator[Finding]:
    """Name each address that did not answer, once per port and error."""
    for host in hosts:
        if host.busy and not host.problem:
            advice = "end the program that uses it, or choose another --master-port"
            level = "fail" if host is hosts[0] else "warn"
            yield Finding(level, host.name, f"port {port}: {host.busy}", advice)
    for kind, fix in (
        ("master", "open it in the firewall, or choose another --master-port"),
        ("random", "open all TCP ports between the hosts: ranks choose free ones"),
    ):
        groups: dict[tuple[Host, str], list[str]] = defaultdict(list)
        for (source, target), error in closed[kind].items():
            groups[target, error].append(source.name)
        for (target, error), sources in groups.items():
            others = f" and {len(sources) - 3} others" if len(sources) > 3 else ""
            where = f"{target.facts['address']} port {target.ports[kind]}"
            yield Finding("fail", target.name, f"{where} did not answer {', '.join(sources[:3])}{others}: {error}", fix)


# Tables

HEADER = "host ssh slots smolds source python torch deepspeed devices cores memory clock shared".split()


def _row(host: Host, hosts: list[Host]) -> list[str]:
    """Return a host's cells; what differs from the first host that answers has a star."""
    if not host.facts:
        return [host.name, host.problem]
    first = next(one for one in hosts if one.facts)
    versions, others = host.facts["versions"], first.facts["versions"]
    shared = {True: "yes", False: "no*", None: "?"}[host.facts.get("shared")]
    row = [host.name, "lost" if host.problem else "ok", str(host.slots)]
    for name in ("smolds-dist", "source of smolds", "python", "torch", "deepspeed"):
        value = versions.get(name, "missing")
        row.append(value + "*" * (value != others.get(name, "missing")))
    row += [host.devices + "*" * (host.devices != first.devices), f"{host.facts['cores']:g}"]
    return [*row, f"{host.facts['memory'] / GB:.1f} GB", f"{round(host.clock, 1) + 0.0:+.1f} s", shared]


def _table(rows: list[list[str]]) -> Iterator[str]:
    """Align columns; a shorter row has a message instead of its last cells."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    widths[0] = max(len(row[0]) for row in rows)
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
