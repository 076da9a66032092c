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
from dataclasses import dataclass, replace
from pathlib import Path

from smolds_dist.config import ENCODED, load_config
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.launching import restarts, slurm
from smolds_dist.launching.environment import environment_file, file_option, on_hosts, passed_on
from smolds_dist.launching.hosts import HostWatch, check_hosts, kill_command, read_hostfile, wait_for_hosts
from smolds_dist.launching.output import run_ranks, run_single
from smolds_dist.launching.plan import Plan, is_valid
from smolds_dist.launching.restarts import Failure, faulty_hosts, resume_options, run_with_restarts
from smolds_dist.launching.signals import EXIT_CODES
from smolds_dist.launching.ssh import run_on_hosts
from smolds_dist.parallel.rank_environment import threads_per_rank
from smolds_dist.parallel.ranks import RankInfo, detect_launcher
from smolds_dist.parallel.topology import Machine, available_cores, detect_machine, plan_topology
from smolds_dist.settings import RunConfig

LAUNCHERS = ("auto", "none", "torchrun", "deepspeed", "mpi", "slurm")


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
    variables = passed_on(os.environ, options.export) if plan.hosts else {}
    if plan.port and plan.launcher in ("mpi", "slurm"):
        variables["MASTER_PORT"] = str(plan.port)
    job = Job(options, config, train_args, machine, plan, variables)
    if options.dry_run:
        print(shlex.join(job.command(plan)))
        return 0

    from smolds_dist.checkpoint.resume import prepare_resumed

    _check_start(plan)
    if plan.hosts:
        check_hosts(plan.hosts, options.hostfile)
    prepare_resumed(config)
    return (
        run_with_restarts(job.start, config.run_dir, options.restarts, job.hand_over)
        if options.restarts
        else job.start([])[0]
    )


@dataclass(frozen=True)
class Job:
    """A checked run, and how its ranks are started.

    Args:
        variables: of the ranks, in addition to those of their hosts.
    """

    options: argparse.Namespace
    config: RunConfig
    train_args: list[str]
    machine: Machine
    plan: Plan
    variables: dict[str, str]

    def start(self, failures: list[Failure]) -> tuple[int, str]:
        """Start the ranks, after failures from the newest checkpoint; return the exit code and the cause of a failure."""
        if self.plan.hosts:
            return self._start_on_hosts(again=bool(failures))
        plan = replan(self.plan, failures, self.options, self.config, self.machine) if failures else self.plan
        command = self.command(plan, bool(failures))
        if plan.launcher == "none":
            return run_single(command, self._environment())
        return run_ranks(command, self._environment(), self.config.run_dir, remote=plan.launcher in ("mpi", "slurm"))

    def _start_on_hosts(self, again: bool) -> tuple[int, str]:
        """Start the ranks on the hosts that answer; restart them if a host can be added (--restarts-grow)."""
        plan, ranks = self.plan, self.config.run_dir / "ranks"
        while True:
            if again:
                chosen = wait_for_hosts(self.plan.hosts, self._largest, restarts.log)
                if isinstance(chosen, int):
                    return chosen, ""
                run_on_hosts(dict.fromkeys(chosen.hosts, kill_command(self._mark)))  # what is left on a lost host
                plan = self._with_hostfile(chosen)
            command = self.command(plan, again)
            missing = [host for host in self.plan.hosts if host not in plan.hosts] if self.options.restarts_grow else []
            watch = HostWatch(ranks, plan, self._mark, self.config.parallel.grace, missing, self._largest)
            with environment_file(self._environment_file, self.variables):
                code, cause = run_ranks(command, self._environment(), ranks.parent, plan.launcher == "mpi", watch)
            if not (watch.grows and code == EXIT_CODES[signal.SIGUSR1]):
                return (code if again or code == 0 or watch.started() else 2), cause
            again = True

    def hand_over(self, failures: list[Failure]) -> bool:
        """Requeue a Slurm job without its faulty nodes, if it has no spare for them; return True on success."""
        bad, now = faulty_hosts(failures), faulty_hosts(failures[-1:])
        no_spare = self.plan.launcher == "slurm" and bool(now) and len(bad) > self.options.spares
        if no_spare and replan(self.plan, failures, self.options, self.config, self.machine).nodes < self.plan.nodes:
            return False
        return no_spare and slurm.requeue_without(bad, self.plan.nodes + self.options.spares)

    def command(self, plan: Plan, again: bool = False) -> list[str]:
        """Return the command line that starts the ranks.

        Args:
            again: after a failure.
        """
        args, config = self.train_args, self.config
        if again:
            args = resume_options(config.run_dir, args, config.checkpoint.resume)
        on_cpu = config.parallel.device == "cpu" or self.machine.devices[0] == "cpu"
        return rank_command(plan, args, on_cpu, [self._mark] if plan.hosts else [])

    @property
    def _environment_file(self) -> Path:
        return self.config.run_dir / "environment.json"

    @property
    def _mark(self) -> str:
        """The first option of all ranks on other hosts, by which they can be found there."""
        return file_option(self._environment_file)

    def _environment(self) -> dict[str, str]:
        """Return the environment of the program that starts the ranks."""
        plan = self.plan
        if plan.hosts:
            return on_hosts(os.environ)
        environment = {**os.environ, **self.variables}
        if plan.launcher in ("torchrun", "deepspeed") and plan.nodes == 1:
            # torchrun's default is one thread per rank.
            environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(plan.procs)))
        return environment

    def _largest(self, answering: list[str]) -> Plan | None:
        """Return the plan for a restart on hosts that answer: on all, or with --restarts-shrink on as many as work."""
        hosts = [host for host in self.plan.hosts if host in answering]
        least = 1 if self.options.restarts_shrink else len(self.plan.hosts)
        sizes = range(len(hosts), least - 1, -1)
        smaller = (replace(self.plan, procs=n * self.plan.per_node, hosts=tuple(hosts[:n])) for n in sizes)
        return next((plan for plan in smaller if is_valid(plan, self.config, self.machine)), None)

    def _with_hostfile(self, plan: Plan) -> Plan:
        if plan.hosts == self.plan.hosts:
            return plan
        path = self.config.run_dir / "hostfile"
        path.write_text("".join(f"{host} slots={plan.per_node}\n" for host in plan.hosts), encoding="utf-8")
        return replace(plan, hostfile=path)


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
    if procs == 1 and launcher in ("torchrun", "deepspeed") and not hosts:
        launcher = "none"
    return Plan(launcher, procs, here, options.hostfile, tuple(hosts), options.master_port, per_rank=per_rank)


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
    return next((one for one in smaller if is_valid(one, config, machine)), plan)


