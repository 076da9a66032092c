"""`smolds launch`: detect the machine and start the ranks with a suitable program.

| launcher  | starts                                                | chosen automatically                      |
|-----------|-------------------------------------------------------|-------------------------------------------|
| none      | one process                                           | one GPU, Apple's GPU, one core            |
| torchrun  | ranks on this machine                                 | several GPUs, or two ranks on a CPU       |
| deepspeed | ranks here, or on a hostfile's machines over pdsh     | with --hostfile                           |
| mpi       | ranks here, or on a hostfile's machines over mpirun   | never                                     |
| slurm     | ranks on an allocation's nodes over srun              | inside a Slurm allocation                 |

If one of these programs has started the ranks already (`mpirun ... smolds launch`), they train directly.
"""

import argparse
import base64
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from smolds_dist.config import ENCODED, load_config
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.inputs import read_text
from smolds_dist.launching import restarts, slurm
from smolds_dist.launching.failure import exit_code_of_stop, kill_ranks, record_dead_rank, signal_ranks
from smolds_dist.launching.output import run_filtered
from smolds_dist.launching.restarts import Failure, faulty_hosts, resume_options, run_with_restarts
from smolds_dist.launching.signals import EXIT_CODES, handled_by
from smolds_dist.parallel.ranks import RankInfo, detect_launcher
from smolds_dist.parallel.topology import Machine, available_cores, detect_machine, plan_topology
from smolds_dist.progress import print_line
from smolds_dist.settings import RunConfig

LAUNCHERS = ("auto", "none", "torchrun", "deepspeed", "mpi", "slurm")


