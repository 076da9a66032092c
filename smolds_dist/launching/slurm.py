"""`smolds slurm`: write a batch script that trains a run or tokenizes its data, and optionally submit it."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.launching import restarts
from smolds_dist.launching.signals import blocked
from smolds_dist.launching.state import SUBMITTED, write_state
from smolds_dist.parallel.ranks import RankInfo, slurm_counts
from smolds_dist.parallel.topology import Machine, plan_topology
from smolds_dist.settings import RunConfig

SCRIPT = """\
#!/usr/bin/env bash
{directives}

# Before the time limit all ranks save and exit with code 75; the job is then requeued and resumes.
trap : TERM # `smolds launch` handles SIGTERM; wait for it
cd {folder} || exit
{python} -m smolds_dist launch --launcher slurm{restarts} -- {options} --checkpoint.resume auto
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""
PREPARE_SCRIPT = """\
#!/usr/bin/env bash
{directives}

# The tasks divide the work through the cache, which all nodes must share; a requeued task tokenizes what is missing.
cd {folder} || exit
exec {python} -m smolds_dist data prepare --workers "${{SLURM_CPUS_PER_TASK:-1}}" -- {options}
"""
# Characters allowed in a directive: nothing that could start another directive or is unusual in a file name.
WORD = re.compile(r"[\w.,:+=@%\[\]/-]+")
TIME = re.compile(r"\d{1,5}-(2[0-3]|[01]?\d)(:[0-5]?\d){0,2}|\d{1,7}(:[0-5]?\d){0,2}")


def slurm(args: list[str]) -> None:
    """Print the script; with --submit, write it to the run's folder, submit it and print the job id."""
    options, train_args = _parse(args)
    config = load_config(train_args, prog="smolds slurm --")
    if any(arg.partition("=")[0] == "--checkpoint.resume" for arg in train_args):
        raise ConfigError("--checkpoint.resume is always auto in a batch job, which may be requeued; omit it.")
    if options.gpus_per_task and options.gpus_per_node:
        raise ConfigError("--gpus-per-node and --gpus-per-task contradict each other; omit one of them.")
    if options.gpus_per_task:
        _check_one_gpu("--gpus-per-task", str(options.gpus_per_task))
    per_node = options.tasks_per_node or options.gpus_per_node or 1
    if options.prepare:
        topology = f"tokenization in {options.nodes} tasks"
    else:
        device = ("cuda", "cpu") if options.gpus_per_node or options.gpus_per_task else ("cpu",)
        machine = Machine(device, options.gpus_per_node or per_node, bf16=True)
        topology = str(plan_topology(config, machine, RankInfo(0, 0, options.nodes * per_node, per_node)))
    script = render(options, config, train_args, per_node)
    if not options.submit:
        print(script, end="")
        return
    check_sbatch()
    path = config.run_dir / ("prepare.sbatch" if options.prepare else "job.sbatch")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    job = submit(path)
    if not options.prepare:
        write_state(config.run_dir, {"job": job, "time": time.time()}, SUBMITTED)
    print(f"submitted job {job}: {topology}")


def render(options: argparse.Namespace, config: RunConfig, train_args: list[str], per_node: int) -> str:
    """Return the batch script of a run's job, or of an array job with `options.nodes` tasks of `smolds data prepare`.

    Names and options cannot inject commands: words are checked, arguments quoted.
    """
    if options.prepare:
        script, name, output = PREPARE_SCRIPT, f"{config.run.name}-prepare", "slurm-%A_%a.out"
        own = {"array": f"0-{options.nodes - 1}", "nodes": 1, "ntasks": 1, "cpus-per-task": options.cpus_per_task or 1}
    else:
        script, name, output = SCRIPT, str(config.run.name), "slurm-%j.out"
        own = {
            "nodes": options.nodes + options.spares,
            "ntasks-per-node": per_node,
            "gpus-per-node": options.gpus_per_node,
            "gpus-per-task": options.gpus_per_task,
            "cpus-per-task": options.cpus_per_task,
            "signal": f"USR1@{options.warn}",
            "open-mode": "append",
        }
    directives = {"job-name": options.job_name or name.replace(" ", "-"), **own, "time": options.time}
    directives |= {"partition": options.partition, "account": options.account, "output": options.output or output}
    again = f" --restarts {options.restarts}" if options.restarts else ""
    again += f" --spares {options.spares}" if options.spares else ""
    again += " --restarts-shrink" if options.restarts_shrink else ""
    return fill(script, directives, restarts=again, options=shlex.join(train_args))