def _gpus_now() -> int:
    """Count the GPUs in a new process, because torch caches its count."""
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)


def rank_command(plan: Plan, train_args: list[str], on_cpu: bool, first: list[str]) -> list[str]:
    """Return the command line that starts the ranks of `smolds train`.

    Args:
        first: an option that precedes `train_args`.
    """
    train = ["-m", "smolds_dist", "train", *first, *train_args]
    procs = str(plan.procs)
    if plan.launcher == "none":
        return [sys.executable, *train]
    if plan.launcher == "torchrun":
        at = ["--master-addr", "127.0.0.1", "--master-port", str(plan.port)] if plan.port else ["--standalone"]
        start = ["-m", "torch.distributed.run", *at, "--nproc-per-node", procs]
        return [sys.executable, *start, *train]
    if plan.launcher == "mpi":
        start = ["mpirun", "-n", procs, "--bind-to", "none"]
        if plan.hostfile:
            start += ["--hostfile", str(plan.hostfile), "--map-by", f"ppr:{plan.per_node}:node"]
            start += ["-x", "PYTHONPATH"] if "PYTHONPATH" in os.environ else []
        elif on_cpu:
            start += ["--oversubscribe"]
        if os.geteuid() == 0:
            start += ["--allow-run-as-root"]
        return [*start, sys.executable, *train]
    if plan.launcher == "slurm":
        layout = ["--nodes", str(plan.nodes), "--ntasks", procs, "--ntasks-per-node", str(plan.per_node)]
        layout += ["--exclude", ",".join(plan.excluded)] if plan.excluded else []
        return ["srun", *layout, *plan.per_rank, "--kill-on-bad-exit=1", sys.executable, *train]
    start = ["-m", "deepspeed.launcher.runner", "--master_port", str(plan.port or _free_port()), "--no_local_rank"]
    start += ["--log_level", "critical"]
    if plan.hostfile:
        # --force_multi: a single host need not be this one
        start += ["--hostfile", str(plan.hostfile), "--launcher", "pdsh", "--force_multi", "--no_ssh_check"]
        # pdsh passes the line to a shell on every host, which would interpret special characters in the arguments.
        if any(re.search(r"[^\w@%+=:,./-]", argument) for argument in train_args):
            train_args = [f"{ENCODED}{base64.urlsafe_b64encode(json.dumps(train_args).encode()).decode()}"]
    else:
        start += ["--num_gpus", procs]
    return [sys.executable, *start, "--module", "smolds_dist", "train", *first, *train_args]


def _check_start(plan: Plan) -> None:
    needed = {
        "mpi": ("mpirun", "install Open MPI and smolds-dist[mpi]"),
        "slurm": ("srun", "load Slurm's client programs"),
        "deepspeed": ("pdsh", "install pdsh, or use --launcher mpi") if plan.hostfile else ("", ""),
    }
    program, fix = needed.get(plan.launcher, ("", ""))
    if program and not shutil.which(program):
        raise ConfigError(f"--launcher {plan.launcher} needs {program}, which is not installed; {fix}.")
    if plan.port and plan.launcher != "slurm" and not plan.hosts:  # torchrun would wait for minutes
        try:
            socket.create_server(("", plan.port)).close()
        except OSError as error:
            reason = os.strerror(error.errno or 0)  # its own text repeats the address
            raise ConfigError(
                f"--master-port {plan.port} cannot be used ({reason}); choose another, or omit it for a free one."
            ) from None


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
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME",
        help="environment variable for the hosts of --hostfile, in addition to those of docs/launching.md; repeatable",
    )
    parser.add_argument("--master-port", type=int, metavar="N", help="port of the rendezvous (default: a free one)")
    restarts.add_options(parser)
    parser.add_argument(
        "--restarts-grow",
        action="store_true",
        help="with --restarts-shrink, save and restart when a missing host of --hostfile answers again",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    options, train_args = parser.parse_before_training(args)
    restarts.check_options(options)
    if options.restarts_grow and not (options.restarts_shrink and options.hostfile):
        raise ConfigError("--restarts-grow needs --restarts-shrink and --hostfile; set them too.")
    if options.export and not options.hostfile:
        raise ConfigError("--export is for the hosts of --hostfile; omit it: ranks here have all variables.")
    return options, train_args


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
