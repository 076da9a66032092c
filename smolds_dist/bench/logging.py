"""`smolds bench logging`: what it costs a run to be seen: rows, TensorBoard, and the steps that are measured closely.

Steps with and without close measurement alternate in one process, over the same model; rows are written as in a run.
"""

import platform
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from smolds_dist.bench.common import bench_parser, check_at_least_one, keep
from smolds_dist.config import load_config


def bench_logging(args: list[str]) -> None:
    """Measures, prints the share of a step, and, with --json, writes all numbers.

    Raises:
        ConfigError: for options that are none.
    """
    parser = bench_parser("logging", __doc__)
    parser.add_argument("--repeats", type=int, default=10, help="steps of each kind")
    parser.add_argument("--sequences", type=int, default=1, help="of a step; more make its share smaller")
    options = parser.parse_args(args)
    check_at_least_one(options, "repeats", "sequences")
    folder = Path(tempfile.mkdtemp(prefix="bench-logging-"))
    try:
        result = measure(options.preset, options.repeats, options.sequences, folder)
    finally:
        shutil.rmtree(folder)
    keep(options, result)
    print(f"{result['parameters']:,} parameters, {result['tokens']:,} tokens a step of {result['step_s']:.2f} s")
    rows = 1e3 * result["row_s"], 1e3 * result["measured_row_s"]
    print(f"a row, with TensorBoard: {rows[0]:.2f} ms; of a measured step: {rows[1]:.2f} ms")
    low, high = result["closely_range_s"]
    print(
        f"measuring a step closely, every tenth: {1e3 * result['closely_s']:.1f} ms more (medians; of single pairs: "
        f"{1e3 * low:.1f} to {1e3 * high:.1f})"
    )
    print(f"a run's share of time for being seen: {result['share']:.2%}")


def measure(preset: str, repeats: int, sequences: int, folder: Path) -> dict:
    """Medians of `repeats` steps of each kind, in seconds."""
    import torch

    from smolds_dist.data.prepare import prepare_data
    from smolds_dist.launching.signals import StopRequest
    from smolds_dist.parallel.ranks import RankInfo
    from smolds_dist.parallel.topology import detect_machine, plan_topology
    from smolds_dist.training.build import Job, build, make_model_config
    from smolds_dist.training.step_row import StepResult, sum_up

    steps = 10 * (repeats + 2)
    config = load_config([
        "--preset", preset, "--parallel.engine=local", "--data.source=stdlib", "--data.tokenizer=train",
        "--data.max_tokens=1_000_000",
        f"--train.global_batch={sequences}", f"--train.micro_batch={sequences}", f"--train.steps={steps}",
        f"--run.dir={folder}", "--checkpoint.every=0", "-q",
    ])  # fmt: skip
    if load_config(["--preset", preset]).data.tokenizer != "train":
        config.model.vocab_size = 49_152  # of the Hub's tokenizer, which is not needed here
    topology = plan_topology(config, detect_machine(), RankInfo())
    data = prepare_data(config)
    config.run_dir.mkdir(parents=True)
    times: dict[str, list[float]] = {name: [] for name in ("step", "row", "measured_step", "measured_row")}
    with StopRequest() as stop:
        job = Job(config, topology, data, make_model_config(config, data), 0.0, stop, lambda: None)
        training = build(job, None)

        def take_step(step: int) -> StepResult:
            return sum_up(job, training, training.stepper.take(step, (step - 1) * sequences))

        take_step(1)
        for repeat in range(repeats):
            # Every tenth step is measured, here as in a run; 11 to 19 are not.
            for kind, step in (("", 11 + repeat % 9), ("measured_", 10 * (repeat + 2))):
                begin = time.perf_counter()
                done = take_step(step)
                times[f"{kind}step"].append(time.perf_counter() - begin)
                begin = time.perf_counter()
                training.log.training_row(done.row, done.counts)
                times[f"{kind}row"].append(time.perf_counter() - begin)
        parameters = sum(parameter.numel() for parameter in training.engine.model.parameters())
        training.close()
    of = {name: median(seconds) for name, seconds in times.items()}
    closely = of["measured_step"] - of["step"]
    differences = [ours - plain for ours, plain in zip(times["measured_step"], times["step"], strict=True)]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {topology.device}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__},
        "preset": preset,
        "parameters": parameters,
        "tokens": sequences * config.data.seq_len,
        "dtype": topology.dtype,
        "step_s": of["step"],
        "row_s": of["row"],
        "measured_row_s": of["measured_row"],
        "closely_s": closely,
        "closely_range_s": [min(differences), max(differences)],
        "share": (9 * of["row"] + of["measured_row"] + closely) / 10 / of["step"],
        "seconds": times,
    }
