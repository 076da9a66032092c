"""`smolds report RUN...`: training log, samples and plot of runs.

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
from smolds_dist.rules import check_tracker
from smolds_dist.settings import Model, saved_sources
from smolds_dist.stages import format_stages, resolve_stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NGRAM = 3
UNIQUE_CONTENT = (
    f"Unique content is the share of distinct {NGRAM}-grams among all {NGRAM}-grams of a sample, prompt included (of words "
    "and punctuation marks). 1 = no repetition; looping text is close to 0 (distinct-n, arXiv 1510.03055, section 5.3)."
)
LOSS_ROWS = 25


def report(args: list[str]) -> None:
    """Write the reports and print their paths."""
    parser = OptionParser(
        prog="smolds report",
        description="Write log_training.md, sample_outputs.md and training_metrics.png; for several runs, one plot of all.",
        example="smolds report runs/first runs/second --to comparison",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run (runs/NAME)")
    parser.add_argument(
        "--rebuild-tensorboard", action="store_true", help="also rewrite TensorBoard's files from metrics.jsonl"
    )
    parser.add_argument("--html", action="store_true", help="also write report.html, a self-contained page")
    parser.add_argument("--send", choices=("wandb",), help="send missing rows of these runs to this tracker")
    parser.add_argument("--to", type=Path, help="output folder; default: the run's, if there is one")
    options = parser.parse_args(args)
    for run in options.runs:
        _check(run)
    if options.send:
        check_tracker(options.send, "--send")
        for run in options.runs:
            send(run, options.send)
        return
    if len(options.runs) > 1 and options.to is None:
        raise ConfigError("reports of several runs need an output folder; set --to.")
    folder = options.to or options.runs[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--to {folder} cannot be created ({error.strerror}); choose another folder.") from None
    written = [folder / "training_metrics.png"]
    with replaced(written[0]) as unfinished:
        figure_of(options.runs).savefig(unfinished, format="png")
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
    "seen_texts": ("unique_texts", "epochs"), "weight": ("gradient", "update", "max_activation", "max_logits"),
}  # fmt: skip


def _check(run: Path) -> None:
    """Raise a `ConfigError` for a run without steps, or for rows with missing values."""
    path = run / "metrics.jsonl"
    rows, samples = read_rows(path), read_rows(run / "samples.jsonl")
    if not any("loss" in row for row in rows):
        raise ConfigError(f"{run} has no training steps; use a run's folder, such as runs/NAME.")
    for row in rows:
        lacking = [n for kind, names in NEEDED.items() if kind in row for n in names if row.get(n) is None]
        if lacking or row.get("tokens_per_s", 1.0) <= 0:
            wrong = f"lacks {lacking[0]}" if lacking else f"has tokens_per_s {row['tokens_per_s']}"
            raise ConfigError(f"{path}: a row of step {row['step']} {wrong}; remove that line.")
    if len({(len(load), *{len(layer) for layer in load}) for row in rows if (load := row.get("load"))}) > 1:
        raise ConfigError(f"{path}: rows differ in their number of experts; remove the wrong lines.")
    for row in samples:
        if not {"text", "prompt"} <= row.keys():
            raise ConfigError(f"{run / 'samples.jsonl'}: a row of step {row['step']} lacks its text; remove that line.")


def send(run: Path, tracker: str) -> None:
    """Send missing rows of a run to a tracker."""
    config = read_settings(run)
    rows = read_rows(run / "metrics.jsonl")
    code = {"failed": 1, "stopped": EXIT_CODES[signal.SIGTERM]}.get(read_state(run).get("state", ""), 0)
    Feed(tracker, run, config, rows).close(code)


def unique_content(text: str) -> float | None:
    """See `UNIQUE_CONTENT`; None for a text with fewer than `NGRAM` words and marks."""
    words = re.findall(r"\w+|[^\w\s]", text)
    grams = Counter(tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))
    return len(grams) / grams.total() if grams else None


def training_log(run: Path) -> str:
    """Return the run as Markdown: configuration, model, loss at regular steps, expert balance, checkpoints, events."""
    rows = read_rows(run / "metrics.jsonl")
    config = read_settings(run)
    manifests = list(manifests_of(run / "checkpoints").values())
    sections = [
        f"# Training log of {run.resolve().name}",
        table(("", ""), overview(rows, manifests)),
        "## Loss",
        table(("step", "tokens", "loss", "validation loss", "bits per byte", "gradient norm", "MaxVio"), _losses(rows)),
        "## Expert balance",
        "Share of the routed tokens per expert over the last 20 steps:",
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
    return "\n\n".join(sections) + "\n"


def sample_log(run: Path) -> str:
    """Return prompts and samples by step as Markdown, each with its unique content."""
    sections = [f"# Samples of {run.resolve().name}", UNIQUE_CONTENT]
    rows = read_rows(run / "samples.jsonl")
    for step, samples in groupby(rows, key=itemgetter("step")):
        sections.append(f"## Step {step}")
        for row in samples:
            share = unique_content(row["text"])
            ratio = "too short for a ratio" if share is None else f"unique content {share:.2f}"
            sections += [f"Prompt {inline(row['prompt'])}, {ratio}:", fenced(row["text"])]
    return "\n\n".join(sections if rows else [*sections, "None."]) + "\n"


def figure_of(runs: list[Path]) -> "Figure":
    """Plot loss and unique documents over steps, and expert balance; one line per run."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    # An opaque light background looks the same on light and dark pages.
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
            loss_axes.plot(steps, values, label=f"{name}, validation", **line)
        unique_axes.plot(
            *column_of(rows, "seen_texts"), color=color, linewidth=1, linestyle="--", label=f"{name}, seen"
        )
        unique_axes.plot(*column_of(rows, "unique_texts"), color=color, linewidth=1.8, label=f"{name}, unique")
        if len(runs) > 1:
            last_axes.plot(*column_of(rows, "tokens_per_s"), color=color, label=name)
    _finish(loss_axes, "Loss", "nats per token")
    _finish(balance_axes, "Expert imbalance (MaxVio of a batch, mean of layers)", "largest load over the mean, minus 1")
    balance_axes.set_ylim(bottom=0)
    _finish(unique_axes, "Documents trained on, by their first 50 tokens", "documents")
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
    heatmap = axes.imshow(load_LE * experts, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    axes.set(title="Load of every expert over the last 20 steps (1 = even share)", xlabel="expert", ylabel="layer")
    axes.set_xticks(range(experts) if experts <= 16 else range(0, experts, experts // 8))
    ticks, first = range(layers) if layers <= 12 else range(0, layers, 4), dense_layers(rows)
    axes.set_yticks(ticks, [str(first + layer) for layer in ticks])
    figure.colorbar(heatmap, ax=axes)


def _finish(axes: Any, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _losses(rows: list[dict]) -> list[tuple]:
    """Return rows for about `LOSS_ROWS` training steps at regular intervals, and for every evaluated step."""
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
    """Return for each source the epochs taken and the validation loss."""
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
    """Describe the stages of the run, and its mixture if there are several sources."""
    if not config["data"].get("sources") and not config["train"].get("stages"):
        return []
    known = load_config(["--config", str(run / "config.yaml")])
    lines = [f"Mixture: {format_schedule(mixture_of(known).schedule())}."] if known.data.sources else []
    resolved = resolve_stages(known).at(1).config.train.stages or []
    return lines + [
        f"Stage {number}: {text}." for number, text in enumerate(format_stages(resolved, known.train.steps), 1)
    ]


def _checkpoint(manifest: Manifest) -> tuple:
    size = sum(entry["bytes"] for entry in manifest.files.values()) / 1e9
    loss = _cell({"loss": manifest.val_loss}, "loss")
    return manifest.step, manifest.created[:16].replace("T", " "), f"{size:.3f} GB", loss, manifest.layout


def _model_printout(config: dict, manifests: list[Manifest]) -> str:
    """Return PyTorch's printout of the model, built on the meta device."""
    if not manifests:
        return "(available after the first checkpoint)"
    import torch

    from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM

    vocabulary = manifests[0].tensors["model.embed_tokens.weight"][0]
    with torch.device("meta"):
        architecture = Model(**config["model"]).architecture()
        model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**architecture | {"vocab_size": vocabulary}))
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{model}\n\n{count:,} parameters"
