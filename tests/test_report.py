"""`smolds report`: what it says is what the run has written."""

import json
import re
import shutil

import matplotlib.image
import pytest
from ranks import smolds

from smolds_dist.errors import ConfigError
from smolds_dist.observe.report import report, sample_log, training_log, unique_content
from smolds_dist.observe.rows import read_rows


@pytest.fixture
def copied(kept_run, tmp_path):
    """A run's folder that may be changed."""
    shutil.copytree(kept_run[0], tmp_path / "one", symlinks=True)
    return tmp_path / "one"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("one two three four", 1.0),
        ("a b c a b c a b c", 3 / 7),
        ("no no no no no", 1 / 3),
        ("f(x); f(x); f(x);", 5 / 13),
        ("too short", None),
        ("", None),
    ],
)
def test_unique_content_is_the_share_of_distinct_trigrams(text, share):
    assert unique_content(text) == (None if share is None else pytest.approx(share))


def test_report_of_a_run_holds_its_numbers(copied, capsys):
    report([str(copied)])
    assert capsys.readouterr().out.split() == [
        str(copied / name) for name in ("training_metrics.png", "log_training.md", "sample_outputs.md")
    ]
    log = (copied / "log_training.md").read_text()
    rows = read_rows(copied / "metrics.jsonl")
    evaluations = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    for row in rows:
        if "loss" in row:
            held_out = f"{evaluations[row['step']]:.4f}" if row["step"] in evaluations else ""
            assert f"| {row['step']} | {row['tokens']:,} | {row['loss']:.4f} | {held_out} |" in log
    assert "65,568 parameters" in log and "DeepSeekV3ForCausalLM(" in log
    assert f"best validation loss | {min(evaluations.values()):.4f} at step" in log
    assert len(re.findall(r"^\| \d .*1 process, plain PyTorch, fp32 \|$", log, re.MULTILINE)) == 3  # checkpoints
    assert "num_experts: 8" in log

    samples = (copied / "sample_outputs.md").read_text()
    for row in map(json.loads, (copied / "samples.jsonl").read_text().splitlines()):
        assert row["text"] in samples and f"## Step {row['step']}" in samples
    assert "distinct 3-grams among all 3-grams" in samples

    picture = matplotlib.image.imread(copied / "training_metrics.png")
    assert picture.shape[0] > 700 and picture.shape[1] > 1100
    assert (picture[..., 3] == 1).all()  # opaque: the same on light and dark pages
    assert picture[..., :3].std() > 0.05


def test_events_are_told_and_values_that_are_not_finite_are_drawn_around(copied):
    with (copied / "metrics.jsonl").open("a") as file:
        skipped = {
            "step": 7,
            "tokens": 1792,
            "loss": None,
            "lr": 1.0,
            "grad_norm": None,
            "tokens_per_s": 9.0,
            "skipped": True,
        }
        event = {"step": 6, "event": "rollback", "spike_begin": 7, "spike_end": 8, "skipped_samples": 16}
        for row in (event, skipped):
            file.write(json.dumps(row) + "\n")
    report([str(copied)])
    log = (copied / "log_training.md").read_text()
    assert "step 6: back here from a loss spike in steps 7 to 8, 16 samples left out" in log
    assert "step 7: loss or gradient not finite, update skipped" in log
    assert "| 7 | 1,792 | not finite |" in log


def test_code_blocks_hold_whatever_a_sample_says(copied):
    text = "```\n| not | a table |\n````"
    (copied / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": "x", "text": text}) + "\n")
    assert f"`````\n{text}\n`````" in sample_log(copied)


def test_log_needs_no_checkpoint(copied):
    shutil.rmtree(copied / "checkpoints")
    assert "known from the first checkpoint on" in training_log(copied)


def test_several_runs_share_a_picture(kept_run, copied, tmp_path):
    finished = smolds("report", str(kept_run[0]), str(copied), "--to", str(tmp_path / "both"))
    assert finished.returncode == 0, finished.text
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["training_metrics.png"]
    report([str(copied), "--to", str(tmp_path / "alone")])
    one, two = (matplotlib.image.imread(tmp_path / name / "training_metrics.png") for name in ("alone", "both"))
    assert (one != two).any()


@pytest.mark.parametrize(("args", "fix"), [(["nowhere"], "holds no training steps"), (["RUN", "RUN"], "--to")])
def test_mistake_is_one_sentence(kept_run, args, fix):
    with pytest.raises(ConfigError, match=fix):
        report([str(kept_run[0]) if arg == "RUN" else arg for arg in args])
