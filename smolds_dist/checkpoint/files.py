"""The checkpoint format: a folder of safetensors files and a manifest, complete or absent; independent of ranks and engines.

    step_00000180/
        rank_00000.safetensors ...  fragments of logical tensors (`parallel.fragments`), keys NAME:KIND:START
        manifest.json               the run's settings, every tensor's shape, every file's size and SHA-256
        manifest.json.sha256        in `sha256sum`'s format

Nothing is pickled, files not in the manifest are never read, and every file is verified before it is read.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from smolds_dist.activity import LONG, beat, doing
from smolds_dist.errors import ConfigError
from smolds_dist.inputs import JSON_BYTES, Count, Positive, convert, parse_json, printable, read_bytes
from smolds_dist.parallel.fragments import Fragment
from smolds_dist.parallel.moving_average import EMA
from smolds_dist.settings import RunConfig

FIX = "restore it from a copy"
# The settings required for reading
_READ = (("train", "global_batch"), ("train", "steps"), ("data", "tokenizer"), ("model", "hidden_size"))
FORMAT = 2  # increase when the layout or the meaning of a file changes
MANIFEST = "manifest.json"
DIGEST = "manifest.json.sha256"
HASH_BYTES = 2**20  # read at once
FILE_BYTES = 1_000_000_000  # of a converted checkpoint; also the memory that converting takes
RANDOM = "random."  # prefix of random states, which belong to a rank and not to the model
_FILE_NAME = re.compile(r"\w[\w.-]*\.safetensors")


class DamagedCheckpointError(Exception):
    """A checkpoint differs from what was written; the message names the file."""


@dataclass
class FileEntry:
    """A manifest's entry for a file."""

    bytes: Count
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@dataclass
class _Layout:  # fields read from a manifest's `topology`
    world_size: Positive
    engine: str
    zero: Count
    expert: Positive
    dtype: str


@dataclass
class _Data:  # fields read from a manifest's `data`
    tokenizer: str = ""
    order: int = 0
    schedule: list[tuple[Count, Count, dict[str, float], Positive]] = field(default_factory=list)
    contents: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's description."""

    step: Count
    created: str  # local time, ISO 8601
    optimizer_steps: Count  # fewer than `step` if updates were skipped
    skipped_steps: Count  # of the data, by rollbacks
    rollbacks: Count
    val_loss: float | None  # if this step was evaluated
    config: dict[str, Any]  # the settings in effect at this step
    topology: dict[str, Any]
    data: dict[str, Any]  # what the token order depends on
    versions: dict[str, str]
    tensors: dict[str, list[Count]]  # shapes of the logical tensors
    files: dict[str, dict[str, Any]]  # {"bytes": ..., "sha256": ...} by name
    samples: Count = 0  # of the run's order, with those skipped
    tokens: Count = 0
    weights_only: bool = False
    format: int = FORMAT

    @property
    def data_step(self) -> int:
        """Step of the data that this step took."""
        return self.step + self.skipped_steps

    @property
    def layout(self) -> str:
        """The layout that wrote it, for display."""
        at = self.topology
        ranks = "1 process" if at["world_size"] == 1 else f"{at['world_size']} ranks"
        engine = (
            "plain PyTorch" if at["engine"] == "local" else f"ZeRO {at['zero']}, expert parallel size {at['expert']}"
        )
        return f"{ranks}, {engine}, {at['dtype']}{', weights only' if self.weights_only else ''}"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def checkpoints_in(root: Path) -> list[Path]:
    """Return the finished checkpoints in a run's `checkpoints` folder, newest first, including damaged ones."""
    found = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def select(run: Path, steps: Collection[int]) -> list[Path]:
    """Return a run's checkpoints of these steps; raise a `ConfigError` that names missing ones."""
    by_step = {step_of(folder): folder for folder in checkpoints_in(run / "checkpoints")}
    if missing := [str(step) for step in steps if step not in by_step]:
        have = ", ".join(map(str, sorted(by_step))) or "none"
        raise ConfigError(f"{run} has no checkpoint of step {', '.join(missing)}; it has {have}.")
    return [by_step[step] for step in steps]


