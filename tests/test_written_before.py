"""What an earlier version wrote goes on: `written_before` holds a run of six steps, its checkpoint of step 4, its exports.

It was written by commit ead97c1, on 25 November 2026, over the text of the fixture `corpus`.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from ranks import ROOT, smolds
from test_data import configure
from transformers import AutoModelForCausalLM, AutoTokenizer

import smolds_dist.model  # noqa: F401 - registers the architecture
from smolds_dist.checkpoint.resume import check_resumable
from smolds_dist.config import load_config
from smolds_dist.data.batch import batch_digest
from smolds_dist.data.prepare import prepare_data
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


WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()
# Digests of 64 samples from 0, 5,000 and 100,000 on, and the beginnings of the contents', as commit 2e73386 had them.
SECOND_ORDER = {
    "several files": [4008729748, 4121081251, 2041199681, {"jsonl": "1e196752b56ca040"}],
    "one document": [2799220926, 2759011525, 1827354362, {"text": "4d08b2b56e82e638"}],
    "limited": [1645061827, 2131590544, 2670549850, {"jsonl": "c5d27bb30a98159e"}],
    "mixed": [1228126906, 168670599, 3946886068, {"a": "1b1dbc78262c0104", "b": "4d08b2b56e82e638"}],
}


def rows_of_words(count: int, seed: int) -> list[str]:
    chance = np.random.RandomState(seed)
    return [" ".join(WORDS[n] for n in chance.randint(0, 8, chance.randint(5, 400))) for _ in range(count)]


def test_second_order_has_the_samples_that_it_had(tmp_path):
    """Of sources that were tokenised whole: of several files, of one document whose end is held out, limited, mixed."""
    for number in range(6):
        rows = rows_of_words(2000 if number < 4 else 40, number)
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "one.txt").write_text(" ".join(rows_of_words(200, 9)))
    files = f"--data.source=jsonl:{tmp_path}/*.jsonl"
    mixed = {
        "a": {"source": f"jsonl:{tmp_path}/[0-3].jsonl"},
        "b": {"source": f"text:{tmp_path}/one.txt", "weight": 0.5},
    }
    options = {
        "several files": [files],
        "one document": [f"--data.source=text:{tmp_path}/one.txt"],
        "limited": [files, "--data.max_tokens=60000"],
        "mixed": [f"--data.sources={json.dumps(mixed)}"],
    }
    for name, given in options.items():
        data = prepare_data(configure(tmp_path / "cache", *given), order=2)
        batches = [range(first, first + 64) for first in (0, 5000, 100_000)]
        assert [batch_digest(data.batch(batch), batch) for batch in batches] == SECOND_ORDER[name][:3]
        contents = data.identity(0)["contents"]
        assert {source: content[:16] for source, content in contents.items()} == SECOND_ORDER[name][3]
