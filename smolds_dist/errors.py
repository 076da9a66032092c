"""The one error type for a user's mistakes, and the parser that raises it."""

import argparse
from typing import Any, NoReturn


class ConfigError(Exception):
    """A setting that cannot work. The message is one sentence that names the value, the rule and the fix.

    The command line prints it and exits with code 2, without a traceback.
    """


class RankError(ConfigError):
    """What is wrong with the ranks themselves; whoever raises it tells it, for it may be the only one."""


class RankFailedError(Exception):
    """A rank's training ended in an error that has been told and logged already."""


class TrainingStoppedError(Exception):
    """Training that cannot go on, on all ranks alike: the loss has diverged, or checkpoints cannot be written.

    The message is one sentence with the fix; the command line prints it once and exits with code 1.
    """


def first_line(error: Exception) -> str:
    """An error's message in a sentence of ours."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


class OptionParser(argparse.ArgumentParser):
    """argparse's parser, which tells a mistake as a `ConfigError` instead of ending the process.

    Args:
        example: a command line that `--help` shows at its end.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.epilog = f"example: {example}" if example else None

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.")

    def parse_before_training(self, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """This command's options, and those of the training behind `--`; raises a `ConfigError` for an option before it that
        is none of this command's."""
        cut = args.index("--") if "--" in args else len(args)
        options, unknown = self.parse_known_args(args[:cut])
        if unknown:
            raise ConfigError(f"{self.prog} does not know {unknown[0]!r}; options of the training go behind `--`.")
        return options, args[cut + 1 :]


def check_at_least(least: int, options: argparse.Namespace, *names: str) -> None:
    """Raises a `ConfigError` that names the first of these options that is set to a lower value."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g} is out of range; it must be at least {least}.")
