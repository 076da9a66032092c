"""The rows of a metrics.jsonl as named curves for TensorBoard and other trackers."""

import math

from smolds_dist.observe.rows import is_kept

# Labels of metrics in `smolds runs diff` and `smolds report --html`, by their names in metrics.jsonl
CURVES = {
    "loss": "Loss, nats per token",
    "mtp_loss": "Loss of multi-token prediction, nats per token",
    "val_loss": "Validation loss, nats per token",
    "val_bits_per_byte": "Validation bits per byte",
    "max_vio": "Expert imbalance (MaxVio of a batch)",
    "max_vio_window": "Expert imbalance (MaxVio of 100 steps)",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "tokens_per_s": "Tokens per second",
    "mfu": "MFU",
    "unique_texts": "Unique documents trained on",
    "memory_gb": "Memory of the largest rank, GB",
}
TRAIN = ("loss", "mtp_loss", "lr", "grad_norm")
SPEED = ("tokens_per_s", "mfu", "memory_gb")


def first_mixture(config: dict) -> int:
    """Return the index of the first layer with experts, which is the first layer in per-layer lists of rows."""
    return config["model"].get("first_k_dense_replace", 0)


def curves_of(row: dict, config: dict) -> dict[str, float]:
    """Return the points by curve name that a row adds, for a run with these settings; none for an event.

    Long runs are thinned to keep trackers small: experts' curves have steps of three significant digits, the others of four,
    and the last step.
    """
    if "event" in row:
        return _of_statistics(row) if row["event"] == "statistics" else {}
    if "tasks" in row:
        return {f"tasks/{name}": score for name, score in row["tasks"].items()}
    points = _of_evaluation(row) if "val_loss" in row else _of_training(row, config)
    return {name: value for name, value in points.items() if value is not None}


def _of_evaluation(row: dict) -> dict[str, float | None]:
    loss = row["val_loss"]
    values = {"loss": loss, "bits_per_byte": row["val_bits_per_byte"], "perplexity": _perplexity(loss)}
    values["max_vio"] = row.get("val_max_vio")
    of_sources = {name: value for name, value in row.items() if "/" in name}
    return {f"validation/{name}": value for name, value in values.items()} | of_sources


def _of_training(row: dict, config: dict) -> dict[str, float | None]:
    step, points = row["step"], dict[str, float | None]()
    if is_kept(step, digits=4) or step == config["train"]["steps"]:
        points |= {f"train/{name}": row.get(name) for name in TRAIN}
        points |= {f"speed/{name}": row.get(name) for name in SPEED}
        if row["loss"] is not None:
            points["train/perplexity"] = _perplexity(row["loss"])
        points |= {f"grad_norm/{group}": norm for group, norm in row.get("grad_norms", {}).items()}
        points |= {f"attention/{name}": row.get(name) for name in ("max_logit", "clipped_heads")}
        points["train/outliers"] = row.get("outliers")
        points |= {f"seconds/{phase}": seconds for phase, seconds in row.get("seconds", {}).items()}
        points |= {f"data/{name}": row.get(name) for name in ("seen_texts", "unique_texts")}
        points |= {f"epochs/{name}": epochs for name, epochs in row.get("epochs", {}).items()}
        if "load" in row:
            points["balance/max_vio"] = row["max_vio"]
            points["balance/max_vio_window"] = row["max_vio_window"]
            points["balance/dead_experts"] = sum(share == 0 for layer in row["load"] for share in layer)
        if "router_entropy" in row:
            points["balance/router_entropy"] = sum(row["router_entropy"]) / len(row["router_entropy"])
    if is_kept(step, digits=3):
        first = first_mixture(config)
        for layer, shares in enumerate(row.get("load", ()), first):
            points[f"max_vio/layer_{layer:02}"] = max(shares) * len(shares) - 1
            points |= {f"load_layer_{layer:02}/expert_{e:02}": share for e, share in enumerate(shares)}
        for layer, biases in enumerate(row.get("bias", ()), first):
            points |= {f"bias_layer_{layer:02}/expert_{e:02}": bias for e, bias in enumerate(biases)}
        entropies = enumerate(row.get("router_entropy", ()), first)
        points |= {f"router_entropy/layer_{layer:02}": entropy for layer, entropy in entropies}
    return points


def statistics_of(row: dict) -> dict[str, dict[str, list[float | None]]]:
    """Return a statistics row's values by kind and part, a list over layers (None for a layer without the part): root mean
    squares of weights, gradients and updates, and those of updates relative to those of the weights ("ratio")."""
    found = {kind: row[kind] for kind in ("weight", "gradient", "update") if isinstance(row.get(kind), dict)}
    pairs = {part: zip(row["update"][part], values, strict=True) for part, values in found.get("weight", {}).items()}
    found["ratio"] = {part: [u / w if w else None for u, w in both] for part, both in pairs.items()}
    return found


def _of_statistics(row: dict) -> dict[str, float]:
    """Return a statistics row's points: parts over all layers under one heading, each layer under its own."""
    points: dict[str, float] = {}
    for kind, parts in statistics_of(row).items():
        for part, values in parts.items():
            points[f"statistics/{kind}/{part}"] = over_layers(values)
            named = {f"statistics_layer_{layer:02}/{kind}/{part}": one for layer, one in enumerate(values)}
            points |= {name: one for name, one in named.items() if one is not None and len(values) > 1}
    for name in ("max_activation", "max_logits"):
        points[f"statistics/{name}"] = max(row[name])
        points |= {f"statistics_layer_{layer:02}/{name}": one for layer, one in enumerate(row[name])}
    return points


def over_layers(values: list[float | None]) -> float:
    """Return the root mean square over layers with equal numbers of elements."""
    known = [value for value in values if value is not None]
    return math.sqrt(sum(value * value for value in known) / max(1, len(known)))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0))
