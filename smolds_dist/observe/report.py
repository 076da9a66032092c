"""`smolds report RUN...`: a training log, the samples and a picture, made anew from what a run has written.

Everything comes from the run's folder: `metrics.jsonl`, `samples.jsonl`, `config.yaml` and the checkpoints' manifests.
"""

import re
import signal
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from smolds_dist.checkpoint.files import Manifest, manifests_of
from smolds_dist.config import load_config
from smolds_dist.data.mixture import format_schedule, mixture_of
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.files import replace_text, replaced
from smolds_dist.launching.signals import EXIT_CODES
from smolds_dist.launching.state import read_state
from smolds_dist.observe.markdown import fenced, inline, table
from smolds_dist.observe.overview import column_of, events, overview, smooth
from smolds_dist.observe.rows import dense_layers, load_table, read_rows, read_settings
from smolds_dist.observe.trackers import Feed
from smolds_dist.rules import trackers_in
from smolds_dist.settings import Model, saved_sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NGRAM = 3
UNIQUE_CONTENT = (
    f"Unique content is the share of distinct {NGRAM}-grams among all {NGRAM}-grams of a sample: words and single marks, "
    "spaces left out, the prompt included. 1 means that nothing is said twice; text that goes round in circles comes near 0 "
    "(distinct-n, arXiv 1510.03055, section 5.3)."
)
LOSS_ROWS = 25


