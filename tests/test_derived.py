"""Runs made from another run's checkpoints: averages and branches."""

import json
import re
import shutil

import pytest
import torch
from ranks import smolds
from safetensors.torch import load_file

from smolds_dist.checkpoint.command import checkpoint
from smolds_dist.checkpoint.files import checkpoints_in, open_verified
from smolds_dist.checkpoint.resume import check_resumable
from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.inference.evaluate import evaluate_model
from smolds_dist.inference.generate import generate
from smolds_dist.interchange.export import export
from smolds_dist.training.trainer import train


def test_average_is_the_mean_of_the_exported_weights(kept_run, tmp_path, capsys):
    run_dir, to = kept_run[0], tmp_path / "mean"
    assert checkpoint(["average", str(run_dir), "--steps", "2:6:2", "--to", str(to)]) == 0
    folders = {step: tmp_path / f"export-{step}" for step in (2, 4, 6)} | {"mean": tmp_path / "export-mean"}
    for step, folder in folders.items():
        source = [str(to)] if step == "mean" else [str(run_dir), "--step", str(step)]
        export([*source, "--to", str(folder), "--format", "smolds", "--no-check"])
    mean, *others = (load_file(folders[name] / "model.safetensors") for name in ("mean", 2, 4, 6))
    assert any("bias" in name and tensor.any() for name, tensor in mean.items())
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, torch.stack([other[name] for other in others]).mean(0))

    # It is a run for every command that reads weights.
    generate([str(to), "--prompt", "the", "--max-new-tokens", "2"])
    evaluate_model([str(to), "--json", str(tmp_path / "loss.json"), "--max-tokens", "500"])
    assert 0 < json.loads((tmp_path / "loss.json").read_text())["loss"] < 10
    capsys.readouterr()
    checkpoint(["ls", str(to)])
    assert re.search(r"^ +6 .*weights only", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(ConfigError, match="without optimizer state"):
        check_resumable(load_config(["--config", str(to / "config.yaml"), "--checkpoint.resume=auto"]))


def test_average_of_two_layouts(small_run, tmp_path):
    """The last checkpoint is of DeepSpeed's engine at ZeRO 1, in one rank."""
    options = [*small_run, "--run.name=run", "--checkpoint.keep=9", "--log.tensorboard=false"]
    train(load_config([*options, "--train.steps=2"]))
    layout = ["--parallel.engine=deepspeed", "--parallel.zero=1", "--parallel.device=cpu"]
    finished = smolds("train", *options, "--train.steps=4", "--checkpoint.resume=auto", *layout)
    assert finished.returncode == 0, finished.text
    run_dir, to = tmp_path / "runs" / "run", tmp_path / "runs" / "mean"
    assert checkpoint(["average", str(run_dir), "--steps", "4,2", "--to", str(to)]) == 0
    (two, four), (mean,) = ([open_verified(f) for f in checkpoints_in(r / "checkpoints")][::-1] for r in (run_dir, to))
    assert (two.manifest.topology["zero"], four.manifest.topology["zero"]) == (0, 1)
    for name in mean.manifest.tensors:
        expected = (two.read_full(name, "value") + four.read_full(name, "value")) / 2
        assert torch.equal(mean.read_full(name, "value"), expected)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("3:5:1", r"no checkpoint of step 3, 5; it has 2, 4, 6\.$"),
        ("4", r"--steps 4 names one step; name at least two"),
        ("2:6", r"'2:6' is not a step or a range; write 600:1000:100"),
        ("6:2:2", r"'6:2:2' is not a step or a range"),
        ("2:6:0", r"'2:6:0' is not a step or a range"),
        ("1:900000000000:1", "is not a step or a range"),
    ],
)
def test_wrong_steps_of_an_average_are_one_sentence(kept_run, tmp_path, steps, words):
    with pytest.raises(ConfigError, match=words) as refused:
        checkpoint(["average", str(kept_run[0]), "--steps", steps, "--to", str(tmp_path / "mean")])
    assert "\n" not in str(refused.value) and not (tmp_path / "mean").exists()


def test_models_that_differ_are_not_averaged(kept_run, small_run, tmp_path):
    other = [
        *small_run,
        "--run.name=other",
        "--train.steps=1",
        "--model.num_hidden_layers=1",
        "--log.tensorboard=false",
    ]
    train(load_config(other))
    run_dir = tmp_path / "runs" / "one"
    shutil.copytree(kept_run[0], run_dir, symlinks=True)
    shutil.move(tmp_path / "runs" / "other" / "checkpoints" / "step_00000001", run_dir / "checkpoints")
    with pytest.raises(ConfigError, match=r"step_00000001 and .*step_00000006 have different models"):
        checkpoint(["average", str(run_dir), "--steps", "1,6", "--to", str(tmp_path / "mean")])
    assert not (tmp_path / "mean").exists()
