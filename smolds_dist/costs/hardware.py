"""Hardware specs: `hardware.yaml`, and files of the same format that `smolds plan --calibrate` writes."""

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
    """Link specs per device and direction."""

    bandwidth: Above0  # bytes/s
    latency: From0  # seconds per exchange with one peer


@dataclass(frozen=True)
class Hardware:
    """One device type and its links; `hardware.yaml` explains the fields."""

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
    utilization: Above0
    overhead: From0
    process: From0
    failures: From0
    sources: tuple[str, ...] = ()

    def flops(self, dtype: str) -> float:
        """Return the FLOP/s that the model's matmuls reach.

        Raises:
            ConfigError: if the device has no peak for `dtype`.
        """
        if dtype not in self.peak:
            raise ConfigError(f"{self.name} has no peak for {dtype}; use {' or '.join(self.peak)}.")
        return self.peak[dtype] * self.utilization

    def shared_by(self, ranks: int) -> "Hardware":
        """Return the specs of each of `ranks` on a node: CPU ranks divide one machine."""
        if self.device != "cpu":
            return self
        crowd = max(1.0, ranks / self.per_node)  # ranks per core
        return replace(
            self,
            peak={dtype: peak / ranks for dtype, peak in self.peak.items()},
            memory=self.memory / ranks,
            bandwidth=self.bandwidth / ranks,
            overhead=self.overhead * crowd,
            link=Link(self.link.bandwidth / crowd, self.link.latency * crowd),
        )


def load_hardware(name: str) -> Hardware:
    """Load the entry with this key in `hardware.yaml`, or a file of one entry.

    Raises:
        ConfigError: if there is neither, or the file's format is wrong.
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
            raise ConfigError(f"{path} has {len(entries)} entries, not one; write it by `smolds plan --calibrate`.")
        name = next(iter(entries))
    return parse_hardware(name, entries[name], path)


def known_hardware(device_name: str) -> Hardware | None:
    """Return the specs for PyTorch's name of a GPU, such as NVIDIA H100 80GB HBM3, or for "cpu" (typical values).

    None if there are none: PCIe cards lack the links of their type.
    """
    keys = sorted(yaml.safe_load(FILE.read_text(encoding="utf-8")), key=len, reverse=True)
    name = device_name.lower()
    key = "cpu-2" if name == "cpu" else next((key for key in keys if key in name and "pcie" not in name), None)
    return load_hardware(key) if key else None


def parse_hardware(key: str, entry: dict[str, Any], path: Path = FILE) -> Hardware:
    """Parse an entry of the YAML file.

    Raises:
        ConfigError: if a field is missing or not a number.
    """
    return convert(entry | {"key": key}, Hardware, path, "hardware.yaml in the package shows the form", strict=False)
