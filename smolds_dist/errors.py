"""Errors, and the option parser that raises them."""

import argparse
import errno
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn


class ConfigError(Exception):
    """A setting that cannot work. The message is one sentence that names the value, the rule and the fix.

    The command line prints it and exits with code 2, without a traceback.
    """


class RankError(ConfigError):
    """An error of the ranks themselves; printed by the rank that raises it, since others may not exist."""


class RankFailedError(Exception):
    """Training failed on this rank; the error has already been printed and logged."""


class TrainingStoppedError(Exception):
    """Training stopped on all ranks: the loss diverged, or checkpoints cannot be written.

    The message is one sentence with the fix; the command line prints it once and exits with code 1.
    """


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without a full stop."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


class OptionParser(argparse.ArgumentParser):
    """argparse's parser, raising `ConfigError` instead of exiting.

    Args:
        example: a command line for the end of `--help`.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.epilog = f"example: {example}" if example else None

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse options and check all numbers and paths: ranges, and that output files can be written."""
        options, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            given = getattr(options, action.dest, None)
            if given is not action.default:
                for value in given if isinstance(given, list) else [given]:
                    _check_value(str([action.metavar or action.dest, *action.option_strings][-1]), value)
        return options, rest

    def add_checkpoint_options(self, default: str) -> None:
        """Add the choice of a run's checkpoint and of its weights.

        Args:
            default: what is read without `--step`.
        """
        self.add_argument("--step", type=int, help=f"step of the run's checkpoint; default: {default}")
        text = "weights of the checkpoint: trained, or ema = their moving average (--train.ema)"
        self.add_argument("--weights", choices=("trained", "ema"), default="trained", help=text)

    def parse_before_training(self, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return this command's options and the training options after `--`.

        Raises:
            ConfigError: for an unknown option before `--`.
        """
        cut = args.index("--") if "--" in args else len(args)
        options, unknown = self.parse_known_args(args[:cut])
        if unknown:
            raise ConfigError(
                f"{self.prog} does not know {unknown[0]!r}; `{self.prog} --help` lists its options, and training options go "
                "after `--`."
            )
        return options, args[cut + 1 :]


ABOVE_0 = math.ulp(0)
Bounds = tuple[float, float]  # lowest and highest value


def ranges(table: dict[Bounds, str]) -> dict[str, Bounds]:
    """Map each name to its bounds, from space-separated names."""
    return {name: bounds for bounds, names in table.items() for name in names.split()}


# Ranges of the commands' numbers; default: 0 to 10^9, or to 10^30 with decimals.
RANGES = ranges({
    (ABOVE_0, 1): "--top-p",
    (ABOVE_0, 10**9): "--every",
    (ABOVE_0, 1e30): "--budget-gpu-hours",
    (0, 1): "--upcycle-noise --upcycle-drop",
    (0, 65_535): "--port",
    (1, 65_535): "--master-port",
    (0, 2**62): "--seed",
    (1, 10**4): "--devices-per-node --top",
    (1, 10**6): "--nodes",
    (1, 10**9): "--batch-size --cpus-per-task --gpus-per-node --gpus-per-task --jobs --max-new-tokens --megabytes "
    "--min-count --nproc-per-node --ranks --rates --repeats --rounds --sequences --steps --tasks-per-node "
    "--upcycle-granularity --warn --workers",
    (1, 1e30): "--target-tokens",
    (2, 10**9): "--ablate --max-tokens",
})  # fmt: skip
WRITTEN = ("--json", "--calibrate")  # files written at the end of a command


def _check_value(option: str, value: Any) -> None:
    """Raise a `ConfigError` for a number out of range or an invalid path."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        check_range(option, value, RANGES.get(option, (0, 10**9 if isinstance(value, int) else 1e30)))
    if isinstance(value, Path):
        text = str(value)
        if "\0" in text or len(text) > 4000 or any(len(name.encode()) > 255 for name in text.split("/")):
            raise ConfigError(
                f"{option} {text[:20]!r}... is not a path; the limit is 255 bytes for a name, without NUL."
            )
        if option in WRITTEN:
            check_writable(option, value)


def check_range(option: str, value: float, bounds: Bounds, otherwise: str = "") -> None:
    """Raise a `ConfigError` for a number out of bounds, including NaN; `otherwise` is appended to the rule."""
    least, most = bounds
    if least <= value <= most:
        return
    rule = {ABOVE_0: "be more than 0", 0: "be 0 or more"}.get(least, f"be at least {least}")
    if (least, most) == (0, 1):
        rule = "lie between 0 and 1"
    elif value > most:
        rule = f"be at most {most:,}"
    raise ConfigError(f"{option} {str(value)[:40]} is out of range; it must {rule}{otherwise}.")


def check_writable(option: str, path: Path) -> None:
    """Raise a `ConfigError` if the option's file cannot be written, before the work for it."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not path.exists():
            with tempfile.TemporaryFile(dir=path.parent):
                return
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"{option} {path} cannot be written ({error.strerror}); name a file in a folder that exists and is writable."
        ) from None
