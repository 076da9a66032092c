"""`smolds launch`: the command line that starts N ranks on this machine, and runs it."""

import argparse
import os
import shlex
import socket
import subprocess
import sys

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.topology import Machine, RankInfo, available_cores, detect_machine, plan_topology

LAUNCHERS = ("torchrun", "deepspeed")


def launch(args: list[str]) -> int:
    """Checks the run, prepares its data, starts the ranks and returns their exit code.

    Mistakes surface here, once and before any rank starts.

    Raises:
        ConfigError: for options or a configuration that cannot work.
    """
    options, train_args = _parse(args)
    config = load_config(train_args, prog="smolds launch --")
    machine = detect_machine()
    procs = _number_of_ranks(options.procs, machine, config.parallel.device)
    topology = plan_topology(config, machine, RankInfo(0, 0, procs))

    from smolds_dist.data.shards import prepare_shards
    from smolds_dist.train.checkpoint import check_resumable

    check_resumable(config, topology)
    prepare_shards(config)

    command = rank_command(options.launcher, procs, train_args)
    if options.dry_run:
        print(shlex.join(command))
        return 0
    environment = dict(os.environ)
    # Ranks share the cores; with more threads than cores each would wait for the others.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // procs)))
    return subprocess.run(command, env=environment).returncode


def rank_command(launcher: str, procs: int, train_args: list[str]) -> list[str]:
    """The command line that starts `procs` ranks of `smolds train` on this machine."""
    if procs == 1:
        return [sys.executable, "-m", "smolds_dist", "train", *train_args]
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(procs), "-m", "smolds_dist"]
    else:
        start = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(procs), "--master_port", str(_free_port())]
        start += ["--no_local_rank", "--module", "smolds_dist"]
    return [sys.executable, *start, "train", *train_args]


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    train_args = []
    if "--" in args:
        cut = args.index("--")
        args, train_args = args[:cut], args[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="smolds launch",
        usage="smolds launch [--procs N] [--launcher NAME] [--dry-run] -- TRAIN-OPTIONS",
        description="Starts several ranks of `smolds train` on this machine.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--procs", default="auto", help="ranks; auto: one per GPU, else one per core up to two")
    parser.add_argument("--launcher", default="torchrun", choices=LAUNCHERS, help="program that starts the ranks")
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    try:
        options, unknown = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}.") from None
    if unknown:
        raise ConfigError(f"smolds launch does not know {unknown[0]!r}; options of the training go behind `--`.")
    return options, train_args


def _number_of_ranks(procs: str, machine: Machine, device: str) -> int:
    if procs != "auto":
        if not procs.isdecimal() or int(procs) < 1:
            raise ConfigError(f"--procs {procs!r} is no number of ranks; give auto, or 1 or more.")
        wanted = int(procs)
    elif device == "cpu" or machine.devices[0] == "cpu":
        wanted = min(2, available_cores())
    else:
        wanted = machine.device_count
    on_gpu = device in ("auto", "cuda") and machine.devices[0] == "cuda"
    if on_gpu and wanted > machine.device_count:
        raise ConfigError(
            f"--procs {wanted} exceeds the {machine.device_count} GPUs of this machine; lower it, or use "
            "--parallel.device cpu."
        )
    return wanted


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
