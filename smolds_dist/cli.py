"""The `smolds` command."""

import contextlib
import gc
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module

from smolds_dist.errors import ConfigError, RankError, RankFailedError
from smolds_dist.files import file_message

FIRST_SPEAKS = 10.0  # seconds that ranks leave the first one to say what all have found wrong

USAGE = """usage: smolds COMMAND [options]

  train      train in this process, or as one rank of a torchrun, deepspeed, mpirun or srun job
  launch     start the ranks that fit this machine or allocation: smolds launch -- TRAIN-OPTIONS
  slurm      write or submit a batch script: smolds slurm --nodes N --time LIMIT [--submit] -- TRAIN-OPTIONS
  plan       memory, time and best layout on any machines: smolds plan --hardware h100 --nodes 8 -- TRAIN-OPTIONS
  doctor     check this machine: smolds doctor
  checkpoint list, verify, convert or remove checkpoints: smolds checkpoint ls runs/NAME
  data       ask what a run is trained on: smolds data show RUN --step N | stats | order -- TRAIN-OPTIONS
  runs       all runs at a glance, or what sets two apart: smolds runs [--watch] | diff runs/A runs/B
  report     write a run's training log, samples and picture: smolds report runs/NAME
  board      open TensorBoard with the experts' curves in front: smolds board [runs/NAME ...]
  bench      measure a training step against its alternatives: smolds bench train
  export     write a checkpoint as a model that plain transformers loads: smolds export runs/NAME --to DIR
  import     make a run of such a model, to continue training from: smolds import DIR --to runs/NAME
  generate   continue a prompt with a trained model: smolds generate runs/NAME --prompt TEXT
  eval       perplexity of a model, or its scores: smolds eval runs/NAME [--data.source SOURCE | --tasks TASK]

`smolds COMMAND --help` tells more, `smolds --version` the version."""

# What each command calls, imported when it is called: it takes the options and returns an exit code, None for 0. All raise
# `ConfigError` where options contradict each other, are out of range, or name what is not there.
COMMANDS = {
    "train": "cli:train_rank",
    "launch": "launching.launcher:launch",
    "slurm": "launching.slurm:slurm",
    "plan": "planner.command:plan",
    "doctor": "launching.doctor:doctor",
    "checkpoint": "checkpoint.command:checkpoint",
    "data": "observe.data_command:data",
    "runs": "observe.runs:runs",
    "report": "observe.report:report",
    "board": "observe.board:board",
    "bench": "bench.train:bench",
    "export": "interchange.export:export",
    "import": "interchange.import_model:import_model",
    "generate": "inference.generate:generate",
    "eval": "inference.evaluate:evaluate_model",
}


def main(words: list[str] | None = None) -> None:
    """Run one command (default: that of this process); a user's mistake ends with one sentence on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="replace")
    # deepspeed puts this in front unless told not to; LOCAL_RANK says the same.
    name, *args = [arg for arg in words or sys.argv[1:] if not arg.startswith("--local_rank=")] or [""]
    if name in ("", "-h", "--help"):
        print(USAGE)
        sys.exit(0 if name else 2)
    if name == "--version":
        from importlib.metadata import version

        print(f"smolds {version('smolds-dist')}")
        return
    try:
        if name not in COMMANDS:
            raise ConfigError(f"smolds {name!r} is not a command; use one of {', '.join(COMMANDS)}.")
        if text := next((arg for arg in args if re.search("[\ud800-\udfff]", arg)), None):
            raise ConfigError(f"the option {text!r} is not UTF-8 text; set LC_ALL=C.UTF-8 and unset PYTHONUTF8.")
        module, _, function = COMMANDS[name].partition(":")
        call = getattr(import_module(f"smolds_dist.{module}"), function)
        with contextlib.nullcontext() if name == "train" else ended_by_signals():
            sys.exit(call(args))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        # A file that cannot be read or written is the user's to fix, as a wrong setting is.
        mistake = isinstance(error, ConfigError)
        if (message := str(error) if mistake else file_message(error)) is None:
            raise
        from smolds_dist.inputs import printable
        from smolds_dist.parallel.ranks import is_first_rank

        # Every rank finds the same mistake; one of them says so. Launchers end all ranks once one has ended: the others wait
        # for that, or the first might be ended before it has spoken.
        if not mistake or isinstance(error, RankError) or is_first_rank(os.environ):
            print("\n".join(map(printable, f"smolds: {message}".split("\n"))), file=sys.stderr)
        else:
            time.sleep(FIRST_SPEAKS)
        sys.exit(1 if name == "train" and not mistake else 2)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the block by an exception on Ctrl-C or SIGTERM, so that nothing half-written is left; exit code 128 + number."""
    asked: list[int] = []

    def end(number: int, _frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: old for number in numbers if (old := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    except Exception:  # code in C may make another exception of the signal's
        if asked:
            sys.exit(128 + asked[0])
        raise
    except KeyboardInterrupt:
        sys.exit(128 + asked[0] if asked else 130)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def train_rank(args: list[str]) -> int:
    """`smolds train`: this process trains, alone or as a rank of a job; returns the exit code."""
    from smolds_dist.config import load_config
    from smolds_dist.parallel.ranks import join_ranks, share_cores

    # Slurm's warning may come before the training listens; it waits until then.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    config = load_config(args, prog="smolds train")  # before the heavy imports, so that a mistake shows at once
    info = join_ranks(config.parallel.timeout)
    share_cores(info)

    # Almost all that imports make stays for good: looking for garbage in it is a quarter of the time in which a run starts.
    gc.disable()
    import transformers

    from smolds_dist.parallel.process_group import end_rank
    from smolds_dist.training.trainer import train

    gc.freeze()
    gc.enable()
    transformers.logging.disable_progress_bar()
    try:
        code = train(config, info)
    except RankFailedError:
        code = 1
    if info.world_size > 1:
        end_rank(code)
    return code
