"""`python -m benchmarks NAME [options]`: run a benchmark."""

import sys
from importlib import import_module

from smolds_dist.errors import ConfigError

NAMES = ("checkpoint", "data", "dense", "drift", "loss", "plan", "recipe", "rendezvous", "roofline", "scale")


def main() -> None:
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: python -m benchmarks {{{','.join(NAMES)}}} [options]")
        return
    try:
        if name not in NAMES:
            raise ConfigError(f"{name!r} is not a benchmark; use one of {', '.join(NAMES)}.")
        import_module(f"benchmarks.{name}").main(options)
    except ConfigError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
