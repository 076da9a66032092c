"""What an earlier version wrote goes on: `written_before` holds a run of six steps, its checkpoint of step 4, its exports.

It was written by commit ead97c1, on 25 November 2026, over the text of the fixture `corpus`.
"""

import shutil

import pytest
import torch
from ranks import ROOT, smolds
from transformers import AutoModelForCausalLM, AutoTokenizer

import smolds_dist.model  # noqa: F401 - registers the architecture
from smolds_dist.checkpoint.resume import check_resumable
from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.observe.rows import read_rows

BEFORE = ROOT / "tests" / "written_before"


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoint_resumes_with_the_losses_that_the_run_had(corpus, tmp_path, ranks):
    run_dir = tmp_path / "runs" / "gqa"
    shutil.copytree(BEFORE / "run", run_dir)
    before = {row["step"]: row["loss"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row}
    (tmp_path / "corpus").symlink_to(corpus)  # the name that the run knows it by
    options = ["--config", "runs/gqa/config.yaml", "--checkpoint.resume", "auto"]
    start = ["train"] if ranks == 1 else ["launch", "--nproc-per-node", str(ranks), "--"]
    finished = smolds(*start, *options, timeout=180, cwd=tmp_path)
    assert finished.returncode == 0, finished.text
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("event") == "start"] == [0, 4]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        if row["step"] > 4 and "loss" in row:
            assert row["loss"] == pytest.approx(before[row["step"]], rel=1e-5)


def test_settings_that_there_were_not_count_as_their_defaults(corpus, tmp_path, monkeypatch):
    shutil.copytree(BEFORE / "run", tmp_path / "runs" / "gqa")
    (tmp_path / "corpus").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    options = ["--config", "runs/gqa/config.yaml", "--checkpoint.resume=auto"]
    with pytest.raises(ConfigError, match=r"was written with --data.document_mask False, this run has True"):
        check_resumable(load_config([*options, "--data.document_mask=true"]))
    with pytest.raises(ConfigError, match=r"was trained on the source 'text' .*, which this run lacks"):
        check_resumable(load_config([*options, "--data.source=jsonl:corpus/*"]))
    with pytest.raises(
        ConfigError, match=r"was trained with source text:\S+ of the source 'text', this run has text:other"
    ):
        check_resumable(load_config([*options, "--data.source=text:other"]))
    found = check_resumable(load_config(options))
    assert found and found[1].step == 4


def test_exports_load_and_compute_the_same():
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
            for folder in (BEFORE / "run" / "export", BEFORE / "exported")
        )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    text = "def add(first, second):"
    tokens = [AutoTokenizer.from_pretrained(BEFORE / part)(text).input_ids for part in ("run/export", "exported")]
    assert tokens[0] == tokens[1] and len(tokens[0]) < len(text)


@pytest.mark.parametrize("folder", ["run", "run/export", "exported"])
def test_every_form_of_the_model_generates(folder):
    finished = smolds(
        "generate", str(BEFORE / folder), "--prompt", "def add", "--temperature", "0", "--max-new-tokens", "4"
    )
    assert finished.returncode == 0, finished.text
    assert finished.stdout.startswith("def add") and len(finished.stdout) > len("def add\n")
