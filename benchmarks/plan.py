"""`python -m benchmarks plan`: compare the planner's predictions with measured memory and time, and published throughput.

Memory: a process's peak over real steps, for every number of ranks, ZeRO stage and size. Time: the machine is calibrated
with one process, then steps of several ranks are measured and predicted. Layout: every expert-parallel size is measured, and
the one that "auto" chooses must be the fastest or close to it. Recompute: each kind of activation checkpointing. Published:
one half of `published.yaml` fits two parameters per GPU generation, and the other tests them.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.published import HALVES, WITHIN, compare, error_factor, fit
from smolds_dist.bench.calibrate import (
    SEQ_LEN,
    SEQUENCES,
    measure_machine,
    measure_step,
    model_of,
    predict,
    settings_of,
)
from smolds_dist.bench.common import write_result
from smolds_dist.bench.train import log, processor
from smolds_dist.config import load_config
from smolds_dist.costs.hardware import parse_hardware
from smolds_dist.costs.layout import Layout
from smolds_dist.costs.memory import PROCESS_BYTES, parameter_counts, rank_memory
from smolds_dist.costs.step_time import step_time
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import detect_machine, expert_sizes, plan_topology
from smolds_dist.planner.search import RECOMPUTED

# Large enough that the model's memory dominates the process's.
MEMORY_SIZES = (
    dict(hidden_size=384, intermediate_size=512, num_hidden_layers=4, vocab_size=16384),
    dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, vocab_size=16384),
    dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, vocab_size=32768),
)
MEMORY_STEPS = 20  # glibc's heap grows until then
TIME_SIZES = (
    dict(hidden_size=192, intermediate_size=256, num_hidden_layers=4, vocab_size=8192),
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=6, vocab_size=8192),
    dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=3, vocab_size=16384),
)

LAYOUT_SIZES = (*TIME_SIZES, dict(hidden_size=384, intermediate_size=256, num_hidden_layers=6, vocab_size=8192))
LAYOUT_ROUNDS = 2  # with one turn per size
RECOMPUTED_ROUNDS = 2


def main(args: list[str]) -> None:
    """Measure, print a table for each kind, and with --json write all numbers.

    Raises:
        ConfigError: for unknown options, or if a measured process fails.
    """
    parser = OptionParser(
        prog="python -m benchmarks plan",
        description=(__doc__ or "").partition("\n")[0],
        example="python -m benchmarks plan --what memory published --sizes 1 --json plan.json",
    )
    parser.add_argument("--what", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), help="predictions to compare")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages for memory")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype for memory")
    parser.add_argument("--steps", type=int, default=MEMORY_STEPS, help="steps before memory is measured")
    parser.add_argument("--sizes", type=int, default=3, help="number of models, smallest first, 1 to 3")
    parser.add_argument("--json", type=Path, help="output file for the result")
    options = parser.parse_args(args)
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, not {options.steps}.")
    if not 1 <= options.sizes <= 3 or any(SEQUENCES % ranks for ranks in options.ranks):
        raise ConfigError(f"--sizes must be between 1 and 3, and --ranks must divide {SEQUENCES}.")
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": processor()}
    for kind in options.what:
        result[kind], text = KINDS[kind](options)
        print(text)
    write_result(options, result)


def check_memory(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Compare the predicted with the measured peak of a rank's resident memory."""
    rows = []
    for size in MEMORY_SIZES[: options.sizes]:
        for ranks in options.ranks:
            for zero in options.zero:
                row = compare_memory(size, ranks, zero, options.dtype, options.steps)
                ratio = row["predicted"] / row["measured"]
                log(f"memory: hidden {size['hidden_size']}, {ranks} ranks, ZeRO {zero}: predicted/measured {ratio:.3f}")
                rows.append(row)
    text = [f"{'parameters':>10} {'ranks':>5} {'zero':>4} {'predicted':>10} {'measured':>10} {'ratio':>6}"]
    for row in rows:
        text.append(
            f"{row['parameters'] / 1e6:>8,.0f} M {row['ranks']:>5} {row['zero']:>4} {row['predicted'] / 1e9:>7,.2f} GB "
            f"{row['measured'] / 1e9:>7,.2f} GB {row['predicted'] / row['measured']:>6.2f}"
        )
    return rows, "\n".join(text)


