"""Stages: settings that change during the run give the same losses in every topology, and after a kill in any stage."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SENTENCES
from ranks import ROOT, smolds

from smolds_dist.checkpoint.files import read_manifest
from smolds_dist.config import load_config
from smolds_dist.data.mixture import mixture_of
from smolds_dist.errors import ConfigError
from smolds_dist.inference.generate import load_model
from smolds_dist.observe.data_command import data as data_command
from smolds_dist.observe.report import training_log
from smolds_dist.observe.rows import read_rows
from smolds_dist.observe.runs import differing_settings
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import Machine, plan_topology
from smolds_dist.planner.command import text_needed
from smolds_dist.settings import Data, RunConfig, Source, Stage, Train, Yarn
from smolds_dist.stages import resolve_stages
from smolds_dist.training.branch import branch
from smolds_dist.training.trainer import train

STEPS = 16
STAGES = [
    {"until": 0.25},
    {"until": 8, "seq_len": 128, "lr": 2e-3, "lr_shape": "constant"},
    {"until": 12, "global_batch": 16, "micro_batch": 2, "weights": {"a": 0.25, "b": 0.75}, "document_mask": True,
     "rope_theta": 50000.0},
    {"lr": 0.0, "lr_shape": "linear",
     "rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 128}},
]  # fmt: skip


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A folder with two corpora and the YAML of a run of four stages."""
    folder = tmp_path_factory.mktemp("staged")
    for name, texts in (("a", SENTENCES[:2]), ("b", SENTENCES[2:])):
        rows = [f"{n} {texts[n % 2]} {n * n} {texts[n * 7 % 2]}. " * (1 + n % 5) for n in range(150)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    settings = {
        "preset": "debug",
        "data": {
            "sources": {
                name: {"source": f"jsonl:{folder}/{name}.jsonl", "weight": weight}
                for name, weight in (("a", 0.7), ("b", 0.3))
            },
            "seq_len": 64, "tokenizer_vocab_size": 300, "val_fraction": 0.1, "cache_dir": str(folder / "cache"),
        },
        "model": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16,
        },
        "train": {
            "steps": STEPS, "global_batch": 8, "dtype": "fp32", "eval_every": 4, "eval_sequences": 8,
            "warmup_steps": 2, "lr": 1e-3, "seed": 1, "stages": STAGES,
        },
        "parallel": {"device": "cpu", "check_every": 3},
        "checkpoint": {"every": 1, "keep": STEPS},
        "log": {"tensorboard": False, "sample_every": 0, "level": "quiet"},
        "run": {"dir": str(folder / "runs")},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


def options_of(staged: Path, name: str, *more: str) -> list[str]:
    return ["--config", str(staged / "run.yaml"), f"--run.name={name}", *more]


def steps_of(run: Path) -> dict[int, dict]:
    return {row["step"]: row for row in read_rows(run / "metrics.jsonl") if "loss" in row}


@pytest.fixture(scope="module")
def whole(staged) -> Path:
    """The undisturbed run in one process."""
    assert train(load_config(options_of(staged, "whole"))) == 0
    return staged / "runs" / "whole"


def check_same(run: Path, whole: Path, first: int = 1) -> None:
    """The run's rows from step `first` on, and its validation losses, are those of the undisturbed one."""
    found, expected = steps_of(run), steps_of(whole)
    assert sorted(found) == list(range(first, STEPS + 1))
    for step, row in found.items():
        for number in ("batch", "tokens", "epochs", "unique_texts", "lr"):
            assert row[number] == expected[step][number], (step, number)
        assert row["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), step
    validation = [
        {row["step"]: row["val_loss"] for row in read_rows(one / "metrics.jsonl") if "val_loss" in row}
        for one in (run, whole)
    ]
    assert all(loss == pytest.approx(validation[1][step], rel=1e-5) for step, loss in validation[0].items())


@pytest.mark.parametrize(("world", "settings"), [(2, ["zero=1", "expert=1"]), (4, ["zero=3", "expert=2"])])
def test_stages_are_the_same_in_several_ranks(staged, whole, world, settings):
    name = f"ranks{world}"
    given = options_of(staged, name, *(f"--parallel.{one}" for one in settings))
    ran = smolds("launch", f"--nproc-per-node={world}", "--", *given, timeout=300)
    assert ran.returncode == 0, ran.text
    check_same(staged / "runs" / name, whole)


@pytest.mark.parametrize(
    ("step", "world", "settings"),
    [
        (2, 2, ["zero=3"]),
        pytest.param(6, 4, ["zero=1", "expert=4"], marks=pytest.mark.long),
        pytest.param(8, 2, ["zero=2", "expert=2"], marks=pytest.mark.long),  # a stage's last step
        pytest.param(10, 2, ["zero=2", "expert=1"], marks=pytest.mark.long),
        pytest.param(14, 4, ["zero=3", "expert=2"], marks=pytest.mark.long),
    ],
)
def test_a_stage_is_resumed_in_another_topology(staged, whole, step, world, settings):
    checkpoint = whole / "checkpoints" / f"step_{step:08}"
    name = f"resumed{step}"
    given = options_of(staged, name, f"--checkpoint.resume={checkpoint}", *(f"--parallel.{one}" for one in settings))
    ran = smolds("launch", f"--nproc-per-node={world}", "--", *given, timeout=300)
    assert ran.returncode == 0, ran.text
    check_same(staged / "runs" / name, whole, step + 1)


def test_a_killed_run_continues_in_its_stage(staged, whole):
    """Killed once in each stage, as soon as the run's rows show it there."""
    run = staged / "runs" / "killed"
    given = options_of(staged, "killed", "--checkpoint.resume=auto")
    stages = resolve_stages(load_config(given))
    for stage in stages.spans:
        process = subprocess.Popen([sys.executable, "-m", "smolds_dist", "train", *given], cwd=ROOT)
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if (run / "metrics.jsonl").exists() and max(steps_of(run), default=0) > stage.first:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert train(load_config(given)) == 0
    check_same(run, whole)


def test_stages_change_what_they_say(staged, whole):
    rows = steps_of(whole)
    tokens = [rows[step]["tokens"] for step in range(1, STEPS + 1)]
    assert tokens == [*range(512, 4 * 512 + 1, 512), *range(3072, 6145, 1024), *range(8192, 22529, 2048)]
    assert [rows[step]["lr"] for step in (1, 2, 5, 8, 12, 13, 16)] == pytest.approx(
        [5e-4, 1e-3, 2e-3, 2e-3, 2e-3, 1.5e-3, 0.0], abs=1e-9
    )
    events = [row for row in read_rows(whole / "metrics.jsonl") if row.get("event") == "stage"]
    assert [(e["step"], e["number"], e["seq_len"], e["global_batch"]) for e in events] == [
        (4, 2, 128, 8), (8, 3, 128, 16), (12, 4, 128, 16),
    ]  # fmt: skip
    manifests = {step: read_manifest(whole / "checkpoints" / f"step_{step:08}") for step in (4, 5, 9, 16)}
    assert [one.config["data"]["seq_len"] for one in manifests.values()] == [64, 128, 128, 128]
    assert [one.config["train"]["global_batch"] for one in manifests.values()] == [8, 8, 16, 16]
    assert [one.samples for one in manifests.values()] == [32, 40, 80, 192]
    assert [one.tokens for one in manifests.values()] == [tokens[step - 1] for step in manifests]


def test_a_checkpoint_has_the_rotary_embedding_of_its_stage(whole):
    found = {step: load_model(whole, step)[0].config for step in (4, 9, 16)}
    assert [one.rope_theta for one in found.values()] == [100000.0, 50000.0, 50000.0]
    assert found[9].rope_scaling is None and found[16].rope_scaling["factor"] == 2.0
    exported, _ = load_model(whole)
    assert exported.config.rope_scaling["factor"] == 2.0 and exported.config.rope_theta == 50000.0
    ids = torch.arange(3, 100)[None]
    last, _ = load_model(whole, STEPS)
    assert torch.equal(exported(ids, use_cache=False).logits, last(ids, use_cache=False).logits)


def test_eval_takes_the_length_of_the_checkpoints_stage(whole):
    for options, length in (([], 128), (["--step=3"], 64), (["--data.seq_len=32"], 32)):
        told = smolds("eval", str(whole), *options)
        assert told.returncode == 0 and f"in sequences of {length}" in told.text, told.text


def test_order_and_steps_are_shown_by_stage(staged, whole, capsys):
    given = options_of(staged, "whole")
    assert data_command(["order", "--samples", "28:68", "--", *given]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["stage"], line["seq_len"]) for line in lines] == [(1, 64)] * 4 + [(2, 128)] * 32 + [(3, 128)] * 4
    assert data_command(["stats", "--json", "--", *given]) == 0
    stats = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["padding"] for one in stats] == [0, 0]
    assert smolds("data", "show", str(whole), "--step=10").returncode == 0  # compares with the batch trained on
    shown = smolds("data", "show", str(whole), "--step=10", "--json").stdout.splitlines()
    assert [json.loads(line)["index"] for line in shown] == list(range(80, 96))


