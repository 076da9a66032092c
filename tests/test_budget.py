"""`train.time_budget`: the number of steps is lowered once, as if it had been set."""

import shutil

import pytest
import torch
import yaml
from ranks import rows_without_timing, smolds
from safetensors.torch import load_file

from smolds_dist.config import load_config
from smolds_dist.observe.rows import read_rows
from smolds_dist.training.trainer import train

MOST = 100_000  # steps, which take minutes here


@pytest.fixture
def options(small_run):
    return [
        *small_run,
        "--train.eval_every=0",
        "--log.sample_every=0",
        "--log.tensorboard=false",
        "--checkpoint.every=1",
    ]


def steps_of(run_dir):
    return [row["step"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]


def test_budget_lowers_steps_once_and_resume_is_exact(options, tmp_path, capsys):
    budget = [*options, f"--train.steps={MOST}", "--train.time_budget=1"]
    run = tmp_path / "runs" / "budget"
    train(load_config([*budget, "--run.name=budget"]))
    steps = steps_of(run)
    assert steps == list(range(1, len(steps) + 1)) and 2 < len(steps) < 2000
    assert f"{len(steps):,} of at most {MOST:,} steps" in capsys.readouterr().out
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == len(steps)

    asked = tmp_path / "runs" / "asked"
    train(load_config([*options, f"--train.steps={len(steps)}", "--run.name=asked"]))
    assert rows_without_timing(asked) == rows_without_timing(run)

    shutil.rmtree(run / "checkpoints" / f"step_{len(steps):08}")
    train(load_config([*budget, "--run.name=budget", "--checkpoint.resume=auto"]))
    assert rows_without_timing(asked) == rows_without_timing(run)
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (run, asked)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_budget_never_adds_steps(options, tmp_path):
    train(load_config([*options, "--train.time_budget=1000", "--run.name=one"]))
    assert steps_of(tmp_path / "runs" / "one") == [1, 2, 3, 4, 5, 6]


def test_ranks_agree_on_the_steps(options, tmp_path):
    budget = [f"--train.steps={MOST}", "--train.time_budget=3", "--checkpoint.every=0", "--run.name=pair"]
    finished = smolds("launch", "--nproc-per-node", "2", "--", *options, *budget)
    assert finished.returncode == 0, finished.text
    assert 2 < len(steps_of(tmp_path / "runs" / "pair")) < MOST
