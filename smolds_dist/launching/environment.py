"""Pass environment variables of the launching shell to ranks on other hosts.

They are in a file in the run's folder that only the user can read, because the process list of a host, which all users
can read, shows the command lines of ssh and of the ranks.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from smolds_dist.errors import ConfigError, RankError
from smolds_dist.launching.ssh import PDSH_VARIABLE, ssh_options
from smolds_dist.parallel.ranks import host_name

OPTION = "--environment="  # first option of a rank: the file's path
PASSED_ON = re.compile(
    r"(AWS|AZURE|CUDA|FSSPEC|GCSFS|GLOO|GOOGLE|HF|HUGGINGFACE|KMP|MKL|NCCL|PYTORCH|TORCH|TORCHINDUCTOR|TRITON|WANDB)"
    r"_\w+|OMP_NUM_THREADS|(?i:(all|ftp|http|https|no)_proxy)"
)
# Each host has its own values of these, from the launcher of its ranks.
PER_RANK = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|LOCAL_SIZE|CROSS_(RANK|SIZE)|MASTER_(ADDR|PORT)|CUDA_VISIBLE_DEVICES|"
    r"(OMPI|PMIX?|SLURM|TORCHELASTIC)_\w+"
)


def passed_on(environment: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """Return the variables that ranks on other hosts receive: `PASSED_ON` and those of `--export`.

    Raises:
        ConfigError: for a name that is not set, or that the launcher of the ranks sets.
    """
    for name in names:
        if PER_RANK.fullmatch(name):
            raise ConfigError(f"--export {name} is set for each rank by its launcher; omit it.")
        if name not in environment:
            raise ConfigError(
                f"--export {name} is not a variable of this shell's environment; set it, or omit --export."
            )
    found = {name for name in environment if PASSED_ON.fullmatch(name) and not PER_RANK.fullmatch(name)}
    return {name: environment[name] for name in sorted({*found, *names})}


def on_hosts(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the program that starts ranks on other hosts.

    It sets the options of ssh, and withholds variables that DeepSpeed would write on ssh's command lines.
    """
    ssh = " ".join(ssh_options())
    keepalive = {"time": 15, "intvl": 15, "probes": 3}  # mpirun's own connections
    return (
        {f"OMPI_MCA_oob_tcp_keepalive_{name}": str(value) for name, value in keepalive.items()}
        | {"OMPI_MCA_plm_rsh_agent": f"ssh {ssh}"}
        | {name: value for name, value in environment.items() if not name.startswith("MLFLOW")}
        | {PDSH_VARIABLE: ssh}
    )


def file_option(path: Path) -> str:
    """Return the option that names the file, without characters that a shell interprets."""
    return f"{OPTION}{quote(str(path.absolute()))}"


@contextmanager
def environment_file(path: Path, variables: dict[str, str]) -> Iterator[None]:
    """Write the file, and delete it at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(variables, file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_environment(args: list[str]) -> list[str]:
    """Set the variables of the file that the first option names, if it does; return the other options."""
    if not args or not args[0].startswith(OPTION):
        return args
    path = Path(unquote(args[0].removeprefix(OPTION)))
    try:
        os.environ |= json.loads(path.read_text())
    except OSError as error:
        raise RankError(
            f"{path} cannot be read on host {host_name()} ({error.strerror}); --run.dir must be a folder that all hosts "
            "share, and the file exists only while `smolds launch` runs."
        ) from None
    return args[1:]
