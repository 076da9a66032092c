"""The experts' part of `smolds report --html`: a map of layers and experts, whose cells open what the expert takes.

It needs no script: radio buttons choose the quantity that colors the map, and a cell is a link to the expert's section,
which is hidden until then. The map is a table of numbers, for readers without colors. All text is escaped.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from smolds_dist.observe.expert_table import Expert, Experts, Neighbors, neighbors_of, quoted, verdict

KINDS = 8  # the most frequent, which can color the map
STYLE = """
.map { font-size: 13px } .map td { padding: 0; text-align: right } .map th { font-weight: normal; padding: 0 0.4em }
.map a { display: block; padding: 0.2em 0.5em; color: #000; text-decoration: none } .map a:hover { outline: 2px solid #000 }
.experts fieldset { border: 1px solid #ddd } .experts label { display: inline-block; margin-right: 1em }
.scroll { overflow-x: auto } .expert { border: 1px solid #ddd; padding: 0 1em 1em }
.expert:not(:target) { display: none } .expert td { padding-right: 1.5em }
.side { display: flex; flex-wrap: wrap; align-items: start; gap: 2em }
"""
CHOICE = ".experts:has(.choose{0}:checked) .map td {{ background: var(--c{0}) }} "
CHOICE += "@supports selector(:has(*)) {{ .experts:not(:has(.choose{0}:checked)) .q{0} {{ display: none }} }}\n"


class Quantity(NamedTuple):
    """What may color the map."""

    label: str
    value: Callable[[Expert], float | None]
    form: str  # of the number
    position: Callable[[float], float]  # between -1, blue, and 1, red; 0 is white


def style_of(found: Sequence[Experts]) -> str:
    """Return the style sheet for the experts of these runs."""
    most = max((len(quantities_of(result)) for result in found), default=0)
    return STYLE + "".join(map(CHOICE.format, range(most))) if most else ""


def draw_experts(result: Experts, name: str) -> str:
    """Return the map and the experts' sections as HTML; `name` is a prefix of ids that no other run has."""
    quantities = quantities_of(result)
    choices = "".join(
        f'<label><input type=radio name="{name}" class=choose{i}{"" if i else " checked"}> {escape(quantity.label)}</label>'
        for i, quantity in enumerate(quantities)
    )
    columns = "".join(
        f"<th scope=col>{e}</th>" for e in range(max(len(layer["experts"]) for layer in result["layers"]))
    )
    rows = "".join(
        f"<tr><th scope=row>layer {layer['layer']}</th>"
        + "".join(
            _cell(f"{name}-{layer['layer']}-{e}", expert, quantities) for e, expert in enumerate(layer["experts"])
        )
        + "</tr>"
        for layer in result["layers"]
    )
    sections = "".join(
        _section(name, layer["layer"], e, expert)
        for layer in result["layers"]
        for e, expert in enumerate(layer["experts"])
    )
    bits = (
        "source_bits", "source_bits_shuffled", "context_bits", "context_bits_shuffled", "kind_bits", "kind_bits_shuffled"
    )  # fmt: skip
    head = ("layer", "bits by source", "shuffled", "by context", "shuffled", "by kind", "shuffled", "MaxVio")
    lines = [
        (layer["layer"], *(f"{layer.get(name):.3f}" for name in bits), f"{layer['max_vio']:.2f}")
        for layer in result["layers"]
    ]
    caption = "<caption>Choose a cell to see what its expert takes</caption>"
    return (
        f'<div class=experts id="{name}"><p>{escape(verdict(result))}</p><details><summary>Information by layer</summary>'
        f"{_table(lines, head)}</details><fieldset><legend>Color by</legend>{choices}</fieldset><div class=scroll>"
        f"<table class=map>{caption}<thead><tr><td></td>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"{sections}</div>"
    )


def quantities_of(result: Experts) -> list[Quantity]:
    """Return what may color the map: load, share of each source and common kind, weight and ablation."""
    experts = [expert for layer in result["layers"] for expert in layer["experts"]]
    count = len(result["layers"][0]["experts"])
    highest = max((expert["weight"] or 0 for expert in experts), default=0) or 1
    found = [
        Quantity("load, relative to an even share", lambda expert: expert["load"] * count, ".2f", _position_of_ratio)
    ]
    found += [
        Quantity(f"share of {name}, relative to load", _source_lift(name), ".2f", _position_of_ratio)
        for name in (result["sources"] if len(result["sources"]) > 1 else ())
    ]
    found += [
        Quantity(f"{kind}, relative to all tokens", _kind_lift(kind), ".2f", _position_of_ratio)
        for kind in sorted(result["kinds"], key=lambda kind: -result["kinds"][kind])[:KINDS]
    ]
    found.append(
        Quantity("weight when chosen", lambda expert: expert["weight"], ".2f", lambda weight: weight / highest)
    )
    if largest := max(abs(expert.get("ablation", 0.0)) for expert in experts):
        found.append(
            Quantity(
                "loss without it, nats per token", lambda expert: expert.get("ablation"), "+.3f",
                lambda change: change / largest,
            )
        )  # fmt: skip
    return found


def _source_lift(name: str) -> Callable[[Expert], float]:
    return lambda expert: expert["sources"].get(name, 0) / expert["load"] if expert["load"] else 0


def _kind_lift(name: str) -> Callable[[Expert], float]:
    return lambda expert: expert["kinds"][name]["lift"] if name in expert["kinds"] else 0


def _position_of_ratio(ratio: float) -> float:
    """Place a ratio on a logarithmic scale from a quarter to four."""
    return max(-1.0, min(1.0, math.log2(ratio) / 2)) if ratio > 0 else -1.0


def color_of(position: float) -> str:
    """Return a color between blue (-1), white and red (1), all light enough for black text."""
    end = (214, 96, 77) if position > 0 else (67, 147, 195)
    return "#" + "".join(f"{round(255 + (part - 255) * min(1, abs(position))):02x}" for part in end)


def _cell(target: str, expert: Expert, quantities: list[Quantity]) -> str:
    values = [quantity.value(expert) for quantity in quantities]
    colors = ";".join(
        f"--c{i}:{color_of(quantity.position(value))}"
        for i, (quantity, value) in enumerate(zip(quantities, values, strict=True))
        if value is not None
    )
    numbers = " ".join(
        f"<span class=q{i}>{'-' if value is None else format(value, quantity.form)}</span>"
        for i, (quantity, value) in enumerate(zip(quantities, values, strict=True))
    )
    return f'<td style="{colors}"><a href="#{target}">{numbers}</a></td>'


def _section(name: str, layer: int, number: int, expert: Expert) -> str:
    """Return what one expert takes, hidden until a link leads to it."""
    ablation, by_source = expert.get("ablation"), expert.get("ablation_sources", {})
    facts = [
        ("load", f"{expert['load']:.1%}"),
        *((f"of {key}", f"{share:.1%}") for key, share in expert["sources"].items()),
    ]
    facts.append(("weight when chosen", "-" if expert["weight"] is None else f"{expert['weight']:.3f}"))
    if ablation is not None:
        facts += [("loss without it", f"{ablation:+.4f}"), *((f"on {k}", f"{v:+.4f}") for k, v in by_source.items())]
    tokens = [
        (quoted(t["text"]), t["count"], f"{t['lift']:.2f}", f"{t['lift_at_least']:.2f}") for t in expert["tokens"]
    ]
    kinds = [
        (kind, f"{one['share']:.1%}", f"{one['lift']:.2f}")
        for kind, one in sorted(expert["kinds"].items(), key=lambda item: -item[1]["share"])
    ]
    neighbors = "".join(
        f"<tr><td>{label}</td><td>{_links(f'{name}-{layer}', found)}</td></tr>" for label, found in neighbors_of(expert)
    )
    return (
        f'<section class=expert id="{name}-{layer}-{number}"><h3>Layer {layer}, expert {number}</h3>'
        f"<div class=side>{_table(facts)}{_table(tokens, ('token', 'count', 'lift', 'at least'))}"
        f"{_table(kinds, ('kind', 'share', 'lift'))}<table>{neighbors}</table></div>"
        f'<a href="#{name}">Back to the map</a></section>'
    )


def _links(prefix: str, neighbors: Neighbors) -> str:
    return ", ".join(f'<a href="#{prefix}-{other}">{other}</a> {value:.2f}' for other, value in neighbors)


def _table(lines: Sequence[tuple], head: tuple[str, ...] = ()) -> str:
    top = f"<tr>{''.join(f'<th scope=col>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    body = ("".join(f"<td>{escape(str(cell))}</td>" for cell in line) for line in lines)
    return f"<table>{top}{''.join(f'<tr>{line}</tr>' for line in body)}</table>"
