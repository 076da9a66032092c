"""`smolds plan`: memory, time and the best layout of a run on machines that you do not have yet, and its bottlenecks."""

import argparse
import json
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolds_dist.config import load_config
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.hardware import Hardware, load_hardware
from smolds_dist.costs.layout import load_stretch, most_received
from smolds_dist.costs.memory import checkpoint_bytes, with_vocabulary
from smolds_dist.costs.step_time import RunTime, run_time
from smolds_dist.data.mixture import format_schedule, mixture_of, truncate_schedule
from smolds_dist.errors import ConfigError, OptionParser, check_writable
from smolds_dist.planner.search import Candidate, best_first, candidates, fits, rejection_reason
from smolds_dist.progress import duration
from smolds_dist.rows import read_rows
from smolds_dist.settings import RunConfig
from smolds_dist.stages import format_stages, resolve_stages

if TYPE_CHECKING:
    from smolds_dist.planner.outlook import Outlook


def plan(args: list[str]) -> None:
    """Print the plan and write --json; with --calibrate measure this machine instead."""
    options, train_args = _parse(args)
    if options.calibrate:
        from smolds_dist.bench.calibrate import calibrate

        calibrate(options.calibrate)
        return
    chooses = bool(options.ladder and options.budget_gpu_hours)
    if options.to and not chooses:
        raise ConfigError("--to writes the run that --ladder and --budget-gpu-hours choose; add both.")
    if options.target_tokens and chooses:
        raise ConfigError("--target-tokens is what --ladder and --budget-gpu-hours choose; remove it.")
    config = load_config(train_args, prog="smolds plan --")
    machine = load_hardware(options.hardware)
    per_node = options.devices_per_node or machine.per_node
    machine = machine.shared_by(per_node)
    max_vio = max_vio_of_run(options.loads, config) if options.loads else options.max_vio
    if chooses:
        plan_model(config, machine, per_node, max_vio, options)
        return
    outlook = None
    if options.ladder:
        from smolds_dist.planner.outlook import Outlook, load_fit  # imports scipy

        outlook = Outlook.of(load_fit(options.ladder, config), config)
    found = list(candidates(config, machine, options.nodes, per_node, max_vio))
    ranking = best_first(found, machine)
    best = ranking[0]
    steps = config.train.steps
    if options.target_tokens:
        steps = math.ceil(options.target_tokens / best.tokens_per_step)
    saved = checkpoint_bytes(with_vocabulary(config), best.layout)
    run = run_time(best.time.total, steps, best.layout, machine, config.checkpoint.every, saved)
    if options.budget_gpu_hours and run.device_hours > options.budget_gpu_hours:
        affordable = int(options.budget_gpu_hours / run.device_hours * steps * best.tokens_per_step)
        raise ConfigError(
            f"the run takes {run.device_hours:,.1f} device hours, over --budget-gpu-hours {options.budget_gpu_hours:,.1f}; "
            f"train at most {affordable:,} tokens or a smaller model."
        )
    print(report(config, machine, found, ranking, run, steps, options.top, max_vio, outlook))
    print(f"\nstart it with\n  {command_line(best, run, train_args, options.nodes, per_node)}")
    if options.json:
        options.json.write_text(json.dumps(as_json(machine, ranking, run, steps, outlook), indent=1) + "\n")


def plan_model(
    config: RunConfig, machine: Hardware, per_node: int, max_vio: float, options: argparse.Namespace
) -> None:
    """Print which member of the ladder's family the budget should train, and write its run's settings."""
    from smolds_dist.planner.recommend import Cluster, as_json, describe, read_record, recommend, run_config, write_run

    to = options.to or options.ladder / "recommended.yaml"
    paths = to, to.with_stem(f"{to.stem}-small")
    cluster = Cluster(machine, options.nodes, per_node, options.budget_gpu_hours, max_vio)
    record = read_record(options.ladder, config)
    for path in paths:
        check_writable("--to", path)
    found = recommend(config, record, cluster)
    print(describe(found, cluster))
    for one, path in zip((found.best, found.smallest), paths, strict=True):
        write_run(run_config(one, record, found.lr), path, one.outlook.describe(one.tokens))
        start = command_line(
            replace(one.layout, settings={}), one.run, ["--config", str(path)], options.nodes, per_node
        )
        print(f"\nwrote {path}; start it with\n  {start}")
    if options.json:
        options.json.write_text(json.dumps(as_json(found), indent=1) + "\n")


