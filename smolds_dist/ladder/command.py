"""`smolds ladder`: plan | run | slurm | fit."""

import argparse
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

from smolds_dist.checkpoint.new_folder import check_free
from smolds_dist.costs.hardware import Hardware, known_hardware, load_hardware
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.ladder.costs import table
from smolds_dist.ladder.plan import PLAN, Ladder, make_ladder, write_ladder
from smolds_dist.launching.slurm import add_job_options, check_time
from smolds_dist.parallel.topology import detect_machine
from smolds_dist.planner.family import granularity, parse_size, weights
from smolds_dist.planner.ladder_fit import fit_ladder, report
from smolds_dist.planner.scaling_law import Point, undetermined


def ladder(args: list[str]) -> int:
    """Plan, train or fit a ladder; return the exit code."""
    parts = {"plan": plan, "run": run, "slurm": slurm, "fit": fit}
    parser = OptionParser(
        prog="smolds ladder",
        usage="smolds ladder plan --to DIR -- TRAIN-OPTIONS | run DIR | slurm DIR --time LIMIT | fit DIR",
        description="Plan small runs of a family of models (plan), train them here (run) or in Slurm (slurm), and predict "
        "the loss of large ones (fit). Each part has --help.",
        example="smolds ladder plan --to runs/ladder -- --preset debug",
        allow_abbrev=False,
    )
    parser.add_argument("part", choices=parts, help="part of the command")
    return parts[parser.parse_args(args[:1]).part](args[1:])


def plan(args: list[str]) -> int:
    """Write the plan and print its costs."""
    parser = OptionParser(
        prog="smolds ladder plan",
        usage="smolds ladder plan --to DIR [options] -- TRAIN-OPTIONS",
        description="Plan small runs of several sizes and numbers of tokens, to predict the loss of large ones.",
        example="smolds ladder plan --to runs/ladder --sizes 64x2,96x3,128x4 --hold-out 256x6 -- --preset debug",
        allow_abbrev=False,
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the ladder")
    parser.add_argument("--sizes", help="WIDTHxDEPTH, comma-separated; default: five below the options' model")
    parser.add_argument("--hold-out", help="size to compare with the prediction; default: the largest of --sizes")
    parser.add_argument(
        "--tokens", default="10,20,40", help="tokens of each size: per active weight, or in total such as 4M,8M"
    )
    parser.add_argument("--rates", type=int, default=5, help="learning rates tried on the smallest size (default: 5)")
    parser.add_argument(
        "--hold-out-rates", type=int, default=1, help="learning rates tried on the hold-out size (default: 1, the best)"
    )
    parser.add_argument("--experts", default="", help="numbers of experts of further rungs, comma-separated")
    parser.add_argument("--dense-twins", action="store_true", help="add a dense model with each size's active weights")
    parser.add_argument(
        "--hardware", help="of the costs: key in costs/hardware.yaml, or a file; default: this machine's"
    )
    parser.add_argument("--devices-per-node", type=int, default=1, help="devices of each run (default: 1)")
    options, train_args = parser.parse_before_training(args)
    check_free(options.to)
    sizes = [parse_size(word, "--sizes") for word in (options.sizes or "").split(",") if word]
    words = [word for word in options.experts.split(",") if word]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", word) for word in words):
        raise ConfigError(f"--experts {options.experts!r} is not a list of numbers from 1 on; write 8,16.")
    made = make_ladder(
        train_args, sizes, parse_size(options.hold_out, "--hold-out") if options.hold_out else None, options.tokens,
        options.rates, options.hold_out_rates, [*map(int, words), *([1] if options.dense_twins else [])],
    )  # fmt: skip
    print(table(made, hardware_of(made, options.hardware), options.devices_per_node))
    options.to.mkdir(parents=True, exist_ok=True)
    write_ladder(made, options.to, f"smolds ladder plan {shlex.join(args)}")
    if missing := undetermined(list(points_of(made))):
        print(f"\n`smolds ladder fit` will not be possible: {missing}")
    print(f"\nplanned in {options.to}/ladder.yaml; train it with `smolds ladder run {shlex.quote(str(options.to))}`")
    return 0


def points_of(made: Ladder) -> Iterator[Point]:
    """Yield the points that a plan's runs will give, with a loss of 1."""
    for rung in made.rungs:
        config = made.config_of(rung)
        for steps in rung.steps:
            tokens = steps * made.step_tokens(rung)
            yield Point(*weights(config), tokens, 1.0, granularity=granularity(config), held_out=rung.held_out)


def hardware_of(made: Ladder, name: str | None) -> Hardware:
    """Return the specs of the asked machine, or of this one: typical ones if it is unknown."""
    if name := name or made.config.parallel.hardware:
        return load_hardware(name)
    return known_hardware(detect_machine().name or "cpu") or load_hardware("cpu-2")


def run(args: list[str]) -> int:
    """Train what is missing."""
    parser = OptionParser(
        prog="smolds ladder run",
        usage="smolds ladder run DIR [--jobs N] [--only RUNG]",
        description="Train the runs of a ladder that are not finished: first the learning rates, then every rung.",
        example="smolds ladder run runs/ladder --jobs 2",
        allow_abbrev=False,
    )
    _add_folder(parser)
    parser.add_argument("--only", metavar="RUNG", help="train one rung, after the learning rates; or only `rates`")
    options = parser.parse_args(args)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled
    from smolds_dist.ladder.run import run_ladder  # imports torch

    return run_ladder(options.ladder, options.jobs, options.only, options.nproc_per_node)


def slurm(args: list[str]) -> int:
    """Write the jobs that train what is missing, and optionally submit them."""
    parser = OptionParser(
        prog="smolds ladder slurm",
        usage="smolds ladder slurm DIR --time LIMIT [options] [--submit]",
        description="Write batch scripts that train a ladder: a job for the learning rates, then an array with a task for "
        "each rung. Tasks save before their time limit, are requeued and resume.",
        example="smolds ladder slurm runs/ladder --gpus-per-node 1 --time 4:00:00 --submit",
        allow_abbrev=False,
    )
    _add_folder(parser)
    parser.add_argument("--gpus-per-node", type=int, help="GPUs of each task (default: none, train on CPUs)")
    parser.add_argument("--cpus-per-task", type=int, help="cores of each task (default: Slurm's)")
    add_job_options(parser, "the folder's name", "slurm-JOB_TASK.out")
    options = parser.parse_args(args)
    check_time(options.time)
    from smolds_dist.ladder.slurm import write_jobs

    for line in write_jobs(options.ladder, options):
        print(line)
    return 0


def fit(args: list[str]) -> int:
    """Fit the scaling law to the finished runs and print its report."""
    parser = OptionParser(
        prog="smolds ladder fit",
        usage="smolds ladder fit DIR",
        description="Fit a scaling law to a ladder's finished runs, compare it with the hold-out, and write fit.json and "
        "fit.png.",
        example="smolds ladder fit runs/ladder",
        allow_abbrev=False,
    )
    parser.add_argument("ladder", type=Path, metavar="DIR", help="folder of the ladder")
    options = parser.parse_args(args)
    from smolds_dist.ladder.results import gather, open_ladder

    # Else only the results were kept.
    if (options.ladder / PLAN).is_file() and any(options.ladder.glob("*/config.yaml")):
        gather(open_ladder(options.ladder), options.ladder)
    print(report(fit_ladder(options.ladder)))
    print(f"\nwritten to {options.ladder}/fit.json and fit.png")
    return 0


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ladder", type=Path, metavar="DIR", help="folder of the ladder")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on a machine (default: 1)")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks of each run (default: 1)")
