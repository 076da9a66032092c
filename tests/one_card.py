"""Several ranks on one device. As a script: run a module (`-m NAME`) or file as one of them; start it by torchrun.

NCCL rejects two ranks on one GPU of a host and takes the host's identity from NCCL_HOSTID, so each rank is a host of its
own, with one GPU, to NCCL and to smolds; they talk over sockets of the loopback. On a CPU the same ranks use gloo.
"""

import contextlib
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator

SOCKETS = {
    "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "WARN",
}  # fmt: skip


class OneCard:
    """Runs ranks that share a device. If they hang, their kernels may wait for each other: it then starts CUDA's
    multi-process service, which runs kernels of several processes simultaneously, for this and all later jobs.

    Args:
        cleanup: takes the end of the service.
    """

    def __init__(self, cleanup: contextlib.ExitStack):
        self._cleanup = cleanup
        self._variables: dict[str, str] = {}

    def run(self, world: int, *command: str) -> str:
        """Return the ranks' standard output; what NCCL said is in the error of a failed job."""
        from ranks import run_ranks

        try:
            return run_ranks(world, "one_card.py", *command, timeout=40, **self._variables).stdout
        except AssertionError as error:
            tried = self._variables or not shutil.which("nvidia-cuda-mps-control")
            if tried or "no end after" not in str(error):
                raise
            self._variables = self._cleanup.enter_context(multi_process_service())
            return self.run(world, *command)


@contextlib.contextmanager
def multi_process_service() -> Iterator[dict[str, str]]:
    """Start CUDA's multi-process service; yield the variables of its clients."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mps-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        control, env = "nvidia-cuda-mps-control", os.environ | variables
        subprocess.run([control, "-d"], env=env, check=True, timeout=60)
        try:
            yield variables
        finally:
            subprocess.run([control], input="quit\n", text=True, env=env, timeout=60)


if __name__ == "__main__":
    os.environ |= {"NCCL_HOSTID": os.environ["RANK"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in SOCKETS.items():
        os.environ.setdefault(name, value)
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
