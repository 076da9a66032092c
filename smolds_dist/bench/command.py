"""`smolds bench NAME`: measurements, each against what a user would pick instead, alternating in one run."""

from smolds_dist.errors import ConfigError


def bench(args: list[str]) -> None:
    """Runs one benchmark.

    Raises:
        ConfigError: for an unknown one.
    """
    from smolds_dist.bench.balance import bench_balance
    from smolds_dist.bench.checkpoint import bench_checkpoint
    from smolds_dist.bench.data import bench_data
    from smolds_dist.bench.dense import bench_dense
    from smolds_dist.bench.generate import bench_generate
    from smolds_dist.bench.logging import bench_logging
    from smolds_dist.bench.loss import bench_loss
    from smolds_dist.bench.plan import bench_plan
    from smolds_dist.bench.roofline import bench_roofline
    from smolds_dist.bench.scale import bench_scale
    from smolds_dist.bench.train import bench_train
    from smolds_dist.bench.upcycle import bench_upcycle

    benches = {
        "train": bench_train, "loss": bench_loss, "balance": bench_balance, "scale": bench_scale,
        "checkpoint": bench_checkpoint, "logging": bench_logging, "generate": bench_generate,
        "plan": bench_plan, "data": bench_data, "upcycle": bench_upcycle, "roofline": bench_roofline,
        "dense": bench_dense,
    }  # fmt: skip
    name, *rest = args or [""]
    if name in ("-h", "--help"):
        print(f"usage: smolds bench {{{','.join(benches)}}} [options]\n\nexample: smolds bench train --preset debug")
        return
    if name not in benches:
        raise ConfigError(f"smolds bench {name!r} is unknown; use one of {', '.join(benches)}.")
    benches[name](rest)