def test_plan_and_log_show_the_stages(staged, whole):
    planned = smolds("plan", "--hardware", "h100", "--", *options_of(staged, "planned", "--parallel.device=auto"))
    assert planned.returncode == 0, planned.text
    lines = [line.strip() for line in planned.stdout.splitlines() if line.strip().startswith("stage ")]
    assert [line.split(":")[0] for line in lines] == [
        "stage 1, steps 1 to 4", "stage 2, steps 5 to 8", "stage 3, steps 9 to 12", "stage 4, steps 13 to 16",
    ]  # fmt: skip
    assert "16 sequences of 128 tokens, 0.25 a + 0.75 b, rope_theta 50000.0, document_mask True: " in lines[2]
    assert "learning rate linear 0, YaRN factor 2: " in lines[3]
    log = training_log(whole)
    assert "Stage 4: steps 13 to 16: 16 sequences of 128 tokens" in log and "stage 2 begins" in log


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"global_batch": 4}, "was trained on 80 sequences up to step 9, but this run's stages have 64"),
        ({"seq_len": 32}, "was written with --data.seq_len 128, but this run has 32"),
        ({"weights": {"b": 1}}, "then 70% a + 30% b in 128 tokens until step 8, then 75% b"),
    ],
)
def test_past_stages_cannot_change_at_a_resume(staged, whole, change, words):
    given = options_of(staged, "other", f"--checkpoint.resume={whole / 'checkpoints' / 'step_00000009'}")
    stages = [STAGES[0], STAGES[1] | change, *STAGES[2:]]
    with pytest.raises(ConfigError) as error:
        train(load_config([*given, f"--train.stages={json.dumps(stages)}"]))
    assert words in str(error.value)


