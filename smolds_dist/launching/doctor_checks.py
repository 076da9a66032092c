"""The checks of `smolds doctor`.

This module imports only the standard library, so that it works in a broken installation. Anything that can hang or
crash (importing torch or deepspeed, the network, MPI, the all-to-all) runs as a probe (`doctor_probes`).
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolds_dist.launching.doctor_probes import Probe, hub_endpoint, measure_all_to_all
from smolds_dist.parallel.control_groups import control_groups

GB = 1e9
# The options that `smolds launch --launcher mpi` uses on a CPU
MPI_OPTIONS = ["--oversubscribe", *(["--allow-run-as-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str  # ok, warn or fail
    name: str
    detail: str
    advice: str = ""  # the fix, if not ok

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice and self.level != "ok" else ""
        return f"{self.level:4}  {self.name:16}  {self.detail}{advice}"


def _output(*command: str) -> str:
    """Return everything a short command prints, or "" if it is missing or hangs."""
    try:
        with Probe(list(command), 10) as probe:
            return probe.result()[1]
    except OSError:
        return ""


# Hardware


def check_system() -> Iterator[Finding]:
    """Check Python, and the cores and memory that affinity and container limits leave."""
    python, system = platform.python_version(), f"{platform.system()} {platform.release()} {platform.machine()}"
    old = sys.version_info < (3, 11)
    yield Finding("fail" if old else "ok", "python", f"{python} on {system}", "use Python 3.11 or later")

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text, quota = f"{cores} of {os.cpu_count()} cores usable", usable_cores()
    text += f", but the container's CPU quota is {quota:.3g} cores" if quota < cores else ""
    advice = f"set OMP_NUM_THREADS={max(1, int(quota))} for a single process to avoid throttling"
    yield Finding("warn" if quota < cores else "ok", "cpu", text, advice)

    total, free = memory_size() or (0.0, 2 * GB)
    text = f"{total / GB:.1f} GB, {free / GB:.1f} GB free" if total else "size unknown on this system"
    yield Finding("warn" if free < 2 * GB else "ok", "memory", text, "close other programs")


def memory_size() -> tuple[float, float] | None:
    """Return total and free bytes: the smaller of the machine's and the cgroup's."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {name: int(size.split()[0]) * 1024.0 for name, size in (line.split(":", 1) for line in lines)}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        try:
            import psutil
        except ImportError:
            return None
        total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    for folder in control_groups("memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file "),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
        ):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limit, used = int((folder / limit_name).read_text()), int((folder / used_name).read_text())
                stat = (folder / "memory.stat").read_text().splitlines()
                used -= sum(int(line.split()[1]) for line in stat if line.startswith(cache_name))
                total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def usable_cores() -> float:
    """Return the cores that affinity and the cgroup's CPU quota leave this process."""
    cores = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    for folder in control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            cores.append(quota / period)
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            cores += [quota / period] if quota > 0 else []
    return min(cores)


def check_gpu(torch: dict[str, Any], device: str) -> Iterator[Finding]:
    """Check the GPUs that torch can use; one that only the driver detects is the usual cause of a slow first run."""
    driver = Path("/proc/driver/nvidia/gpus").is_dir()
    for index, gpu in enumerate(torch["gpus"]):
        text = f"{gpu['name']}, {gpu['total'] / GB:.0f} GB, {gpu['free'] / GB:.0f} GB free"
        text += f", but {gpu['error']}" if gpu["error"] else "" if gpu["bf16"] else ", no bf16"
        level = "ok" if not gpu["error"] else "warn" if device == "cpu" else "fail"
        yield Finding(level, f"gpu {index}", text, "install the torch build for this GPU and driver")
    if torch["gpus"]:
        yield Finding("ok", "cuda", f"CUDA {torch['cuda']}, NCCL {torch['nccl']}")
    elif device == "cuda" or (device == "auto" and driver):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = f"torch is built for CUDA {torch['cuda']}" if torch.get("cuda") else "torch is built without CUDA"
        reason += f", CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else ""
        advice = "install the torch build for the driver (https://pytorch.org/get-started), or use --device cpu"
        yield Finding("fail" if device == "cuda" else "warn", "gpu", f"torch cannot use a GPU: {reason}", advice)
    elif torch["mps"]:
        yield Finding("ok", "gpu", "Apple GPU (MPS), one process only")
    elif device != "mps":
        yield Finding("ok", "gpu", "none; training runs on the CPU")
    if device == "mps" and not torch["mps"]:
        yield Finding("fail", "gpu", "torch cannot use an Apple GPU", "use --device cpu")


