"""The model card of an export: model, training data, results, and how to load it."""

from pathlib import Path
from typing import Any

from smolds_dist.checkpoint.derived import read_parent
from smolds_dist.checkpoint.files import Manifest
from smolds_dist.data.mixture import format_schedule, truncate_schedule
from smolds_dist.interchange.transformers_format import layer_of
from smolds_dist.observe import markdown
from smolds_dist.observe.overview import parameters_of
from smolds_dist.observe.report import figure_of
from smolds_dist.observe.rows import load_table, read_rows
from smolds_dist.observe.summary import facts
from smolds_dist.settings import saved_train
from smolds_dist.stages import format_stages

PLOT = "training_metrics.png"


def write_card(
    folder: Path, checkpoint: Path, manifest: Manifest, config: Any, kind: str, averaged: bool = False
) -> None:
    """Write README.md, and the plot of the run if the checkpoint is in its run's folder.

    Args:
        averaged: True for moving averages of the weights, which training does not evaluate.
    """
    run = checkpoint.parent.parent
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] <= manifest.step]
    if any("loss" in row for row in rows):
        figure_of([run]).savefig(folder / PLOT)
    parent = read_parent(run)
    weights = str(parent) if parent and len(parent.steps) > 1 else ""
    if averaged:
        weights = f"moving average, decay {manifest.config['train']['ema']:g}"
    text = card(run.resolve().name, rows, manifest, config, kind, weights)
    (folder / "README.md").write_text(text, encoding="utf-8")


def sources_table(manifest: Manifest) -> list[tuple[str, str]]:
    """Return a table row for each source of text, and the mixture."""
    data = manifest.config["data"]
    if not data.get("sources"):
        return [("text", f"`{data['source']}`")]
    trained_on = truncate_schedule(manifest.data["schedule"], manifest.samples, manifest.data_step)
    return [
        *((f"text: {name}", f"`{one['source']}`") for name, one in data["sources"].items()),
        ("mixture", format_schedule(trained_on)),
    ]


def stages_table(manifest: Manifest) -> list[tuple[str, str]]:
    """Return a table row for the sequence length, or for each stage that the run has begun."""
    stages = saved_train(manifest.config["train"]).stages
    if not stages:
        return [("sequence length", f"{manifest.config['data']['seq_len']:,}")]
    return [(f"stage {number}", text) for number, text in enumerate(format_stages(stages, manifest.data_step), 1)]


def card(name: str, rows: list[dict], manifest: Manifest, config: Any, kind: str, weights: str = "") -> str:
    """Return the card as Markdown, with the Hub's metadata at the top.

    Args:
        weights: what they are an average of, if they are one.
    """
    train = manifest.config["train"]
    experts = f"{config.num_experts} in each of {config.num_hidden_layers} layers"
    everything = kind == "smolds" or config.attention == "latent"  # other classes have no multi-token prediction
    stored = {n: s for n, s in manifest.tensors.items() if everything or layer_of(n) < config.num_hidden_layers}
    table: list[tuple[str, str]] = [
        ("parameters", f"{parameters_of(stored):,}"),
        ("experts", f"{experts}, {config.num_experts_per_tok} per token"),
        ("attention", "multi-head latent" if config.attention == "latent" else "grouped-query"),
        *sources_table(manifest),
        ("steps", f"{manifest.step:,}"),
        ("tokens", f"{manifest.tokens:,}"),
        *stages_table(manifest),
        ("optimizer", f"{train['optimizer']}, learning rate {train['lr']:g}, {train['schedule']}"),
        ("layout", manifest.layout),
    ]  # fmt: skip
    if weights:
        table.append(("weights", weights))
    evaluation = None if weights else next((row for row in reversed(rows) if "val_loss" in row), None)
    if evaluation:
        line = f"{evaluation['val_loss']:.4f} nats per token, {evaluation['val_bits_per_byte']:.3f} bits per byte"
        table.append(("validation loss", f"{line} (step {evaluation['step']:,})"))
    table += facts(rows).items()
    import_line = "import smolds_dist.model  # registers the architecture\n" if kind == "smolds" else ""
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- mixture-of-experts\n- smolds\n---",
        f"# {name}",
        "A mixture-of-experts language model, pre-trained with smolds on its training text only: it continues text and "
        "does not follow instructions.",
        "## Loading",
        f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n{import_line}\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_NAME")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")\n'
        'inputs = tokenizer("Once", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```",
        "## Training",
        markdown.table(("", ""), table),
    ]
    if any("load" in row for row in rows):
        sections += [
            f"![Loss, balance and unique documents]({PLOT})",
            "## Expert balance",
            "Share of the routed tokens per expert over the last 20 steps:",
            f"```\n{load_table(rows)}\n```",
        ]
    return "\n\n".join(sections) + "\n"
