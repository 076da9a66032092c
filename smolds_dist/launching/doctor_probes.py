"""The doctor's probes: anything that can hang or crash runs in another process with a time limit.

`python -m smolds_dist.launching.doctor_probes NAME` runs one. Like the doctor itself, this module imports only the
standard library until a probe runs.
"""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

PROBE_LIMITS = {"torch": 60, "deepspeed": 90, "hub": 8, "mpi": 20, "slurm": 5, "all-to-all": 60}  # seconds
ANSWER = "smolds-doctor-answer: "  # precedes a probe's result, as JSON


class Probe:
    """A command that runs in the background, in its own process group, until its time limit."""

    def __init__(self, command: list[str], limit: float, **environment: str) -> None:
        self.limit, self.end = limit, time.monotonic() + limit
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by __exit__
        # A probe is not a rank of the job this process may belong to.
        ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in ranks}
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT, text=True,
            env=env | environment, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_exception: object) -> None:
        """Kill the group; SIGTERM first, because torchrun and mpirun forward it to ranks outside the group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(3)
        self.output.close()

    def result(self) -> tuple[int | None, str]:
        """Return the exit code (None after a timeout) and everything printed."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(max(0.0, self.end - time.monotonic()))
        self.output.seek(0)
        return code, self.output.read().strip()

    def answer(self) -> tuple[Any, str]:
        """Return a probe's result and "", or None and the error."""
        code, output = self.result()
        if ANSWER in output and code == 0:
            # Another rank's output may follow on the same line: mpirun forwards partial lines.
            return json.JSONDecoder().raw_decode(output.rpartition(ANSWER)[2])[0], ""
        if code is None or code == -signal.SIGALRM:
            return None, f"no answer after {self.limit:g} s"
        # Prefer a rank's error to torchrun's own, which only reports that a rank failed
        pattern = r"^\s*(?:\[rank\d+\]:)?\s*([\w.]*(?:Error|Exception)\b(?<!ChildFailedError).*)"
        errors = re.findall(pattern, output, re.MULTILINE)
        lines = [line for line in output.splitlines() if re.search(r"\w", line)]
        return None, (errors or lines or [f"exit code {code}"])[-1].strip()[:300]


def probe_args(name: str, *args: str) -> list[str]:
    return ["-m", "smolds_dist.launching.doctor_probes", name, *args]


def measure_all_to_all(backend: str) -> tuple[dict[str, float] | None, str]:
    """Measure an all-to-all between two ranks of this machine: latency (s) and bandwidth (bytes/s), or the error."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, *probe_args("all-to-all", backend)]
    with Probe(command, PROBE_LIMITS["all-to-all"], OMP_NUM_THREADS="1") as probe:
        return probe.answer()


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _probe_torch() -> dict[str, Any]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = {"name": torch.cuda.get_device_name(index), "total": 0, "free": 0, "bf16": False, "error": ""}
        try:
            gpu["free"], gpu["total"] = torch.cuda.mem_get_info(index)
            with torch.cuda.device(index):
                gpu["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
            assert torch.ones(8, device=f"cuda:{index}").sum().item() == 8
        except Exception as error:
            gpu["error"] = (str(error).splitlines() or [type(error).__name__])[0]
        gpus.append(gpu)
    nccl = torch.cuda.nccl.version() if gpus and torch.distributed.is_nccl_available() else ("missing",)
    versions = {"cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl))}
    return {"gpus": gpus, "mps": torch.backends.mps.is_available(), **versions}


def _probe_deepspeed() -> float:
    begin = time.monotonic()
    import deepspeed  # noqa: F401

    return time.monotonic() - begin


def _probe_mpi() -> int:
    from mpi4py import MPI

    return MPI.COMM_WORLD.size


def _probe_hub() -> dict[str, str]:
    """Request the Hub's front page. Any answer counts, so credentials in HF_ENDPOINT are never sent or printed."""
    import ssl

    context = ssl.create_default_context()
    with contextlib.suppress(ImportError):  # certificates that the Hub's own client trusts
        import certifi

        context.load_verify_locations(certifi.where())
    try:
        url = urllib.parse.urlsplit(hub_endpoint())
        url = url._replace(netloc=url.netloc.rpartition("@")[2])
        request = urllib.request.Request(url.geturl(), method="HEAD", headers={"User-Agent": "smolds-doctor"})
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
        with opener.open(request, timeout=5) as response:
            status = response.status
    except urllib.error.HTTPError as error:
        status = error.code
    except urllib.error.URLError as error:
        return {"problem": str(error.reason)}
    except Exception as error:  # a malformed address; the message would contain it
        return {"problem": "timed out" if isinstance(error, TimeoutError) else type(error).__name__}
    return {"problem": f"HTTP status {status}" if status >= 500 or status == 407 else ""}


def _probe_all_to_all(backend: str) -> dict[str, float] | None:
    """Run one of the ranks: measure latency with small exchanges and bandwidth with large ones."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    world = dist.get_world_size()

    def exchange(size: int, repeats: int) -> list[float]:
        """Return the seconds of each repetition, with `size` numbers per rank."""
        sent = torch.full((size,), float(rank), device=device)
        received = torch.empty_like(sent)
        seconds = []
        for _ in range(repeats):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_to_all_single(received, sent)
            if backend == "nccl":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        expected = torch.arange(world, device=device, dtype=sent.dtype).repeat_interleave(size // world)
        if not torch.equal(received, expected):
            raise RuntimeError("the all-to-all returned wrong values")
        return seconds

    large = 2**26 if backend == "nccl" else 2**23
    exchange(256, 20)
    small_times = exchange(256, 300)
    exchange(large, 1)
    found = link_speed(small_times, exchange(large, 5), 4 * large, world)
    dist.barrier()
    dist.destroy_process_group()
    return found if rank == 0 else None


def link_speed(small: list[float], large: list[float], size: int, world: int) -> dict[str, float]:
    """Compute latency and bandwidth from the seconds of small exchanges and of large ones (`size` bytes per rank, 1/world
    of which stays local)."""
    return {"latency": statistics.median(small), "bandwidth": size * (world - 1) / world / statistics.median(large)}


def _probe(name: str, *args: str) -> None:
    """Run one probe. The alarm ends it at its limit wherever it hangs, even if the parent is gone."""
    if hasattr(signal, "alarm"):
        signal.alarm(PROBE_LIMITS[name])
    probes: dict[str, Callable[..., Any]] = {
        "torch": _probe_torch,
        "deepspeed": _probe_deepspeed,
        "hub": _probe_hub,
        "mpi": _probe_mpi,
        "all-to-all": _probe_all_to_all,
    }
    answer = probes[name](*args)
    if answer is not None:
        print(f"{ANSWER}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    _probe(*sys.argv[1:])
