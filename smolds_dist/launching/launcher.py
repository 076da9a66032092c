"""`smolds launch`: looks at what is there, and starts the ranks with the program that fits.

| launcher  | starts                                                | chosen by itself                          |
|-----------|-------------------------------------------------------|-------------------------------------------|
| none      | one process                                           | one GPU, Apple's GPU, one core            |
| torchrun  | ranks on this machine                                 | several GPUs, or two ranks on a CPU       |
| deepspeed | ranks on this machine, or on a hostfile's over pdsh   | with --hostfile                           |
| mpi       | ranks on this machine or on a hostfile's over mpirun  | never                                     |
| slurm     | ranks on an allocation's nodes over srun              | inside a Slurm allocation                 |

Ranks that one of these programs has started already (`mpirun ... smolds launch`) train where they are.
"""

import argparse
import base64
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from smolds_dist.config import ENCODED, load_config
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.launching.failure import exit_code_of_stop, find_dead, signal_ranks
from smolds_dist.launching.output import run_quietly
from smolds_dist.parallel.ranks import RankInfo, started_by
from smolds_dist.parallel.topology import Machine, available_cores, detect_machine, plan_topology

LAUNCHERS = ("auto", "none", "torchrun", "deepspeed", "mpi", "slurm")


@dataclass(frozen=True)
class Plan:
    """Which ranks to start where, with what."""

    launcher: str
    procs: int
    per_node: int
    hostfile: Path | None = None

    @property
    def nodes(self) -> int:
        return -(-self.procs // self.per_node)


def launch(args: list[str], machine: Machine | None = None) -> int:
    """Checks the run, prepares its data, starts the ranks and returns the exit code.

    Mistakes surface here, once and before any rank starts.

    Args:
        machine: what to plan for; this machine where not given.

    Raises:
        ConfigError: for options or a configuration that cannot work.
    """
    options, train_args = _parse(args)
    config = load_config(train_args, prog="smolds launch --")
    machine = machine or detect_machine()
    plan = plan_launch(options, machine, config.parallel.device, os.environ)
    plan_topology(config, machine, RankInfo(0, 0, plan.procs, plan.per_node))  # refuses what cannot work
    command = rank_command(plan, train_args, config.parallel.device == "cpu" or machine.devices[0] == "cpu")
    if options.dry_run:
        print(shlex.join(command))
        return 0

    from smolds_dist.checkpoint.resume import prepare_resumed

    _check_programs(plan)
    prepare_resumed(config)

    environment = dict(os.environ)
    if plan.launcher in ("torchrun", "deepspeed") and plan.nodes == 1:
        # torchrun would set one thread per rank.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // plan.procs)))
    if plan.launcher == "none":
        return subprocess.run(command, env=environment).returncode
    return _run(command, environment, config.run_dir, remote=plan.launcher in ("mpi", "slurm"))


def plan_launch(options: argparse.Namespace, machine: Machine, device: str, env: "os._Environ[str] | dict") -> Plan:
    """The launcher, the number of ranks and their nodes.

    Raises:
        ConfigError: where the options contradict each other or the machine.
    """
    on_cpu = device == "cpu" or machine.devices[0] == "cpu"
    hosts = read_hostfile(options.hostfile) if options.hostfile else {}
    launcher = options.launcher
    if launcher == "auto":
        if started_by(env):
            return Plan("none", 1, 1)
        if hosts:
            launcher = "deepspeed"
        elif "SLURM_JOB_ID" in env:
            launcher = "slurm"
    if hosts and launcher not in ("deepspeed", "mpi"):
        raise ConfigError(f"--launcher {launcher} takes no --hostfile; use --launcher deepspeed or mpi.")
    nodes, here = 1, (min(2, available_cores()) if on_cpu else machine.device_count)
    if launcher == "slurm":
        if "SLURM_JOB_ID" not in env:
            raise ConfigError("--launcher slurm works inside an allocation; use salloc or sbatch, or `smolds slurm`.")
        nodes = int(env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", 1)))
        tasks, per_node = env.get("SLURM_NTASKS"), env.get("SLURM_NTASKS_PER_NODE")
        gpus = env.get("SLURM_GPUS_ON_NODE")
        here = int(per_node or (int(tasks) // nodes if tasks else gpus if gpus and not on_cpu else 1))
    if hosts:
        slots = set(hosts.values())
        if len(slots) > 1:
            raise ConfigError(f"{options.hostfile} gives its hosts different slots ({sorted(slots)}); make them equal.")
        nodes, here = len(hosts), slots.pop()
    if options.nproc_per_node != "auto":
        if not options.nproc_per_node.isdecimal() or int(options.nproc_per_node) < 1:
            raise ConfigError(
                f"--nproc-per-node {options.nproc_per_node!r} is no number of ranks; give auto, or 1 or more."
            )
        asked = int(options.nproc_per_node)
        if nodes > 1 and launcher == "deepspeed" and asked != here:
            raise ConfigError(
                f"--nproc-per-node {asked} is not the {here} slots that {options.hostfile} gives each host; leave it out, "
                "or change the slots."
            )
        here = asked
    procs = nodes * here
    on_gpu = not on_cpu and machine.devices[0] == "cuda"
    if on_gpu and nodes == 1 and launcher != "slurm" and procs > machine.device_count:
        raise ConfigError(
            f"--nproc-per-node {procs} exceeds the {machine.device_count} GPUs of this machine; lower it, or use "
            "--parallel.device cpu."
        )
    if launcher == "auto":
        launcher = "torchrun" if procs > 1 else "none"
    if launcher == "none" and procs > 1:
        if options.nproc_per_node != "auto":
            raise ConfigError(f"--launcher none starts one process, not {procs}; use --launcher torchrun.")
        procs = here = 1
    if procs == 1 and launcher in ("torchrun", "deepspeed"):
        launcher = "none"
    return Plan(launcher, procs, here, options.hostfile)


def rank_command(plan: Plan, train_args: list[str], on_cpu: bool) -> list[str]:
    """The command line that starts the ranks of `smolds train`."""
    train = ["-m", "smolds_dist", "train", *train_args]
    procs = str(plan.procs)
    if plan.launcher == "none":
        return [sys.executable, *train]
    if plan.launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", procs]
        return [sys.executable, *start, *train]
    if plan.launcher == "mpi":
        start = ["mpirun", "-n", procs, "--bind-to", "none"]
        if plan.hostfile:
            start += ["--hostfile", str(plan.hostfile), "--map-by", f"ppr:{plan.per_node}:node"]
        elif on_cpu:
            start += ["--oversubscribe"]
        if os.geteuid() == 0:
            start += ["--allow-run-as-root"]
        return [*start, sys.executable, *train]
    if plan.launcher == "slurm":
        layout = ["--nodes", str(plan.nodes), "--ntasks", procs, "--ntasks-per-node", str(plan.per_node)]
        return ["srun", *layout, "--kill-on-bad-exit=1", sys.executable, *train]
    start = ["-m", "deepspeed.launcher.runner", "--master_port", str(_free_port()), "--no_local_rank"]
    if plan.hostfile:
        start += ["--hostfile", str(plan.hostfile), "--launcher", "pdsh"]
        # pdsh hands the line to a shell on every host, which would read what is in the arguments.
        if any(re.search(r"[^\w@%+=:,./-]", argument) for argument in train_args):
            train_args = [f"{ENCODED}{base64.urlsafe_b64encode(json.dumps(train_args).encode()).decode()}"]
    else:
        start += ["--num_gpus", procs, "--log_level", "critical"]
        if shutil.which("numactl"):
            start += ["--bind_cores_to_rank"]  # without numactl, ranks share the cores themselves
    return [sys.executable, *start, "--module", "smolds_dist", "train", *train_args]


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots per host of a DeepSpeed or Open MPI hostfile, lines `host slots=N`.

    Raises:
        ConfigError: naming the line that is not such.
    """
    if not path.is_file():
        raise ConfigError(f"--hostfile {str(path)!r} is not a file; give one with a line `host slots=N` for each host.")
    hosts = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([\w.@:-]+)\s+slots=(\d+)", line)
        if not match or int(match.group(2)) < 1:
            raise ConfigError(f"{path}, line {number} is {line!r}; write it as `host slots=N`.")
        if match.group(1) in hosts:
            raise ConfigError(f"{path}, line {number} names {match.group(1)} again; name each host once.")
        hosts[match.group(1)] = int(match.group(2))
    if not hosts:
        raise ConfigError(f"{path} names no host; write a line `host slots=N` for each.")
    return hosts


def _check_programs(plan: Plan) -> None:
    needed = {
        "mpi": ("mpirun", "install Open MPI and smolds-dist[mpi]"),
        "slurm": ("srun", "load Slurm's client programs"),
        "deepspeed": ("pdsh", "install pdsh, or use --launcher mpi") if plan.hostfile else ("", ""),
    }
    program, fix = needed.get(plan.launcher, ("", ""))
    if program and not shutil.which(program):
        raise ConfigError(f"--launcher {plan.launcher} needs the program {program}, which is not here; {fix}.")


def _run(command: list[str], environment: dict[str, str], run_dir: Path, remote: bool) -> int:
    """Runs the launcher, passes signals on to the ranks, and ends with one line if they failed."""
    began = time.time()
    ranks = run_dir / "ranks"
    hidden: list[str] = []

    def pass_on(process: subprocess.Popen, number: int) -> None:
        # torchrun and deepspeed would kill the ranks; the ranks want to save their work.
        if remote or not signal_ranks(ranks, number, began):
            process.send_signal(number)

    code, told = run_quietly(command, environment, hidden, pass_on)
    if code == 0:
        return 0
    stopped = exit_code_of_stop(ranks, began)
    if stopped is not None:
        return stopped
    if ranks.is_dir():
        (ranks / "launcher.log").write_text("".join(hidden))
    if code != 2 and not told:
        print(f"\nsmolds: {_cause(ranks, began, code, hidden)}", file=sys.stderr)
    return code if code > 0 else 128 - code


def _cause(ranks: Path, began: float, code: int, hidden: list[str]) -> str:
    """Why the ranks ended: what one of them noted but could no longer say, or what can be seen of them."""
    find_dead(ranks, since=began)
    cause = ranks / "cause.txt"
    if cause.exists() and cause.stat().st_mtime >= began - 1:
        return f"{cause.read_text().strip()}; the other ranks stop."
    said = next((line.strip() for line in reversed(hidden) if line.strip(" \n=-")), "nothing")
    return f"the ranks ended with exit code {code}; the last that was heard of them: {said}"


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OptionParser(
        prog="smolds launch",
        usage="smolds launch [--nproc-per-node N] [--launcher NAME] [--hostfile FILE] [--dry-run] -- TRAIN-OPTIONS",
        description="Starts the ranks of `smolds train`.",
        renamed={"--procs": "--nproc-per-node"},
        example="smolds launch --nproc-per-node 2 -- --preset debug --run.name pair --data.source text:'corpus/*.txt'",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--nproc-per-node",
        default="auto",
        metavar="N",
        help="ranks on each machine; auto: its slots or tasks, or one per GPU, or one per core up to two",
    )
    parser.add_argument("--launcher", default="auto", choices=LAUNCHERS, help="program that starts the ranks")
    parser.add_argument("--hostfile", type=Path, help="several machines: a line `host slots=N` for each")
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    return parser.parse_before_training(args)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
