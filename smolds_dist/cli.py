"""The `smolds` command: train, launch, generate."""

import os
import sys

from smolds_dist.errors import ConfigError, RankFailedError

USAGE = """usage: smolds COMMAND [options]

  train      train in this process, or as one rank of a torchrun or deepspeed job
  launch     start several ranks on this machine: smolds launch --procs N -- TRAIN-OPTIONS
  generate   continue a prompt with a trained model: smolds generate runs/NAME --prompt TEXT

`smolds COMMAND --help` tells more."""


def main() -> None:
    """Runs one command; a user's mistake ends with one sentence on stderr and exit code 2."""
    commands = {"train": _train, "launch": _launch, "generate": _generate}
    name, args = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in ("", "-h", "--help"):
        print(USAGE)
        sys.exit(0 if name else 2)
    try:
        if name not in commands:
            raise ConfigError(f"smolds {name!r} is no command; use one of {', '.join(commands)}.")
        commands[name](args)
    except ConfigError as error:
        # Every rank finds the same mistake; one of them says so.
        if os.environ.get("RANK", "0") == "0":
            print(f"smolds: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _train(args: list[str]) -> None:
    from smolds_dist.config import load_config
    from smolds_dist.parallel.ranks import join_ranks, share_cores

    info = join_ranks()  # first, because it says which rank speaks
    config = load_config(args, prog="smolds train")  # before the heavy imports, so that a mistake shows at once
    share_cores(info)

    import transformers

    from smolds_dist.parallel.engine import end_rank
    from smolds_dist.train.trainer import train

    transformers.logging.disable_progress_bar()
    try:
        code = train(config)
    except RankFailedError:
        code = 1
    if info.world_size > 1:
        end_rank(code)
    sys.exit(code)


def _launch(args: list[str]) -> None:
    from smolds_dist.parallel.launcher import launch

    sys.exit(launch(args))


def _generate(args: list[str]) -> None:
    from smolds_dist.generate import generate

    generate(args)
