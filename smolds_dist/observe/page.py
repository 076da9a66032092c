"""`smolds report --html`: a self-contained page.

Curves can be zoomed; each expert's load is shown over time with a slider. Plotly draws them; its code is in the page. What
each expert takes comes from `smolds experts` and needs no script (`expert_map`).
Everything that runs have written, names and samples included, is escaped text that a browser does not execute.
"""

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from smolds_dist.checkpoint.files import manifests_of
from smolds_dist.observe.curves import CURVES, over_layers, statistics_of
from smolds_dist.observe.expert_map import draw_experts, style_of
from smolds_dist.observe.expert_table import read_experts
from smolds_dist.observe.overview import column_of, events, overview, smooth
from smolds_dist.observe.rows import dense_layers, read_rows, read_settings
from smolds_dist.observe.runs import differing_settings

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FRAMES = 60  # positions of the slider
POINTS = 2000  # of a curve
STATISTICS = {"ratio": "Update relative to weights", "update": "Update", "weight": "Weights", "gradient": "Gradient"}
SMOOTHED = ("loss", "max_vio", "tokens_per_s")
ENVIRONMENT = ("host", "system", "device", "threads", "topology", "reason", "parameters", "versions")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1em; color: #222; background: #fff }
h1, h2 { line-height: 1.2 }
h2 { margin-top: 2em }
table { border-collapse: collapse; margin: 0.5em 0 }
td { padding: 0.2em 0.8em 0.2em 0; vertical-align: top }
tr + tr { border-top: 1px solid #ddd }
pre { background: #f6f6f6; padding: 0.8em; white-space: pre-wrap }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1em }
.curves > div { min-width: 0 }
"""


def html_page(runs: list[Path]) -> str:
    """Return the page of these runs: curves, expert loads, samples by step, settings, events, environment."""
    rows = {run: read_rows(run / "metrics.jsonl") for run in runs}
    title = ", ".join(run.resolve().name for run in runs)
    charts = [curve for name in CURVES if (curve := draw_curve(rows, name))]
    drawn = [_chart(chart, "inline" if chart is charts[0] else False) for chart in charts]
    sections = [f"<h1>{_text(title)}</h1>", *(_facts(run, rows[run], len(runs) > 1) for run in runs)]
    sections += ["<h2>Curves</h2>", '<div class="curves">', *drawn, "</div>"]
    for run in runs:
        if loads := draw_loads(rows[run]):
            drawn.append(_chart(loads))
            sections += [f"<h2>Load of every expert{_of(run, runs)}</h2>", drawn[-1]]
    experts = {run: found for run in runs if (found := read_experts(run))}
    for number, (run, found) in enumerate(experts.items()):
        sections += [f"<h2>Experts{_of(run, runs)}</h2>", draw_experts(found, f"experts{number}")]
    for run in runs:
        if charts := draw_statistics([row for row in rows[run] if row.get("event") == "statistics"]):
            drawn += (of_run := [_chart(chart) for chart in charts])
            sections += [f"<h2>Statistics{_of(run, runs)}</h2>", '<div class="curves">', *of_run, "</div>"]
    for run in runs:
        sections += [f"<h2>Samples{_of(run, runs)}</h2>", *_samples(read_rows(run / "samples.jsonl"))]
    sections += ["<h2>Settings</h2>"]
    if len(runs) > 1:
        sections.append(_table([("", *(run.resolve().name for run in runs)), *differing_settings(runs)]))
    for run in runs:
        settings = yaml.safe_dump(read_settings(run), sort_keys=False)
        sections.append(f"<details><summary>All{_of(run, runs)}</summary><pre>{_text(settings)}</pre></details>")
    for run in runs:
        items = "".join(f"<li>{_text(event)}</li>" for event in events(rows[run]))
        sections += [f"<h2>Events{_of(run, runs)}</h2>", f"<ul>{items}</ul>"]
    for run in runs:
        start: dict = next((row for row in reversed(rows[run]) if row.get("event") == "start"), {})
        known = [(name.replace("_", " "), _plain(start[name])) for name in ENVIRONMENT if name in start]
        sections += [f"<h2>Environment{_of(run, runs)}</h2>", _table(known)]
    # Only Plotly's scripts may run; its charts compile their own code.
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", "".join(drawn), re.DOTALL)
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src 'unsafe-eval' "
    policy += " ".join(f"'sha256-{digest}'" for digest in hashes)
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += f"<title>{_text(title)}</title><style>{STYLE}{style_of(list(experts.values()))}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n" + "\n".join(sections) + "\n</body></html>\n"


def draw_curve(rows: dict[Path, list[dict]], name: str) -> "Figure | None":
    """Draw one of `CURVES` with a line per run; None if no run has it."""
    from plotly.colors import qualitative
    from plotly.graph_objects import Figure, Scattergl

    figure = Figure()
    for number, (run, own) in enumerate(rows.items()):
        steps, values = column_of(own, name)
        if not steps:
            continue
        color = qualitative.D3[number % len(qualitative.D3)]
        label = _text(run.resolve().name)
        if name in SMOOTHED:
            lines = [(values, label, 0.3, 1, False), (smooth(values), f"{label}, smoothed", 1.0, 2, True)]
        else:
            lines = [(values, label, 1.0, 2, True)]
        every = -(-len(steps) // POINTS)
        for line, called, opacity, width, shown in lines:
            figure.add_trace(
                Scattergl(
                    x=steps[::every], y=line[::every], name=called, opacity=opacity, showlegend=shown and len(rows) > 1,
                    mode="lines+markers" if name == "val_loss" else "lines", line={"color": color, "width": width},
                )
            )  # fmt: skip
    if not figure.data:
        return None
    _lay_out(figure, CURVES[name], 340)
    figure.update_xaxes(title="step")
    if name == "lr":
        figure.update_yaxes(tickformat=".1e")
    return figure


def draw_statistics(rows: list[dict]) -> list["Figure"]:
    """Draw a run's statistics rows: a chart by part for each kind, then charts by layer, each with a line per layer."""
    if not rows:
        return []
    by_kind = [statistics_of(row) for row in rows]
    steps, charts = [row["step"] for row in rows], []

    def draw(title: str, lines: dict[str, Any], scale: str) -> None:
        from plotly.graph_objects import Figure, Scattergl

        figure = Figure([Scattergl(x=steps, y=line, name=_text(name)) for name, line in lines.items()])
        _lay_out(figure, title, 340)
        figure.update_xaxes(title="step")
        figure.update_yaxes(type=scale)
        charts.append(figure)

    for kind, title in STATISTICS.items():
        lines: dict[str, Any] = {part: [over_layers(one[kind][part]) for one in by_kind] for part in by_kind[-1][kind]}
        draw(f"{title} by part", lines, "log")
    layers = range(len(rows[-1]["max_activation"]))
    largest = {"max_activation": "Largest activation", "max_logits": "Largest attention logit"}
    for name, title in largest.items():
        draw(f"{title} by layer", {f"layer {n}": [row[name][n] for row in rows] for n in layers}, "linear")
    for part, values in by_kind[-1]["ratio"].items():
        known = [n for n, value in enumerate(values) if value is not None]
        if len(known) > 1:
            lines = {f"layer {n}": [one["ratio"][part][n] for one in by_kind] for n in known}
            draw(f"{STATISTICS['ratio']} by layer: {part}", lines, "log")
    return charts


def draw_loads(rows: list[dict]) -> "Figure | None":
    """Draw each expert's share of its layer's tokens relative to an even share: heatmaps of layers and experts by step."""
    from plotly.graph_objects import Figure, Frame, Heatmap

    loads = [(row["step"], row["load"]) for row in rows if "load" in row]
    if not loads:
        return None
    chosen = [loads[round(position)] for position in np.linspace(0, len(loads) - 1, min(FRAMES, len(loads)))]
    layers, experts = len(loads[0][1]), len(loads[0][1][0])
    names, first = [str(expert) for expert in range(experts)], dense_layers(rows)

    def heatmap(load: list[list[float]]) -> Any:
        even = [[round(share * experts, 3) for share in layer] for layer in load]
        layer_names = [str(first + layer) for layer in range(layers)]
        hover = "layer %{y}, expert %{x}: %{z:.2f}<extra></extra>"
        return Heatmap(z=even, x=names, y=layer_names, zmin=0, zmax=2, colorscale="RdBu_r", hovertemplate=hover)

    figure = Figure(
        data=[heatmap(chosen[-1][1])], frames=[Frame(data=[heatmap(load)], name=str(s)) for s, load in chosen]
    )
    moved = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"method": "animate", "label": _text(step), "args": [[str(step)], moved]} for step, _ in chosen]
    _lay_out(figure, "Load relative to an even share", max(300, 60 + 22 * layers))
    figure.update_layout(sliders=[{"active": len(chosen) - 1, "currentvalue": {"prefix": "step "}, "steps": steps}])
    figure.update_xaxes(title="expert", type="category")
    figure.update_yaxes(title="layer", type="category", autorange="reversed")
    return figure


