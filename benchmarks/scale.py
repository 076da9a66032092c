"""`python -m benchmarks scale`: tokens/s on 1, 2, 4, ... ranks, and time by cause.

The tokens per step are constant. On a CPU, ranks divide the machine's cores, so that several cannot be faster than one: the
result is the cost of expert parallelism.
"""

import argparse
from dataclasses import replace
from statistics import median
from typing import Any

from smolds_dist.bench.common import add_dtype, bench_parser, parse, write_result
from smolds_dist.bench.contenders import Task
from smolds_dist.bench.train import describe_machine, log, make_task, run_trial
from smolds_dist.errors import ConfigError

PARTS = ("all_to_all", "optimizer_traffic", "waiting")


def main(args: list[str]) -> None:
    """Measure, print a table and, with --json, write all numbers.

    Raises:
        ConfigError: for unknown options, or more ranks than GPUs.
    """
    parser = bench_parser("python -m benchmarks scale", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks to compare")
    parser.add_argument("--sequences", type=int, default=4, help="sequences per step over all ranks")
    add_dtype(parser)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, with one turn per number of ranks")
    parser.add_argument("--steps", type=int, default=3, help="steps per turn, after one to warm up")
    options, settings = parse(parser, args)
    result = measure(options, settings)
    write_result(options, result)
    print(table(result))


def measure(options: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """Measure speed, and in separate trials with the barriers of `benchmarks.traffic` the time by cause."""
    base = replace(make_task(options, settings), contender="smolds")
    for ranks in options.ranks:
        if ranks < 1 or options.sequences % ranks:
            raise ConfigError(
                f"--ranks {ranks} does not divide --sequences {options.sequences}; choose divisors of it."
            )
    tasks: dict[int, Task] = {n: replace(base, sequences=options.sequences // n) for n in options.ranks}
    tokens = options.sequences * base.seq_len
    rates: dict[int, list[float]] = {ranks: [] for ranks in tasks}
    shares: dict[int, list[dict[str, float]]] = {ranks: [] for ranks in tasks}
    memory: dict[int, float] = dict.fromkeys(tasks, 0.0)
    for number in range(options.rounds):
        for ranks, task in tasks.items():
            log(f"round {number + 1}/{options.rounds}: {ranks} ranks")
            answer = run_trial(task, options.steps, ranks)
            rates[ranks].append(tokens / median(answer["seconds"]))
            memory[ranks] = max(memory[ranks], answer["memory"] / 1e9)
            if ranks > 1:
                shares[ranks] += run_trial(task, options.steps, ranks, module="benchmarks.traffic")["notes"]
    by_ranks = {}
    for ranks in tasks:
        notes = shares[ranks]
        by_ranks[str(ranks)] = {
            "tokens_per_s": median(rates[ranks]),
            "by_round": rates[ranks],
            "memory_gb_of_a_rank": memory[ranks],
            "shares": {part: median([note[part] / note["step"] for note in notes] or [0.0]) for part in PARTS},
        }
    return describe_machine(base) | {"tokens_per_step": tokens, "ranks": by_ranks}


def table(result: dict[str, Any]) -> str:
    """Format speed, also relative to the first row's, and fractions of the time, by number of ranks."""
    lines = [
        f"{result['preset']}, {result['dtype']}, {result['tokens_per_step']:,} tokens/step, on {result['machine']}",
        f"{'ranks':>5}{'tokens/s':>10}{'ratio':>8}{'memory per rank':>18}{'all-to-all':>12}{'optimizer traffic':>19}"
        f"{'waiting':>9}",
    ]
    first = next(iter(result["ranks"].values()))
    for ranks, one in result["ranks"].items():
        ratio = median(ours / base for ours, base in zip(one["by_round"], first["by_round"], strict=True))
        share = one["shares"]
        lines.append(
            f"{ranks:>5}{one['tokens_per_s']:>10,.0f}{ratio:>8.2f}{one['memory_gb_of_a_rank']:>15.2f} GB"
            f"{share['all_to_all']:>12.1%}{share['optimizer_traffic']:>19.1%}{share['waiting']:>9.1%}"
        )
    return "\n".join(lines)