@dataclass(frozen=True)
class Plan:
    """How many ranks to start, where, and with which launcher."""

    launcher: str
    procs: int
    per_node: int
    hostfile: Path | None = None
    excluded: tuple[str, ...] = ()  # nodes of the allocation not to use
    per_rank: tuple[str, ...] = ()  # srun's options for cores and GPUs, which it does not inherit from the allocation

    @property
    def nodes(self) -> int:
        return -(-self.procs // self.per_node)


def launch(args: list[str], machine: Machine | None = None) -> int:
    """Check the run, prepare its data, start the ranks and return the exit code.

    Mistakes are reported here once, before any rank starts.

    Args:
        machine: the machine to plan for; default: this one.
    """
    options, train_args = _parse(args)
    config = load_config(train_args, prog="smolds launch --")
    machine = machine or detect_machine()
    plan = plan_launch(options, machine, config.parallel.device, os.environ)
    topology = plan_topology(config, machine, RankInfo(0, 0, plan.procs, plan.per_node))  # rejects invalid layouts
    if config.parallel.ds_config:
        from smolds_dist.parallel.expert_parallel import deepspeed_config

        deepspeed_config(config, topology, config.model)
    on_cpu = config.parallel.device == "cpu" or machine.devices[0] == "cpu"
    if options.dry_run:
        print(shlex.join(rank_command(plan, train_args, on_cpu)))
        return 0

    from smolds_dist.checkpoint.resume import prepare_resumed

    _check_programs(plan)
    prepare_resumed(config)

    environment = dict(os.environ)
    if plan.launcher in ("torchrun", "deepspeed") and plan.nodes == 1:
        # torchrun's default is one thread per rank.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // plan.procs)))

    def start(failures: list[Failure]) -> tuple[int, str]:
        args = resume_options(config.run_dir, train_args, config.checkpoint.resume) if failures else train_args
        now = replan(plan, failures, options, config, machine) if failures else plan
        command = rank_command(now, args, on_cpu)
        if plan.launcher == "none":
            return _run_single(command, environment)
        return run_ranks(command, environment, config.run_dir, remote=plan.launcher in ("mpi", "slurm"))

    def hand_over(failures: list[Failure]) -> bool:
        bad, now = faulty_hosts(failures), faulty_hosts(failures[-1:])
        no_spare = plan.launcher == "slurm" and bool(now) and len(bad) > options.spares
        if no_spare and replan(plan, failures, options, config, machine).nodes < plan.nodes:
            return False
        return no_spare and slurm.requeue_without(bad, plan.nodes + options.spares)

    return run_with_restarts(start, config.run_dir, options.restarts, hand_over) if options.restarts else start([])[0]


def plan_launch(options: argparse.Namespace, machine: Machine, device: str, env: "os._Environ[str] | dict") -> Plan:
    """Choose the launcher, the number of ranks and their nodes; raise a `ConfigError` if options contradict each other or
    the machine."""
    on_cpu = device == "cpu" or machine.devices[0] == "cpu"
    hosts = read_hostfile(options.hostfile) if options.hostfile else {}
    launcher = options.launcher
    if launcher == "auto":
        if detect_launcher(env):
            return Plan("none", 1, 1)
        if hosts:
            launcher = "deepspeed"
        elif "SLURM_JOB_ID" in env:
            launcher = "slurm"
    if options.spares and launcher != "slurm":
        raise ConfigError("--spares are nodes of a Slurm allocation; use --launcher slurm, or omit --spares.")
    if hosts and launcher not in ("deepspeed", "mpi"):
        raise ConfigError(f"--launcher {launcher} does not support --hostfile; use --launcher deepspeed or mpi.")
    nodes, here = 1, (min(2, available_cores()) if on_cpu else machine.device_count)
    if launcher == "slurm":
        nodes, here = slurm.allocation(env, options.spares, on_cpu)
    if hosts:
        slots = set(hosts.values())
        if len(slots) > 1:
            raise ConfigError(
                f"{options.hostfile} lists hosts with different slots ({sorted(slots)}); make them equal."
            )
        nodes, here = len(hosts), slots.pop()
    if options.nproc_per_node != "auto":
        here = _requested_ranks(options, nodes, here, launcher)
    per_rank = slurm.options_per_rank(env, here) if launcher == "slurm" else ()
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
    return Plan(launcher, procs, here, options.hostfile, per_rank=per_rank)


def _requested_ranks(options: argparse.Namespace, nodes: int, here: int, launcher: str) -> int:
    """Return the ranks per machine that --nproc-per-node requests."""
    if not options.nproc_per_node.isdecimal() or int(options.nproc_per_node) < 1:
        raise ConfigError(
            f"--nproc-per-node {options.nproc_per_node!r} is not a number of ranks; use auto, or 1 or more."
        )
    asked = int(options.nproc_per_node)
    if nodes > 1 and launcher == "deepspeed" and asked != here:
        raise ConfigError(
            f"--nproc-per-node {asked} differs from the {here} slots per host in {options.hostfile}; omit it, or change "
            "the slots."
        )
    return asked


def replan(
    plan: Plan, failures: list[Failure], options: argparse.Namespace, config: RunConfig, machine: Machine
) -> Plan:
    """Plan a restart without failed nodes: on spares if available; with --restarts-shrink, with the largest number of
    ranks that works on what is left. Restarts with fewer GPUs have not been tested."""
    bad = faulty_hosts(failures)
    if not options.restarts_shrink:
        return replace(plan, excluded=tuple(bad[-options.spares :] if options.spares else []))
    if plan.launcher == "slurm":
        left = plan.nodes + options.spares - len(bad)
        smaller = [
            replace(plan, procs=n * plan.per_node, excluded=tuple(bad)) for n in range(min(plan.nodes, left), 0, -1)
        ]
    elif plan.nodes == 1 and machine.devices[0] == "cuda":
        most = min(plan.procs, _gpus_now())
        smaller = [replace(plan, procs=n, per_node=n) for n in range(most, 0, -1)]
    else:
        smaller = [plan]
    for one in smaller:
        try:
            plan_topology(config, machine, RankInfo(0, 0, one.procs, one.per_node))
        except ConfigError:
            continue
        return one
    return plan


def _gpus_now() -> int:
    """Count the GPUs in a new process, because torch caches its count."""
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)


def rank_command(plan: Plan, train_args: list[str], on_cpu: bool) -> list[str]:
    """Return the command line that starts the ranks of `smolds train`."""
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
        layout += ["--exclude", ",".join(plan.excluded)] if plan.excluded else []
        return ["srun", *layout, *plan.per_rank, "--kill-on-bad-exit=1", sys.executable, *train]
    start = ["-m", "deepspeed.launcher.runner", "--master_port", str(_free_port()), "--no_local_rank"]
    if plan.hostfile:
        start += ["--hostfile", str(plan.hostfile), "--launcher", "pdsh"]
        # pdsh passes the line to a shell on every host, which would interpret special characters in the arguments.
        if any(re.search(r"[^\w@%+=:,./-]", argument) for argument in train_args):
            train_args = [f"{ENCODED}{base64.urlsafe_b64encode(json.dumps(train_args).encode()).decode()}"]
    else:
        start += ["--num_gpus", procs, "--log_level", "critical"]
        if shutil.which("numactl"):
            start += ["--bind_cores_to_rank"]  # without numactl, the ranks divide the cores themselves
    return [sys.executable, *start, "--module", "smolds_dist", "train", *train_args]


