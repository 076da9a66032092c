"""Resume: choose the checkpoint and load its tensors in any layout."""

import re
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from smolds_dist.checkpoint import files
from smolds_dist.checkpoint.files import CheckpointReader, Manifest
from smolds_dist.checkpoint.writer import TrainState
from smolds_dist.data.batch import TrainingData
from smolds_dist.data.mixture import format_schedule, mixture_of, names_in, truncate_schedule
from smolds_dist.data.prepare import prepare_data
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.moving_average import EMA
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import RunConfig, saved_sources, saved_train
from smolds_dist.stages import resolve_stages

UNIQUE_TEXTS = "data.unique_texts"  # a checkpoint's name of `data.batch.UniqueTexts`
OUTLIERS = "training.outliers"  # and of `training.guard.OutlierFilter`


def prepare_resumed(config: RunConfig) -> TrainingData:
    """Prepare the run's data, with the resumed checkpoint's tokenizer, if any; raise a `ConfigError` like `check_resumable`
    and `prepare_data`."""
    found = check_resumable(config)
    if found is None or found[1].weights_only:
        return prepare_data(config)
    folder, manifest = found
    if config.train.time_budget and manifest.step >= config.train.warmup_steps:
        config.train.steps = manifest.config["train"]["steps"]
    tokenizer = folder.parent.parent / "tokenizer"
    known = config.data.tokenizer == "train" and (tokenizer / "tokenizer.json").is_file()
    return prepare_data(config, tokenizer if known else None, manifest.data["limits"], manifest.samples)


def check_resumable(config: RunConfig) -> tuple[Path, Manifest] | None:
    """Reject, before any rank starts, an existing run without --checkpoint.resume or with incompatible settings.

    Reads only manifests; `open_checkpoint` verifies contents.

    Returns:
        The checkpoint to resume from, if any.

    Raises:
        ConfigError: naming the setting and the fix.
    """
    own = files.checkpoints_in(config.run_dir / "checkpoints")
    metrics = config.run_dir / "metrics.jsonl"
    resume = config.checkpoint.resume
    exists = own or (metrics.exists() and metrics.stat().st_size)
    candidates = _candidates(config)
    inside = candidates and candidates[0].resolve().parent == (config.run_dir / "checkpoints").resolve()
    if exists and resume != "auto" and not inside:
        raise ConfigError(
            f"{config.run_dir} already holds a run; continue it with --checkpoint.resume auto, choose another "
            "--run.name, or delete the folder."
        )
    if resume not in ("never", "auto"):
        if inside and own[0].resolve() != candidates[0].resolve():
            raise ConfigError(
                f"{config.run_dir} has newer checkpoints than {candidates[0].name}, up to {own[0].name}; remove them with "
                f"`smolds checkpoint rm {config.run_dir} --after {files.step_of(candidates[0])}`, or continue under another "
                f"--run.name with --checkpoint.resume {candidates[0]}."
            )
        damage = files.find_damage(candidates[0], contents=False)
        if damage:
            raise ConfigError(f"{candidates[0]} is damaged: {damage[0]}; choose another checkpoint.")
    for folder in candidates:
        if not files.find_damage(folder, contents=False):
            manifest = files.read_manifest(folder)
            check_compatible(config, folder, manifest)
            return folder, manifest
    return None


def _candidates(config: RunConfig) -> list[Path]:
    """Return the checkpoints to try to resume from, in order."""
    resume = config.checkpoint.resume
    if resume == "never":
        return []
    own = files.checkpoints_in(config.run_dir / "checkpoints")
    if resume == "auto":
        return own
    if resume.isdecimal():
        requested = config.run_dir / "checkpoints" / files.checkpoint_name(int(resume))
    else:
        requested = Path(resume)
        if (requested / "checkpoints").is_dir():
            requested = next(iter(files.checkpoints_in(requested / "checkpoints")), requested)
    if not requested.is_dir() or not re.fullmatch(r"step_\d+", requested.resolve().name):
        have = ", ".join(str(files.step_of(folder)) for folder in reversed(own)) or "none"
        raise ConfigError(
            f"--checkpoint.resume {resume!r} is not a checkpoint; use never, auto, a step of this run ({have}), or a "
            "folder such as runs/NAME/checkpoints/step_00001000."
        )
    return [requested.resolve()]


