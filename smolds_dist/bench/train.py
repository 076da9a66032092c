"""`smolds bench train`: compare the tokens/s of a training step with the alternatives'.

Contenders (`bench.contenders`) take turns: in each round every one starts a new process, warms up, and runs some steps. Of
transformers' experts implementations and precisions, with and without `torch.compile`, the fastest in a trial takes part;
compile time does not count. Muon has its own row. "dense" is a ceiling: the same decoder without experts, with one SwiGLU
per layer as wide as a token's experts together. A contender that fails is reported and drops out.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smolds_dist.bench.common import add_dtype, bench_parser, parse, write_result
from smolds_dist.bench.contenders import CONTENDERS, Task
from smolds_dist.config import load_config
from smolds_dist.costs.memory import with_vocabulary
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.rank_environment import threads_per_rank

# Not batched_mm, which gathers a weight for every row: 13 GB for a training batch.
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm")
PRECISIONS = {"bf16": ("autocast", "bf16"), "fp32": ("fp32",)}  # by --dtype
MODES = ("", "/compile")
VARIANTS = [
    f"{experts}/{precision}{mode}"
    for experts in EXPERTS_IMPLEMENTATIONS
    for precision in (*PRECISIONS["bf16"], *PRECISIONS["fp32"])
    for mode in MODES
]
OTHER_COMMIT = "smolds, --against"
LONGEST = 900  # timeout of a contender, in seconds


def bench(args: list[str]) -> None:
    """Run `smolds bench train`: measure, print a table and, with --json, write all numbers.

    Raises:
        ConfigError: for an unknown benchmark or option.
    """
    name, *args = args if args and args[0] not in ("-h", "--help") else ["train", "--help"]
    if name == "launches":
        from smolds_dist.bench.launches import bench_launches

        return bench_launches(args)
    if name != "train":
        raise ConfigError(
            f"smolds bench {name!r} is unknown; use train or launches, or `python -m benchmarks` in a checkout."
        )
    parser = bench_parser("smolds bench train", __doc__)
    parser.add_argument("--sequences", type=int, default=4, help="sequences per step over all ranks")
    add_dtype(parser)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, with one turn per contender")
    parser.add_argument("--steps", type=int, default=3, help="steps per turn, after one to warm up")
    parser.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS), help="contenders")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1], help="ranks of smolds; several shard the experts")
    parser.add_argument(
        "--optimizers", nargs="+", choices=("adamw", "muon"), default=("adamw", "muon"), help="smolds in one process"
    )
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile, which takes minutes")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT",
        help="transformers' variants to try: EXPERTS/PRECISION or EXPERTS/PRECISION/compile; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="begin no round that would exceed these; 0 = no limit"
    )
    parser.add_argument("--against", type=Path, help="checkout of another commit of smolds to compare with")
    options, settings = parse(parser, args)
    if any(one.startswith("--train.optimizer") for one in settings):
        raise ConfigError("--train.optimizer is not an option of smolds bench train; use --optimizers.")
    if any(options.sequences % ranks for ranks in options.ranks):
        raise ConfigError(f"--ranks {options.ranks} does not divide --sequences {options.sequences}; choose divisors.")
    if options.against and not (options.against / "smolds_dist" / "bench" / "contenders.py").is_file():
        raise ConfigError(
            f"--against {options.against} is not a checkout of smolds; create one by `git worktree add FOLDER COMMIT`."
        )
    result = measure(options, settings)
    write_result(options, result)
    print(table(result))
    if own := [f"{name} failed: {text}" for name, text in result["failed"].items() if name.startswith("smolds")]:
        raise ConfigError(f"{'; '.join(own).rstrip('.')}.")


def make_task(options: argparse.Namespace, settings: list[str]) -> Task:
    """Return the task of all contenders."""
    config = load_config(["--preset", options.preset, *settings], benchmark=True)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    vocabulary, length = with_vocabulary(config).vocab_size, config.data.seq_len
    return Task(
        "", options.preset, vocabulary, options.sequences, length, options.dtype, device, settings=tuple(settings)
    )


def describe_machine(task: Task) -> dict[str, Any]:
    """Return the machine, versions and settings of a result."""
    from smolds_dist.parallel.versions import package_versions

    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {task.device}, {torch.get_num_threads()} threads",
        "versions": package_versions(),
        "preset": task.preset,
        "settings": list(task.settings),
        "dtype": task.dtype,
    }


def measure(options: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """Measure all contenders, round by round."""
    from smolds_dist.costs.flops import flops_per_token, largest_products
    from smolds_dist.training.clock import matrix_product_peak

    began = time.monotonic()
    task = make_task(options, settings)
    if task.config().model.force_uniform_routing and options.only != ["smolds"]:
        raise ConfigError("--model.force_uniform_routing is supported by smolds only; add --only smolds.")
    chosen = smolds_variants(task, options) if "smolds" in options.only else {}
    if "dense" in options.only:
        variant = fastest_mode(task, options)
        chosen[f"dense {variant}".rstrip()] = replace(task, contender="dense", variant=variant), 1
    trials: dict[str, float] = {}
    for contender in ("transformers", "trainer", "deepspeed", "masked"):
        if contender in options.only:
            best = best_variant(replace(task, contender=contender), trials, options)
            if best:
                chosen[f"{contender} {best.variant}"] = best, 1

    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    failed: dict[str, str] = {}
    peaks = []
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    model = task.model_config()
    shapes = largest_products(model, options.sequences * task.seq_len)
    for number in range(options.rounds):
        round_began = time.monotonic()
        peaks.append(matrix_product_peak(torch.device(task.device), dtype, 0.5, shapes))
        for name in list(turns):
            log(f"round {number + 1}/{options.rounds}: {name}")
            checkout = options.against if name == OTHER_COMMIT else None
            wanted, ranks = chosen[name]
            try:
                turns[name].append(run_trial(wanted, options.steps, ranks, checkout))
            except ConfigError as error:
                log(f"  {error}")
                failed[name] = str(error)
                del turns[name]
        now = time.monotonic()
        if options.minutes and now + (now - round_began) > began + 60 * options.minutes:
            log(f"no other round fits into {options.minutes:g} minutes")
            break
    if not turns:
        raise ConfigError(f"no contender ran; {next(iter(failed.values()), 'none is left, name others by --only.')}")
    peak = median(peaks)
    flops = flops_per_token(model, task.seq_len)
    tokens = options.sequences * task.seq_len
    results = {}
    for name, answers in turns.items():
        rates = [tokens / median(answer["seconds"]) for answer in answers]
        results[name] = {
            "tokens_per_s": median(rates),
            "by_round": rates,
            "memory_gb": max(answer["memory"] for answer in answers) / 1e9,
            "flops_utilization": median(rates) * flops / peak,
            "compile_seconds": median(sum(answer.get("compiling", ())) for answer in answers),
        }
    return describe_machine(task) | {
        "tokens_per_step": tokens,
        "flops_per_token": flops,
        "matrix_product_peak": peak,
        "trials_tokens_per_s": trials,
        "contenders": results,
        "failed": failed,
    }


def smolds_variants(task: Task, options: argparse.Namespace) -> dict[str, tuple[Task, int]]:
    """Return smolds' own rows, each with its number of ranks; ratios compare with the first."""
    ways = {}
    if 1 in options.ranks:
        for optimizer in options.optimizers:
            own = replace(task, contender="smolds", settings=(*task.settings, f"--train.optimizer={optimizer}"))
            if optimizer == "muon":
                ways["smolds, Muon"] = own, 1
                continue
            if fastest_mode(task, options) == "graphs":
                ways["smolds, graphs"] = replace(own, variant="graphs"), 1
            if not options.no_compile:
                ways["smolds, compiled"] = replace(own, variant="compile"), 1
            ways["smolds"] = own, 1
            if options.against:
                ways[OTHER_COMMIT] = own, 1
    for ranks in options.ranks:
        if ranks > 1:
            own = replace(task, contender="smolds", sequences=options.sequences // ranks)
            ways[f"smolds, {ranks} ranks"] = own, ranks
    return ways


def fastest_mode(task: Task, options: argparse.Namespace) -> str:
    """Return the fastest mode of `contenders.smolds` here: CUDA graphs of compiled code, compiled, or neither."""
    if options.no_compile:
        return ""
    return "graphs" if task.device.startswith("cuda") and task.dtype == "bf16" else "compile"


def variants_of(task: Task, trials: dict[str, float], modes: Sequence[str]) -> list[str]:
    """Return a peer's variants to try: precisions, and for transformers EXPERTS/PRECISION with mode "" or "/compile"."""
    precisions = PRECISIONS[task.dtype]
    if task.contender == "deepspeed":
        precisions = (task.dtype,)  # its engine's own bf16
    if task.contender not in ("transformers", "trainer"):
        return list(precisions)
    variants = []
    for mode in modes:
        kinds: Sequence[str] = EXPERTS_IMPLEMENTATIONS
        tried = {
            name.split()[1]: rate
            for name, rate in trials.items()
            if name.startswith("transformers ") and name.endswith("/compile") == bool(mode)
        }
        if task.contender == "trainer" and tried:
            kinds = [max(tried, key=lambda name: tried[name]).split("/")[0]]  # the loop's best
        variants += [f"{kind}/{precision}{mode}" for kind in kinds for precision in precisions]
    return variants


def best_variant(task: Task, trials: dict[str, float], options: argparse.Namespace) -> Task | None:
    """Return a peer's fastest variant in a trial of two steps, or None if none runs here. Adds its tokens/s to `trials`."""
    variants = variants_of(task, trials, ("",) if options.no_compile else MODES)
    if task.contender in ("transformers", "trainer"):
        variants = [variant for variant in variants if variant in options.variants]
    if len(variants) == 1:  # needs no trial
        return replace(task, variant=variants[0])
    rates = {}
    for variant in variants:
        log(f"trial of {task.contender} {variant}")
        try:
            answer = run_trial(replace(task, variant=variant), 2, 1)
        except ConfigError as error:
            log(f"  {error}")
            continue
        rates[variant] = task.sequences * task.seq_len / min(answer["seconds"])
        trials[f"{task.contender} {variant}"] = rates[variant]
    return replace(task, variant=max(rates, key=lambda variant: rates[variant])) if rates else None


def run_trial(
    task: Task, steps: int, ranks: int, checkout: Path | None = None, module: str = "smolds_dist.bench.contenders"
) -> dict[str, Any]:
    """Start a contender, run a warm-up step and `steps` steps, and return its answer.

    Args:
        checkout: of another commit, to run its code.
        module: that runs the steps.

    Raises:
        ConfigError: if it fails, with its last line of output.
    """
    defaults = asdict(Task("", "", 0, 0, 0, "", ""))
    # An older commit may not know newer fields.
    settings = {name: value for name, value in asdict(task).items() if value != defaults[name]}
    command = [sys.executable, "-m", module, json.dumps(settings)]
    environment = dict(os.environ)
    if ranks > 1:
        command[1:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        environment["OMP_NUM_THREADS"] = str(threads_per_rank(ranks))
    try:
        # In the checkout: -m imports from the working directory first.
        finished = subprocess.run(
            command,
            input=f"1\n{steps}\n",
            capture_output=True,
            text=True,
            env=environment,
            cwd=checkout,
            timeout=LONGEST,
        )
        answers, printed = finished.stdout.splitlines(), finished.stderr.splitlines()
    except subprocess.TimeoutExpired:
        answers, printed = [], []
    if len(answers) < 2:
        raise ConfigError(f"{task.contender} {task.variant} failed: {printed[-1].strip() if printed else 'killed'}")
    return json.loads(answers[1])


def table(result: dict[str, Any]) -> str:
    """Format the contenders as a table, with the ratio of the first (smolds) to each."""
    contenders = result["contenders"]
    lines = [
        f"{result['preset']}, {result['dtype']}, {result['tokens_per_step']:,} tokens/step, on {result['machine']}; "
        f"matmul peak {result['matrix_product_peak'] / 1e9:,.0f} GFLOP/s",
        f"{'':34}{'tokens/s':>10}{'smolds speedup':>26}{'memory':>10}{'MFU':>8}",
    ]
    first = next(iter(contenders.values()))
    for name, one in contenders.items():
        ratios = [ours / theirs for ours, theirs in zip(first["by_round"], one["by_round"], strict=True)]
        ratio = f"{median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(
            f"{name:34}{one['tokens_per_s']:>10,.0f}{ratio:>26}{one['memory_gb']:>7.2f} GB{one['flops_utilization']:>8.1%}"
        )
    return "\n".join([*lines, *(f"{name} failed: {text}" for name, text in result["failed"].items())])


def processor() -> str:
    """Return the CPU's name, as Linux reports it, and the widest vector instructions that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
