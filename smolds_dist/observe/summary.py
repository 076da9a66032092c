"""The summary printed at the end of a run."""

import shlex
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
    table = f"share of the tokens per expert, last 20 steps:\n{load_table(rows)}"
    return "\n".join(["", *_aligned(lines | facts(rows)), "", table, "", *_aligned(after)])


def facts(rows: list[dict]) -> dict[str, str]:
    """Return speed, memory and balance from the rows of a `metrics.jsonl`, as far as they have them."""
    steps = [row for row in rows if "mfu" in row]
    measured = [row for row in steps if "seconds" in row]
    balanced = next((row for row in reversed(steps) if "load" in row), None)
    found = {}
    if steps:
        speed, share = (median(row[name] for row in steps) for name in ("tokens_per_s", "mfu"))
        found["speed"] = f"{speed:,.0f} tokens/s, MFU {share:.1%}"
    if measured:
        phases = {name: median(row["seconds"][name] for row in measured) for name in measured[-1]["seconds"]}
        shares = {name.replace("_", "-"): seconds / sum(phases.values()) for name, seconds in phases.items()}
        largest_first = sorted(shares.items(), key=lambda item: -item[1])
        found["time of a step"] = ", ".join(f"{name} {share:.1%}" for name, share in largest_first if share)
        found["memory"] = f"{max(row.get('memory_gb', 0.0) for row in measured):.2f} GB on the largest rank"
    if steps and "seen_texts" in steps[-1]:
        seen = f"{steps[-1]['unique_texts']:,} unique of {steps[-1]['seen_texts']:,} seen"
        epochs = [f"{epochs:.3g} epochs of {name}" for name, epochs in steps[-1]["epochs"].items()]
        found["documents"] = ", ".join([seen, *epochs])
    if balanced:
        dead = sum(share == 0 for layer in balanced["load"] for share in layer)
        violation = f"MaxVio {balanced['max_vio_window']:.2f} over the last {WINDOW} steps"
        found["experts"] = f"{violation}, {dead or 'none'} without tokens in the last step"
    return found


def _aligned(lines: dict[str, str]) -> list[str]:
    return [f"{name + ':':<17}{text}" for name, text in lines.items()]
