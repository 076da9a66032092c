"""Machines as data: `hardware.yaml`, and files of the same form that `smolds plan --calibrate` writes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from smolds_dist.errors import ConfigError

FILE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Link:
    """Of one device, in one direction."""

    bandwidth: float  # bytes/s
    latency: float  # seconds of an exchange with one peer


@dataclass(frozen=True)
class Hardware:
    """One kind of device and what connects it; the fields are explained in `hardware.yaml`."""

    key: str
    name: str
    device: str
    peak: dict[str, float]
    memory: float
    bandwidth: float
    per_node: int
    link: Link
    fabric: Link
    host_link: float
    utilisation: float
    overhead: float
    process: float
    failures: float
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
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            entries = None
        if not isinstance(entries, dict) or len(entries) != 1:
            raise ConfigError(f"{path} has not one entry of hardware; write it by `smolds plan --calibrate`.")
        name = next(iter(entries))
    return parse_hardware(name, entries[name])


def known_hardware(device_name: str) -> Hardware | None:
    """By the name that PyTorch has for a GPU, such as NVIDIA H100 80GB HBM3, or "cpu", for which there are typical figures.

    None where there are no figures: cards in a PCIe slot lack the links of their kind.
    """
    keys = sorted(yaml.safe_load(FILE.read_text(encoding="utf-8")), key=len, reverse=True)
    name = device_name.lower()
    key = "cpu-2" if name == "cpu" else next((key for key in keys if key in name and "pcie" not in name), None)
    return load_hardware(key) if key else None


def parse_hardware(key: str, entry: dict[str, Any]) -> Hardware:
    """An entry of the YAML file.

    Raises:
        ConfigError: where something is missing or no number.
    """
    numbers = ("memory", "bandwidth", "host_link", "utilisation", "overhead", "process", "failures")
    try:
        found: dict[str, Any] = {field: float(entry[field]) for field in numbers}
        for field in ("link", "fabric"):
            found[field] = Link(float(entry[field]["bandwidth"]), float(entry[field]["latency"]))
        return Hardware(
            key=key,
            name=entry["name"],
            device=entry["device"],
            peak={dtype: float(value) for dtype, value in entry["peak"].items()},
            per_node=int(entry["per_node"]),
            sources=tuple(entry.get("sources", ())),
            **found,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"hardware {key!r} is incomplete ({error}); hardware.yaml shows the form.") from None
