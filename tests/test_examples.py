"""Every file of examples/ runs, and the API reference is complete."""

import shutil
import sys

import pytest
from ranks import ROOT, run

from smolds_dist.observe.rows import read_rows

SMALL = ["--train.eval_sequences=4", "--log.sample_tokens=4", "--data.max_tokens=60000"]


def example(name: str, *args: str, cwd) -> str:
    finished = run([sys.executable, str(ROOT / "examples" / name), *args], timeout=180, cwd=cwd)
    assert finished.returncode == 0, finished.text
    return finished.stdout


def test_new_router(corpus, cache, tmp_path):
    options = [f"--data.source=text:{corpus}/*.txt", f"--data.cache_dir={cache}", "--data.tokenizer_vocab_size=300"]
    said = example("new_router.py", *options, "--data.seq_len=64", "--train.steps=20", cwd=tmp_path)
    losses = [float(line.split()[3].rstrip(",")) for line in said.splitlines() if line.startswith("step")]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_new_source(cache, tmp_path):
    said = example("new_source.py", "sums.jsonl", *SMALL, f"--data.cache_dir={cache}", "--train.steps=3", cwd=tmp_path)
    assert "bits per byte" in said
    samples = read_rows(tmp_path / "runs" / "sums" / "samples.jsonl")
    assert [row["prompt"] for row in samples] == ["12 + 30 =", "7 + 8 ="]


def test_continue_import(kept_run, corpus, cache, tmp_path):
    shutil.copytree(kept_run[0], tmp_path / "runs" / "first")
    options = [f"--data.cache_dir={cache}", "--data.seq_len=32", "--train.steps=3", "--data.val_fraction=0.1"]
    said = example("continue_import.py", "runs/first", f"text:{corpus}/1*.txt", *options, *SMALL, cwd=tmp_path)
    assert "validation loss" in said
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "first", "first-exported", "first-again", "first-again-exported",
    }  # fmt: skip


def test_api_reference_is_built_from_the_docstrings(tmp_path):
    pytest.importorskip("pdoc")
    finished = run([sys.executable, "-m", "pdoc", "smolds_dist", "-o", str(tmp_path)], timeout=120, cwd=ROOT)
    assert finished.returncode == 0, finished.text
    # One is about an annotation of transformers' configuration, which ours inherits.
    warnings = [line for line in finished.stderr.splitlines() if "Warn" in line and "'regression'" not in line]
    assert not warnings
    page = (tmp_path / "smolds_dist" / "training" / "library.html").read_text()
    assert "Train in this process" in page and "RunResult" in page
    for module in ("model", "parallel/balancer", "training/trainer"):
        assert (tmp_path / "smolds_dist" / f"{module}.html").is_file()