def test_fractions_that_more_steps_would_move_are_named(staged, whole):
    ends = (0.25, 0.5, 0.75, None)
    stages = json.dumps([stage | {"until": end} for stage, end in zip(STAGES, ends, strict=True)])
    resume = f"--checkpoint.resume={whole / 'checkpoints' / 'step_00000006'}"
    given = options_of(staged, "more", resume, "--train.steps=64", f"--train.stages={stages}")
    with pytest.raises(ConfigError) as error:
        train(load_config(given))
    assert "--train.steps 64, before 16, moves the ends" in str(error.value)
    assert "set until to '4 steps', '8 steps', '12 steps': " in str(error.value)


def test_a_world_size_that_does_not_divide_a_batch_is_rejected_with_its_stage(staged):
    stages = '[{"until": 4}, {"global_batch": 6}]'
    config = load_config(options_of(staged, "uneven", f"--train.stages={stages}"))
    with pytest.raises(ConfigError) as error:
        plan_topology(config, Machine(("cpu",), 4, False), RankInfo(0, 0, 4, 4))
    assert str(error.value).startswith(
        "train.stages: stage 2: --train.global_batch 6 is not a multiple of the world size 4"
    )


def test_plan_counts_the_text_of_the_steps_alone(staged):
    """Not that of stages which a short run does not reach."""
    config = load_config(
        options_of(
            staged, "short", "--train.stages=[{until: 10}, {until: 400, weights: {b: 1}}, {}]", "--train.steps=12"
        )
    )
    assert text_needed(config, 12) == [
        "text: 70% a + 30% b until step 10, then 100% b until step 12",
        "tokens: 3,584 of a, 2,560 of b",
    ]


