"""Python that starts in milliseconds: most of a test's time would go to importing torch in new processes.

One process imports everything once; each start forks it. `programs()` creates a folder with `python`, `smolds` and
`torchrun` that do so. They forward arguments, environment, working directory, files and signals, and exit like the process
that they start, which joins the namespaces and the cgroup of a test host (cluster.py) if they run on one. Normal starts are
left for `-c` and `-I`, for another environment of variables that libraries read during import, and for tests with
`cold=True` or `sys.executable`.

This file is the server that forks; CLIENT is the program in the folder.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import pkgutil
import random
import resource
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
AT_START = dict(os.environ)  # without variables that libraries set while tests run, such as TOKENIZERS_PARALLELISM
# Prefixes of variables that a library reads during import, except those in READ_LATER.
READ_ON_IMPORT = (
    "CUDA DS_ HF_ HOME KMP LC_ LD_ MKL MPL NUMEXPR OMP OPENBLAS PYTHON TOKENIZERS TORCH TRANSFORMERS TRITON USE_ XDG"
)
# PyTorch sets TORCHINDUCTOR_CACHE_DIR itself, also in a test's process. With a CUDA device nothing forks.
READ_LATER = """CUDA_VISIBLE_DEVICES LD_PRELOAD OMPI_ PYTHON_EXEC PYTHONUNBUFFERED TORCHELASTIC TORCHINDUCTOR_CACHE_DIR
    TORCH_EXTENSIONS_DIR TORCH_NCCL"""

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

args, name = sys.argv[1:], os.path.basename(sys.argv[0])
args = {{"smolds": ["-m", "smolds_dist"], "torchrun": ["-m", "torch.distributed.run"]}}.get(name, []) + args


def read_on_import(environment):
    kept = [n for n in environment if n.startswith({read}) and not n.startswith({later})]
    values = {{n: environment[n] for n in kept}}
    # DeepSpeed adds the working directory, which is in sys.path anyway.
    path = [p for p in values.pop("PYTHONPATH", "").split(":") if p not in ("", os.getcwd(), {root!r})]
    return values | {{"PYTHONPATH": path}}


target = args[1:] if args[:1] == ["-u"] else args
if target and (target[0] == "-m" or target[0].endswith(".py")):
    try:
        server = socket.socket(socket.AF_UNIX)
        server.connect({address!r})
    except OSError:
        target = []
else:
    target = []
if not target or read_on_import(os.environ) != read_on_import({environment!r}):
    os.execv({python!r}, [{python!r}, *args])

passed_on = [s for s in signal.Signals if s not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)]
mask = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # until there is a process to forward them to
request = dict(args=target, cwd=os.getcwd(), environment=dict(os.environ), mask=[int(s) for s in mask])
request = json.dumps(request).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
pid = int.from_bytes(server.recv(8), "big")
for number in passed_on:
    signal.signal(number, lambda number, frame: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
for stream in (0, 1, 2):
    os.close(stream)
status = server.recv(8)
code = os.waitstatus_to_exitcode(int.from_bytes(status, "big")) if status else -signal.SIGKILL
if code < 0:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def environment() -> dict[str, str]:
    """Return the environment of every process of a test, before the test's own variables."""
    path = os.pathsep.join(filter(None, (str(ROOT), AT_START.get("PYTHONPATH"))))
    return AT_START | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def read_on_import() -> dict[str, str]:
    """Return the variables of a test's processes that they must have so that they can be forked."""
    first, later = tuple(READ_ON_IMPORT.split()), tuple(READ_LATER.split())
    return {n: v for n, v in environment().items() if n.startswith(first) and not n.startswith(later)}


def python(preload: str = "") -> str:
    """Return the path of the Python that has imported everything, or of the usual one."""
    folder = programs(preload)
    return str(folder / "python") if folder else sys.executable


@functools.cache
def programs(preload: str = "") -> Path | None:
    """Return the folder to prepend to PATH; start the server, once for each library to preload.

    None without `pidfd_open`, and with a GPU, which no fork can use after DeepSpeed has detected it.
    """
    import torch

    if not hasattr(os, "pidfd_open") or torch.cuda.is_available():
        return None
    folder = Path(tempfile.mkdtemp(prefix="smolds-warm-", dir="/tmp"))  # the path of a Unix socket must be short
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = str(folder / "socket")
    client = CLIENT.format(
        python=sys.executable, address=address, environment=environment(), read=tuple(READ_ON_IMPORT.split()),
        later=tuple(READ_LATER.split()), root=str(ROOT),
    )  # fmt: skip
    for name in ("python", "smolds", "torchrun"):
        (folder / name).write_text(client)
        (folder / name).chmod(0o755)
    command = [sys.executable, __file__, address, str(folder / "python")]
    env = environment() | ({"LD_PRELOAD": preload} if preload else {})
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    atexit.register(process.kill)
    assert process.stdin and process.stdout
    if b"ready\n" not in iter(process.stdout.readline, b""):  # after output of imports
        raise RuntimeError("what tests fork their processes from did not start")
    return folder