def report(
    config: RunConfig,
    machine: Hardware,
    found: list[Candidate],
    ranking: list[Candidate],
    run: RunTime,
    steps: int,
    top: int,
    max_vio: float,
    outlook: "Outlook | None",
) -> str:
    """Format the plan as text, with losses if there is an `outlook`."""
    best, model = ranking[0], with_vocabulary(config)
    layout, time = best.layout, best.time
    flops = flops_per_token(model, layout.seq_len)
    shares = sorted(
        ((value / time.total, name.replace("_", " ")) for name, value in asdict(time).items()), reverse=True
    )
    assumed = 1 + load_stretch(max_vio, model.num_experts, layout.expert)
    most = most_received(model.num_experts_per_tok, model.num_experts, layout.expert)
    received = f"  if a rank receives {assumed:,.2f} times the mean rank's rows; the most possible is {most:,.2f}"
    mfu = best.tokens_per_s * flops / layout.world / machine.peak[layout.dtype]
    lines = [
        f"{config.run.name} on {layout.world} x {machine.name}, {layout.dtype}, {best.tokens_per_step:,.0f} tokens/step",
        f"{len(ranking)} of {len(found)} layouts fit; best: {' '.join(best.options)}",
        "",
        f"  {best.tokens_per_s:,.0f} tokens/s, {time.total * 1e3:,.1f} ms/step, MFU {mfu:.1%}",
        "  " + ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.005),
        f"  memory per rank: {best.memory.total / 1e9:,.2f} of {machine.memory / 1e9:,.0f} GB: "
        + ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in best.memory.parts()),
        *([received] if layout.expert > 1 else []),
        f"  {steps:,} steps take {duration(run.seconds)}, {run.device_hours:,.1f} device hours; expected failures: "
        f"{run.expected_failures:,.2f}, costing {duration(run.failures)}; checkpoint stalls: {duration(run.checkpoints)}",
        *(f"  {line}" for line in (*stage_lines(best, machine), *text_needed(config, steps))),
        *([f"  {outlook.describe(steps * best.tokens_per_step)}; below: in the same time"] if outlook else []),
        "",
        f"{'expert':>6} {'zero':>4} {'micro':>5} {'recompute':>9} {'tokens/s':>12}{'    loss' if outlook else ''} "
        f"{'memory':>9}  verdict",
    ]
    for one in [*ranking[:1], *alternatives(found, best, machine)[:top]]:
        at = one.layout
        verdict = "best" if one is best else rejection_reason(one, best, machine)
        loss = f"{outlook.loss_in(run, one):8.4f}" if outlook else ""
        lines.append(
            f"{at.expert:>6} {at.zero:>4} {at.micro_batch:>5} {at.recompute:>9} "
            f"{one.tokens_per_s:>12,.0f}{loss} {one.memory.total / 1e9:>6,.1f} GB  {verdict}"
        )
    return "\n".join(lines)


def text_needed(config: RunConfig, steps: int) -> list[str]:
    """Return lines with the run's schedule and tokens per source, if there are several sources."""
    if not config.data.sources:
        return []
    config = replace(config, train=replace(config.train, steps=steps))
    mixture, samples = mixture_of(config), resolve_stages(config).samples(steps)
    tokens = mixture.tokens(samples).tolist()
    return [
        f"text: {format_schedule(truncate_schedule(mixture.schedule(), samples, steps))}",
        "tokens: " + ", ".join(f"{total:,} of {name}" for name, total in zip(mixture.names, tokens, strict=True)),
    ]


def stage_lines(best: Candidate, machine: Hardware) -> list[str]:
    """Return a line for each stage of the run, if it has several."""
    texts = format_stages(best.worst.span.config.train.stages or [], sum(one.steps for one in best.stages))
    return [
        f"stage {one.span.number}, {text}: {one.layout.tokens_per_step / one.time.total:,.0f} tokens/s, "
        f"{one.memory.total / 1e9:,.2f} of {machine.memory / 1e9:,.0f} GB, {duration(one.steps * one.time.total)}"
        for one, text in zip(best.stages, texts, strict=False)
    ]


