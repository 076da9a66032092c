"""The checkpoint format: complete or absent, verified before reading, kept as configured, and `smolds checkpoint`."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import smolds

from smolds_dist.checkpoint.command import checkpoint
from smolds_dist.checkpoint.files import (
    CheckpointReader,
    DamagedCheckpointError,
    Manifest,
    checkpoints_in,
    finalize,
    find_damage,
    open_verified,
    read_manifest,
    write_tensors,
)
from smolds_dist.checkpoint.resume import check_resumable, open_checkpoint
from smolds_dist.config import load_config
from smolds_dist.data.prepare import prepare_data
from smolds_dist.errors import ConfigError
from smolds_dist.inference.generate import generate
from smolds_dist.interchange.import_model import import_model
from smolds_dist.launching.slurm import slurm
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.fragments import Fragment, logical_shapes, split_by_tensor
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.settings import RunConfig, Train
from smolds_dist.training.build import lr_change
from smolds_dist.training.trainer import train

FILES = ["rank_00000.safetensors", "manifest.json", "manifest.json.sha256"]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]


@pytest.fixture
def copied(kept_run, tmp_path):
    """Copy that run; return it and the options to resume it."""
    run_dir, options = kept_run
    shutil.copytree(run_dir, tmp_path / "runs" / "one", symlinks=True)
    return tmp_path / "runs" / "one", [*options, f"--run.dir={tmp_path / 'runs'}", "--checkpoint.resume=auto"]


def opened(options: list[str]) -> CheckpointReader | None:
    config = load_config(options)
    check_resumable(config)
    return open_checkpoint(config, plan_topology(config, detect_machine(), RankInfo()))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncate", "flip", "delete", "empty"])
def test_damaged_file_is_named_and_the_previous_checkpoint_used(copied, capsys, name, harm):
    run_dir, options = copied
    newest = run_dir / "checkpoints" / "step_00000006"
    content = (newest / name).read_bytes()
    # Any byte may be damaged: each file has its own seed.
    place = random.Random(name).randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :]
    new = {"truncate": content[:place], "flip": flipped, "empty": b""}
    (newest / name).unlink() if harm == "delete" else (newest / name).write_bytes(new[harm])
    assert any(name.removesuffix(".sha256") in line for line in find_damage(newest))
    reader = opened(options)
    assert reader.manifest.step == 4
    assert f"{newest} is damaged: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"step_00000006 is damaged|no checkpoint of .* is complete"):
        opened([*options, "--checkpoint.resume=6"])
    assert checkpoint(["verify", str(run_dir)]) == 1


def test_run_without_a_complete_checkpoint_is_rejected(copied):
    run_dir, options = copied
    for folder in checkpoints_in(run_dir / "checkpoints"):
        (folder / FILES[0]).write_bytes(b"")
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"no checkpoint of .* is complete .*step_00000006.*step_00000002"):
        train(load_config([*options, "--train.steps=8"]))
    assert (run_dir / "metrics.jsonl").read_bytes() == before


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickle_in_a_checkpoint_is_never_executed(copied, tmp_path):
    """Neither next to the files, nor in place of one whose manifest entry was forged to match."""
    run_dir, options = copied
    newest = run_dir / "checkpoints" / "step_00000006"
    for name in ("balancer.pt", "rank_00001.safetensors", "mp_rank_00_model_states.pt"):
        (newest / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (
        "not in the manifest: balancer.pt" in smolds("checkpoint", "verify", str(run_dir)).stdout
    )  # as a user starts it
    train(load_config([*options, "--train.steps=7"]))
    assert losses(run_dir)[-1][0] == 7

    newest = run_dir / "checkpoints" / "step_00000007"
    torch.save(Bomb(tmp_path / "ran"), newest / FILES[0])
    manifest = read_manifest(newest)
    content = (newest / FILES[0]).read_bytes()
    manifest.files[FILES[0]].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    text = json.dumps(dataclasses.asdict(manifest))
    (newest / "manifest.json").write_text(text)
    (newest / "manifest.json.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
    assert not find_damage(newest)
    with pytest.raises(ConfigError, match="step_00000007 is damaged"):
        train(load_config([*options, "--train.steps=8", "--checkpoint.resume=7"]))
    assert not (tmp_path / "ran").exists()


def test_manifest_cannot_name_files_outside_the_folder(copied):
    run_dir, _ = copied
    newest = run_dir / "checkpoints" / "step_00000006"
    outside = run_dir / "outside.safetensors"
    shutil.move(newest / FILES[0], outside)
    (newest / FILES[0]).symlink_to(outside)
    assert "is not a regular file of the folder" in find_damage(newest)[0]
    manifest = read_manifest(newest)
    manifest.files["../outside.safetensors"] = manifest.files.pop(FILES[0])
    unfinished = newest.with_name("unfinished_step_00000006")
    unfinished.mkdir()
    assert "is not a regular file of the folder" in find_damage(finalize(unfinished, manifest))[0]


def test_nothing_of_others_is_unpickled_or_run(kept_run, tmp_path):
    """Token files and models with a pickle, and code in a model's folder, execute nothing."""
    ran = tmp_path / "ran"
    np.save(tmp_path / "tokens.npy", np.array([Bomb(ran)]), allow_pickle=True)
    (tmp_path / "tokens.npy.gz").write_bytes(gzip.compress((tmp_path / "tokens.npy").read_bytes()))
    options = [f"--data.tokenizer={kept_run[0] / 'tokenizer'}", f"--data.cache_dir={tmp_path}", "--run.name=x"]
    for name in ("tokens.npy", "tokens.npy.gz"):
        config = load_config([*options, f"--data.source=tokens:{tmp_path / name}"])
        with pytest.raises(ConfigError, match=f"{name} cannot be read .*[Oo]bject"):
            prepare_data(config)

    model = shutil.copytree(kept_run[0] / "export", tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save(Bomb(ran), model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="contains no safetensors files"):
        generate([str(model), "--prompt", "x"])
    with pytest.raises(ConfigError, match="contains no safetensors files"):
        import_model([str(model), "--to", str(tmp_path / "run"), "--data.seq_len=32"])

    shutil.copy(kept_run[0] / "export" / "model.safetensors", model)
    fields = json.loads((model / "config.json").read_text()) | {"model_type": "theirs"}
    fields["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (model / "config.json").write_text(json.dumps(fields))
    (model / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(ConfigError, match=r"cannot be loaded .*custom code"):
        generate([str(model), "--prompt", "x"])
    with pytest.raises(ConfigError, match="cannot be imported"):
        import_model([str(model), "--to", str(tmp_path / "run"), "--data.seq_len=32"])
    assert not ran.exists()
    np.load(tmp_path / "tokens.npy", allow_pickle=True)  # control: the attack works if loaded
    assert ran.exists()


def test_any_range_is_read_from_any_split(tmp_path):
    """Property: tensors split at random over files and read at random are what was written."""
    chance = random.Random(7)
    shapes = logical_shapes("model.layers.0.mlp.experts.gate_up_proj", (3, 10, 7)) | {"model.norm.weight": (13,)}
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    files: list[dict] = [{}, {}, {}]
    for name, tensor in whole.items():
        borders = [0, *sorted(chance.sample(range(1, tensor.numel()), 3)), tensor.numel()]
        for begin, end in itertools.pairwise(borders):
            chance.choice(files)[f"{name}:value:{begin}"] = tensor.flatten()[begin:end].clone()
    unfinished = tmp_path / "unfinished_step_00000001"
    unfinished.mkdir()
    entries = {
        f"f{n}.safetensors": write_tensors(unfinished / f"f{n}.safetensors", file) for n, file in enumerate(files)
    }
    reader = CheckpointReader(finalize(unfinished, manifest_of(shapes, entries)), manifest_of(shapes, entries))
    reader.check_coverage()
    for _ in range(200):
        name = chance.choice(list(whole))
        begin = chance.randrange(whole[name].numel())
        end = chance.randint(begin + 1, whole[name].numel())
        out = torch.empty(end - begin)
        reader.fill(Fragment(name, (), begin, {"value": out}))
        assert torch.equal(out, whole[name].flatten()[begin:end])
    with pytest.raises(DamagedCheckpointError, match="is missing"):
        reader.read("model.norm.weight", "value", 10, torch.empty(4))


def manifest_of(shapes: dict, files: dict):
    topology = dict(world_size=1, engine="local", zero=0, expert=1, dtype="fp32")
    empty = dict(optimizer_steps=1, skipped_steps=0, rollbacks=0, val_loss=None, topology=topology, data={})
    tensors = {name: list(shape) for name, shape in shapes.items()}
    return Manifest(step=1, created="", versions={}, tensors=tensors, files=files, config=asdict(RunConfig()), **empty)


@pytest.mark.parametrize("missing", [True, False])
def test_missing_or_repeated_elements_are_found(tmp_path, missing):
    pieces = {"norm:value:0": torch.ones(5), "norm:value:5": torch.ones(5)}
    if missing:
        del pieces["norm:value:5"]
    else:
        pieces["norm:value:3"] = torch.ones(2)
    unfinished = tmp_path / "unfinished_step_00000001"
    unfinished.mkdir()
    entry = write_tensors(unfinished / "f.safetensors", pieces)
    folder = finalize(unfinished, manifest_of({"norm": (10,)}, {"f.safetensors": entry}))
    reader = CheckpointReader(folder, read_manifest(folder))
    with pytest.raises(DamagedCheckpointError, match="missing or repeated"):
        reader.check_coverage()
    with pytest.raises(ConfigError, match=r"damaged: .* missing or repeated elements; choose another --step"):
        open_verified(folder)


def test_fragments_of_all_ranks_cover_a_parameter_once():
    """ZeRO's ranges with padding at their end, and the shares of replicas."""
    shapes = logical_shapes("model.layers.1.mlp.experts.w1", (2, 5, 3), first_expert=4)
    assert list(shapes) == [f"model.layers.1.mlp.experts.{e}.gate_proj.weight" for e in (4, 5)]
    value = torch.arange(30.0)
    padded = torch.cat((value, torch.full((2,), -1.0)))
    fragments = [
        f for rank in range(4) for f in split_by_tensor(shapes, rank * 8, {"value": padded[rank * 8 : rank * 8 + 8]})
    ]
    assert torch.cat([f.tensors["value"] for f in fragments]).tolist() == value.tolist()
    shares = [
        f.share()
        for replica in range(3)
        for f in split_by_tensor(shapes, 0, {"value": value}, replica=replica, replicas=3)
    ]
    for number, name in enumerate(shapes):
        parts = sorted((f for f in shares if f.name == name), key=lambda f: f.start)
        assert torch.cat([f.tensors["value"] for f in parts]).tolist() == value[15 * number : 15 * number + 15].tolist()


def test_retention_keeps_the_last_the_periodic_and_the_best(small_run, tmp_path, capsys):
    options = [
        *small_run, "--run.name=kept", "--train.steps=12", "--train.eval_every=1", "--checkpoint.every=1",
        "--checkpoint.keep=2", "--checkpoint.keep_every=5", "--log.sample_every=0", "--log.tensorboard=false",
        # The learning rate grows until training diverges: the best step is an early one.
        "--train.warmup_steps=12", "--train.lr=1.5", "--train.grad_clip=0", "--log.sample_prompts=[]",
    ]  # fmt: skip
    train(load_config(options))
    run_dir = tmp_path / "runs" / "kept"
    evaluations = {row["step"]: row["val_loss"] for row in read_rows(run_dir / "metrics.jsonl") if "val_loss" in row}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best not in (5, 10, 11, 12)  # else it would be kept anyway
    kept = [read_manifest(folder).step for folder in reversed(checkpoints_in(run_dir / "checkpoints"))]
    assert kept == sorted({5, 10, 11, 12, best})
    capsys.readouterr()
    checkpoint(["ls", str(run_dir)])
    listed = capsys.readouterr().out
    assert re.search(rf"^ +{best} .*\(best\)$", listed, re.MULTILINE), listed


def test_resume_from_a_step_and_from_another_run(kept_run, copied, tmp_path):
    run_dir, options = copied
    other = [*options, "--run.name=other", f"--checkpoint.resume={run_dir / 'checkpoints' / 'step_00000004'}"]
    train(load_config(other))
    assert losses(tmp_path / "runs" / "other") == losses(run_dir)[4:]
    with pytest.raises(ConfigError, match=r"newer checkpoints than step_00000002.*rm .* --after 2"):
        check_resumable(load_config([*options, "--checkpoint.resume=2"]))
    assert checkpoint(["rm", str(run_dir), "--after", "2"]) == 0
    train(load_config([*options, "--checkpoint.resume=2"]))
    assert losses(run_dir) == losses(kept_run[0])
    with pytest.raises(ConfigError, match=r"a step of this run \(2, 4, 6\)"):
        check_resumable(load_config([*options, "--checkpoint.resume=3"]))


def test_changed_learning_rate_is_logged(copied, capsys):
    train(load_config([*copied[1], "--train.steps=7", "--train.schedule=cosine"]))
    words = r"the learning rate of step 7 is (\S+), but (\S+) with the checkpoint's settings; see --train.schedule"
    ((now, before),) = re.findall(words, capsys.readouterr().out)
    assert float(now) == pytest.approx(0.1 * float(before))


@pytest.mark.parametrize(
    ("step", "before", "now", "words"),
    [
        (
            50,
            {},
            {"steps": 200},
            r"of step 51 is 8.\d\de-01, but 5.\d\de-01 with .*; it ends at 1.00e-01 in step 200, before at",
        ),
        (
            50,
            {"schedule": "wsd"},
            {"steps": 200},
            r"of step 51 is 1.00e\+00 as before; it ends at 1.00e-01 in step 200, ",
        ),
        (
            90,
            {"schedule": "wsd"},
            {"steps": 200},
            r"of step 91 is 1.00e\+00, but 5.05e-01 with the checkpoint's settings; see",
        ),
        (
            5,
            {"warmup_steps": 10},
            {"steps": 50},
            r"of step 6 is 6.00e-01 as before; .* in step 50, before at .* in step 100$",
        ),
        (5, {"warmup_steps": 10}, {"warmup_steps": 20}, r"of step 6 is 3.00e-01, but 6.00e-01 with the checkpoint's"),
        (
            100,
            {},
            {"steps": 110, "schedule": "wsd", "decay_fraction": 0},
            r"1.00e\+00, but 1.00e-01 .* ends at 1.00e\+00 in",
        ),
        (50, {}, {"beta1": 0.8, "steps": 100}, None),
    ],
)
def test_changes_of_the_learning_rate_are_one_line_with_both_values(step, before, now, words):
    first = {"steps": 100, "warmup_steps": 1, "lr": 1.0} | before
    saved, settings = Train(**first), RunConfig(train=Train(**first | now))
    manifest = dataclasses.replace(manifest_of({}, {}), step=step, config=asdict(RunConfig(train=saved)))
    line = lr_change(manifest, settings)
    assert (line is None) if words is None else (re.search(words, line) and "\n" not in line), line


def test_converted_checkpoint_resumes_but_weights_only_does_not(copied, tmp_path):
    run_dir, options = copied
    for name, extra in {"whole": [], "weights": ["--weights-only"]}.items():
        assert checkpoint(["convert", str(run_dir), "--step", "4", "--to", str(tmp_path / "runs" / name), *extra]) == 0
        folder = tmp_path / "runs" / name / "checkpoints" / "step_00000004"
        reader = CheckpointReader(folder, read_manifest(folder))
        reader.check_coverage()
        assert reader.kinds("model.norm.weight") == (
            {"value", "exp_avg", "exp_avg_sq"} if name == "whole" else {"value"}
        )
    train(load_config([*options, "--run.name=whole"]))
    assert losses(tmp_path / "runs" / "whole") == losses(run_dir)[4:]
    with pytest.raises(ConfigError, match="without optimizer state"):
        check_resumable(load_config([*options, "--run.name=weights"]))


def test_last_complete_checkpoint_cannot_be_removed(copied):
    run_dir, _ = copied
    for step in (2, 4):
        (run_dir / "checkpoints" / f"step_0000000{step}" / FILES[0]).write_bytes(b"")
    with pytest.raises(ConfigError, match="last complete checkpoint"):
        checkpoint(["rm", str(run_dir), "--step", "6"])
    assert checkpoint(["rm", str(run_dir), "--step", "2", "4"]) == 0
    assert [path.name for path in checkpoints_in(run_dir / "checkpoints")] == ["step_00000006"]
    assert checkpoint(["verify", str(run_dir)]) == 0


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        (["ls", "nowhere"], "has no checkpoint"),
        (["verify", "RUN", "--step", "5"], "it has 2, 4, 6"),
        (["rm", "RUN"], "--step N"),
        (["convert", "RUN", "--to", "RUN"], "choose another --to"),
    ],
)
def test_mistake_is_one_sentence(kept_run, args, fix):
    with pytest.raises(ConfigError, match=fix) as refused:
        checkpoint([str(kept_run[0]) if arg == "RUN" else arg for arg in args])
    assert "\n" not in str(refused.value)


def test_mistake_in_the_command_line_ends_with_exit_code_2(kept_run):
    finished = smolds("checkpoint", "prune", str(kept_run[0]))
    assert finished.returncode == 2, finished.text
    assert "verify" in finished.stderr and finished.stderr.count("\n") == 1


def test_random_states_are_restored(copied):
    _, options = copied
    states = opened(options).stored("random.rank_00000")
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    assert not torch.equal(states["cpu"], before)
    torch.set_rng_state(states["cpu"])
    assert torch.equal(torch.get_rng_state(), states["cpu"])
    assert opened(options).stored("random.rank_00007") == {}


def test_secrets_reach_no_file_of_a_run(small_run, tmp_path, monkeypatch, capsys):
    secret = "hf_SecretOfFortyLettersThatNobodyMaySee"
    arguments = [*small_run, "--run.name=secret", "--parallel.zero=1"]  # the engine for several ranks
    finished = smolds("train", *arguments, HF_TOKEN=secret, WANDB_API_KEY=secret, timeout=120)
    assert finished.returncode == 0, finished.text
    assert secret not in finished.stdout + finished.stderr
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    monkeypatch.setenv("HF_TOKEN", secret)
    slurm(["--time", "5", "--", *small_run])
    script = capsys.readouterr().out
    assert "#SBATCH" in script and secret not in script
