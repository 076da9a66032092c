"""What experts take: the content of `experts.json`, and tables of it for a terminal."""

from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

from smolds_dist.inputs import ROWS_BYTES, printable, read_json

FILE = "experts.json"
Number = Annotated[float, Meta(ge=-1e12, le=1e12)]
Neighbors = list[tuple[int, Number]]  # other experts with a value

SHOWN = 6  # tokens of an expert
NOTABLE = 2  # experts of a layer
KINDS = 4  # of an expert


class Source(TypedDict):
    tokens: int
    loss: Number


class Kind(TypedDict):
    share: Number
    lift: Number


class Token(TypedDict):
    text: str
    count: int
    lift: Number
    lift_at_least: Number


class Expert(TypedDict):
    """An expert of a layer (docs/watching.md)."""

    load: Number
    weight: Number | None
    sources: dict[str, Number]
    kinds: dict[str, Kind]
    tokens: list[Token]
    shared_tokens: Neighbors
    same_token_types: Neighbors
    similar_weights: Neighbors
    ablation: NotRequired[Number]
    ablation_sources: NotRequired[dict[str, Number]]


class Layer(TypedDict):
    layer: int
    max_vio: Number
    source_bits: Number
    source_bits_shuffled: Number
    context_bits: Number
    context_bits_shuffled: Number
    kind_bits: Number
    kind_bits_shuffled: Number
    experts: Annotated[list[Expert], Meta(min_length=1)]


class Experts(TypedDict):
    """The content of `experts.json`, apart from how it was computed."""

    sources: dict[str, Source]
    source_entropy_bits: Number
    kinds: dict[str, int]
    layers: Annotated[list[Layer], Meta(min_length=1)]


def read_experts(run: Path) -> Experts | None:
    """Return a run's `experts.json`, None if there is none; raise a `ConfigError` if it is damaged."""
    fix = "write it again with `smolds experts`, or remove it"
    return read_json(run / FILE, fix, Experts, ROWS_BYTES) if (run / FILE).exists() else None


def describe_layers(result: Experts) -> str:
    """Return a row per layer: information about source and kind, the busiest expert, and the experts whose tokens are the
    least shared with others."""
    lines = [
        _sources(result),
        "",
        "layer  bits by source  by context  by kind  MaxVio  busiest  experts with the most specific tokens",
    ]
    for layer in result["layers"]:
        experts = layer["experts"]
        busiest = max(range(len(experts)), key=lambda e: experts[e]["load"])
        notable = sorted((e for e in range(len(experts)) if experts[e]["tokens"]), key=lambda e: -_lift(experts[e]))
        shown = "; ".join(f"e{e} {format_tokens(experts[e], 4)}" for e in notable[:NOTABLE])
        lines.append(
            f"{layer['layer']:>5}  {layer['source_bits']:>14.3f}  {layer['context_bits']:>10.3f}  "
            f"{layer['kind_bits']:>7.3f}  {layer['max_vio']:>6.2f}  "
            f"{f'e{busiest}':>3} {experts[busiest]['load']:>4.0%}  {shown}"
        )
    return "\n".join([*lines, "", verdict(result)])


def verdict(result: Experts) -> str:
    """Return how much experts have parted by source, against shuffled labels, and by kind."""
    layers, whole = result["layers"], result["source_entropy_bits"] or 1.0
    kind = max(layers, key=lambda layer: layer["kind_bits"])
    by_kind = f"By kind of token: at most {kind['kind_bits']:.3f} bits per choice (layer {kind['layer']}); shuffled "
    by_kind += f"{kind['kind_bits_shuffled']:.3f}."
    if len(result["sources"]) < 2:
        return by_kind
    most = max(layers, key=lambda layer: layer["source_bits"])
    by_chance = most["source_bits_shuffled"] / whole
    beyond = most["source_bits"] / whole - by_chance
    degree = "have parted" if beyond >= 0.5 else "have partly parted" if beyond >= 0.05 else "have hardly parted"
    found = f"the experts {degree} by source"
    if by_chance >= 0.05 > beyond:
        found = "too few sequences to show whether the experts have parted"
    return (
        f"By source: at most {most['source_bits']:.3f} of {whole:.3f} bits per choice (layer {most['layer']}); shuffled "
        f"{most['source_bits_shuffled']:.3f}: {found}.\nFor the same tokens in both: "
        f"{most['context_bits']:.3f}; shuffled {most['context_bits_shuffled']:.3f}.\n{by_kind}"
    )


def describe_layer(result: Experts, number: int) -> str:
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


def format_tokens(expert: Expert, most: int) -> str:
    """Return the expert's tokens with the largest sure lift, quoted."""
    return " ".join(quoted(token["text"]) for token in expert["tokens"][:most])


def format_kinds(expert: Expert) -> str:
    """Return the kinds of tokens with the largest lift among those that are at least 1 % of the expert's tokens."""
    common = [(name, kind) for name, kind in expert["kinds"].items() if kind["share"] >= 0.01 and kind["lift"] > 1]
    common.sort(key=lambda item: -item[1]["lift"])
    return ", ".join(f"{name} {kind['share']:.0%} ({kind['lift']:.1f}x)" for name, kind in common[:KINDS])


def format_neighbors(expert: Expert) -> str:
    """Return the nearest experts by tokens in common, types of tokens and weights."""
    return ", ".join(f"{label} e{found[0][0]} {found[0][1]:.2f}" for label, found in neighbors_of(expert) if found)


def neighbors_of(expert: Expert) -> list[tuple[str, Neighbors]]:
    """Return other experts that take the same tokens, take similar types of tokens, or have similar weights."""
    return [
        ("tokens shared with", expert["shared_tokens"]),
        ("similar types of tokens", expert["same_token_types"]),
        ("similar weights", expert["similar_weights"]),
    ]


def quoted(text: str) -> str:
    """Return a token's text in quotation marks, with spaces visible and control characters escaped."""
    return f'"{printable(text)}"'


def _lift(expert: Expert) -> float:
    return expert["tokens"][0]["lift_at_least"]


def _sources(result: Experts) -> str:
    counts = (
        f"{printable(name)} {source['tokens']:,} tokens, loss {source['loss']:.3f}"
        for name, source in result["sources"].items()
    )
    return "; ".join(counts)