def check_compatible(config: RunConfig, folder: Path, manifest: Manifest) -> None:
    """Reject settings that would change the interrupted run. The layout and later stages may differ."""
    try:
        _check_settings(config, folder, manifest)
    except ConfigError as error:
        train, steps = saved_train(manifest.config["train"]), config.train.steps
        shares = [
            one.until for one in config.train.stages or () if isinstance(one.until, int | float) and one.until < 1
        ]
        if steps == train.steps or not shares:
            raise
        ends = ", ".join(f"'{one.until}'" for one in (train.stages or [])[:-1])
        raise ConfigError(
            f"--train.steps {steps}, before {train.steps}, moves the ends of train.stages that are fractions; to keep them, "
            f"set until to {ends}: {error}"
        ) from None


def _check_settings(config: RunConfig, folder: Path, manifest: Manifest) -> None:
    saved = manifest.config | {"train": asdict(saved_train(manifest.config["train"]))}
    stages = resolve_stages(config)
    in_effect = stages.at(manifest.data_step).config
    mup = in_effect.train.mup
    kept: dict[str, Iterable[str]] = {"model": saved["model"]}
    if not manifest.weights_only:
        kept["data"] = (
            "tokenizer", "tokenizer_vocab_size", "seq_len", "val_fraction", "max_tokens", "window_tokens",
            "allow_control_tokens", "document_mask", "packing",
        )  # fmt: skip
        base = ("mup_base_width", "mup_base_depth") if mup else ()
        kept["train"] = ("seed", "global_batch", "optimizer", "mup", *base)
    elif manifest.step:
        raise ConfigError(f"{folder} has weights without optimizer state; resume from a checkpoint that a run wrote.")
    elif mup and not saved["train"]["mup"]:
        raise ConfigError(
            f"{folder} has imported weights, whose last norm lacks the factor of --train.mup, so its rates would be wrong; "
            "unset --train.mup, or set it also in `smolds import` if the weights were trained with it."
        )
    for section, names in kept.items():
        for name in names:
            now = asdict(getattr(in_effect, section))[name]
            saved_value = saved[section][name]
            if saved_value != now:
                raise ConfigError(
                    f"{folder} was written with --{section}.{name} {saved_value}, but this run has {now}; "
                    "resume with the same value, or start a new --run.name."
                )
    if manifest.weights_only:
        return
    if stages.samples(manifest.data_step) != manifest.samples:
        raise ConfigError(
            f"{folder} was trained on {manifest.samples:,} sequences up to step {manifest.step}, but this run's stages have "
            f"{stages.samples(manifest.data_step):,}; resume with the same --train.stages up to that step, or start a new "
            "--run.name."
        )
    _check_mixture(config, folder, manifest)


def _check_mixture(config: RunConfig, folder: Path, manifest: Manifest) -> None:
    """Reject settings whose sources or proportions differ from the checkpoint's up to its step; later stages may differ."""
    saved = saved_sources(manifest.config["data"])
    until = manifest.samples, manifest.data_step
    before = truncate_schedule(manifest.data["schedule"], *until)
    now = truncate_schedule(mixture_of(config).schedule(), *until)
    advice = "resume with the same --data options, start a new stage at this step, or start a new --run.name"
    for name in names_in(before):
        old, new = saved[name], config.data.mixed.get(name)
        if new is None:
            raise ConfigError(
                f"{folder} was trained on the source {name!r} ({old.source}), which this run does not have; {advice}."
            )
        for setting in ("text_field", "split", "token_dtype"):
            if getattr(old, setting) != getattr(new, setting):
                raise ConfigError(
                    f"{folder} was trained with {setting} {getattr(old, setting)} of the source {name!r}, but this run "
                    f"has {getattr(new, setting)}; {advice}."
                )
    if before != now:
        raise ConfigError(
            f"{folder} was trained on {format_schedule(before)}, but this run's settings are {format_schedule(now)}; "
            f"{advice}."
        )