def report(args: list[str]) -> None:
    """Writes the reports and prints their paths."""
    parser = OptionParser(
        prog="smolds report",
        description="Writes log_training.md, sample_outputs.md and training_metrics.png; several runs share a picture.",
        example="smolds report runs/first runs/second --to comparison",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder (runs/NAME)")
    parser.add_argument(
        "--rebuild-tensorboard", action="store_true", help="also write TensorBoard's files anew, from metrics.jsonl"
    )
    parser.add_argument(
        "--html", action="store_true", help="also write report.html, one page with all of it, to look at and to send"
    )
    parser.add_argument(
        "--send", metavar="TRACKER", default="", help="give wandb, mlflow or trackio what it has not got of these runs"
    )
    parser.add_argument("--to", type=Path, help="folder to write to; the run's own where there is one run")
    options = parser.parse_args(args)
    for run in options.runs:
        _check(run)
    if trackers := trackers_in(options.send, "--send"):
        for run in options.runs:
            send(run, trackers)
        return
    if len(options.runs) > 1 and options.to is None:
        raise ConfigError("several runs share a picture; name a folder for it with --to.")
    folder = options.to or options.runs[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--to {folder} cannot be made ({error.strerror}); choose another folder.") from None
    written = [folder / "training_metrics.png"]
    with replaced(written[0]) as part:
        figure_of(options.runs).savefig(part, format="png")
    if len(options.runs) == 1:
        texts = {"log_training.md": training_log(options.runs[0]), "sample_outputs.md": sample_log(options.runs[0])}
        for name, text in texts.items():
            replace_text(folder / name, text)
            written.append(folder / name)
    if options.html:
        from smolds_dist.observe.page import html_page

        replace_text(folder / "report.html", html_page(options.runs))
        written.append(folder / "report.html")
    if options.rebuild_tensorboard:
        from smolds_dist.observe.tensorboard import rebuild

        written += map(rebuild, options.runs)
    for path in written:
        print(path)


NEEDED = {
    "loss": ("tokens", "tokens_per_s"), "val_loss": ("val_bits_per_byte",), "load": ("max_vio", "max_vio_window"),
    "seen_texts": ("unique_texts", "epochs"),
}  # fmt: skip


def _check(run: Path) -> None:
    """Raise a `ConfigError` for a run without steps, or with rows that lack what goes with what they have."""
    path = run / "metrics.jsonl"
    rows, samples = read_rows(path), read_rows(run / "samples.jsonl")
    if not any("loss" in row for row in rows):
        raise ConfigError(f"{run} holds no training steps; name a run's folder, such as runs/NAME.")
    for row in rows:
        lacking = [n for kind, names in NEEDED.items() if kind in row for n in names if row.get(n) is None]
        if lacking or row.get("tokens_per_s", 1.0) <= 0:
            wrong = f"lacks {lacking[0]}" if lacking else f"has tokens_per_s {row['tokens_per_s']}"
            raise ConfigError(f"{path}: a row of step {row['step']} {wrong}; remove that line.")
    if len({(len(load), *{len(layer) for layer in load}) for row in rows if (load := row.get("load"))}) > 1:
        raise ConfigError(f"{path}: its rows have loads of different numbers of experts; remove the wrong lines.")
    for row in samples:
        if not {"text", "prompt"} <= row.keys():
            raise ConfigError(f"{run / 'samples.jsonl'}: a row of step {row['step']} lacks its text; remove that line.")


def send(run: Path, trackers: list[str]) -> None:
    """Gives trackers what they have not got of a run."""
    config = read_settings(run)
    rows = read_rows(run / "metrics.jsonl")
    code = {"failed": 1, "stopped": EXIT_CODES[signal.SIGTERM]}.get(read_state(run).get("state", ""), 0)
    for feed in [Feed(name, run, config, rows) for name in trackers]:
        feed.close(code)


def unique_content(text: str) -> float | None:
    """See `UNIQUE_CONTENT`; None for a text with fewer than `NGRAM` words and marks."""
    words = re.findall(r"\w+|[^\w\s]", text)
    grams = Counter(tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))
    return len(grams) / grams.total() if grams else None


def training_log(run: Path) -> str:
    """The run as Markdown: configuration, model, loss at regular steps, expert balance, checkpoints, events."""
    rows = read_rows(run / "metrics.jsonl")
    config = read_settings(run)
    manifests = list(manifests_of(run / "checkpoints").values())
    parts = [
        f"# Training log of {run.resolve().name}",
        table(("", ""), overview(rows, manifests)),
        "## Loss",
        table(("step", "tokens", "loss", "validation loss", "bits per byte", "gradient norm", "MaxVio"), _losses(rows)),
        "## Expert balance",
        "Share of the routed tokens per expert, last 20 steps:",
        fenced(load_table(rows)),
        "## Data",
        table(("source", "text", "epochs", "validation loss", "bits per byte"), _sources(config, rows)),
        *_mixture(run, config),
        "## Checkpoints",
        table(("step", "written", "size", "validation loss", "layout"), [*map(_checkpoint, reversed(manifests))])
        if manifests
        else "None.",
        "## Events",
        "\n".join(f"- {event}" for event in events(rows)) or "None.",
        "## Configuration",
        fenced(yaml.safe_dump(config, sort_keys=False).strip(), "yaml"),
        "## Model",
        fenced(_model_printout(config, manifests)),
    ]
    return "\n\n".join(parts) + "\n"


def sample_log(run: Path) -> str:
    """Prompts and samples at each interval as Markdown, each with its unique content."""
    parts = [f"# Samples of {run.resolve().name}", UNIQUE_CONTENT]
    rows = read_rows(run / "samples.jsonl")
    for step, samples in groupby(rows, key=itemgetter("step")):
        parts.append(f"## Step {step}")
        for row in samples:
            share = unique_content(row["text"])
            ratio = "too short for a ratio" if share is None else f"unique content {share:.2f}"
            parts += [f"Prompt {inline(row['prompt'])}, {ratio}:", fenced(row["text"])]
    return "\n\n".join(parts if rows else [*parts, "None."]) + "\n"


def figure_of(runs: list[Path]) -> "Figure":
    """Loss and unique texts over steps, expert balance beside them; a line for each run."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    # An opaque light ground reads the same on light and dark pages.
    figure = Figure(figsize=(12, 7.5), dpi=110, facecolor="white", layout="constrained")
    (loss_axes, balance_axes), (unique_axes, last_axes) = figure.subplots(2, 2)
    colors = rcParams["axes.prop_cycle"].by_key()["color"]
    for number, run in enumerate(runs):
        color, name = colors[number % len(colors)], run.resolve().name
        rows = read_rows(run / "metrics.jsonl")
        for axes, column, label in ((loss_axes, "loss", f"{name}, training"), (balance_axes, "max_vio", name)):
            steps, values = column_of(rows, column)
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values), color=color, linewidth=1.6, label=label)
        steps, values = column_of(rows, "val_loss")
        if values:
            line = dict(color=color, marker="o", markersize=5, linestyle="--", markeredgecolor="black")
            loss_axes.plot(steps, values, label=f"{name}, held out", **line)
        unique_axes.plot(
            *column_of(rows, "seen_texts"), color=color, linewidth=1, linestyle="--", label=f"{name}, seen"
        )
        unique_axes.plot(*column_of(rows, "unique_texts"), color=color, linewidth=1.8, label=f"{name}, distinct")
        if len(runs) > 1:
            last_axes.plot(*column_of(rows, "tokens_per_s"), color=color, label=name)
    _finish(loss_axes, "Loss", "nats per token")
    _finish(
        balance_axes, "Expert imbalance (MaxVio of a batch, mean of layers)", "busiest expert over the mean, minus 1"
    )
    balance_axes.set_ylim(bottom=0)
    _finish(unique_axes, "Unique content: texts trained on, by their first 50 tokens", "texts")
    unique_axes.set(xlim=loss_axes.get_xlim(), ylim=(0, None))
    if len(runs) == 1:
        _draw_load(figure, last_axes, rows)
    else:
        _finish(last_axes, "Speed", "tokens per second")
    return figure


def _draw_load(figure: "Figure", axes: Any, rows: list[dict]) -> None:
    loads = [row["load"] for row in rows if "load" in row][-20:]
    if not loads:
        axes.set_axis_off()
        return
    load_LE = np.mean(loads, 0)
    layers, experts = load_LE.shape
    picture = axes.imshow(load_LE * experts, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    axes.set(title="Load of every expert, last 20 steps (1: its even share)", xlabel="expert", ylabel="layer")
    axes.set_xticks(range(experts) if experts <= 16 else range(0, experts, experts // 8))
    ticks, first = range(layers) if layers <= 12 else range(0, layers, 4), dense_layers(rows)
    axes.set_yticks(ticks, [str(first + layer) for layer in ticks])
    figure.colorbar(picture, ax=axes)


def _finish(axes: Any, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _losses(rows: list[dict]) -> list[tuple]:
    """About `LOSS_ROWS` training steps at regular distances, and every evaluated one."""
    steps = {row["step"]: row for row in rows if "loss" in row}
    evaluated = {row["step"]: row for row in rows if "val_loss" in row}
    every = max(1, len(steps) // LOSS_ROWS)
    chosen = sorted({*list(steps)[::every], *evaluated, max(steps)} & set(steps))

    table = []
    for step in chosen:
        row, evaluation = steps[step], evaluated.get(step, {})
        table.append((
            step, f"{row['tokens']:,}", _cell(row, "loss") or "not finite", _cell(evaluation, "val_loss"),
            _cell(evaluation, "val_bits_per_byte", 3), _cell(row, "grad_norm", 3), _cell(row, "max_vio", 2),
        ))  # fmt: skip
    return table


def _cell(row: dict, name: str, digits: int = 4) -> str:
    return "" if row.get(name) is None else f"{row[name]:.{digits}f}"


def _sources(config: dict, rows: list[dict]) -> list[tuple]:
    """What the run has taken of each source, and how it does on its held-out text."""
    sources = saved_sources(config["data"])
    epochs: dict = next((row["epochs"] for row in reversed(rows) if "epochs" in row), {})
    evaluation: dict = next((row for row in reversed(rows) if "val_loss" in row), {})
    table = []
    for name, one in sources.items():
        own = "" if len(sources) == 1 else f"/{name}"
        loss, bits = _cell(evaluation, f"val_loss{own}"), _cell(evaluation, f"val_bits_per_byte{own}", 3)
        table.append((name, f"`{one.source}`", f"{epochs[name]:.3g}" if name in epochs else "", loss, bits))
    return table


def _mixture(run: Path, config: dict) -> list[str]:
    """The stages in words, where there are several sources."""
    if not config["data"].get("sources"):
        return []
    mixture = mixture_of(load_config(["--config", str(run / "config.yaml")]))
    return [f"The mixture: {format_schedule(mixture.schedule(), config['train']['global_batch'])}."]


def _checkpoint(manifest: Manifest) -> tuple:
    size = sum(entry["bytes"] for entry in manifest.files.values()) / 1e9
    loss = _cell({"loss": manifest.val_loss}, "loss")
    return manifest.step, manifest.created[:16].replace("T", " "), f"{size:.3f} GB", loss, manifest.layout


def _model_printout(config: dict, manifests: list[Manifest]) -> str:
    """What PyTorch prints of the model, which is built without memory."""
    if not manifests:
        return "(known from the first checkpoint on)"
    import torch

    from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM

    vocabulary = manifests[0].tensors["model.embed_tokens.weight"][0]
    with torch.device("meta"):
        architecture = Model(**config["model"]).architecture()
        model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**architecture | {"vocab_size": vocabulary}))
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{model}\n\n{count:,} parameters"
