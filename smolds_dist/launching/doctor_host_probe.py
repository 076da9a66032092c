"""The doctor's probe on one host of a hostfile: the host's facts, and its connections to the other hosts' probes.

`python -m smolds_dist.launching.doctor_host_probe` reads requests, one JSON list `[name, *arguments]` per line, and prints
each answer after `ANSWER`. It ends with its standard input, which is an ssh connection, or without a request for
`LIFETIME` seconds. It imports only the standard library; torch runs in another process.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smolds_dist.launching.doctor_checks import memory_size, usable_cores
from smolds_dist.launching.doctor_probes import ANSWER, PROBE_LIMITS, Probe, probe_args
from smolds_dist.parallel.versions import package_versions, source_digest

LIFETIME = 120  # seconds without a request
CONNECT_SECONDS = 3.0


def facts() -> dict[str, Any]:
    """Return this host's versions, cores, memory (bytes) and the address at which ssh reached it."""
    return {
        "address": os.environ["SSH_CONNECTION"].split()[2],
        "versions": package_versions() | {"source of smolds": source_digest()},
        "cores": usable_cores(),
        "memory": (memory_size() or (0, 0))[0],
    }


def compare_folder(folder: str, name: str, content: str) -> str:
    """Return why a file that another host wrote into a folder cannot be read here, or the folder not written; "" if all
    is well."""
    try:
        if Path(folder, name).read_text() != content:
            return f"{name} has another content"
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return ""


def listen(address: str, master_port: int | None) -> tuple[dict[str, int], str, str]:
    """Answer the other hosts' probes on a free port and on the master port, if it is set and free.

    Args:
        address: this host's; it decides between IPv4 and IPv6.

    Returns:
        The ports by kind, the token of this host's connections, and why the master port cannot be used.
    """
    token, family, error = secrets.token_hex(8), socket.AF_INET6 if ":" in address else socket.AF_INET, ""
    ports = {}
    for kind, port in {"random": 0, "master": master_port}.items():
        try:
            if port is not None:
                listener = socket.create_server(("", port), family=family, backlog=1024)
                ports[kind] = listener.getsockname()[1]
                threading.Thread(target=_greet, args=(listener, token.encode()), daemon=True).start()
        except OSError as problem:
            error = os.strerror(problem.errno or 0)
    return ports, token, error


def _greet(listener: socket.socket, token: bytes) -> None:
    """Send the token to everyone who connects."""
    while True:
        with listener.accept()[0] as connection, contextlib.suppress(OSError):
            connection.sendall(token)


def connect(others: list[tuple[str, int, str]]) -> list[str]:
    """Connect to addresses, ports and tokens in parallel; return "" or the error of each."""

    def attempt(other: tuple[str, int, str]) -> str:
        address, port, token = other
        try:
            with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
                known = connection.recv(len(token), socket.MSG_WAITALL).decode(errors="replace") == token
                return "" if known else "another program answers"
        except OSError as error:
            return error.strerror or str(error)

    with ThreadPoolExecutor(max(1, len(others))) as threads:
        return list(threads.map(attempt, others))


def main() -> None:
    """Answer requests. The alarm ends a probe that hangs, or whose connection is gone without an end."""
    with Probe([sys.executable, *probe_args("torch")], PROBE_LIMITS["torch"]) as torch:
        actions: dict[str, Callable[..., Any]] = {
            "facts": facts,
            "clock": time.time,
            "torch": torch.answer,
            "folder": compare_folder,
            "listen": listen,
            "connect": connect,
        }
        for line in sys.stdin:
            signal.alarm(LIFETIME)
            name, *arguments = json.loads(line)
            print(f"{ANSWER}{json.dumps(actions[name](*arguments))}", flush=True)


if __name__ == "__main__":
    signal.alarm(LIFETIME)
    main()
