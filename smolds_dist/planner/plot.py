"""Plot of step time by cause over the number of ranks."""

from dataclasses import fields, replace
from pathlib import Path

from smolds_dist.costs.hardware import Hardware
from smolds_dist.costs.step_time import StepTime
from smolds_dist.errors import ConfigError
from smolds_dist.planner.search import Candidate, best_first, candidates
from smolds_dist.settings import RunConfig

MAX_RANKS = 16_384


def best_by_ranks(config: RunConfig, machine: Hardware, per_node: int, max_vio: float) -> dict[int, Candidate | None]:
    """Return the best layout for 1, 2, 4, ... `MAX_RANKS` ranks, or None if none fits. The global batch grows so that each
    rank has at least one sequence."""
    found: dict[int, Candidate | None] = {}
    for ranks in (2**power for power in range(MAX_RANKS.bit_length())):
        batch = -(-max(config.train.global_batch, ranks) // ranks) * ranks
        given = replace(config, train=replace(config.train, global_batch=batch))
        on_node = min(ranks, per_node)
        try:
            tried = list(candidates(given, machine, ranks // on_node, on_node, max_vio))
            found[ranks] = best_first(tried, machine)[0]
        except ConfigError:
            found[ranks] = None
    return found


def draw(config: RunConfig, machine: Hardware, per_node: int, max_vio: float, path: Path) -> None:
    """Write the plot.

    Raises:
        ConfigError: if no number of ranks has a layout that fits.
    """
    found = best_by_ranks(config, machine, per_node, max_vio)
    if not any(found.values()):
        raise ConfigError(f"no number of ranks up to {MAX_RANKS:,} has a layout that fits {machine.name}.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="tight")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    indices = range(len(found))
    bottom = [0.0] * len(found)
    for field in fields(StepTime):
        # Per token, to compare different global batches.
        heights = [
            getattr(one.time, field.name) * one.layout.world / one.layout.tokens_per_step * 1e6 if one else 0.0
            for one in found.values()
        ]
        if any(heights):
            above.bar(indices, heights, 0.8, bottom, label=field.name.replace("_", " "))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for index, one in zip(indices, found.values(), strict=True):
        text = f"ep {one.layout.expert}\nZeRO {one.layout.zero}" if one else "does\nnot fit"
        above.text(index, bottom[index], text, ha="center", va="bottom", fontsize=7)
    above.set_ylabel("device time per token (µs)")
    above.set_ylim(0, max(bottom) * 1.2)
    above.set_title(f"{config.run.name} on {machine.name}: best layout for each number of ranks")
    above.legend(fontsize=8)
    below.plot(indices, [one.time.total if one else None for one in found.values()], marker="o")
    below.set_yscale("log")
    below.set_ylabel("step time (s)")
    below.set_xlabel(f"ranks; above {config.train.global_batch:,}, the global batch grows with them")
    below.set_xticks(list(indices), [f"{ranks:,}" for ranks in found], rotation=45)
    below.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
