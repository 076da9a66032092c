"""What a person sees of a run while it trains."""

import shlex
import sys
from statistics import median

from smolds_dist.config import Log, RunConfig
from smolds_dist.data.shards import TokenShards
from smolds_dist.progress import ProgressBar
from smolds_dist.train.metrics import WINDOW, load_table, read_rows


class Terminal:
    """Speaks on rank 0 alone, as `log.level` says; warnings always."""

    def __init__(self, log: Log, steps: int, done: int, main: bool):
        self._main = main
        self.shown = main and log.level != "quiet"
        self.verbose = main and log.level == "verbose"
        self._bar = ProgressBar("step", steps, done, log.every, self.shown)

    def step(self, row: dict) -> None:
        """A row of `MetricsWriter.training_row`."""
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        text = f"loss {loss}, {row['tokens_per_s']:,.0f} tokens/s"
        text += ", update skipped: not finite" if row.get("skipped") else f", MaxVio {row['max_vio']:.2f}"
        if self.verbose:
            norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
            text += f", gradient norm {norm}, learning rate {row['lr']:.2e}, {row['mfu']:.1%} of peak FLOP/s"
        self._bar.show(row["step"], text, line=self.verbose)

    def say(self, text: str) -> None:
        """Something worth knowing, on standard output."""
        if self.shown:
            self._bar.write(text, sys.stdout)

    def warn(self, text: str) -> None:
        if self._main:
            self._bar.write(f"warning: {text}", sys.stderr)

    def close(self) -> None:
        self._bar.close()


def summary(config: RunConfig, shards: TokenShards) -> str:
    """The end of a run for a person: what it learned, where time and tokens went, and where to look."""
    rows = read_rows(config.run_dir / "metrics.jsonl")
    steps = [row for row in rows if "tokens_per_s" in row]
    lines = {}
    evaluation = next((row for row in reversed(rows) if "val_loss" in row), None)
    if evaluation:
        lines["validation loss"] = (
            f"{evaluation['val_loss']:.4f} nats per token, {evaluation['val_bits_per_byte']:.3f} bits per byte; "
            f"a model that ignores context reaches {shards.meta.val_unigram_entropy:.4f} (unigram entropy)"
        )
    if steps:
        middle = {name: median(row[name] for row in steps) for name in ("tokens_per_s", "mfu")}
        lines["speed"] = f"{middle['tokens_per_s']:,.0f} tokens/s, {middle['mfu']:.1%} of the peak in matrix products"
    measured = [row for row in steps if "seconds" in row]
    if measured:
        phases = {name: median(row["seconds"][name] for row in measured) for name in measured[-1]["seconds"]}
        shares = {name: seconds / sum(phases.values()) for name, seconds in phases.items()}
        lines["time of a step"] = ", ".join(
            f"{name.replace('_', '-')} {share:.1%}" for name, share in sorted(shares.items(), key=lambda item: -item[1])
        )
        lines["memory"] = f"{max(row['memory_gb'] for row in measured):.2f} GB in the largest rank"
    balanced = next((row for row in reversed(steps) if "load" in row), None)
    if balanced:
        dead = sum(share == 0 for layer in balanced["load"] for share in layer)
        lines["experts"] = (
            f"MaxVio {balanced['max_vio_window']:.2f} over the last {WINDOW} steps, {dead or 'none'} without a token"
        )
    prompt = config.log.sample_prompts[0] if config.log.sample_prompts else ""
    after = {
        "model": f"{config.run_dir}/export",
        "try it": f"smolds generate {config.run_dir} --prompt {shlex.quote(prompt)}",
        "curves": f"smolds board {config.run_dir}",
    }
    table = f"\nshare of the tokens per expert, last 20 steps:\n{load_table(rows)}\n"
    return "\n".join(["", *_aligned(lines), table, *_aligned(after)])


def _aligned(lines: dict[str, str]) -> list[str]:
    return [f"{name + ':':<17}{text}" for name, text in lines.items()]