# Software


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions() -> Iterator[Finding]:
    """Compare the installed packages with the requirements in setup.cfg."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("fail", "packaging", "not installed", "run pip install -e . in smolds' folder")
        return
    try:
        lines = importlib.metadata.requires("smolds-dist") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("warn", "smolds-dist", "not installed, so required versions are unknown", "pip install -e .")
        return
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": "mpi"}):
            continue
        name, version, optional = requirement.name, version_of(requirement.name), "extra" in str(requirement.marker)
        needed = ",".join(sorted(str(requirement.specifier).split(","), reverse=True))
        if version is None and optional:
            yield Finding("ok", name, "not installed, needed only for the mpi launcher")
        elif version is None:
            yield Finding("fail", name, "not installed", f"pip install '{name}{needed}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            level = "warn" if optional else "fail"
            yield Finding(level, name, f"{version} is outside {needed}", f"pip install '{name}{needed}'")
        else:
            yield Finding("ok", name, f"{version} ({needed})")


def check_deepspeed(probe: Probe) -> Iterator[Finding]:
    """Check `import deepspeed`, which looks for the accelerator and CUDA and so can fail when installed."""
    if version_of("deepspeed") is None:
        return  # check_versions reports this
    seconds, error = probe.answer()
    advice = "see `python -c 'import deepspeed'`; one process trains without it"
    yield Finding("fail" if error else "ok", "deepspeed import", error or f"took {seconds:.1f} s", advice)


def check_launchers(torch_works: bool, probes: dict[str, Probe]) -> Iterator[Finding]:
    """Check the programs that can start ranks. Only torchrun is required, so a missing one is not a problem."""
    works = torch_works and version_of("deepspeed")
    yield Finding("ok", "torchrun", "works, as part of torch" if torch_works else "needs torch")
    yield Finding("ok", "deepspeed run", "works, as part of deepspeed" if works else "needs deepspeed")
    yield _mpirun(probes.get("mpi"))
    yield _slurm(probes.get("slurm"))
    missing = [program for program in ("ssh", "pdsh") if not shutil.which(program)]
    if missing:
        yield Finding("ok", "pdsh, ssh", f"{missing[0]} not installed, needed only for deepspeed on several nodes")
    elif not re.search(r"rcmd modules:.*\bssh\b", modules := _output("pdsh", "-V")):
        yield Finding("warn", "pdsh, ssh", "pdsh lacks its ssh module", "build pdsh with ssh")
    else:
        version = _output("ssh", "-V").split(",")[0].split(" ")[0]
        yield Finding("ok", "pdsh, ssh", f"{modules.splitlines()[0].split(' ')[0]}, {version}")


def _mpirun(probe: Probe | None) -> Finding:
    """Start two real ranks: if mpirun and mpi4py use different MPIs, ranks start but each has world size 1."""
    if not shutil.which("mpirun"):
        return Finding("ok", "mpirun", "not installed, needed only for the mpi launcher")
    version = next(iter(_output("mpirun", "--version").splitlines()), "unknown version")
    if probe is None:
        return Finding("ok", "mpirun", f"{version}; mpi4py is missing, needed only for the mpi launcher")
    size, error = probe.answer()
    if error:
        return Finding("warn", "mpirun", f"{version}, but two ranks did not start: {error}", "use another launcher")
    if size != 2:
        advice = "pip install --force-reinstall --no-binary mpi4py mpi4py"
        return Finding("warn", "mpirun", f"{version}, but mpi4py uses another MPI, so each rank runs alone", advice)
    return Finding("ok", "mpirun", f"works with mpi4py, {version}")


def _slurm(probe: Probe | None) -> Finding:
    missing = [name for name in ("srun", "sbatch", "scontrol") if not shutil.which(name)]
    if len(missing) == 3:
        return Finding("ok", "srun, sbatch", "not installed, needed only for Slurm")
    if missing or probe is None:
        return Finding("warn", "srun, sbatch", f"{', '.join(missing)} not found", "install Slurm's client commands")
    code, output = probe.result()
    up = [line for line in output.splitlines() if re.search(r"\bUP\b", line)]
    if code == 0 and up:
        return Finding("ok", "srun, sbatch", f"{_output('srun', '--version')}, {up[0]}")
    reason = "no answer within 5 s" if code is None else (output.splitlines() or [f"exit code {code}"])[-1][:200]
    advice = "to use Slurm, start slurmctld or set SLURM_CONF to the cluster's file"
    return Finding("warn", "srun, sbatch", f"installed, but the controller is unreachable: {reason}", advice)


def check_compilers(cuda: bool) -> Iterator[Finding]:
    """Check for the C compiler that Triton needs on CUDA, or the C++ compiler that torch.compile needs on a CPU."""
    wanted = (os.environ.get("CC") or "gcc cc clang") if cuda else (os.environ.get("CXX") or "g++ clang++")
    found = next((program for program in wanted.split() if shutil.which(program)), None)
    if found:
        release = re.search(r"\d+(\.\d+)+", _output(found, "--version"))
        yield Finding("ok", "compilers", f"{found} {release[0]}" if release else found)
    elif cuda:
        advice = "install gcc: on CUDA, the expert layers' Triton kernels are compiled on first use"
        yield Finding("warn", "compilers", "no C compiler", advice)
    else:
        yield Finding("ok", "compilers", "no C++ compiler, needed only for --train.compile on")


def check_all_to_all(backend: str) -> Iterator[Finding]:
    """Run a real all-to-all between two ranks, as expert parallelism does."""
    where = "GPUs" if backend == "nccl" else "CPU processes"
    found, error = measure_all_to_all(backend)
    if found is None:
        variable = "NCCL_DEBUG=INFO" if backend == "nccl" else "GLOO_SOCKET_IFNAME=lo"
        yield Finding("fail", "all-to-all", f"two ranks over {backend}: {error}", f"retry with {variable}")
    else:
        speed = f"{found['latency'] * 1e6:.0f} us median latency, {found['bandwidth'] / GB:.2f} GB/s per rank"
        yield Finding("ok", "all-to-all", f"two {where} over {backend}: {speed}")


# Folders


def nearest_folder(folder: Path) -> Path:
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))


def check_folder(name: str, folder: Path) -> Iterator[Finding]:
    """Check free space and write permission at the nearest existing folder; create none."""
    folder, nearest = folder.absolute(), nearest_folder(folder)
    try:
        tempfile.TemporaryFile(dir=nearest).close()
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        reason = f"{nearest}: {error.strerror}"
        yield Finding("fail", name, f"{folder} cannot be written ({reason})", "choose another folder")
        return
    level = "fail" if free < 1 * GB else "warn" if free < 20 * GB else "ok"
    yield Finding(level, name, f"{folder}, {free / GB:.1f} GB free", "free some disk space")


# Network and environment


def check_hub(probe: Probe | None) -> Iterator[Finding]:
    """Check that the Hub answers and a token is set, without printing it. No probe: the user chose offline mode."""
    token = f"HF_TOKEN {'set' if os.environ.get('HF_TOKEN') else 'not set'}"
    if probe is None:
        yield Finding("ok", "hub", f"offline mode is set, {token}")
        return
    host = urllib.parse.urlsplit(hub_endpoint()).hostname or "HF_ENDPOINT"
    found, error = probe.answer()
    problem = error or found["problem"]
    text = f"{host} is not reachable ({problem})" if problem else f"{host} answers"
    advice = "the sources stdlib, text, jsonl and parquet work offline"
    yield Finding("warn" if problem else "ok", "hub", f"{text}, {token}", advice)


def is_offline() -> bool:
    """Return True if the Hub's client would be in offline mode."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def check_environment() -> Iterator[Finding]:
    """Check environment variables and limits that affect ranks."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    present, missing = ([n for n in ranks if (n in os.environ) == here] for here in (True, False))
    if "RANK" in present and missing:
        advice = "unset RANK, or start ranks with `smolds launch`"
        yield Finding("warn", "ranks", f"RANK is set without {' and '.join(missing)}", advice)
    else:
        here = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}" if "RANK" in present else "none set"
        yield Finding("ok", "ranks", f"{here} in the environment")

    threads = os.environ.get("OMP_NUM_THREADS")
    note = ", so a single process uses one core" if threads == "1" and (os.cpu_count() or 1) > 1 else ""
    yield Finding("ok", "threads", f"OMP_NUM_THREADS={threads}{note}" if threads else "OMP_NUM_THREADS not set")

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    text = f"at most {files}" if files >= 0 else "no limit"
    yield Finding("warn" if 0 <= files < 1024 else "ok", "open files", text, "run `ulimit -n 4096` first")
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).total
        level, text = ("warn", f"{size / 1e6:.0f} MB") if size < 64e6 else ("ok", f"{size / GB:.1f} GB")
        yield Finding(level, "/dev/shm", text, "start the container with --shm-size 1g for NCCL's buffers")