def _lay_out(figure: "Figure", title: str, height: int) -> None:
    figure.update_layout(
        title=title, height=height, template="plotly_white", margin={"l": 60, "r": 20, "t": 50, "b": 50},
        legend={"orientation": "h", "y": -0.25},
    )  # fmt: skip


def _chart(figure: "Figure", code: str | bool = False) -> str:
    """Return the figure as HTML; `code="inline"` includes Plotly, needed once per page."""
    config = {"displaylogo": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=code, auto_play=False, config=config)


def _samples(rows: list[dict]) -> list[str]:
    """Return the samples by step; the last ones are expanded."""
    blocks = []
    for step, samples in groupby(rows, key=itemgetter("step")):
        texts = "".join(f"<pre>{_text(sample['text'])}</pre>" for sample in samples)
        opened = " open" if step == rows[-1]["step"] else ""
        blocks.append(f"<details{opened}><summary>step {_text(step)}</summary>{texts}</details>")
    return blocks or ["<p>None.</p>"]


def _facts(run: Path, rows: list[dict], named: bool) -> str:
    heading = f"<h3>{_text(run.resolve().name)}</h3>" if named else ""
    table = overview(rows, list(manifests_of(run / "checkpoints").values()))
    return heading + _table([(name, _plain(value)) for name, value in table])


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    cells = ("".join(f"<td>{_text(cell)}</td>" for cell in line) for line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return yaml.safe_dump(value).splitlines()[0] if isinstance(value, list) else str(value)


def _of(run: Path, runs: list[Path]) -> str:
    return f" of {_text(run.resolve().name)}" if len(runs) > 1 else ""


def _text(text: Any) -> str:
    return html.escape(str(text))