def read_hostfile(path: Path) -> dict[str, int]:
    """Read the slots per host from a DeepSpeed or Open MPI hostfile (lines `host slots=N`)."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "write a line `host slots=N` for each host").splitlines(), 1):
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
        raise ConfigError(f"{path} lists no host; write a line `host slots=N` for each.")
    return hosts


def _check_programs(plan: Plan) -> None:
    needed = {
        "mpi": ("mpirun", "install Open MPI and smolds-dist[mpi]"),
        "slurm": ("srun", "load Slurm's client programs"),
        "deepspeed": ("pdsh", "install pdsh, or use --launcher mpi") if plan.hostfile else ("", ""),
    }
    program, fix = needed.get(plan.launcher, ("", ""))
    if program and not shutil.which(program):
        raise ConfigError(f"--launcher {plan.launcher} needs {program}, which is not installed; {fix}.")


def _run_single(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run one process, forwarding signals; return its exit code and, if it failed, the cause."""
    process = subprocess.Popen(command, env=environment)

    def forward_signal(number: int, _frame: object) -> None:
        if number != signal.SIGINT:  # a terminal sends it to both
            process.send_signal(number)

    with handled_by(forward_signal):
        code = process.wait()
    if code >= 0:
        return code, f"the process ended with exit code {code}"
    return 128 - code, f"the process was killed by signal {-code}"


def run_ranks(command: list[str], environment: dict[str, str], run_dir: Path, remote: bool) -> tuple[int, str]:
    """Run the launcher, forward signals to the ranks, and print one line if they failed.

    Returns:
        The exit code and, if they failed, the cause.
    """
    began = time.time()
    ranks = run_dir / "ranks"
    hidden: list[str] = []
    asked: list[int] = []

    def forward_signal(process: subprocess.Popen, number: int) -> None:
        asked.append(number)
        # torchrun and deepspeed would kill the ranks before they save a checkpoint.
        if remote or not signal_ranks(ranks, number, began):
            process.send_signal(number)

    code, message = run_filtered(command, environment, hidden, forward_signal)
    if code == 0:
        return 0, ""
    stopped = exit_code_of_stop(ranks, began)
    if stopped is not None:
        return stopped, ""
    record_dead_rank(ranks, since=began)  # ranks record the cause unless they were killed
    noted = ranks / "cause.txt"
    cause = (
        noted.read_text(encoding="utf-8", errors="replace").strip()
        if noted.exists() and noted.stat().st_mtime >= began - 1
        else ""
    )
    kill_ranks(ranks, began)
    if ranks.is_dir():
        (ranks / "launcher.log").write_text("".join(hidden), encoding="utf-8")
    how = f"the ranks ended with exit code {code}" if code > 0 else f"the launcher was killed by signal {-code}"
    if code != 2 and not message:
        last_line = next((line.strip() for line in reversed(hidden) if line.strip(" \n=-")), "nothing")
        last = f"{how}; last output: {last_line}"
        print_line(f"\nsmolds: {f'{cause}; the other ranks stop.' if cause else last}", sys.stderr)
    code = code if code > 0 else 128 - code
    if code in EXIT_CODES.values() and not asked:
        code = 1  # srun returns the highest code of all ranks, including those it signaled after another failed
    return code, cause or message.rstrip(".") or how


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OptionParser(
        prog="smolds launch",
        usage="smolds launch [--nproc-per-node N] [--launcher NAME] [--hostfile FILE] [--restarts N] -- TRAIN-OPTIONS",
        description="Start the ranks of `smolds train`.",
        example="smolds launch --nproc-per-node 2 -- --preset debug --run.name pair --data.source text:'corpus/*.txt'",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--nproc-per-node",
        default="auto",
        metavar="N",
        help="ranks per machine; auto = its slots or tasks, else one per GPU, else one per core up to two",
    )
    parser.add_argument("--launcher", default="auto", choices=LAUNCHERS, help="launcher of the ranks (default: auto)")
    parser.add_argument("--hostfile", type=Path, help="file with a line `host slots=N` per machine")
    restarts.add_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    options, train_args = parser.parse_before_training(args)
    restarts.check_options(options)
    return options, train_args


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
