"""`python -m benchmarks checkpoint`: seconds that a save stalls training, compared with DeepSpeed's `save_checkpoint`.

Both save the same state of the same DeepSpeed engine (ZeRO 1, one process), in turn, to the same disk.
"""

import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from smolds_dist.bench.common import bench_parser, write_result
from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError


def main(args: list[str]) -> None:
    """Measure, print a table and, with --json, write all numbers.

    Raises:
        ConfigError: for unknown options.
    """
    parser = bench_parser("python -m benchmarks checkpoint", __doc__)
    parser.add_argument("--repeats", type=int, default=5, help="saves by each")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="output folder")
    options = parser.parse_args(args)
    options.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.dir))
    try:
        result = measure(options.preset, options.repeats, folder)
    finally:
        shutil.rmtree(folder)
    write_result(options, result)
    print(f"{result['parameters']:,} parameters, {result['ours']['gigabytes']:.2f} GB of state")
    print(f"{'':22}{'training stall':>22}{'until on disk':>22}")
    for name, label in (("ours", "smolds"), ("deepspeed", "DeepSpeed")):
        print(f"{label:22}{result[name]['stall_s']:>20.2f} s{result[name]['total_s']:>20.2f} s")
    low, high = result["ratio_range"]
    print(f"ratio of medians: {result['ratio']:.3f} (of single pairs: {low:.3f} to {high:.3f})")
    print(
        f"a training step takes {result['step_s']:.2f} s, {result['step_while_writing_s']:.2f} s while a checkpoint is "
        f"written; the copy's {result['ours']['gigabytes']:.2f} GB of host memory are allocated in the background, in "
        f"{result['prepare_s']:.1f} s"
    )


def measure(preset: str, repeats: int, folder: Path) -> dict:
    """Return medians of `repeats` saves by each; the table explains them."""
    import torch

    from smolds_dist.bench.contenders import smolds_step
    from smolds_dist.checkpoint.writer import CheckpointWriter, TrainState
    from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
    from smolds_dist.parallel.balancer import Balancer
    from smolds_dist.parallel.fragments import tensor_shapes
    from smolds_dist.parallel.make_engine import make_engine
    from smolds_dist.parallel.process_group import start_process_group
    from smolds_dist.parallel.ranks import RankInfo
    from smolds_dist.parallel.topology import detect_machine, plan_topology

    options = ["--parallel.engine=deepspeed", "--parallel.zero=1", "--train.global_batch=1", "--train.dtype=auto"]
    config = load_config(["--preset", preset, *options, f"--run.dir={folder}", "--checkpoint.keep_best=false"])
    topology = plan_topology(config, detect_machine(), RankInfo())
    start_process_group(topology)
    settings = config.model.architecture() | {"vocab_size": config.model.vocab_size or 49_152}
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**settings))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine: Any = make_engine(model, config, topology)
    balancer = Balancer(engine.model, config.train.balance_rate)
    ids = torch.randint(0, settings["vocab_size"], (1, 256), generator=torch.Generator().manual_seed(0))
    step = partial(smolds_step, engine, balancer, ids)
    for _ in range(2):
        step()
    writer = CheckpointWriter(config, topology, tensor_shapes(model), lambda samples: {})
    writer.prepare(engine)
    prepare_s = _seconds(writer.wait)
    plain = folder / "deepspeed"
    times: dict[str, list[float]] = {name: [] for name in ("stall", "total", "deepspeed", "step", "step_while_writing")}
    for repeat in range(repeats):
        times["step"].append(_seconds(step))
        begin = time.perf_counter()
        writer.save(engine, balancer, TrainState(step=repeat + 1), None)
        times["stall"].append(time.perf_counter() - begin)
        writer.wait()
        times["total"].append(time.perf_counter() - begin)
        times["deepspeed"].append(_seconds(partial(engine.engine.save_checkpoint, str(plain), tag="one")))
        shutil.rmtree(plain)
        writer.save(engine, balancer, TrainState(step=1000 + repeat), None)
        times["step_while_writing"].append(_seconds(step))
        writer.wait()
        error = writer.failure()
        if error:
            raise ConfigError(
                f"the checkpoint cannot be written ({error}); set --dir to a folder with more disk space."
            )
    newest = max((folder / str(config.run.name) / "checkpoints").glob("step_*"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    engine.close()
    ratios = [ours / theirs for ours, theirs in zip(times["stall"], times["deepspeed"], strict=True)]
    import deepspeed

    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {topology.device}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        "preset": preset,
        "parameters": parameters,
        "dtype": topology.dtype,
        "ours": {"stall_s": median(times["stall"]), "total_s": median(times["total"]), "gigabytes": size / 1e9},
        "deepspeed": {"stall_s": median(times["deepspeed"]), "total_s": median(times["deepspeed"])},
        "ratio": median(times["stall"]) / median(times["deepspeed"]),
        "ratio_range": [min(ratios), max(ratios)],
        "prepare_s": prepare_s,
        "step_s": median(times["step"]),
        "step_while_writing_s": median(times["step_while_writing"]),
        "seconds": times,
    }


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
