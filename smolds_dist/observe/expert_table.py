"""What experts take, from `experts.json`, as tables for a terminal."""

from typing import Any

from smolds_dist.inputs import printable

SHOWN = 6  # tokens of an expert
NOTABLE = 2  # experts of a layer
KINDS = 4  # of an expert


def describe_layers(result: dict[str, Any]) -> str:
    """Return a row per layer: information about source and kind, the busiest expert, and the experts whose tokens are the
    least shared with others."""
    lines = [
        _sources(result),
        "",
        "layer  bits by source  by kind  MaxVio  busiest  experts with the most specific tokens",
    ]
    for layer in result["layers"]:
        experts = layer["experts"]
        busiest = max(range(len(experts)), key=lambda e: experts[e]["load"])
        notable = sorted((e for e in range(len(experts)) if experts[e]["tokens"]), key=lambda e: -_lift(experts[e]))
        shown = "; ".join(f"e{e} {format_tokens(experts[e], 4)}" for e in notable[:NOTABLE])
        lines.append(
            f"{layer['layer']:>5}  {layer['source_bits']:>14.3f}  {layer['kind_bits']:>7.3f}  {layer['max_vio']:>6.2f}  "
            f"{f'e{busiest}':>3} {experts[busiest]['load']:>4.0%}  {shown}"
        )
    return "\n".join([*lines, "", verdict(result)])


def verdict(result: dict[str, Any]) -> str:
    """Return how much experts have parted by source, against shuffled labels, and by kind."""
    layers, whole = result["layers"], result["source_entropy_bits"]
    kind = max(layers, key=lambda layer: layer["kind_bits"])
    by_kind = f"By kind of token: at most {kind['kind_bits']:.3f} bits per choice (layer {kind['layer']}); shuffled "
    by_kind += f"{kind['kind_bits_shuffled']:.3f}."
    if len(result["sources"]) < 2:
        return by_kind
    most = max(layers, key=lambda layer: layer["source_bits"])
    beyond = (most["source_bits"] - most["source_bits_shuffled"]) / whole
    degree = "have parted" if beyond >= 0.5 else "have partly parted" if beyond >= 0.05 else "have hardly parted"
    return (
        f"By source: at most {most['source_bits']:.3f} of {whole:.3f} bits per choice (layer {most['layer']}); shuffled "
        f"{most['source_bits_shuffled']:.3f}: the experts {degree} by source.\n{by_kind}"
    )


def describe_layer(result: dict[str, Any], number: int) -> str:
    """Return the experts of one layer: a row each, and their tokens."""
    layer = next(layer for layer in result["layers"] if layer["layer"] == number)
    names = list(result["sources"]) if len(result["sources"]) > 1 else []
    ablated = "ablation" in layer["experts"][0]
    head = ["expert", "load", *(printable(name) for name in names), "weight", *(["without it"] if ablated else [])]
    rows = [head]
    for number, expert in enumerate(layer["experts"]):
        weight = "-" if expert["weight"] is None else f"{expert['weight']:.3f}"
        row = [f"e{number}", f"{expert['load']:.1%}", *(f"{expert['sources'][name]:.1%}" for name in names), weight]
        rows.append(row + ([f"{expert['ablation']:+.4f}"] if ablated else []))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append("")
    for number, expert in enumerate(layer["experts"]):
        lines += [f"e{number}: {format_tokens(expert, SHOWN) or 'no token above chance'}"]
        lines += [f"    {text}" for text in (format_kinds(expert), format_neighbors(expert)) if text]
    return "\n".join([_sources(result), "", *lines, "", verdict(result)])


def format_tokens(expert: dict[str, Any], most: int) -> str:
    """Return the expert's tokens with the largest sure lift, quoted."""
    return " ".join(quoted(token["text"]) for token in expert["tokens"][:most])


def format_kinds(expert: dict[str, Any]) -> str:
    """Return the kinds of tokens with the largest lift among those that are at least 1 % of the expert's tokens."""
    common = [(name, kind) for name, kind in expert["kinds"].items() if kind["share"] >= 0.01 and kind["lift"] > 1]
    common.sort(key=lambda item: -item[1]["lift"])
    return ", ".join(f"{name} {kind['share']:.0%} ({kind['lift']:.1f}x)" for name, kind in common[:KINDS])


def format_neighbors(expert: dict[str, Any]) -> str:
    """Return the nearest experts by tokens in common, types of tokens and weights."""
    labels = {"shared_tokens": "tokens shared with", "same_token_types": "similar types", "similar_weights": "weights"}
    named = {label: expert[key][0] for key, label in labels.items() if expert[key]}
    return ", ".join(f"{label} e{other} {value:.2f}" for label, (other, value) in named.items())


def quoted(text: str) -> str:
    """Return a token's text in quotation marks, with spaces visible and control characters escaped."""
    return f'"{printable(text)}"'


def _lift(expert: dict[str, Any]) -> float:
    return expert["tokens"][0]["lift_at_least"]


def _sources(result: dict[str, Any]) -> str:
    counts = (
        f"{printable(name)} {source['tokens']:,} tokens, loss {source['loss']:.3f}"
        for name, source in result["sources"].items()
    )
    return "; ".join(counts)