def import_all() -> None:
    """Import all modules that our processes use, except those run by `-m` and those that start MPI or threads (datasets)."""
    import smolds_dist

    for module in pkgutil.walk_packages(smolds_dist.__path__, "smolds_dist."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in """deepspeed deepspeed.moe.utils deepspeed.runtime.zero.muon.muon_optimizer matplotlib.pyplot
            tensorboard.compat.proto.event_pb2 torch.distributed.elastic.multiprocessing torch.distributed.launcher.api
            torch.utils.data transformers.generation transformers.models.auto.tokenization_auto""".split():
        importlib.import_module(name)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "GenerationMixin", "PreTrainedTokenizerFast"):
        getattr(importlib.import_module("transformers"), name)


def serve(address: str) -> dict:
    """Fork for every request; return in the fork only, with the request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, None)
    selector.register(0, selectors.EVENT_READ, None)  # closes when the parent exits
    os.write(1, b"ready\n")
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                sys.exit()
            if key.fileobj is listener:
                if request := accept(listener, selector):
                    return request
            else:
                ended, (client, pid, pidfd) = key.fileobj == key.data[2], key.data
                if not ended:  # the client was killed
                    kill_tree(pid)
                selector.unregister(pidfd)
                selector.unregister(client)
                os.close(pidfd)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):
                    client.sendall(status.to_bytes(8, "big"))
                client.close()
                break  # the process's other event may also be in this list


def accept(listener: socket.socket, selector: selectors.BaseSelector) -> dict | None:
    """Read a request and fork; return the request in the fork."""
    client, _ = listener.accept()
    header, streams, *_ = socket.recv_fds(client, 8, 3)
    size, text = int.from_bytes(header, "big"), b""
    while len(text) < size and (more := client.recv(size - len(text))):
        text += more
    if not header or len(text) < size:  # the client was killed
        for stream in streams:
            os.close(stream)
        client.close()
        return None
    request = json.loads(text)
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        pidfd = os.pidfd_open(pid)
        selector.register(client, selectors.EVENT_READ, (client, pid, pidfd))
        selector.register(pidfd, selectors.EVENT_READ, (client, pid, pidfd))
        return None
    enter_host(client)
    os.setsid()
    client.sendall(os.getpid().to_bytes(8, "big"))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, max(streams) + 64)
    selector.close()
    return request


def enter_host(client: socket.socket) -> None:
    """Enter the client's namespaces and memory cgroup if they differ from this process's; return in a child process then,
    because a process never leaves its process namespace."""
    pid, *_ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    peer = Path("/proc", str(pid))
    if os.readlink(peer / "ns" / "pid") == os.readlink("/proc/self/ns/pid"):
        return
    for line in (peer / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("memory", ""):
            group = Path("/sys/fs/cgroup", controllers, path.lstrip("/"), "cgroup.procs")
            with contextlib.suppress(OSError):
                group.write_text(str(os.getpid()))
    where = os.getcwd()
    files = [os.open(peer / "ns" / kind, os.O_RDONLY) for kind in ("uts", "ipc", "net", "pid", "mnt")]
    for file in files:
        if ctypes.CDLL(None, use_errno=True).setns(file, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(file)
    os.chdir(where)
    if child := os.fork():
        os.closerange(0, 1000)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if -code not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def kill_tree(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def become(request: dict, python: str) -> NoReturn:
    """Run a module or file as `python` would, and exit with its exit code.

    Exits without freeing imported modules, which would copy all of their memory.
    """
    code: object = 0
    try:
        run_as_main(request, python)
    except SystemExit as stop:
        code = stop.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def run_as_main(request: dict, python: str) -> None:
    import numpy as np

    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    if "HOST_FAULTS" in os.environ:  # as host_faults.c, preloaded, does in a normal start
        ctypes.CDLL(os.environ["LD_PRELOAD"]).read_settings(os.environ["HOST_FAULTS"].encode())
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
    for stream, terminal in ((sys.stdout, os.isatty(1)), (sys.stderr, True)):
        at_once = bool(os.environ.get("PYTHONUNBUFFERED"))
        stream.reconfigure(line_buffering=terminal or at_once, write_through=at_once)
    random.seed()
    np.random.seed()
    sys.executable = python  # so that its child processes also fork
    first, *args = request["args"]
    if first == "-m":
        if not hasattr(sys.modules.get(args[0]), "__path__"):
            sys.modules.pop(args[0], None)  # else runpy warns that it runs twice
        sys.argv, sys.path[0] = args, os.getcwd()
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *args], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import_all()
    gc.collect()
    gc.freeze()
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        sys.exit(f"{len(threads)} threads after the imports, so no fork would be sound")
    become(serve(sys.argv[1]), sys.argv[2])
