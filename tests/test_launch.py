"""`smolds launch` with real ranks: the run of one process, its refusals, its resume."""

import json
import os
import shlex

import pytest
import torch
from ranks import ROOT, smolds
from safetensors.torch import load_file

from smolds_dist.config import load_config
from smolds_dist.train.metrics import read_rows
from smolds_dist.train.trainer import train


@pytest.fixture
def single_process_rows(small_run, tmp_path):
    train(load_config([*small_run, "--run.name=single", "--parallel.device=cpu", "--train.dtype=fp32"]))
    return read_rows(tmp_path / "runs" / "single" / "metrics.jsonl")


@pytest.mark.parametrize(("launcher", "zero"), [("torchrun", 2), ("deepspeed", 3)])
def test_two_ranks_write_the_run_of_one(small_run, single_process_rows, tmp_path, launcher, zero):
    options = [*small_run, "--run.name=pair", "--parallel.device=cpu", "--train.dtype=fp32", f"--parallel.zero={zero}"]
    start = ["launch", "--procs", "2", "--launcher", launcher, "--"]
    first = smolds(*start, *options, "--train.steps=4", "--parallel.expert=2", timeout=180)
    assert first.returncode == 0, first.text
    # six steps' schedule has to be the reference's, so the first part cannot be compared: only the resume's steps exist
    assert "2 ranks over gloo" in first.stdout
    assert "expert parallel size 2" in first.stdout
    assert "share of the tokens per expert" in first.stdout
    whole = smolds(*start, *options, "--run.name=whole", timeout=180)
    assert whole.returncode == 0, whole.text
    rows = read_rows(tmp_path / "runs" / "whole" / "metrics.jsonl")
    for ours, theirs in zip(rows, single_process_rows, strict=True):
        assert ours["step"] == theirs["step"]
        for name in ("loss", "val_loss", "grad_norm", "max_vio"):
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-3)
    weights = [load_file(tmp_path / "runs" / name / "export" / "model.safetensors") for name in ("whole", "single")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, atol=1e-3, rtol=1e-3)


def test_expert_parallel_run_resumes(small_run, tmp_path):
    options = [*small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--log.tensorboard=false"]
    options += ["--train.schedule=wsd", "--train.decay_fraction=0"]  # so that four steps are a part of six
    whole = smolds("launch", "--procs=2", "--", *options, "--run.name=whole", timeout=180)
    assert whole.returncode == 0, whole.text
    for more in (["--train.steps=4"], ["--checkpoint.resume=auto"]):
        part = smolds("launch", "--procs=2", "--", *options, "--run.name=parts", *more, timeout=180)
        assert part.returncode == 0, part.text
    rows = {name: read_rows(tmp_path / "runs" / name / "metrics.jsonl") for name in ("whole", "parts")}
    losses = {name: [row["loss"] for row in part if "loss" in row] for name, part in rows.items()}
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-6)
    assert "continuing from" in part.stdout


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (["--procs=2", "--", "--parallel.expert=3"], "valid values: 1, 2"),
        (["--procs=3", "--"], "use 6 or 9"),
        (["--procs=2", "--", "--train.balance=aux_loss"], "use --train.balance bias"),
        (["--procs=0", "--"], "1 or more"),
        (["--procs=two", "--"], "1 or more"),
        (["--launcher=mpi", "--"], "torchrun"),
        (["--train.steps=3"], "behind `--`"),
        (["--procs=2", "--", "--data.source=text:/nowhere/*"], "check the pattern"),
    ],
)
def test_mistake_is_one_sentence_before_any_rank_starts(small_run, tmp_path, options, fix):
    if "--" in options:
        options = [*options[: options.index("--") + 1], *small_run, *options[options.index("--") + 1 :]]
    result = smolds("launch", *options)
    assert result.returncode == 2, result.text
    assert fix in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_a_command_that_works(small_run):
    result = smolds("launch", "--procs=1", "--dry-run", "--", *small_run, "--run.name=dry run")
    assert result.returncode == 0, result.text
    command = shlex.split(result.stdout)
    assert command[1:4] == ["-m", "smolds_dist", "train"]
    assert command[-1] == "--run.name=dry run"


def test_failing_rank_fails_the_launch(small_run, tmp_path):
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "no_such_section": 1, "optimizer": {}}))
    result = smolds("launch", "--procs=2", "--", *small_run, f"--parallel.ds_config={ds_config}", timeout=180)
    assert result.returncode != 0
    assert "remove it" in result.stderr


def test_own_deepspeed_configuration_is_used(small_run, tmp_path):
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    settings["zero_optimization"]["overlap_comm"] = False
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    options = ["--parallel.zero=2", f"--parallel.ds_config={tmp_path / 'ds.json'}", "--train.steps=2"]
    result = smolds("train", *small_run, "--run.name=own", *options, timeout=180)
    assert result.returncode == 0, result.text
    assert "DeepSpeed ZeRO 2" in result.stdout
    assert os.path.exists(tmp_path / "runs" / "own" / "export" / "model.safetensors")
