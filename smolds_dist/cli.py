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

from smolds_dist.activity import LONG, doing
from smolds_dist.errors import ConfigError, RankError, RankFailedError
from smolds_dist.files import file_message

FIRST_RANK_SECONDS = 10.0  # that other ranks wait for the first one to print an error common to all

USAGE = """usage: smolds COMMAND [options]

  train      train in this process, or as one rank of a torchrun, deepspeed, mpirun or srun job
  launch     start the ranks that fit this machine or allocation: smolds launch -- TRAIN-OPTIONS
  slurm      write or submit a batch script: smolds slurm --nodes N --time LIMIT [--submit] -- TRAIN-OPTIONS
  plan       estimate memory, time and best layout on any machines: smolds plan --hardware h100 --nodes 8 -- TRAIN-OPTIONS
  ladder     predict losses from small runs: smolds ladder plan --to DIR -- TRAIN-OPTIONS | run DIR
  doctor     check this machine, or all hosts of a hostfile: smolds doctor [--hostfile FILE]
  branch     make a run that continues another's checkpoint: smolds branch RUN --step N --to DIR -- TRAIN-OPTIONS
  checkpoint list, verify, convert, average or remove checkpoints: smolds checkpoint ls runs/NAME
  data       show what a run is trained on: smolds data show RUN --step N | stats | order -- TRAIN-OPTIONS
  runs       list all runs, or compare two: smolds runs [--watch] | diff runs/A runs/B
  report     write a run's training log, samples and plot: smolds report runs/NAME
  board      open TensorBoard with the experts' curves pinned: smolds board [runs/NAME ...]
  bench      compare a training step with its alternatives (train), or count its GPU kernels (launches)
  export     write a checkpoint as a model that plain transformers loads: smolds export runs/NAME --to DIR
  import     make a run of such a model, to continue its training: smolds import DIR --to runs/NAME
  generate   continue a prompt with a trained model: smolds generate runs/NAME --prompt TEXT
  eval       compute perplexity or task scores of a model: smolds eval runs/NAME [--data.source SOURCE | --tasks TASK]
  experts    show what each expert has learned to take: smolds experts runs/NAME [--data.source SOURCE]

`smolds COMMAND --help` shows its options, `smolds --version` the version."""

# Function of each command, imported on use: it takes the options and returns an exit code, None for 0. All raise
# `ConfigError` if options contradict each other, are out of range, or name something that does not exist.
COMMANDS = {
    "train": "cli:train_rank",
    "launch": "launching.launcher:launch",
    "slurm": "launching.slurm:slurm",
    "plan": "planner.command:plan",
    "ladder": "ladder.command:ladder",
    "doctor": "launching.doctor:doctor",
    "branch": "training.branch:branch",
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
    "experts": "inference.experts:experts",
}


def main(words: list[str] | None = None) -> None:
    """Run a command (default: from sys.argv); a user error prints one sentence to stderr and exits with code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="replace")
    # deepspeed prepends this by default; LOCAL_RANK has the same value.
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
        with ended_by_signals():
            sys.exit(call(args))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        # The user can fix an unreadable or unwritable file, as a wrong setting.
        user_error = isinstance(error, ConfigError)
        if (message := str(error) if user_error else file_message(error)) is None:
            raise
        from smolds_dist.inputs import printable
        from smolds_dist.parallel.ranks import is_first_rank

        # All ranks find the same error; the first prints it. Launchers end all ranks once one has exited: the others wait
        # for that, or the first might be ended before it has printed.
        if not user_error or isinstance(error, RankError) or is_first_rank(os.environ):
            print("\n".join(map(printable, f"smolds: {message}".split("\n"))), file=sys.stderr)
        else:
            time.sleep(FIRST_RANK_SECONDS)
        sys.exit(1 if name == "train" and not user_error else 2)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `KeyboardInterrupt(signal)` in the block on Ctrl-C or SIGTERM, so that partial files are removed; exit code
    128 + signal."""
    asked: list[int] = []

    def end(number: int, _frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: old for number in numbers if (old := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    except Exception:  # C code may replace the signal's exception by another
        if asked:
            sys.exit(128 + asked[0])
        raise
    except KeyboardInterrupt:
        sys.exit(128 + asked[0] if asked else 130)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def train_rank(args: list[str]) -> int:
    """Train in this process, alone or as a rank of a job (`smolds train`); return the exit code."""
    from smolds_dist.launching.environment import read_environment

    own = read_environment(args)  # before imports that read the environment
    on_hosts, args = own != args, own  # `smolds launch --hostfile` reads the ranks' reports, also a single one's
    from smolds_dist.config import load_config
    from smolds_dist.parallel.rank_environment import set_torch_variables, share_cores
    from smolds_dist.parallel.ranks import host_name, is_first_of_host, is_first_rank, join_ranks

    # Slurm's warning may arrive before training handles it; it stays pending until then.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        config = load_config(args, prog="smolds train")  # before the slow imports: an error is printed immediately
        info = join_ranks(config.parallel.timeout)
    except ConfigError as error:
        if is_first_rank(os.environ) or not is_first_of_host(os.environ) or isinstance(error, RankError):
            raise
        time.sleep(2 * FIRST_RANK_SECONDS)  # rank 0 most likely reports the same error, and this process is ended
        raise RankError(f"on host {host_name()}: {error}") from None
    set_torch_variables()
    share_cores(info, on_gpu=config.parallel.device != "cpu")
    report = None
    if info.world_size > 1 or on_hosts:
        from smolds_dist.launching.failure import RankReport

        report = RankReport(config.run_dir, info, config.parallel)

    # Imported objects are almost all permanent: collecting garbage among them is a quarter of a run's start.
    gc.disable()
    code = 1
    try:
        with doing("importing packages", LONG):
            import transformers

            from smolds_dist.parallel.process_group import end_rank
            from smolds_dist.training.trainer import train
        gc.freeze()
        gc.enable()
        transformers.logging.disable_progress_bar()
        code = train(config, info, report)
    except ImportError as error:
        if report is None:
            raise
        report.fail(error)
        return 1
    except KeyboardInterrupt as error:
        if report:
            report.end("stopped", 128 + error.args[0])
        raise
    except RankFailedError:
        pass
    if info.world_size > 1:
        end_rank(code)
    return code