def alternatives(found: list[Candidate], best: Candidate, machine: Hardware) -> list[Candidate]:
    """Return, for every other expert-parallel size and ZeRO stage, the best layout that fits, or else the smallest."""

    def rank(one: Candidate) -> tuple[bool, float]:
        fitting = fits(one, machine)
        return not fitting, -one.tokens_per_s if fitting else one.memory.total

    chosen: dict[tuple[int, int], Candidate] = {}
    for one in sorted(found, key=rank):
        chosen.setdefault((one.layout.expert, one.layout.zero), one)
    del chosen[best.layout.expert, best.layout.zero]
    return sorted(chosen.values(), key=lambda one: (not fits(one, machine), -one.tokens_per_s))


def command_line(best: Candidate, run: RunTime, train_args: list[str], nodes: int, per_node: int) -> str:
    """Return the command that starts the best layout: `smolds launch` on one node, `smolds slurm` on several."""
    asked = {name for name in best.settings if any(arg.partition("=")[0] == f"--{name}" for arg in train_args)}
    settings = [option for name, option in zip(best.settings, best.options, strict=True) if name not in asked]
    train = shlex.join([*train_args, *settings])
    if nodes == 1:
        return f"smolds launch --nproc-per-node {per_node} -- {train}"
    hours = max(1, round(run.seconds * 1.2 / 3600 + 0.5))
    devices = f"--gpus-per-node {per_node}" if best.layout.device == "cuda" else f"--tasks-per-node {per_node}"
    return f"smolds slurm --nodes {nodes} {devices} --time {hours}:00:00 -- {train}"


def as_json(
    machine: Hardware, ranking: list[Candidate], run: RunTime, steps: int, outlook: "Outlook | None"
) -> dict[str, Any]:
    found: dict[str, Any] = {"hardware": asdict(machine), "steps": steps, "run": asdict(run)}
    if outlook:
        tokens = steps * ranking[0].tokens_per_step
        found["loss"] = dict(zip(("predicted", "low", "high"), outlook.predict(tokens), strict=True))
    return found | {
        "layouts": [
            {
                "settings": one.settings,
                "tokens_per_s": one.tokens_per_s,
                "seconds": asdict(one.time) | {"total": one.time.total},
                "memory": asdict(one.memory) | {"total": one.memory.total},
            }
            | ({"loss": outlook.loss_in(run, one)} if outlook else {})
            for one in ranking
        ],
    }


def max_vio_of_run(run: Path, config: RunConfig) -> float:
    """Return MaxVio, the mean over layers, of the last step that a run recorded.

    Raises:
        ConfigError: if the run recorded none, or has another number of experts.
    """
    loads = next((row["load"] for row in reversed(read_rows(run / "metrics.jsonl")) if "load" in row), None)
    if loads is None:
        raise ConfigError(f"{run} has no recorded expert loads; name the folder of a run that has trained a step.")
    if len(loads[0]) != config.model.num_experts:
        raise ConfigError(
            f"--loads has {len(loads[0])} experts, the model {config.model.num_experts}; name a run with the same number."
        )
    return sum(max(layer) * len(layer) - 1 for layer in loads) / len(loads)


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OptionParser(
        prog="smolds plan",
        usage="smolds plan --hardware NAME --nodes N [options] -- TRAIN-OPTIONS | smolds plan --calibrate FILE",
        description="Plan a run on any machines: memory, time, traffic and the best layout. Starts nothing.",
        example="smolds plan --hardware h100 --nodes 8 -- --preset moe-7b-a1b",
        allow_abbrev=False,
    )
    hardware = "key in costs/hardware.yaml, or a file written by --calibrate"
    parser.add_argument("--hardware", default="h100", help=hardware)
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument("--devices-per-node", type=int, help="devices per node; default: the hardware's")
    parser.add_argument("--max-vio", type=float, default=0.1, help="most loaded expert's load over the mean, minus 1")
    parser.add_argument("--loads", type=Path, help="run folder whose recorded expert loads replace --max-vio")
    parser.add_argument("--target-tokens", type=float, help="tokens to train on, instead of --train.steps")
    budget = "device hours; a run that takes more is an error; with --ladder, the model that they buy is chosen"
    parser.add_argument("--budget-gpu-hours", type=float, help=budget)
    parser.add_argument("--ladder", type=Path, help="folder of a ladder, whose fit predicts losses")
    parser.add_argument("--to", type=Path, help="output file for the chosen run; default: recommended.yaml in --ladder")
    parser.add_argument("--top", type=int, default=8, help="number of other layouts to list")
    parser.add_argument("--json", type=Path, help="output file for all layouts that fit")
    parser.add_argument("--calibrate", type=Path, help="measure this machine and write a file for --hardware")
    return parser.parse_before_training(args)
