"""`smolds branch RUN --step N --to runs/NAME -- TRAIN-OPTIONS`: a new run that continues a checkpoint with other settings.

For example several decays, of different lengths, of one run at a constant learning rate (WSD, arXiv 2404.06395). Weights,
optimizer state and position in the data are those of the step.
"""

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import quote

from smolds_dist.checkpoint import files
from smolds_dist.checkpoint.derived import derived_run
from smolds_dist.checkpoint.files import Manifest
from smolds_dist.checkpoint.new_folder import check_free
from smolds_dist.checkpoint.resume import check_compatible
from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.interchange.export import find_checkpoint
from smolds_dist.observe.rows import truncate_rows
from smolds_dist.settings import RunConfig
from smolds_dist.stages import CHANGING, resolve_stages
from smolds_dist.training.build import lr_change


def branch(args: list[str]) -> None:
    """Make the run's folder: settings, checkpoint, and the metrics up to its step; print the command that trains it."""
    options, settings = _parse(args)
    run, to = options.run, options.to
    check_free(to)
    folder = find_checkpoint(run, options.step)
    if damage := files.find_damage(folder, contents=False):
        raise ConfigError(f"{folder} is damaged: {damage[0]}; choose another --step.")
    manifest = files.read_manifest(folder)
    config = branch_config(run, manifest, to, settings)
    check_compatible(config, folder, manifest)
    with derived_run(to, run, config, [manifest.step]) as unfinished:
        linked = link_checkpoint(folder, unfinished / "checkpoints" / folder.name, manifest)
        for path in (run / "metrics.jsonl", run / "samples.jsonl"):
            if path.exists():
                shutil.copyfile(path, unfinished / path.name)
                truncate_rows(unfinished / path.name, manifest.step)
        if config.log.tensorboard:
            from smolds_dist.observe.tensorboard import rebuild

            rebuild(unfinished)
    how = "hard links" if linked else "a copy, because hard links are not possible there"
    print(f"{to} begins with step {manifest.step} of {run}; its checkpoint is {how}")
    if line := lr_change(manifest, config):
        print(line)
    command = "smolds train" if manifest.topology["world_size"] == 1 else "smolds launch --"
    print(f"train it with `{command} --config {quote(str(to / 'config.yaml'))} --checkpoint.resume auto`")


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OptionParser(
        prog="smolds branch",
        usage="smolds branch RUN [--step N] --to DIR [-- TRAIN-OPTIONS]",
        description="Make a new run that continues a run's checkpoint with other settings, such as a decay of its learning "
        "rate. It shares the checkpoint's files and does not start training.",
        example="smolds branch runs/first --step 4000 --to runs/decay -- --train.steps 4400",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run to branch from (runs/NAME)")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="folder of the new run, such as runs/NAME"
    )
    options, settings = parser.parse_before_training(args)
    if not (options.run / "config.yaml").is_file():
        raise ConfigError(f"{options.run} is not a run; use a run's folder, such as runs/NAME.")
    for name in ("--config", "--preset", "--run.name", "--run.dir"):
        if any(setting.partition("=")[0] == name for setting in settings):
            raise ConfigError(
                f"{name} cannot be set for a branch, which has its run's settings; remove it, and use --to."
            )
    return options, settings


def branch_config(run: Path, manifest: Manifest, to: Path, settings: list[str]) -> RunConfig:
    """Return the run's settings, changed by `settings`.

    Its stages keep their steps, whatever the branch's number of steps; the last one continues to the end. What a stage omits
    is `settings`' value. If neither stages nor `settings` set a decay, WSD's covers all steps of the branch.

    Raises:
        ConfigError: if a setting is invalid, or the branch would have no steps.
    """
    names = [f"--run.dir={to.parent}", f"--run.name={to.name}", "--checkpoint.resume=never"]
    base = ["--config", str(run / "config.yaml"), *names]
    named = {setting.partition("=")[0] for setting in settings}
    base.append("--train.time_budget=null")  # it would replace the number of steps by the checkpoint's
    config = load_config([*base, *settings], prog="smolds branch")
    if config.train.time_budget:
        raise ConfigError("--train.time_budget is measured in a run's first steps, not in a branch; set --train.steps.")
    if config.train.stages and "--train.stages" not in named:
        for name, section in CHANGING.items():
            option = f"--{section}.{name}"
            if option in named and any(getattr(stage, name) is not None for stage in config.train.stages):
                raise ConfigError(
                    f"{option} would have no effect: {run} has stages, which set it; set --train.stages instead."
                )
        resolved = resolve_stages(load_config(base)).spans[-1].config.train.stages or []
        config.train.stages = [
            replace(own, until=stage.until, lr_until=stage.lr_until)
            for own, stage in zip(config.train.stages, resolved, strict=True)
        ]
        config.train.stages[-1].until = None
    steps, stages = config.train.steps, config.train.stages or []
    if steps <= manifest.step:
        raise ConfigError(f"--train.steps {steps} ends before the branch's first step {manifest.step + 1}; raise it.")
    staged = any(stage.lr is not None or stage.lr_shape for stage in stages)
    if config.train.schedule == "wsd" and not staged and "--train.decay_fraction" not in named:
        config.train.decay_fraction = (steps - manifest.step) / steps
        print(f"--train.decay_fraction {config.train.decay_fraction:.6g}: the learning rate decays in all its steps")
    return config


def link_checkpoint(folder: Path, to: Path, manifest: Manifest) -> bool:
    """Make the folder `to` with hard links to a checkpoint's files, or copies if links are not possible; return True for
    links.

    No file of a checkpoint is ever changed after it is written, so runs can share them and delete their own.

    Raises:
        ConfigError: if the run has deleted the checkpoint in the meantime.
    """
    to.mkdir()
    linked = True
    try:
        for name in (*manifest.files, files.MANIFEST, files.DIGEST):
            try:
                os.link(folder / name, to / name)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(folder / name, to / name)
                linked = False
    except FileNotFoundError:
        raise ConfigError(f"{folder} was deleted while it was read; choose another --step.") from None
    files.mark_latest(to)
    return linked
