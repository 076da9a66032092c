"""Runs made from another run's checkpoints: averages and branches."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

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
from smolds_dist.observe.rows import read_rows
from smolds_dist.observe.runs import difference, runs
from smolds_dist.stages import resolve_stages
from smolds_dist.training.branch import branch
from smolds_dist.training.trainer import train


@pytest.fixture
def trunk(kept_run, tmp_path):
    """A copy of the run of six steps at a constant rate, with checkpoints after 2, 4 and 6."""
    return Path(shutil.copytree(kept_run[0], tmp_path / "runs" / "trunk", symlinks=True))


def steps_of(run: Path, name: str = "loss") -> dict[int, float]:
    return {row["step"]: row[name] for row in read_rows(run / "metrics.jsonl") if name in row}


def resume(run: Path, *options: str) -> None:
    names = [f"--run.dir={run.parent}", f"--run.name={run.name}", "--checkpoint.resume=auto"]
    train(load_config(["--config", str(run / "config.yaml"), *names, *options]))


def hashes(run: Path, step: int) -> dict[str, str]:
    folder = run / "checkpoints" / f"step_{step:08}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_average_is_the_mean_of_the_exported_weights(kept_run, tmp_path, capsys):
    run_dir, to = kept_run[0], tmp_path / "mean"
    assert checkpoint(["average", str(run_dir), "--steps", "2:6:2", "--to", str(to)]) == 0
    folders = {step: tmp_path / f"export-{step}" for step in (2, 4, 6)} | {"mean": tmp_path / "export-mean"}
    for step, folder in folders.items():
        source = [str(to)] if step == "mean" else [str(run_dir), "--step", str(step)]
        export([*source, "--to", str(folder), "--format", "smolds", "--no-check"])
    mean, *others = (load_file(folders[name] / "model.safetensors") for name in ("mean", 2, 4, 6))
    assert "| weights | mean of steps 2 to 6 |" in (folders["mean"] / "README.md").read_text()
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


def test_branch_decays_over_its_own_steps(trunk, tmp_path, capsys):
    to = tmp_path / "runs" / "decay"
    branch([str(trunk), "--step", "4", "--to", str(to), "--", "--train.steps=8", "--log.tensorboard=true"])
    said = capsys.readouterr().out
    lr, least = 3e-3, 3e-4
    assert f"{to} begins with step 4 of {trunk}; its checkpoint is hard links\n" in said
    assert "--train.decay_fraction 0.5: the learning rate decays in all its steps\n" in said
    assert re.search(
        r"the learning rate of step 5 is 2.3[23]e-03, but 3.00e-03 with the checkpoint's settings; see", said
    )
    assert "; it ends at 3.00e-04 in step 8, before at 3.00e-03 in step 6\n" in said
    assert f"`smolds train --config {to / 'config.yaml'} --checkpoint.resume auto`" in said
    assert steps_of(to) == {step: loss for step, loss in steps_of(trunk).items() if step <= 4}
    assert list((to / "tensorboard").glob("*tfevents*"))
    assert not (to / "checkpoints" / "step_00000006").exists()
    assert (to / "checkpoints" / "latest").resolve().name == "step_00000004"
    resume(to)
    rates = steps_of(to, "lr")
    assert list(rates) == list(range(1, 9))
    assert [rates[step] for step in range(4, 9)] == pytest.approx([lr - (lr - least) / 4 * n for n in range(5)])
    branch([str(trunk), "--step", "4", "--to", str(tmp_path / "own"), "--", "--train.decay_fraction=0.25"])
    assert load_config(["--config", str(tmp_path / "own" / "config.yaml")]).train.decay_fraction == 0.25


def test_branch_continues_the_data_and_neither_run_changes_the_others_files(trunk, kept_run, tmp_path):
    """Both delete the shared checkpoint, and in a branch of the branch it is still what it was."""
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    written = hashes(trunk, 4)
    same = ["--train.decay_fraction=0", "--checkpoint.keep=1", "--checkpoint.every=1", "--checkpoint.keep_best=false"]
    branch([str(trunk), "--step", "4", "--to", str(first), "--", *same])
    branch([str(first), "--step", "4", "--to", str(second), "--", *same])
    assert os.path.samefile(*(run / "checkpoints" / "step_00000004" / "manifest.json" for run in (trunk, second)))
    resume(first)
    assert steps_of(first) == steps_of(trunk) == steps_of(kept_run[0])
    assert [folder.name for folder in checkpoints_in(first / "checkpoints")] == ["step_00000006"]
    assert hashes(trunk, 4) == hashes(second, 4) == written
    resume(trunk, "--train.steps=7", *same)
    assert [folder.name for folder in checkpoints_in(trunk / "checkpoints")] == ["step_00000007"]
    assert hashes(second, 4) == written
    resume(second)
    assert steps_of(second) == steps_of(kept_run[0])


def test_a_moved_branch_does_not_start_from_the_beginning(trunk, tmp_path):
    to, moved = tmp_path / "runs" / "decay", tmp_path / "runs" / "moved"
    branch([str(trunk), "--step", "4", "--to", str(to)])
    given = ["--config", str(to / "config.yaml"), "--checkpoint.resume=auto"]
    assert load_config(given).run_dir == to
    to.rename(moved)
    given[1] = str(moved / "config.yaml")
    with pytest.raises(ConfigError, match=rf"names the run {to}, but is in the run {moved}; .* --run.name moved\.$"):
        load_config(given)
    assert load_config([*given, "--run.name=new"]).run_dir == tmp_path / "runs" / "new"
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace("resume: never", "resume: auto"))  # as in a resumed run
    read = load_config(["--config", str(moved / "config.yaml")])  # by commands that only read it
    assert (read.run_dir, read.checkpoint.resume) == (to, "auto")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system")
def test_a_branch_on_another_file_system_has_a_copy(trunk, tmp_path, capsys):
    to = Path("/dev/shm") / f"smolds-{os.getpid()}"
    if to.parent.stat().st_dev == trunk.stat().st_dev:
        pytest.skip("no second file system")
    try:
        branch([str(trunk), "--step", "4", "--to", str(to)])
        assert "its checkpoint is a copy, because hard links are not possible there" in capsys.readouterr().out
        assert hashes(to, 4) == hashes(trunk, 4)
    finally:
        shutil.rmtree(to, ignore_errors=True)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--step", "3"], r"has no checkpoint of step 3; it has 2, 4, 6\.$"),
        (["--step", "6"], r"--train.steps 6 ends before the branch's first step 7; raise it"),
        (["--step", "4", "--", "--train.steps=4"], r"--train.steps 4 ends before the branch's first step 5"),
        (["--step", "4", "--", "--train.seed=9"], r"was written with --train.seed 0, but this run has 9"),
        (["--step", "4", "--", "--train.time_budget=60"], r"--train.time_budget is measured .*; set --train.steps\.$"),
        (["--step", "4", "--", "--run.name=x"], r"--run.name cannot be set for a branch"),
        (["--step", "4", "--", "--preset", "debug"], r"--preset cannot be set for a branch"),
        (["--step", "4", "--train.steps=9"], r"does not know '--train.steps=9'.*after `--`"),
        (["--step", "4", "--", "--train.stepz=9"], r"--train.stepz is not an option; did you mean --train.steps\?"),
    ],
)
def test_wrong_branch_is_one_sentence_and_leaves_nothing(kept_run, tmp_path, args, words):
    to = tmp_path / "runs" / "new"
    with pytest.raises(ConfigError, match=words) as refused:
        branch([str(kept_run[0]), "--to", str(to), *args])
    assert "\n" not in str(refused.value) and not to.parent.exists()


def test_branch_of_a_damaged_checkpoint_or_into_a_run_is_an_error(trunk, tmp_path):
    with pytest.raises(ConfigError, match=r"runs/trunk exists; choose another"):
        branch([str(trunk), "--step", "4", "--to", str(trunk)])
    (trunk / "checkpoints" / "step_00000004" / "rank_00000.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"step_00000004 is damaged: rank_00000.safetensors has 0 bytes"):
        branch([str(trunk), "--step", "4", "--to", str(tmp_path / "new")])
    with pytest.raises(ConfigError, match=r"nowhere is not a run"):
        branch([str(tmp_path / "nowhere"), "--step", "4", "--to", str(tmp_path / "new")])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", r"--run.name is empty; set a value"),
        ("a:b", r"--run.name 'a:b' cannot be a folder name"),
        ("trunk/checkpoints/step_00000009", r"is inside the run .*trunk; choose a folder outside, such as .*trunk-2"),
    ],
)
def test_a_new_run_has_a_runs_name_and_lies_outside_its_parent(trunk, tmp_path, monkeypatch, name, words):
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.chdir(empty)
    to = name if name == "." else str(trunk.parent / name)
    for make in (
        lambda: checkpoint(["average", str(trunk), "--steps", "2,4", "--to", to]),
        lambda: branch([str(trunk), "--step", "4", "--to", to]),
    ):
        with pytest.raises(ConfigError, match=words):
            make()
    assert [run.name for run in trunk.parent.iterdir()] == ["trunk"] and len(steps_of(trunk)) == 6
    assert len(checkpoints_in(trunk / "checkpoints")) == 3 and not any(empty.iterdir())


def test_runs_draws_the_tree_and_diff_compares_at_the_same_step(trunk, tmp_path, capsys):
    folder = trunk.parent
    branch([str(trunk), "--step", "4", "--to", str(folder / "decay"), "--", "--train.lr=0.01"])
    branch([str(folder / "decay"), "--step", "4", "--to", str(folder / "again"), "--", "--train.steps=9"])
    checkpoint(["average", str(trunk), "--steps", "2:6:2", "--to", str(folder / "mean")])
    branch([str(trunk), "--step", "2", "--to", str(tmp_path / "elsewhere")])
    (tmp_path / "elsewhere").rename(folder / "moved")  # its parent's relative path is wrong now
    resume(folder / "decay")
    capsys.readouterr()
    runs([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    tree = lines[1:]
    assert re.match(r"trunk +finished +6 of 6 ", tree[0])
    assert re.match(r"  decay \(from step 4\) +finished +6 of 6 ", tree[1])
    assert re.match(r"    again \(from step 4\) +not started +4 of 9 ", tree[2])
    assert re.match(r"  mean \(mean of steps 2 to 6\) +weights only +20\d\d-", tree[3])
    assert re.match(r"moved +not started +2 of 6 ", tree[4])

    shown = difference(trunk, folder / "decay").splitlines()
    assert re.fullmatch(r"parent +trunk from step 4", shown[1])
    assert any(re.match(r"train.lr +0.003 +0.01$", line) for line in shown)
    losses = [steps_of(run)[6] for run in (trunk, folder / "decay")]
    assert any(line.split() == ["loss", "at", "step", "6", *(f"{loss:.5g}" for loss in losses)] for line in shown)
    assert not any("at step" in line for line in difference(trunk, folder / "again").splitlines())

    (folder / "mean" / "parent.json").write_text('{"run": "../mean", "steps": [2, 4], "created": 1}')
    (folder / "again" / "parent.json").write_text("{}")
    runs([str(folder)])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert sorted(line.split()[0] for line in lines) == ["again", "decay", "mean", "moved", "trunk"]
    assert any(re.match(r"again +damaged: parent.json is invalid", line) for line in lines)


def test_stages_of_a_branch_keep_their_steps(small_run, tmp_path):
    """Fractions of the trunk's steps would move with the branch's number of steps."""
    stages = '[{"until": 0.5, "seq_len": 16}, {"seq_len": 32}]'
    constant = ["--train.schedule=wsd", "--train.decay_fraction=0", "--log.tensorboard=false", "--checkpoint.every=3"]
    train(load_config([*small_run, *constant, "--run.name=trunk", "--train.steps=4", f"--train.stages={stages}"]))
    trunk, to = tmp_path / "runs" / "trunk", tmp_path / "runs" / "longer"
    branch([str(trunk), "--step", "3", "--to", str(to), "--", "--train.steps=6", "--train.decay_fraction=0"])
    resume(to)
    own = load_config(["--config", str(to / "config.yaml")]).train.stages
    assert [(stage.until, stage.seq_len) for stage in own] == [("2 steps", 16), (None, 32)]
    assert list(steps_of(to)) == list(range(1, 7))
    assert steps_of(to)[4] == steps_of(trunk)[4]
    settings = ["--train.steps=6", "--train.micro_batch=1"]
    branch([str(trunk), "--step", "3", "--to", str(tmp_path / "micro"), "--", *settings])
    spans = resolve_stages(load_config(["--config", str(tmp_path / "micro" / "config.yaml")])).spans
    assert [span.config.train.micro_batch for span in spans] == [1, 1]
    moved = '--train.stages=[{"until": 0.75, "seq_len": 16}, {"seq_len": 32}]'
    with pytest.raises(ConfigError, match=r"step_00000003 was written with --data.seq_len 32, but this run has 16"):
        branch([str(trunk), "--step", "3", "--to", str(tmp_path / "moved"), "--", moved])