def fill(script: str, directives: dict[str, Any], **values: str) -> str:
    """Return a batch script with its directives (None: omitted), folder, Python and other, quoted values.

    Raises:
        ConfigError: for a directive's value that could be more than a word.
    """
    for name, value in directives.items():
        if value is not None and not WORD.fullmatch(str(value)):
            raise ConfigError(
                f"--{name} {str(value)!r} has characters not allowed in a batch script; use letters, digits and .,:+=@%-_."
            )
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    return script.format(
        directives="\n".join([*lines, "#SBATCH --requeue"]),
        folder=shlex.quote(str(Path.cwd())),
        python=shlex.quote(sys.executable),
        **values,
    )


def submit(path: Path, *options: str) -> str:
    """Submit a batch script and return the job's id.

    Raises:
        ConfigError: if Slurm is not installed or rejects it.
    """
    check_sbatch()
    result = subprocess.run(["sbatch", "--parsable", *options, str(path)], capture_output=True, text=True)
    if result.returncode:
        raise ConfigError(f"sbatch rejected {path}: {result.stderr.strip().removeprefix('sbatch: error: ')}.")
    return result.stdout.strip().partition(";")[0]


def check_sbatch() -> None:
    if not shutil.which("sbatch"):
        raise ConfigError("--submit needs sbatch, which is not installed; use a login node of the cluster.")


Environment = Mapping[str, str]