def test_a_branch_keeps_the_stages_and_differs_in_its_end(staged, whole):
    to = staged / "runs" / "branch"
    with pytest.raises(ConfigError, match="global_batch would have no effect"):
        branch([str(whole), "--step=6", f"--to={to}", "--", "--train.global_batch", "4"])
    branch([str(whole), "--step=6", f"--to={to}", "--", "--train.steps", "20"])
    assert differing_settings([whole, to]) == [
        ("train.steps", "16", "20"), ("train.stages.4.until", "16 steps", "20 steps"),
    ]  # fmt: skip


@pytest.mark.long
def test_code_is_compiled_again_only_for_other_shapes(staged, capsys):
    stages = (
        '[{"until": 2, "micro_batch": 4}, {"until": 4, "global_batch": 16}, {"until": 6, "lr": 1e-3}, {"seq_len": 32}]'
    )
    given = options_of(
        staged, "compiled", f"--train.stages={stages}", "--train.compile=true", "--log.level=normal", "--train.steps=8"
    )
    assert train(load_config(given)) == 0
    assert capsys.readouterr().out.count("compiled in ") == 2
    plain = options_of(staged, "plain", f"--train.stages={stages}", "--train.compile=false", "--train.steps=8")
    assert train(load_config(plain)) == 0
    losses = [[row["loss"] for row in steps_of(staged / "runs" / name).values()] for name in ("compiled", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_stage_in_progress_must_match_and_later_ones_may_change(staged, whole):
    given = options_of(staged, "later", f"--checkpoint.resume={whole / 'checkpoints' / 'step_00000009'}")
    other = [*STAGES[:2], {name: value for name, value in STAGES[2].items() if name != "rope_theta"}, STAGES[3]]
    with pytest.raises(ConfigError) as error:
        train(load_config([*given, f"--train.stages={json.dumps(other)}"]))
    assert "was written with --model.rope_theta 50000.0, but this run has 100000.0" in str(error.value)
    later = [*STAGES[:3], {"seq_len": 64, "global_batch": 8, "document_mask": False}]
    train(load_config([*given, "--train.steps=14", f"--train.stages={json.dumps(later)}"]))
    rows = steps_of(staged / "runs" / "later")
    assert sorted(rows) == list(range(10, 15)) and rows[14]["tokens"] - rows[13]["tokens"] == 8 * 64
    expected = steps_of(whole)
    assert [rows[step]["batch"] for step in (10, 11, 12)] == [expected[step]["batch"] for step in (10, 11, 12)]


@pytest.mark.parametrize(
    ("until", "last"),
    [(0.5, 50), (40, 40), ("1 step", 1), ("40 steps", 40), ("0.4M tokens", 49), ("1e+5 tokens", 12), (None, 100)],
)
def test_ends_of_stages(until, last):
    config = RunConfig(train=Train(steps=100, global_batch=8, stages=[Stage(until), *([Stage()] if until else [])]))
    spans = resolve_stages(config).spans
    assert spans[0].last == last and spans[-1].last == 100
    resolved = resolve_stages(spans[-1].config)
    assert [(one.first, one.last, one.tokens) for one in resolved.spans] == [(s.first, s.last, s.tokens) for s in spans]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (['--train.stages=[{"until": 1}, {"seq_len": 64}]'], "stage 1: until 1 is the end of the run"),
        (["--train.stages=[{until: 0.5}, {lr: 0}]"], "stage 2: lr 0 with lr_shape constant would train nothing"),
        (["--train.stages=[{until: 0.5}, {lr: 1e-5, lr_shape: hold}]"], "lr 1e-05 with lr_shape hold holds the rate"),
        (["--train.stages.seq_len=32"], "--train.stages.seq_len is not an option; set all: --train.stages"),
        (["--train.stages.0.seq_len", "32"], "--train.stages.0.seq_len is not an option"),
    ],
)
def test_stages_that_do_nothing_are_rejected(options, words):
    with pytest.raises(ConfigError) as error:
        load_config(["--preset", "debug", *options])
    assert words in str(error.value)