def compare_memory(
    size: dict[str, int], ranks: int, zero: int, dtype: str = "fp32", steps: int = MEMORY_STEPS
) -> dict[str, Any]:
    """Predict and measure the memory of one layout."""
    import torch

    engine = "deepspeed" if ranks > 1 or zero else "local"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = Layout(ranks, ranks, ranks, zero, SEQUENCES // ranks, 1, SEQ_LEN, dtype, device=device, engine=engine)
    settings = (f"--parallel.zero={zero}", f"--parallel.engine={engine}")
    _, measured = measure_step(size, ranks, settings, dtype, steps)
    # On a GPU, the measurement is PyTorch's allocated memory.
    predicted = rank_memory(model_of(size), layout, PROCESS_BYTES["cpu"] if device == "cpu" else 0.0)
    parameters = sum(parameter_counts(model_of(size)))
    return {
        "parameters": parameters, "ranks": ranks, "zero": zero, "dtype": dtype, "steps": steps,
        "predicted": predicted.total, "measured": measured, "parts": dict(predicted.parts()),
    }  # fmt: skip


def check_time(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compare predicted with measured step times, on this machine calibrated with one process."""
    entry = measure_machine()
    machine = parse_hardware("here", entry)
    rows = []
    for size in TIME_SIZES[: options.sizes]:
        for ranks in options.ranks:
            log(f"time: hidden {size['hidden_size']}, {ranks} ranks")
            seconds, _ = measure_step(size, ranks, ("--parallel.zero=1",))
            rows.append(
                {
                    "size": size,
                    "ranks": ranks,
                    "predicted": predict(model_of(size), machine, ranks),
                    "measured": median(seconds),
                }
            )
    text = [f"{'hidden':>6} {'layers':>6} {'ranks':>5} {'predicted':>10} {'measured':>10} {'ratio':>6}"]
    for row in rows:
        at = row["size"]
        text.append(
            f"{at['hidden_size']:>6} {at['num_hidden_layers']:>6} {row['ranks']:>5} {row['predicted'] * 1e3:>7,.0f} ms "
            f"{row['measured'] * 1e3:>7,.0f} ms {row['predicted'] / row['measured']:>6.2f}"
        )
    return {"hardware": entry, "steps": rows}, "\n".join(text)


def check_recomputation(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compare memory and relative slowdown of each kind of activation checkpointing in one process."""
    entry = measure_machine()
    machine = parse_hardware("here", entry)
    rows: list[dict[str, Any]] = []
    plain = ("--parallel.engine=local",)  # DeepSpeed's own buffers would hide the activations
    for size in MEMORY_SIZES[: options.sizes]:
        seconds: dict[str, list[float]] = {recompute: [] for recompute in RECOMPUTED}
        memory = dict.fromkeys(RECOMPUTED, 0)
        for _ in range(RECOMPUTED_ROUNDS):
            for recompute in RECOMPUTED:
                log(f"recompute: hidden {size['hidden_size']}, {recompute}")
                found, peak = measure_step(size, settings=(f"--train.activation_checkpointing={recompute}", *plain))
                seconds[recompute] += found
                memory[recompute] = max(memory[recompute], peak)
        layout = Layout(1, 1, 1, 0, SEQUENCES, 1, SEQ_LEN, "fp32", device=machine.device, engine="local")
        process = PROCESS_BYTES["cpu"] if machine.device == "cpu" else 0.0
        for recompute in RECOMPUTED:
            at, model = replace(layout, recompute=recompute), model_of(size)
            times = (step_time(model, one, machine).total for one in (at, layout))
            rows.append(
                {
                    "size": size, "recompute": recompute,
                    "memory": {"predicted": rank_memory(model, at, process).total, "measured": memory[recompute]},
                    "slower": {"predicted": next(times) / next(times),
                               "measured": median(a / b for a, b in zip(seconds[recompute], seconds["none"], strict=True))},
                }
            )  # fmt: skip
    text = ["hidden layers recompute   memory  measured  ratio  slower measured"]
    for row in rows:
        size, memory, slower = row["size"], row["memory"], row["slower"]
        text.append(
            f"{size['hidden_size']:>6} {size['num_hidden_layers']:>6} {row['recompute']:>9} "
            f"{memory['predicted'] / 1e9:>5,.2f} GB {memory['measured'] / 1e9:>6,.2f} GB "
            f"{memory['predicted'] / memory['measured']:>6.2f} {slower['predicted']:>7.2f} {slower['measured']:>8.2f}"
        )
    return {"hardware": entry, "layouts": rows}, "\n".join(text)


def check_layouts(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compare the expert-parallel size that `plan_topology` chooses on this machine with measured step times."""
    entry = measure_machine()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        hardware = Path(folder) / "here.yaml"
        hardware.write_text(yaml.safe_dump({"here": entry}))
        for size in LAYOUT_SIZES[: options.sizes + 1]:
            for ranks in (ranks for ranks in options.ranks if ranks > 1):
                chosen = chosen_size(size, ranks, hardware)
                seconds: dict[int, list[float]] = {one: [] for one in expert_sizes(ranks, model_of(size).num_experts)}
                for _ in range(LAYOUT_ROUNDS):
                    for expert, found in seconds.items():
                        found += measure_step(size, ranks, ("--parallel.zero=1", f"--parallel.expert={expert}"))[0]
                medians = {expert: median(found) for expert, found in seconds.items()}
                log(f"layout: hidden {size['hidden_size']}, {ranks} ranks: {chosen} of {medians}")
                rows.append({"size": size, "ranks": ranks, "chosen": chosen, "seconds": medians})
    text = [
        f"{'hidden':>6} {'layers':>6} {'ranks':>5} {'chosen':>6} {'of the fastest':>14}  ms/step by expert-parallel size"
    ]
    for row in rows:
        at, medians = row["size"], row["seconds"]
        share = min(medians.values()) / medians[row["chosen"]]
        times = ", ".join(f"{expert}: {seconds * 1e3:,.0f}" for expert, seconds in medians.items())
        text.append(
            f"{at['hidden_size']:>6} {at['num_hidden_layers']:>6} {row['ranks']:>5} {row['chosen']:>6} {share:>14.2f}  "
            f"{times}"
        )
    return {"hardware": entry, "steps": rows}, "\n".join(text)


def chosen_size(size: dict[str, int], ranks: int, hardware: Path) -> int:
    """Return the expert-parallel size that "auto" chooses."""
    given = [*settings_of(size), f"--data.seq_len={SEQ_LEN}", f"--train.global_batch={SEQUENCES}"]
    config = load_config(["--preset", "debug", *given, f"--parallel.hardware={hardware}", "--parallel.zero=1"])
    return plan_topology(config, detect_machine(), RankInfo(0, 0, ranks)).expert


def check_published(_options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compare predicted with published tokens/s per device in each half, and fit the parameters on the first half.

    Marks errors above `WITHIN`.
    """
    found = compare()
    text, errors = [], {}
    for half in HALVES:
        own = [one for one in found if one.run.half == half]
        hits = sum(one.hit for one in own)
        errors[half] = {"runs": len(own), "factor": error_factor(own), "hits": hits}
        text.append(f"{half:70} {'published':>9} {'predicted':>9} {'ratio':>6}")
        for one in own:
            mark = "" if one.hit else "  missed"
            text.append(f"{one.run.name:70} {one.run.published:>9,.0f} {one.predicted:>9,.0f} {one.ratio:>6.2f}{mark}")
        text.append(f"median error: a factor of {error_factor(own):.2f}; {hits} of {len(own)} within {WITHIN:.0%}\n")
    figures = fit()
    text.append(f"{'fitted on the first half':30} {'runs':>4} {'utilization':>11} {'overhead':>8}")
    for key, (utilization, overhead, runs) in figures.items():
        text.append(f"{key:30} {runs:>4} {utilization:>11.2f} {overhead * 1e3:>5.1f} ms")
    rows = [
        {
            "run": one.run.name,
            "source": one.run.source,
            "half": one.run.half,
            "published": one.run.published,
            "predicted": one.predicted,
            "hit": one.hit,
        }
        for one in found
    ]
    chosen = {
        key: {"utilization": share, "overhead": seconds, "runs": n} for key, (share, seconds, n) in figures.items()
    }
    return {"errors": errors, "figures": chosen, "runs": rows}, "\n".join(text)


KINDS = {
    "memory": check_memory, "time": check_time, "layout": check_layouts, "recompute": check_recomputation,
    "published": check_published,
}  # fmt: skip
