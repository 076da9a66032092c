"""Machines as data: `hardware.yaml`, and files of the same form that `smolds plan --calibrate` writes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from msgspec import Meta

from smolds_dist.errors import ConfigError
from smolds_dist.inputs import Positive, convert, read_yaml

Above0 = Annotated[float, Meta(gt=0, le=1e30)]
From0 = Annotated[float, Meta(ge=0, le=1e30)]
FILE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Link:
    """Of one device, in one direction."""

    bandwidth: Above0  # bytes/s
    latency: From0  # seconds of an exchange with one peer


@dataclass(frozen=True)
class Hardware:
    """One kind of device and what connects it; the fields are explained in `hardware.yaml`."""

    key: str
    name: str
    device: str
    peak: dict[str, Above0]
    memory: Above0
    bandwidth: Above0
    per_node: Positive
    link: Link
    fabric: Link
    host_link: Above0
    utilisation: Above0
    overhead: From0
    process: From0
    failures: From0
    sources: tuple[str, ...] = ()

    def flops(self, dtype: str) -> float:
        """FLOP/s of the model's matrix products.

        Raises:
            ConfigError: for a dtype that the device does not multiply.
        """
        if dtype not in self.peak:
            raise ConfigError(f"{self.name} has no figure for {dtype}; use {' or '.join(self.peak)}.")
        return self.peak[dtype] * self.utilisation

    def shared_by(self, ranks: int) -> "Hardware":
        """What each of `ranks` on a node has: of a CPU, whose ranks share one machine, a part of everything."""
        if self.device != "cpu":
            return self
        crowd = max(1.0, ranks / self.per_node)  # ranks that take turns on a core
        return replace(
            self,
            peak={dtype: peak / ranks for dtype, peak in self.peak.items()},
            memory=self.memory / ranks,
            bandwidth=self.bandwidth / ranks,
            overhead=self.overhead * crowd,
            link=Link(self.link.bandwidth / crowd, self.link.latency * crowd),
        )


def load_hardware(name: str) -> Hardware:
    """By its key in `hardware.yaml`, or from a file of one entry.

    Raises:
        ConfigError: where there is none, or the file is not of that form.
    """
    path = Path(name)
    entries = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    if name not in entries:
        if not path.is_file():
            raise ConfigError(
                f"hardware {name!r} is unknown; use one of {', '.join(entries)}, or a file that --calibrate wrote."
            )
        entries = read_yaml(path, "write it by `smolds plan --calibrate`", dict[str, dict[str, Any]])
        if len(entries) != 1:
            raise ConfigError(f"{path} has not one entry of hardware; write it by `smolds plan --calibrate`.")
        name = next(iter(entries))
    return parse_hardware(name, entries[name], path)


def known_hardware(device_name: str) -> Hardware | None:
    """By the name that PyTorch has for a GPU, such as NVIDIA H100 80GB HBM3, or "cpu", for which there are typical figures.

    None where there are no figures: cards in a PCIe slot lack the links of their kind.
    """
    keys = sorted(yaml.safe_load(FILE.read_text(encoding="utf-8")), key=len, reverse=True)
    name = device_name.lower()
    key = "cpu-2" if name == "cpu" else next((key for key in keys if key in name and "pcie" not in name), None)
    return load_hardware(key) if key else None


def parse_hardware(key: str, entry: dict[str, Any], path: Path = FILE) -> Hardware:
    """An entry of the YAML file.

    Raises:
        ConfigError: where something is missing or no number.
    """
    return convert(entry | {"key": key}, Hardware, path, "hardware.yaml in the package shows the form", strict=False)
