"""TensorBoard's view of a run: a pure function of its configuration, `metrics.jsonl` and `samples.jsonl`.

torch's SummaryWriter hands events to a thread that dies, with a traceback, when the disk is full; the file written here
waits until there is room. Messages and records are TensorBoard's own.

Shape letters: L layers, E experts.
"""

import math
import os
import socket
import time
from io import BytesIO
from pathlib import Path

import torch
import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, image, text

from smolds_dist.train.append import AppendedFile

PIXELS = 12  # of a heatmap's cell
LARGEST_CELLS = 4096  # of a heatmap; beyond, it is left out


class Board:
    """One event file in `folder`.

    Args:
        purge_step: TensorBoard forgets what older files say of this step and later ones, which are trained again.
        config: the run's settings, shown as text.
        layers_and_experts: L and E, for the tabs of the custom scalars.
    """

    def __init__(self, folder: Path, purge_step: int, config: dict, layers_and_experts: tuple[int, int]):
        folder.mkdir(parents=True, exist_ok=True)
        seconds, fraction = divmod(time.time_ns(), 10**9)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{seconds:010}.{fraction:09}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._add(custom_scalars(layout(*layers_and_experts)), purge_step - 1)
        settings = yaml.safe_dump(config, sort_keys=False)
        self._add(text("configuration", f"```yaml\n{settings}```"), purge_step - 1)

    def show(self, row: dict) -> None:
        """Adds a row of `metrics.jsonl`."""
        step, when = row["step"], row.get("time")
        if "event" in row:
            self._add(text("events", ", ".join(f"{key} {value}" for key, value in row.items())), step, when)
        elif "val_loss" in row:
            scalars = {"loss": row["val_loss"], "bits_per_byte": row["val_bits_per_byte"]}
            scalars["perplexity"] = math.exp(min(row["val_loss"], 50.0))
            self._scalars({f"validation/{name}": value for name, value in scalars.items()}, step, when)
        else:
            self._training(row, step, when)

    def show_sample(self, row: dict) -> None:
        """Adds a row of `samples.jsonl`."""
        self._add(text(f"samples/{row['prompt'].strip() or 'no prompt'}", f"````\n{row['text']}\n````"), row["step"])

    def _training(self, row: dict, step: int, when: float | None) -> None:
        scalars = {f"train/{name}": row[name] for name in ("loss", "lr", "grad_norm", "tokens_per_s")}
        if row["loss"] is not None:
            scalars["train/perplexity"] = math.exp(min(row["loss"], 50.0))
        if "load" in row:
            load_LE = torch.tensor(row["load"])
            experts = load_LE.shape[1]
            scalars["balance/max_vio"] = row["max_vio"]
            scalars["balance/dead_experts"] = int((load_LE == 0).sum())
            for layer, shares in enumerate(row["load"]):
                scalars[f"balance_by_layer/max_vio_{layer:02}"] = max(shares) * experts - 1
                scalars |= {f"load_layer_{layer:02}/expert_{e:02}": share for e, share in enumerate(shares)}
            if load_LE.numel() <= LARGEST_CELLS and is_pictured(step):
                self._add(image("balance/load", heatmap(load_LE), dataformats="CHW"), step, when)
        self._scalars(scalars, step, when)

    def _scalars(self, values: dict[str, float | None], step: int, when: float | None) -> None:
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None]
        self._add(Summary(value=points), step, when)

    def _add(self, summary: Summary, step: int, when: float | None = None) -> None:
        self._write(Event(wall_time=when or time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())

    def close(self) -> None:
        self._file.close()


def is_pictured(step: int) -> bool:
    """Steps that get a heatmap: denser at the start, about ten per power of ten."""
    return step % max(1, 10 ** (len(str(step)) - 1)) == 0


def heatmap(load_LE: torch.Tensor) -> torch.Tensor:
    """Layers from top to bottom, experts from left to right, [3, L x PIXELS, E x PIXELS] in 0..1.

    White is an even share, red more (full at twice the share), blue less (full at none).
    """
    excess = (load_LE * load_LE.shape[1] - 1).clamp(-1, 1)
    red, blue = 1 + excess.clamp(max=0), 1 - excess.clamp(min=0)
    picture = torch.stack((red, torch.minimum(red, blue), blue))
    return picture.repeat_interleave(PIXELS, 1).repeat_interleave(PIXELS, 2)


def layout(layers: int, experts: int) -> dict[str, dict[str, list]]:
    """Tabs of the custom scalars: category -> chart -> kind and tags."""

    def lines(*tags: str) -> list:
        return ["Multiline", list(tags)]

    loads = {
        f"load, layer {layer}": lines(*(f"load_layer_{layer:02}/expert_{e:02}" for e in range(experts)))
        for layer in range(layers)
    }
    return {
        "Experts": {
            "MaxVio": lines("balance/max_vio"),
            "MaxVio by layer": lines(*(f"balance_by_layer/max_vio_{layer:02}" for layer in range(layers))),
            "dead experts": lines("balance/dead_experts"),
            **loads,
        },
        "Learning": {
            "loss": lines("train/loss", "validation/loss"),
            "perplexity": lines("train/perplexity", "validation/perplexity"),
            "bits per byte": lines("validation/bits_per_byte"),
            "learning rate": lines("train/lr"),
            "gradient norm": lines("train/grad_norm"),
        },
        "Speed": {"tokens per second": lines("train/tokens_per_s")},
    }


def rebuild(run: Path, metrics: list[dict], samples: list[dict]) -> Path:
    """Writes a run's event files anew from its rows, in place of those that are there; returns the folder."""
    folder = run / "tensorboard"
    for old in folder.glob("*tfevents*"):
        old.unlink()
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    board = Board(folder, 1, config, (config["model"]["num_hidden_layers"], config["model"]["num_experts"]))
    for row in metrics:
        board.show(row)
    for row in samples:
        board.show_sample(row)
    board.close()
    return folder
