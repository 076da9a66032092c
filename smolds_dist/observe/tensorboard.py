"""A run's TensorBoard files: a pure function of its configuration, `metrics.jsonl` and `samples.jsonl`.

torch's SummaryWriter hands events to a thread that crashes when the disk is full; this writer waits until there is space.
Messages and records are TensorBoard's own.

TensorBoard draws up to a thousand points per curve. To keep the files of long runs small, later steps are thinned: curves of
single experts from step 1,000 on, others from step 10,000 on, by a factor of ten for each further digit of the step.

Shape letters: L layers, E experts.
"""

import os
import socket
import time
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, histogram, histogram_raw, hparams, image, text

from smolds_dist.errors import ConfigError
from smolds_dist.files import AppendedFile
from smolds_dist.observe.curves import curves_of, first_mixture
from smolds_dist.observe.markdown import fenced
from smolds_dist.observe.rows import is_kept, read_rows, read_settings

PIXELS = 12  # of a heatmap's cell
LARGEST_CELLS = 4096  # larger heatmaps are skipped
# Metrics in the table of hyperparameters.
FINAL = ("train/loss", "validation/loss", "validation/bits_per_byte", "balance/max_vio_window", "speed/tokens_per_s")


class Board:
    """Writes one event file in `folder`.

    Args:
        purge_step: TensorBoard discards this and later steps of older files, because they are trained again.
        config: the run's settings.
    """

    def __init__(self, folder: Path, purge_step: int, config: dict):
        folder.mkdir(parents=True, exist_ok=True)
        seconds, fraction = divmod(time.time_ns(), 10**9)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{seconds:010}.{fraction:09}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._add(custom_scalars(layout(config)), purge_step - 1)
        self._add(text("configuration", _as_yaml(config)), purge_step - 1)
        experiment, start, self._end = hparams(_settings(config), dict.fromkeys(FINAL, 0.0))
        self._add(experiment, purge_step - 1)
        self._add(start, purge_step - 1)
        self._config = config

    def show(self, row: dict) -> None:
        """Add a row of `metrics.jsonl`."""
        step, when = row["step"], row.get("time")
        if row.get("event", "statistics") != "statistics":
            name = "environment" if row["event"] == "start" else "events"
            self._add(text(name, _as_yaml(row)), step, when)
            return
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in curves_of(row, self._config).items()]
        if points:
            self._add(Summary(value=points), step, when)
        if "loss" in row and is_kept(step, digits=1):
            self._images(row, step, when)
        if "loss" in row and step == self._config["train"]["steps"]:
            self._add(self._end, step, when)

    def show_sample(self, row: dict) -> None:
        """Add a row of `samples.jsonl`."""
        self._add(text(f"samples/{row['prompt'].strip() or 'no prompt'}", fenced(row["text"])), row["step"])

    def _images(self, row: dict, step: int, when: float | None) -> None:
        load_LE = torch.tensor(row.get("load", ()))
        if 0 < load_LE.numel() <= LARGEST_CELLS:
            self._add(image("balance/load", heatmap(load_LE), dataformats="CHW"), step, when)
        first = first_mixture(self._config)
        for layer, biases in enumerate(row.get("bias", ()), first):
            self._add(histogram(f"selection_bias/layer_{layer:02}", torch.tensor(biases).numpy(), "auto"), step, when)
        for layer, counts in enumerate(row.get("router_histogram", ()), first):
            self._add(_histogram(f"router_probability/layer_{layer:02}", counts), step, when)

    def _add(self, summary: Summary, step: int, when: float | None = None) -> None:
        self._write(Event(wall_time=when or time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())

    def close(self) -> bool:
        """Return True if everything has been written."""
        return self._file.close()


def heatmap(load_LE: torch.Tensor) -> torch.Tensor:
    """Return layers (top to bottom) by experts (left to right) as an image [3, L x PIXELS, E x PIXELS] in 0..1.

    White is an even share, red more (saturated at twice the share), blue less (saturated at none).
    """
    excess = (load_LE * load_LE.shape[1] - 1).clamp(-1, 1)
    red, blue = 1 + excess.clamp(max=0), 1 - excess.clamp(min=0)
    pixels = torch.stack((red, torch.minimum(red, blue), blue))
    return pixels.repeat_interleave(PIXELS, 1).repeat_interleave(PIXELS, 2)


def layout(config: dict) -> dict[str, dict[str, list]]:
    """Return the tabs of the custom scalars as tab -> chart -> kind and tags; the experts' tab comes first."""
    model = config["model"]
    last = model["num_hidden_layers"] + model.get("num_nextn_predict_layers", 0)
    layers, experts = range(first_mixture(config), last), range(model["num_experts"])

    def lines(*tags: str) -> list:
        return ["Multiline", list(tags)]

    def of_experts(metric: str) -> dict[str, list]:
        return {
            f"{metric}, layer {layer}": lines(*(f"{metric}_layer_{layer:02}/expert_{e:02}" for e in experts))
            for layer in layers
        }

    return {
        "Experts": {
            "MaxVio": lines("balance/max_vio", "balance/max_vio_window", "validation/max_vio"),
            "MaxVio by layer": lines(*(f"max_vio/layer_{layer:02}" for layer in layers)),
            "dead experts": lines("balance/dead_experts"),
            "router entropy by layer": lines(*(f"router_entropy/layer_{layer:02}" for layer in layers)),
            **of_experts("load"),
            **of_experts("bias"),
        },
        "Learning": {
            "loss": lines("train/loss", "validation/loss", "train/mtp_loss"),
            "perplexity": lines("train/perplexity", "validation/perplexity"),
            "bits per byte": lines("validation/bits_per_byte"),
            "learning rate": lines("train/lr"),
            "documents, seen and unique": lines("data/.*"),
            "epochs of each source": lines("epochs/.*"),
            "loss of each source": lines("val_loss/.*"),
            "tasks": lines("tasks/.*"),
            "gradient norm": lines("train/grad_norm", "grad_norm/.*"),
        },
        "Speed": {
            "tokens per second": lines("speed/tokens_per_s"),
            "MFU": lines("speed/mfu"),
            "seconds per step": lines("seconds/.*"),
            "memory of the largest rank, GB": lines("speed/memory_gb"),
        },
    }


def _as_yaml(values: dict) -> str:
    return fenced(yaml.safe_dump(values, sort_keys=False).rstrip(), "yaml")


def _settings(config: dict) -> dict[str, float | str | bool]:
    """Return the settings by which runs can be compared, with dotted names."""
    return {
        f"{section}.{name}": value
        for section in ("train", "model", "data", "parallel")
        for name, value in config[section].items()
        if isinstance(value, int | float | str)
    }


def _histogram(tag: str, counts: list[float]) -> Summary:
    """Return TensorBoard's histogram of shares from 0 to 1, with moments computed from the bins' centers."""
    width, total = 1 / len(counts), sum(counts)
    middles = [(i + 0.5) * width for i in range(len(counts))]
    first, second = (sum(n * x**power for n, x in zip(counts, middles, strict=True)) for power in (1, 2))
    return histogram_raw(tag, 0.0, 1.0, total, first, second, [(i + 1) * width for i in range(len(counts))], counts)


def rebuild(run: Path) -> Path:
    """Rewrite a run's event file from its rows, then remove the old ones; return the folder.

    Raises:
        ConfigError: if the disk is full; the old files stay.
    """
    folder, settings = run / "tensorboard", read_settings(run)
    old = [*folder.glob("*tfevents*")]
    with TemporaryDirectory(prefix=".tensorboard.", dir=run) as unfinished:
        board = Board(Path(unfinished), 1, settings)
        for row in read_rows(run / "metrics.jsonl"):
            board.show(row)
        for row in read_rows(run / "samples.jsonl"):
            board.show_sample(row)
        if not board.close():
            raise ConfigError(
                f"{folder} cannot be rewritten because the disk is full; free space and rerun the command."
            )
        (new,) = Path(unfinished).iterdir()
        folder.mkdir(exist_ok=True)
        new.rename(folder / new.name)
    for path in old:
        path.unlink()
    return folder