def check_contents(reader: CheckpointReader, data: TrainingData) -> None:
    """Reject a source whose text has changed since it was trained on."""
    saved, identity = reader.manifest.data, data.identity(reader.manifest.samples)
    if saved["tokenizer"] != identity["tokenizer"]:
        raise ConfigError(f"{reader.folder} was trained with another tokenizer; set --data.tokenizer to that one.")
    if reader.manifest.weights_only:
        return
    if saved["order"] != identity["order"]:
        raise ConfigError(
            f"{reader.folder} was trained with version {saved['order']} of the sample order, but this run has version "
            f"{identity['order']}; start a new --run.name."
        )
    advice = (
        "restore its files, add the new text as another source in a stage that begins now, or start a new --run.name"
    )
    for name in names_in(truncate_schedule(saved["schedule"], reader.manifest.samples, reader.manifest.data_step)):
        if saved["contents"][name] != identity["contents"][name]:
            raise ConfigError(
                f"the text of the source {name!r} has changed since {reader.folder} was written; {advice}."
            )


def open_checkpoint(config: RunConfig, topology: Topology, before: int | None = None) -> CheckpointReader | None:
    """Open the newest complete checkpoint to resume from; None for a new run. Collective: ranks divide the verification.

    Args:
        before: consider only this run's checkpoints of steps before this one.

    Raises:
        ConfigError: if there are checkpoints but none is complete, or the requested one is not.
    """
    candidates = _candidates(config)
    if before is not None:
        candidates = [f for f in files.checkpoints_in(config.run_dir / "checkpoints") if files.step_of(f) < before]
    skipped = []
    for folder in candidates:
        reader, damage = _verified(folder, topology)
        if reader:
            if before is None:
                check_compatible(config, folder, reader.manifest)
            return reader
        skipped.append(f"{folder} is damaged: {damage}")
        if topology.rank == 0:
            print(f"{skipped[-1]}; skipped.")
    if skipped and before is None:
        raise ConfigError(
            f"no checkpoint of {config.run_dir} is complete ({'; '.join(skipped)}); restore one from a copy, or start a "
            "new --run.name."
        )
    return None


def _verified(folder: Path, topology: Topology) -> tuple[CheckpointReader | None, str]:
    """Return a complete checkpoint's reader, or the damage, the same on all ranks. Ranks divide the files."""
    reader, damage = files.read_all(folder, slice(topology.rank, None, topology.world_size))
    found = [damage] * topology.world_size
    if topology.world_size > 1:
        dist.all_gather_object(found, damage)
    first = next(chain.from_iterable(found), "")
    return None if first else reader, first


@torch.no_grad()
def restore(reader: CheckpointReader, engine: Engine, balancer: Balancer, topology: Topology) -> TrainState:
    """Load optimizer state, selection biases and random states in this layout; return the run's progress.

    The engine already has the weights, filled by `reader.fill`. Moving averages that the checkpoint lacks start from them.
    """
    manifest = reader.manifest
    if manifest.optimizer_steps:  # else there are only weights
        engine.allocate_optimizer_state(
            lambda name: sorted(reader.kinds(name) - {"value", EMA}), manifest.optimizer_steps
        )
        done = {"value"} if reader.has_ema else {"value", EMA}
        for fragment in engine.fragments():
            reader.fill(fragment.only(*fragment.tensors.keys() - done))
    for (name, kind), tensor in balancer.state().items():
        reader.read(name, kind if kind in reader.kinds(name) else "value", 0, tensor)
    # A rank new in this layout keeps its own states.
    states = reader.stored(f"{files.RANDOM}rank_{topology.rank:05}")
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and topology.device == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    return TrainState(manifest.step, manifest.skipped_steps, manifest.rollbacks, manifest.tokens)
