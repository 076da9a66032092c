"""`smolds doctor`: check that this machine can run smolds. One line per check, with a fix if it fails.

Like its checks, it imports only the standard library, so that it works in a broken installation.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smolds_dist.errors import OptionParser
from smolds_dist.launching import doctor_checks as checks
from smolds_dist.launching.doctor_checks import Finding
from smolds_dist.launching.doctor_probes import PROBE_LIMITS, Probe, probe_args


def doctor(args: list[str]) -> int:
    """Print the report; return 1 if a check failed, else 0."""
    parser = OptionParser(
        prog="smolds doctor",
        description="Check this machine, or all hosts of a hostfile; the exit code is 1 if a check fails.",
        example="smolds doctor --device cpu",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="device to train on")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder for runs (default: runs)")
    parser.add_argument("--hostfile", type=Path, help="file with a line `host slots=N` per host to check over ssh")
    parser.add_argument("--master-port", type=int, metavar="N", help="port of the rendezvous, to check with --hostfile")
    options = parser.parse_args(args)
    failed = False
    with contextlib.ExitStack() as stack:
        for line in _hosts(options) if options.hostfile else _findings(options, stack):
            print(_redact(str(line)), flush=True)
            failed |= isinstance(line, Finding) and line.level == "fail"
    return int(failed)


def _hosts(options: argparse.Namespace) -> Iterator[str | Finding]:
    from smolds_dist.launching.doctor_hosts import report_hosts  # needs more than the standard library

    yield from report_hosts(options.hostfile, options.device, options.dir, options.master_port)


def _findings(options: argparse.Namespace, stack: contextlib.ExitStack) -> Iterator[Finding]:
    """Run all checks in order. Probes start first, in parallel; the all-to-all runs alone because it is timed."""

    commands = {name: [sys.executable, *probe_args(name)] for name in ("torch", "deepspeed")}
    if not checks.is_offline():
        commands["hub"] = [sys.executable, *probe_args("hub")]
    if shutil.which("mpirun") and checks.version_of("mpi4py"):
        commands["mpi"] = ["mpirun", *checks.MPI_OPTIONS, "-n", "2", sys.executable, *probe_args("mpi")]
    if shutil.which("scontrol"):
        commands["slurm"] = ["scontrol", "ping"]
    probes = {name: stack.enter_context(Probe(command, PROBE_LIMITS[name])) for name, command in commands.items()}

    yield from _guarded("system", checks.check_system)
    found, error = probes["torch"].answer()
    torch: dict[str, Any] = found or {"gpus": [], "mps": False}
    yield from _guarded("gpu", checks.check_gpu, torch, options.device)
    yield from _guarded("versions", checks.check_versions)
    if error:
        yield Finding("fail", "torch import", error, "see `python -c 'import torch'`")
    yield from _guarded("deepspeed import", checks.check_deepspeed, probes["deepspeed"])
    yield from _guarded("launchers", checks.check_launchers, not error, probes)
    if not error:
        gpus = len(torch["gpus"]) if options.device in ("auto", "cuda") else 0
        yield from _guarded("all-to-all", checks.check_all_to_all, "nccl" if gpus > 1 else "gloo")
    yield from _guarded("compilers", checks.check_compilers, bool(torch["gpus"]))
    folders = {"runs": options.dir, "data cache": Path("~/.cache/smolds").expanduser()}
    for name, folder in folders.items():
        yield from _guarded(name, checks.check_folder, name, folder)
    yield from _guarded("hub", checks.check_hub, probes.get("hub"))
    yield from _guarded("environment", checks.check_environment)


def _guarded(name: str, check: Callable[..., Iterator[Finding]], *args: Any) -> Iterator[Finding]:
    """Run one check; if it raises, report that in one line and continue."""
    try:
        yield from check(*args)
    except Exception as error:
        yield Finding("warn", name, f"the check itself failed ({type(error).__name__}: {error})", "report this")


def _redact(text: str) -> str:
    """Replace tokens and URL credentials, which an error message may contain, with `***`."""
    secrets = {os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    for name, value in os.environ.items():
        match = re.match(r"(?:.*?://)?(.+)@", value)
        if match and (name == "HF_ENDPOINT" or name.lower().endswith("_proxy")):
            parts = [match[1], *(part for part in match[1].split(":", 1) if len(part) > 3)]
            secrets.update(parts, map(urllib.parse.unquote, parts))
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return re.sub(r"://[^\s/]*@", "://***@", text)
