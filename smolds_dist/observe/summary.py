"""The summary printed at the end of a run."""

import shlex
from itertools import pairwise
from statistics import median

from smolds_dist.observe.rows import WINDOW, load_table, read_rows
from smolds_dist.settings import RunConfig


def summary(config: RunConfig, unigram_entropy: float) -> str:
    """Return losses, speed, memory, data and balance of a run, and the commands to continue with.

    Args:
        unigram_entropy: of the validation set, in nats per token.
    """
    rows = read_rows(config.run_dir / "metrics.jsonl")
    lines = {}
    evaluation = next((row for row in reversed(rows) if "val_loss" in row), None)
    if evaluation:
        lines["validation loss"] = (
            f"{evaluation['val_loss']:.4f} nats per token, {evaluation['val_bits_per_byte']:.3f} bits per byte; "
            f"a model that ignores context reaches {unigram_entropy:.4f} (unigram entropy)"
        )
        by_source = {name.partition("/")[2]: v for name, v in evaluation.items() if name.startswith("val_loss/")}
        if by_source:
            lines["by source"] = ", ".join(f"{name} {loss:.4f}" for name, loss in by_source.items())
    prompt = config.log.sample_prompts[0] if config.log.sample_prompts else ""
    after = {
        "model": f"{config.run_dir}/export",
        "try it": f"smolds generate {config.run_dir} --prompt {shlex.quote(prompt)}",
    }
    if config.log.tensorboard:
        after["curves"] = f"smolds board {config.run_dir}"
    number = min(20, sum("load" in row for row in rows))
    table = f"share of routed tokens per expert, last {number} steps:\n{load_table(rows)}"
    return "\n".join(["", *_aligned(lines | facts(rows)), "", table, "", *_aligned(after)])


def facts(rows: list[dict]) -> dict[str, str]:
    """Return speed, memory and balance from the rows of a `metrics.jsonl`, as far as they have them.

    Speed and memory are those of the last layout.
    """
    steps = [row for row in rows[_last_layout(rows) :] if "mfu" in row]
    measured = [row for row in steps if "seconds" in row]
    balanced = next((row for row in reversed(rows) if "load" in row), None)
    found = {}
    if steps:
        speed, share = (median(row[name] for row in steps) for name in ("tokens_per_s", "mfu"))
        found["speed"] = f"{speed:,.0f} tokens/s, MFU {share:.1%}"
    if measured:
        timed = [row["seconds"] for row in measured if "all_to_all" in row["seconds"]] or [measured[-1]["seconds"]]
        phases = {name: median(seconds.get(name, 0.0) for seconds in timed) for name in timed[-1]}
        shares_by_phase = {name.replace("_", "-"): seconds / sum(phases.values()) for name, seconds in phases.items()}
        largest_first = sorted(shares_by_phase.items(), key=lambda item: -item[1])
        found["time of a step"] = ", ".join(f"{name} {share:.1%}" for name, share in largest_first if share)
        found["memory"] = f"{max(row.get('memory_gb', 0.0) for row in measured):.2f} GB on the largest rank"
    if counted := next((row for row in reversed(rows) if "seen_texts" in row), None):
        seen = f"{counted['unique_texts']:,} unique of {counted['seen_texts']:,} seen"
        epochs = [f"{epochs:.3g} epochs of {name}" for name, epochs in counted["epochs"].items()]
        found["documents"] = ", ".join([seen, *epochs])
    if balanced:
        shares = [share for layer in balanced["load"] for share in layer]
        number = min(WINDOW, sum("load" in row for row in rows))
        violation = f"MaxVio {balanced['max_vio_window']:.2f} over the last {number} steps"
        found["experts"] = f"{violation}, {shares.count(0) or 'none'} of {len(shares)} without tokens in the last step"
    return found


def _last_layout(rows: list[dict]) -> int:
    """Return the index of the first row since the layout or the machine last changed."""
    starts = [index for index, row in enumerate(rows) if row.get("event") == "start"]
    keys = ("topology", "host")
    changes = (b for a, b in pairwise(starts) if [rows[a].get(k) for k in keys] != [rows[b].get(k) for k in keys])
    return max(changes, default=0)


def _aligned(lines: dict[str, str]) -> list[str]:
    return [f"{name + ':':<17}{text}" for name, text in lines.items()]
