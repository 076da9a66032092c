"""`smolds report` shows the content of the run's files."""

import json
import re
import shutil

import matplotlib.image
import numpy as np
import pytest

from smolds_dist.errors import ConfigError
from smolds_dist.observe.markdown import inline
from smolds_dist.observe.report import figure_of, report, sample_log, training_log, unique_content
from smolds_dist.observe.rows import read_rows


@pytest.fixture
def copied(kept_run, tmp_path):
    """Return a run's folder that may be changed."""
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
            evaluation = f"{evaluations[row['step']]:.4f}" if row["step"] in evaluations else ""
            assert f"| {row['step']} | {row['tokens']:,} | {row['loss']:.4f} | {evaluation} |" in log
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
    assert (picture[..., 3] == 1).all()  # opaque, for light and dark pages


def points_of(line) -> list[tuple]:
    return [*zip(*(column.tolist() for column in map(np.asarray, line.get_data())), strict=True)]


def test_plot_of_a_run_shows_its_rows(copied):
    rows = read_rows(copied / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    loss, balance, texts, load, *_ = figure_of([copied]).axes
    raw, smooth, evaluation = loss.get_lines()
    assert points_of(raw) == [(row["step"], row["loss"]) for row in steps]
    assert points_of(evaluation) == [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    mean = (0.9 * steps[0]["loss"] + steps[1]["loss"]) / 1.9
    assert points_of(smooth)[:2] == [(1, pytest.approx(steps[0]["loss"])), (2, pytest.approx(mean))]
    assert points_of(balance.get_lines()[0]) == [(row["step"], row["max_vio"]) for row in steps]
    for line, name in zip(texts.get_lines(), ("seen_texts", "unique_texts"), strict=True):
        assert points_of(line) == [(row["step"], row[name]) for row in steps]
    (picture,) = load.get_images()
    shares = np.array([row["load"] for row in steps]).mean(0) * 8
    assert picture.get_array().tolist() == [pytest.approx(layer) for layer in shares.tolist()]


def test_events_are_listed_and_values_that_are_not_finite_are_skipped(copied):
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
    assert "step 6: rolled back here from a loss spike in steps 7 to 8, 16 samples skipped" in log
    assert "step 7: loss or gradient not finite, update skipped" in log
    assert "| 7 | 1,792 | not finite |" in log


def test_code_blocks_hold_whatever_a_sample_says(copied):
    text = "```\n| not | a table |\n````"
    (copied / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": "x", "text": text}) + "\n")
    assert f"`````\n{text}\n`````" in sample_log(copied)


def test_a_prompt_stays_in_its_line():
    assert inline("def ") == "`def `"
    assert inline("`` <b>\n\n# taken") == "``` `` <b> # taken ```"


def test_log_needs_no_checkpoint(copied):
    shutil.rmtree(copied / "checkpoints")
    assert "available after the first checkpoint" in training_log(copied)


def test_several_runs_share_a_plot(kept_run, copied, tmp_path):
    report([str(kept_run[0]), str(copied), "--to", str(tmp_path / "both")])
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["training_metrics.png"]
    other = copied.rename(tmp_path / "two")
    loss, _, _, speed = figure_of([kept_run[0], other]).axes
    assert [line.get_label() for line in speed.get_lines()] == ["one", "two"]
    assert [line.get_label() for line in loss.get_lines()[2::3]] == ["one, validation", "two, validation"]
    rows = [row for row in read_rows(other / "metrics.jsonl") if "loss" in row]
    for line in speed.get_lines():
        assert points_of(line) == [(row["step"], row["tokens_per_s"]) for row in rows]


@pytest.mark.parametrize(("args", "fix"), [(["nowhere"], "has no training steps"), (["RUN", "RUN"], "--to")])
def test_mistake_is_one_sentence(kept_run, args, fix):
    with pytest.raises(ConfigError, match=fix):
        report([str(kept_run[0]) if arg == "RUN" else arg for arg in args])
