"""`smolds checkpoint ls|verify|convert|average|rm RUN`: list, verify, convert, average and remove a run's checkpoints."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from smolds_dist.checkpoint import files
from smolds_dist.checkpoint.derived import derived_run
from smolds_dist.checkpoint.new_folder import check_free, new_folder
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.inputs import convert as convert_values
from smolds_dist.inputs import printable
from smolds_dist.settings import RunConfig


def checkpoint(args: list[str]) -> int:
    """Run one of the commands; return the exit code, 1 if `verify` finds damage."""
    options = _parse(args)
    folders = files.checkpoints_in(options.run / "checkpoints")
    if not folders:
        raise ConfigError(f"{options.run} has no checkpoint; name a run's folder, such as runs/NAME.")
    if options.command == "ls":
        _list(folders)
    elif options.command == "verify":
        return _verify(files.select(options.run, options.step) if options.step else folders)
    elif options.command == "convert":
        (folder,) = folders[:1] if options.step is None else files.select(options.run, [options.step])
        convert(folder, options.to, options.weights_only)
    elif options.command == "average":
        average(options.run, files.select(options.run, options.steps), options.to)
    else:
        if not options.step and options.after is None:
            raise ConfigError("smolds checkpoint rm needs --step N, or --after N for all later ones.")
        later = [f for f in folders if options.after is not None and files.step_of(f) > options.after]
        _remove(options.run, folders, list(dict.fromkeys([*files.select(options.run, options.step or []), *later])))
    return 0


def _parse(args: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="smolds checkpoint",
        description="List, verify, convert, average or remove a run's checkpoints.",
        example="smolds checkpoint ls runs/first",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "ls": "list checkpoints: step, date, size, validation loss, layout",
        "verify": "compare every file with the manifest",
        "convert": "copy a checkpoint with every tensor in one piece, to archive, move or resume from",
        "average": "make a run of the mean of several checkpoints' weights, to evaluate, sample and export",
        "rm": "remove checkpoints, but never the last complete one",
    }
    more = {
        "convert": " --to runs/kept",
        "average": " --steps 600:1000:100 --to runs/averaged",
        "rm": " --step 100",
    }
    for name, text in texts.items():
        example = f"smolds checkpoint {name} runs/first{more.get(name, '')}"
        command = commands.add_parser(name, help=text, description=text, example=example, allow_abbrev=False)
        command.add_argument("run", type=Path, help="a run's folder (runs/NAME)")
        if name in ("verify", "rm"):
            command.add_argument(
                "--step", type=int, nargs="+", help="steps of the checkpoints (default for verify: all)"
            )
        if name == "rm":
            command.add_argument("--after", type=int, help="remove all checkpoints after this step")
        if name == "convert":
            command.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
            command.add_argument(
                "--to", type=Path, required=True, help="run folder to write the checkpoint to, such as runs/OTHER"
            )
            command.add_argument("--weights-only", action="store_true", help="omit the optimizer state")
        if name == "average":
            text = "steps of the checkpoints, comma-separated; FIRST:LAST:EVERY for a range"
            command.add_argument("--steps", type=_steps, required=True, help=text)
            command.add_argument("--to", type=Path, required=True, help="folder of the new run, such as runs/NAME")
    return parser.parse_args(args)


def _steps(text: str) -> list[int]:
    """Return the steps of `--steps`, in increasing order: comma-separated numbers and inclusive ranges FIRST:LAST:EVERY."""
    found: set[int] = set()
    for one in text.split(","):
        match = re.fullmatch(r"(\d{1,12})(?::(\d{1,12}):([1-9]\d{0,11}))?", one.strip())
        first, last, every = (int(match[1]), int(match[2] or match[1]), int(match[3] or 1)) if match else (0, 0, 1)
        if not match or last < first or (last - first) // every >= 10_000:
            raise ConfigError(
                f"--steps {printable(one)!r} is not a step or a range; write 600:1000:100, or 600,800,1000."
            )
        found |= {*range(first, last + 1, every)}
    if len(found) < 2:
        raise ConfigError(f"--steps {printable(text)} names one step; name at least two to average.")
    return sorted(found)


def _list(folders: list[Path]) -> None:
    damage = {folder: files.find_damage(folder, contents=False) for folder in folders}
    manifests = {folder: files.read_manifest(folder) for folder in folders if not damage[folder]}
    marked = {"newest": next(iter(manifests), None), "best": files.best_checkpoint(manifests)}
    print(f"{'step':>9}  {'saved':16}  {'size':>9}  {'val loss':>8}  layout")
    for folder in reversed(folders):
        manifest = manifests.get(folder)
        if manifest is None:
            print(printable(f"{files.step_of(folder):>9}  damaged: {damage[folder][0]}"))
            continue
        size = sum(entry["bytes"] for entry in manifest.files.values()) / 1e9
        loss = "-" if manifest.val_loss is None else f"{manifest.val_loss:.4f}"
        marks = [name for name, at in marked.items() if at == folder]
        line = f"{manifest.step:>9}  {manifest.created[:16].replace('T', ' ')}  {size:>6.3f} GB  {loss:>8}  "
        print(printable(f"{line}{manifest.layout}{' (' + ', '.join(marks) + ')' if marks else ''}"))


def _verify(folders: list[Path]) -> int:
    damaged = 0
    for folder in reversed(folders):
        reader, damage = files.read_all(folder)
        damaged += bool(damage)
        for line in damage:
            print(printable(f"{folder.name}  damaged  {line}"))
        if reader is not None:
            manifest = reader.manifest
            listed = {*manifest.files, "manifest.json", "manifest.json.sha256"}
            extra = sorted(path.name for path in folder.iterdir() if path.name not in listed)
            note = f"; ignored, not in the manifest: {', '.join(extra)}" if extra else ""
            counts = f"{len(manifest.files)} files, {len(manifest.tensors)} tensors"
            print(printable(f"{folder.name}  ok  {counts}{note}"))
    return 1 if damaged else 0


def convert(folder: Path, run: Path, weights_only: bool) -> Path:
    """Copy a checkpoint to `run`/checkpoints with every logical tensor in one piece, a gigabyte at a time.

    Raises:
        ConfigError: if the source is damaged or the target exists.
    """
    root = run / "checkpoints"
    if (root / folder.name).exists():
        raise ConfigError(f"{root / folder.name} exists; choose another --to.")
    reader = files.open_verified(folder)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in reader.manifest.tensors:
            for kind in ["value"] if weights_only else sorted(reader.kinds(name)):
                yield f"{name}:{kind}:0", reader.read_full(name, kind).view(-1)
        yield from reader.extra_tensors().items()

    with new_folder(root / folder.name) as part:
        entries = files.write_tensor_files(part, tensors())
        check_free(root / folder.name)
        written = files.finalize(part, replace(reader.manifest, files=entries, weights_only=weights_only))
    print(f"wrote {written}")
    return written


@torch.no_grad()
def average(run: Path, folders: list[Path], to: Path) -> None:
    """Make the run `to` of the mean, in fp32, of several checkpoints' weights and selection biases (arXiv 2203.05482).

    The checkpoints may have different layouts. Tensors are read one by one, so memory is bounded by one output file.

    Raises:
        ConfigError: if one is damaged or of another model, or `to` exists.
    """
    check_free(to)
    readers = [files.open_verified(folder) for folder in folders]
    last, biases = readers[-1].manifest, [reader.selection_biases() for reader in readers]
    for reader, own in zip(readers, biases, strict=True):
        other = reader.manifest
        same_text = other.data.get("tokenizer") == last.data.get("tokenizer")
        if not same_text or (other.config["model"], other.tensors, *own) != (
            last.config["model"], last.tensors, *biases[-1]
        ):  # fmt: skip
            raise ConfigError(
                f"{reader.folder} and {folders[-1]} have different models or tokenizers; average checkpoints of one model."
            )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in last.tensors:
            yield (
                f"{name}:value:0",
                _mean((reader.read_full(name, "value") for reader in readers), len(readers)).view(-1),
            )
        for name in biases[-1]:
            yield f"{name}:value:0", _mean((own[name].clone() for own in biases), len(readers))

    config = convert_values(last.config, RunConfig, folders[-1] / files.MANIFEST, files.FIX)
    with derived_run(to, run, config, [files.step_of(folder) for folder in folders]) as unfinished:
        part = unfinished / "checkpoints" / f"unfinished_{folders[-1].name}"
        part.mkdir()
        entries = files.write_tensor_files(part, tensors())
        files.finalize(part, replace(last, files=entries, weights_only=True, val_loss=None))
    print(f"wrote the mean of {len(folders)} checkpoints to {to}")


def _mean(tensors: Iterator[Tensor], count: int) -> Tensor:
    """Return the mean of `count` tensors; the first one is overwritten."""
    total = next(tensors)
    for tensor in tensors:
        total += tensor
    return total / count


def _remove(run: Path, folders: list[Path], to_delete: list[Path]) -> None:
    lock = FileLock(run / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{run} is in use by a training process; wait for its end.") from None
    with lock:
        left = [folder for folder in folders if folder not in to_delete]
        complete = [folder for folder in to_delete if not files.find_damage(folder, contents=False)]
        if complete and all(files.find_damage(folder) for folder in left):
            raise ConfigError(
                f"{complete[0].name} is the last complete checkpoint of {run}; to remove it, delete its folder."
            )
        for folder in to_delete:
            files.remove(folder)
            print(f"removed {folder}")
        latest = folders[0].parent / "latest"
        if left and not latest.exists():
            files.mark_latest(left[0])
        elif not left:
            latest.unlink(missing_ok=True)