def allocation(env: Environment, spares: int, on_cpu: bool) -> tuple[int, int]:
    """Return the number of nodes of this process's Slurm allocation, without spares, and the ranks per node; of nodes with
    different numbers of tasks, the smallest."""
    if "SLURM_JOB_ID" not in env:
        raise ConfigError("--launcher slurm needs a Slurm allocation; use salloc or sbatch, or `smolds slurm`.")
    if "SLURM_HET_SIZE" in env:
        raise ConfigError(
            f"SLURM_HET_SIZE is {env['SLURM_HET_SIZE']}, but ranks start in one component of a heterogeneous job; request "
            "all nodes in one component, without `:`."
        )
    nodes = int(env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", 1)))
    tasks, gpus = env.get("SLURM_NTASKS"), env.get("SLURM_GPUS_ON_NODE")
    here = int(env.get("SLURM_NTASKS_PER_NODE") or (gpus if gpus and not on_cpu else 1))
    if tasks and "SLURM_NTASKS_PER_NODE" not in env:
        here = min(slurm_counts(env.get("SLURM_TASKS_PER_NODE", "")) or [int(tasks) // nodes])
    if spares >= nodes:
        raise ConfigError(f"--spares {spares} leaves none of the allocation's {nodes} nodes; request more nodes.")
    return nodes - spares, here


def options_per_rank(env: Environment, per_node: int) -> tuple[str, ...]:
    """Return srun's options for a rank's cores and GPUs, as in the allocation.

    Raises:
        ConfigError: if the ranks of a node need more cores than its smallest node has.
    """
    cpus, gpus, text = (env.get(f"SLURM_{name}") for name in ("CPUS_PER_TASK", "GPUS_PER_TASK", "JOB_CPUS_PER_NODE"))
    cores = min(slurm_counts(text or ""), default=None)
    if cores is not None and per_node * int(cpus or 1) > cores and "SLURM_OVERCOMMIT" not in env:
        raise ConfigError(
            f"{per_node} ranks with {cpus or 1} cores each exceed the {cores} cores of the allocation's smallest node "
            f"(SLURM_JOB_CPUS_PER_NODE is {text}); lower --nproc-per-node, or request more cores."
        )
    if gpus:
        _check_one_gpu("SLURM_GPUS_PER_TASK", gpus)
    return (*(("--cpus-per-task", cpus) if cpus else ()), *(("--gpus-per-task", gpus) if gpus else ()))


def _check_one_gpu(name: str, value: str) -> None:
    if value.rpartition(":")[2] != "1":
        raise ConfigError(f"{name} is {value}, but each rank uses one GPU; use 1.")


@blocked()
def requeue_without(nodes: list[str], needed: int) -> bool:
    """Requeue this batch job on other nodes and log it; return True on success.

    It succeeds if the partition has enough other working nodes. Slurm then ends the job, whose signals this function
    blocks until it returns: Slurm accepts excluded nodes only for a pending job, not for a running one.

    Args:
        nodes: nodes to exclude in addition to the job's excluded nodes.
        needed: the number of nodes the job requests.
    """
    job, partition = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_JOB_PARTITION", "")

    def ask(*command: str) -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()

    try:
        listed = [names for names in ask("squeue", "--noheader", "--jobs", job, "--format", "%x") if names != "(null)"]
        away = set(nodes).union(*(ask("scontrol", "show", "hostnames", names) for names in listed))
        working = ["--states", "idle,alloc,mix", "--format", "%N"]
        others = set(ask("sinfo", "--noheader", "--Node", "--partition", partition, *working)) - away
        if len(others) < needed:
            return False
        names = ",".join(sorted(away))
        print(f"smolds: job {job} is requeued without {names}.", file=sys.stderr, flush=True)
        ask("scontrol", "requeue", job)
        ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={names}")
        return True
    except (OSError, subprocess.SubprocessError) as error:
        message = getattr(error, "stderr", "") or str(error)
        print(f"smolds: job {job} could not be requeued: {message.strip()}", file=sys.stderr, flush=True)
        return False


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    if "--" not in args and not {"-h", "--help"} & set(args):
        raise ConfigError("smolds slurm needs the training options after `--`.")
    parser = OptionParser(
        prog="smolds slurm",
        usage="smolds slurm --nodes N [--gpus-per-node N] --time LIMIT [options] [--submit] -- TRAIN-OPTIONS",
        description="Write a Slurm batch script that saves a checkpoint before its time limit, requeues and resumes.",
        example="smolds slurm --nodes 2 --gpus-per-node 8 --time 4:00:00 -- --preset moe-1b-a200m --run.name big",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes, without spares (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs, and so ranks, per node (default: none, train on CPUs)")
    parser.add_argument("--tasks-per-node", type=int, help="ranks per node (default: one per GPU, or 1)")
    parser.add_argument(
        "--gpus-per-task", type=int, help="1 = each rank sees only its own GPU; instead of --gpus-per-node"
    )
    parser.add_argument("--cpus-per-task", type=int, help="cores per rank or task (default: Slurm's; 1 with --prepare)")
    restarts.add_options(parser)
    add_job_options(parser, "the run's name", "slurm-JOB.out")
    parser.add_argument("--prepare", action="store_true", help="tokenize instead of training, in --nodes tasks")
    options, train_args = parser.parse_before_training(args)
    check_time(options.time)
    restarts.check_options(options)
    return options, train_args


def add_job_options(parser: argparse.ArgumentParser, name: str, output: str) -> None:
    """Add the options that every job has; `name` and `output` are their defaults in the help."""
    parser.add_argument("--time", default="", help="time limit: minutes, H:MM:SS or D-HH:MM:SS")
    parser.add_argument(
        "--warn", type=int, default=120, help="seconds before the limit at which all ranks save and stop (default: 120)"
    )
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--account", help="Slurm account")
    parser.add_argument("--job-name", help=f"job name (default: {name})")
    parser.add_argument("--output", help=f"job output file (default: {output})")
    parser.add_argument("--submit", action="store_true", help="submit the job and print its id")


def check_time(limit: str) -> None:
    if not TIME.fullmatch(limit):
        raise ConfigError(f"--time {limit!r} is not a time limit; use minutes, H:MM:SS or D-HH:MM:SS.")