def test_a_section_in_the_wrong_place_is_named(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: debug\nstages: [{until: 0.5}, {seq_len: 64}]\n")
    with pytest.raises(ConfigError) as error:
        load_config(["--config", str(tmp_path / "run.yaml")])
    assert str(error.value) == "stages is not a section; write it under train."


def test_stages_of_an_option_replace_those_of_a_file(tmp_path):
    yarn = {"factor": 2.0, "original_max_position_embeddings": 128, "mscale": 1.0}
    stages = [{"until": 0.5}, {"rope_scaling": yarn, "weights": {"stdlib": 2.0}}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"preset": "debug", "train": {"stages": stages}}))
    other = [{"until": 5}, {"rope_scaling": yarn | {"mscale": None, "factor": 4.0}}]
    del other[1]["rope_scaling"]["mscale"]
    found = load_config(["--config", str(tmp_path / "run.yaml"), f"--train.stages={json.dumps(other)}"]).train.stages
    assert found == [Stage(5.0), Stage(rope_scaling=Yarn(4.0, 128))]


def test_lr_until_is_a_fraction_of_the_runs_steps():
    stages = [Stage(10), Stage(80, lr=0.0, lr_shape="linear", lr_until=0.5), Stage(seq_len=64)]
    resolved = resolve_stages(RunConfig(train=Train(steps=40, stages=stages))).spans[0].config.train.stages
    assert resolved[1].lr_until == "20 steps"


def test_a_stage_takes_only_sources_with_a_weight():
    """Also if another source lags by more than a sample of the new length."""
    sources = {name: Source("stdlib", 0.5) for name in "ab"}
    stages = [Stage("1 step"), Stage(seq_len=32, weights={"a": 1.0})]
    config = RunConfig(data=Data(seq_len=128, sources=sources), train=Train(steps=8, global_batch=3, stages=stages))
    source, _ = mixture_of(config).locate(np.arange(3, 24))
    assert not source.any()


def test_other_text_of_a_stage_is_not_a_loss_spike(staged, tmp_path):
    """Its loss is far above that of the text before, also after a resume in the stage."""
    chance = random.Random(0)
    rows = {"a": [f"{n} one two three. " * 20 for n in range(200)]}
    rows["b"] = [f"{chance.getrandbits(1600):x}" for _ in range(200)]
    for name, texts in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = options_of(
        staged, "noise", "--train.stages=[{until: 60}, {weights: {b: 1.0}}]", "--train.global_batch=4",
        "--train.spike_threshold=4", "--train.spike_steps=2", "--train.lr=1e-2", "--checkpoint.every=10",
        "--train.eval_every=0",
        *(f"--data.sources.{name}.source=jsonl:{tmp_path}/{name}.jsonl" for name in "ab"), "--data.sources.b.weight=0",
    )  # fmt: skip
    assert train(load_config([*given, "--train.steps=63"])) == 0
    assert train(load_config([*given, "--train.steps=66", "--checkpoint.resume=auto"])) == 0
    rows = read_rows(staged / "runs" / "noise" / "metrics.jsonl")
    assert not [row for row in rows if row.get("event") == "rollback"]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert losses[61] > 2 * losses[60]


def test_a_short_run_keeps_later_stages_where_they_are():
    stages = [Stage(40, seq_len=64), Stage(80, seq_len=128), Stage(seq_len=256)]
    short, full = (resolve_stages(RunConfig(train=Train(steps=steps, stages=stages))) for steps in (50, 100))
    assert [one.first for one in short.spans] == [one.first for one in full.spans] == [0, 40, 80]
    assert short.tokens(50) == full.tokens(50)
