"""`smolds bench NAME`: measurements, each against what a user would pick instead, alternating in one run."""

from smolds_dist.errors import ConfigError


def bench(args: list[str]) -> None:
    """Runs one benchmark.

    Raises:
        ConfigError: for an unknown one.
    """
    from smolds_dist.bench.checkpoint import bench_checkpoint
    from smolds_dist.bench.logging import bench_logging
    from smolds_dist.bench.train import bench_train

    benches = {"train": bench_train, "checkpoint": bench_checkpoint, "logging": bench_logging}
    name, *rest = args or [""]
    if name not in benches:
        raise ConfigError(f"smolds bench {name!r} is unknown; use one of {', '.join(benches)}.")
    benches[name](rest)