# Writing


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write CPU tensors; return the file's manifest entry, computed from what can be read back."""
    with doing("writing a checkpoint", LONG):
        save_file({name: tensor.numpy() for name, tensor in tensors.items()}, path)
        path.chmod(0o644)  # safetensors makes files readable only by their owner
        _flush(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def batch_by_bytes(tensors: Iterable[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    """Yield tensors in order, in batches of up to `most` bytes; a larger tensor alone."""
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > most:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        size += tensor.nbytes
    if batch:
        yield batch


def write_tensor_files(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], file_bytes: int = FILE_BYTES
) -> dict[str, dict[str, Any]]:
    """Write tensors into files of up to `file_bytes`; return the manifest's entries."""
    files = {}
    for number, part in enumerate(batch_by_bytes(tensors, file_bytes)):
        name = f"part_{number:05}.safetensors"
        files[name] = write_tensors(folder / name, part)
    return files


def finalize(unfinished: Path, manifest: Manifest) -> Path:
    """Add the manifest to a folder with all files and rename it: from then on it counts as a checkpoint."""
    text = json.dumps(asdict(manifest), indent=1)
    (unfinished / MANIFEST).write_text(text, encoding="utf-8")
    (unfinished / DIGEST).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n")
    for path in (unfinished / MANIFEST, unfinished / DIGEST, unfinished):
        _flush(path)
    root = unfinished.parent
    finished = root / checkpoint_name(manifest.step)
    replaced = finished.with_name(f"removing_{finished.name}")
    if finished.exists():
        finished.rename(replaced)
    unfinished.rename(finished)
    shutil.rmtree(replaced, ignore_errors=True)
    mark_latest(finished)
    _flush(root)
    return finished


def mark_latest(folder: Path) -> None:
    """Point the link `latest` next to a checkpoint to it."""
    link = folder.with_name("latest.part")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.with_name("latest"))


def remove(folder: Path) -> None:
    """Delete a checkpoint; if interrupted, the remains do not look like one."""
    to_delete = folder.with_name(f"removing_{folder.name}")
    shutil.rmtree(to_delete, ignore_errors=True)
    folder.rename(to_delete)
    shutil.rmtree(to_delete)


def remove_leftovers(root: Path) -> None:
    """Delete checkpoints that a killed run left partly written or partly deleted."""
    for pattern in ("unfinished_step_*", "removing_step_*", ".step_*.part"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, doing("verifying a checkpoint"):
        while block := file.read(HASH_BYTES):
            digest.update(block)
            beat()
    return digest.hexdigest()


# Verifying


def read_manifest(folder: Path) -> Manifest:
    """Read and verify the manifest; raise a `DamagedCheckpointError` that names the damage."""
    try:
        content = read_bytes(path := folder / MANIFEST, FIX, JSON_BYTES)
        beat()  # ranks read every checkpoint's
        digest = read_bytes(folder / DIGEST, FIX, JSON_BYTES)
    except ConfigError as error:
        raise _damaged(folder, error) from None
    if digest != f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode():
        raise DamagedCheckpointError(f"{MANIFEST} and {DIGEST} do not match")
    try:
        values = parse_json(content, path, FIX, dict[str, Any])
        if values.get("format") != FORMAT:
            found = printable(str(values.get("format"))[:40])
            raise DamagedCheckpointError(f"{MANIFEST} has format {found}, but this version reads format {FORMAT}")
        convert(values, Manifest, path, FIX)
        for name, kind in {"config": RunConfig, "topology": _Layout, "data": _Data}.items():
            convert(values[name], kind, path, FIX)
        convert(values["files"], dict[str, FileEntry], path, FIX)
        batch, *_ = (values["config"][section][name] for section, name in _READ)
        convert(batch, Positive, path, FIX)
    except KeyError as error:
        raise DamagedCheckpointError(f"{MANIFEST} lacks {error} in its config") from None
    except ConfigError as error:
        raise _damaged(folder, error) from None
    return Manifest(**{one.name: values[one.name] for one in fields(Manifest) if one.name in values})


def _damaged(folder: Path, error: ConfigError) -> DamagedCheckpointError:
    """Convert an input error to one about a file of the folder."""
    return DamagedCheckpointError(str(error).removeprefix(f"{folder}/").removesuffix(f"; {FIX}."))


def find_damage(folder: Path, contents: bool = True, part: slice = slice(None)) -> list[str]:
    """Return a checkpoint's damage, one line per file; empty for a complete one.

    Args:
        contents: compare the files' contents too, not only their sizes.
        part: the files to check, so that ranks can divide the work.
    """
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpointError as error:
        return [str(error)]
    damage = []
    for name in sorted(manifest.files)[part]:
        path, entry = folder / name, manifest.files[name]
        if not _FILE_NAME.fullmatch(name) or path.is_symlink():
            damage.append(printable(f"{name} is not a regular file of the folder"))
        elif not path.is_file():
            damage.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            damage.append(f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}")
        elif contents and _sha256(path) != entry["sha256"]:
            damage.append(f"{name} differs from what was written (SHA-256)")
    return damage


def manifests_of(root: Path) -> dict[Path, Manifest]:
    """Return the undamaged manifests in a run's `checkpoints` folder, newest first."""
    found = {}
    for folder in checkpoints_in(root):
        with contextlib.suppress(DamagedCheckpointError):
            found[folder] = read_manifest(folder)
    return found


def best_checkpoint(manifests: dict[Path, Manifest]) -> Path | None:
    """Return the checkpoint with the lowest validation loss; None if none was evaluated."""
    losses = {folder: m.val_loss for folder, m in manifests.items() if m.val_loss is not None}
    return min(losses, key=lambda folder: losses[folder], default=None)


# Reading


class _StoredSlice(NamedTuple):
    start: int
    length: int
    file: str
    key: str


class CheckpointReader:
    """Reads any range of any logical tensor from a verified checkpoint of any layout. Files stay memory-mapped.

    Raises:
        DamagedCheckpointError: if a file cannot belong to a checkpoint.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        self._files = {}
        for name in sorted(manifest.files):
            try:
                self._files[name] = safe_open(folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DamagedCheckpointError(f"{name} is not a safetensors file ({error})") from None
        self._index: dict[str, dict[str, list[_StoredSlice]]] = defaultdict(lambda: defaultdict(list))
        for file_name, file in self._files.items():
            for key in file.keys():  # noqa: SIM118  safe_open is not a mapping
                name, kind, start = (*key.rsplit(":", 2), "", "")[:3]
                if not re.fullmatch(r"[0-9]{1,18}", start):
                    raise DamagedCheckpointError(
                        printable(f"{file_name} has a tensor {key}, which is not a checkpoint's")
                    )
                length = math.prod(file.get_slice(key).get_shape())
                self._index[name][kind].append(_StoredSlice(int(start), length, file_name, key))
        for kinds in self._index.values():
            for pieces in kinds.values():
                pieces.sort()

    def kinds(self, name: str) -> set[str]:
        """Return the stored kinds of a logical tensor: "value", and optimizer state such as "exp_avg"."""
        return set(self._index.get(name, ()))

    @property
    def has_ema(self) -> bool:
        """True if the weights' moving averages are stored."""
        return all(EMA in self.kinds(name) for name in self.manifest.tensors)

    def use_ema(self) -> None:
        """Read moving averages as the values of weights and selection biases; raise a `ConfigError` if there are none."""
        if not self.has_ema:
            raise ConfigError(f"{self.folder} has no moving averages; train with --train.ema, or omit --weights ema.")
        for kinds in self._index.values():
            if EMA in kinds:
                kinds["value"] = kinds.pop(EMA)

    def check_coverage(self) -> None:
        """Raise a `DamagedCheckpointError` naming the first logical tensor with missing or repeated elements in a stored
        kind."""
        for name, shape in self.manifest.tensors.items():
            if "value" not in self.kinds(name):
                raise DamagedCheckpointError(f"{name} is missing")
            for kind, pieces in self._index[name].items():
                *starts, end = accumulate((piece.length for piece in pieces), initial=0)
                if end != math.prod(shape) or starts != [piece.start for piece in pieces]:
                    raise DamagedCheckpointError(f"{kind} of {name} has missing or repeated elements")

    def read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill `out` [n] with elements [start, start + n); raise a `DamagedCheckpointError` if some are missing."""
        pieces = self._index.get(name, {}).get(kind, [])
        done, end = start, start + len(out)
        at = max(0, bisect_right(pieces, start, key=lambda piece: piece.start) - 1)
        for piece in pieces[at:]:
            beat()
            first, last = max(done, piece.start), min(end, piece.start + piece.length)
            if first > done or done >= end:
                break
            if first < last:
                part = self._files[piece.file].get_slice(piece.key)[first - piece.start : last - piece.start]
                out[first - start : last - start].copy_(part)
                done = last
        if done != end:
            raise DamagedCheckpointError(f"{kind} of {name} is missing from element {done}")

    def fill(self, fragment: Fragment) -> None:
        """Fill every kind of a fragment."""
        for kind, tensor in fragment.tensors.items():
            self.read(fragment.name, kind, fragment.start, tensor)

    def stored(self, name: str) -> dict[str, Tensor]:
        """Return the tensors stored in one piece under a name, by kind; empty if there are none."""
        return {
            kind: self._files[pieces[0].file].get_tensor(pieces[0].key)
            for kind, pieces in self._index.get(name, {}).items()
        }

    def read_full(self, name: str, kind: str) -> Tensor:
        """Return a full logical tensor in its shape."""
        out = torch.empty(self.manifest.tensors[name])
        self.read(name, kind, 0, out.view(-1))
        return out

    def selection_biases(self) -> dict[str, Tensor]:
        """Return the routers' selection biases [E] by name."""
        names = sorted(name for name in self._index if name.endswith(".e_score_correction_bias"))
        return {name: self.stored(name)["value"] for name in names}

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that are not parameters, by key: selection biases, random states and data progress."""
        names = [name for name in self._index if name not in self.manifest.tensors]
        return {f"{name}:{kind}:0": tensor for name in names for kind, tensor in self.stored(name).items()}


def read_all(folder: Path, part: slice = slice(None)) -> tuple[CheckpointReader | None, list[str]]:
    """Return a reader if every file and tensor is complete, else the damage, as from `find_damage`."""
    try:
        if damage := find_damage(folder, part=part):
            return None, damage
        reader = CheckpointReader(folder, read_manifest(folder))
        reader.check_coverage()
        return reader, []
    except (DamagedCheckpointError, OSError) as error:
        return None, [str(error)]


def open_verified(folder: Path) -> CheckpointReader:
    """Return a checkpoint's reader; raise a `ConfigError` if it is damaged."""
    reader, damage = read_all(folder)
    if reader is None:
        raise ConfigError(f"{folder} is damaged: {damage[0]}; choose another --step.")
    return reader
