"""Tokenization during training, or in advance by many processes, gives the same run."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
import warm
from filelock import FileLock
from ranks import is_running, smolds
from test_remote import Server

from smolds_dist.config import load_config
from smolds_dist.data.prepare import prepare_data
from smolds_dist.observe.rows import read_rows

STEPS, BATCH = 60, 12
# So long that few tokens, mostly one per word, fill a shard's MiB.
WORDS = [
    f"{one}{two}"
    for one in "qualificationconsiderationrepresentation congratulationsubstantiationinvestigation".split()
    for two in "ABCDEFGHIJ"
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Create six files of one shard each, with about 30,000 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = np.random.RandomState(0)
    for number in range(6):
        rows = (" ".join(chance.choice(WORDS, 20)) for _ in range(1300))
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        assert len(text) > 2**20
        (folder / f"{number}.jsonl").write_text(text)
    return folder


def options_of(corpus: Path, folder: Path) -> list[str]:
    options = {
        "data.source": f"jsonl:{corpus}/*.jsonl", "data.cache_dir": folder / "cache", "data.tokenizer_vocab_size": 600,
        "data.seq_len": 128, "data.val_fraction": 0.02, "data.window_tokens": 17_000, "run.dir": folder / "runs",
        "run.name": "one", "train.steps": STEPS, "train.global_batch": BATCH, "train.warmup_steps": 2, "train.seed": 1,
        "train.eval_every": 30, "train.eval_sequences": 4, "checkpoint.every": 5, "log.sample_every": 0,
        "log.tensorboard": "false", "model.hidden_size": 32, "model.intermediate_size": 32, "parallel.device": "cpu",
        "model.num_hidden_layers": 1, "model.num_attention_heads": 2, "model.num_key_value_heads": 1,
        "model.head_dim": 16, "train.dtype": "fp32",
    }  # fmt: skip
    return ["--preset", "debug", *(f"--{name}={value}" for name, value in options.items())]


def shards_in(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "units").glob("*/*/meta.json"))


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory) -> tuple[Path, dict[int, dict]]:
    """Train on a corpus prepared by `smolds data prepare`; return the folder, and the run's rows by step."""
    folder = tmp_path_factory.mktemp("prepared")
    made = smolds("data", "prepare", "--workers", "2", "--", *options_of(corpus, folder), "--train.steps=500")
    assert made.returncode == 0, made.text
    assert "jsonl: 6 of 6 shards tokenized" in made.stdout
    before = shards_in(folder)
    assert len(before) == 6
    trained = smolds("train", *options_of(corpus, folder))
    assert trained.returncode == 0, trained.text
    assert shards_in(folder) == before
    return folder, rows_by_step(folder)


def rows_by_step(folder: Path) -> dict[int, dict]:
    return {row["step"]: row for row in read_rows(folder / "runs" / "one" / "metrics.jsonl") if "loss" in row}


def assert_same(rows: dict[int, dict], expected: dict[int, dict], other_topologies: bool = False) -> None:
    """Compare every step's batch and documents; and losses to 1e-6 if nothing else differs.

    Between topologies, rounding may route a token to another expert; then some steps' losses differ by more.
    """
    assert sorted(rows) == sorted(expected) == list(range(1, STEPS + 1))
    off = {}
    for step, row in expected.items():
        assert rows[step]["batch"] == row["batch"], step
        assert rows[step]["unique_texts"] == row["unique_texts"]
        off[step] = abs(rows[step]["loss"] / row["loss"] - 1)
    assert max(off.values()) <= (5e-5 if other_topologies else 1e-6), off
    assert median(off.values()) <= 1e-6, off


@pytest.mark.parametrize("workers", [1, pytest.param(0, marks=pytest.mark.long)])
def test_losses_are_those_of_a_prepared_corpus(corpus, prepared, tmp_path, workers):
    """With background workers, and without them, when the training process tokenizes what it needs."""
    trained = smolds("train", *options_of(corpus, tmp_path), f"--data.workers={workers}")
    assert trained.returncode == 0, trained.text
    assert "1 of 6 shards tokenized so far" in trained.stdout
    assert_same(rows_by_step(tmp_path), prepared[1])
    val = [
        [row["val_loss"] for row in read_rows(folder / "runs" / "one" / "metrics.jsonl") if "val_loss" in row]
        for folder in (tmp_path, prepared[0])
    ]
    assert val[0] == pytest.approx(val[1], rel=1e-5)
    for made in shards_in(tmp_path):
        there = prepared[0] / made.relative_to(tmp_path)
        assert [(made.parent / name).read_bytes() for name in ("tokens.bin", "documents")] == [
            (there.parent / name).read_bytes() for name in ("tokens.bin", "documents")
        ]


@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.long)])
def test_run_killed_in_two_windows_resumes_identically(corpus, prepared, tmp_path, cold):
    """SIGKILL to the whole job, twice, each time resumed in another topology; `cold`: not to its workers, which exit."""
    options = [*options_of(corpus, tmp_path), "--checkpoint.resume=auto"]
    starts = [
        (["launch", "--nproc-per-node=2", "--"], 8),
        (["launch", "--nproc-per-node=2", "--"], 52),
        (["train"], STEPS),
    ]
    layouts = ["--parallel.expert=2", "--parallel.expert=1", "--train.micro_batch=4"]
    for (start, until), layout in zip(starts, layouts, strict=True):
        process = start_job([*start, *options, layout], tmp_path, cold)
        if until == STEPS:
            assert process.wait(120) == 0, (tmp_path / "out").read_text()
            break
        wait_for(lambda until=until: max(rows_by_step(tmp_path), default=0) >= until, process, tmp_path)
        ranks = [json.loads(path.read_text())["pid"] for path in (tmp_path / "runs/one/ranks").glob("rank_*.json")]
        if cold:
            kill_all_but_workers(process)
        process.kill()  # the process that forked it kills the rest (see warm.py)
        wait_until_gone(ranks)
    assert_same(rows_by_step(tmp_path), prepared[1], other_topologies=True)


def start_job(args: list[str], folder: Path, cold: bool = False) -> subprocess.Popen:
    python = sys.executable if cold else warm.python()
    with (folder / "out").open("ab") as out:
        return subprocess.Popen(
            [python, "-m", "smolds_dist", *args],
            stdout=out, stderr=out, env=warm.environment(), start_new_session=True,
        )  # fmt: skip


def wait_for(there, process: subprocess.Popen, folder: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end and process.poll() is None, (folder / "out").read_text()[-6000:]
        time.sleep(0.02)


def kill_all_but_workers(process: subprocess.Popen) -> None:
    """Send SIGKILL; workers exit by themselves."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    workers = [pid for pid in family if "smolds_dist.data.workers" in command_of(pid)]
    for pid in family:
        if pid not in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(workers)


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end, "processes outlive their run"
        time.sleep(0.05)


def command_of(pid: int) -> str:
    """Return the command of a process, empty if it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the prepared files without locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.long)])
def test_three_processes_of_which_two_are_killed_prepare_the_same_files(corpus, prepared, tmp_path, times):
    """Killed at random times; the third finishes alone."""
    chance = random.Random(times)
    tokenizer = prepared[0] / "runs" / "one" / "tokenizer"
    options = ["--workers=1", "--", *options_of(corpus, tmp_path), "--train.steps=500", f"--data.tokenizer={tokenizer}"]
    alone = smolds("data", "prepare", *options)
    assert alone.returncode == 0, alone.text
    expected = files_of(tmp_path / "cache")
    assert sum(name.endswith("tokens.bin") for name in expected) == 7  # of six shards and the validation set
    for number in range(times):
        here = tmp_path / str(number)
        here.mkdir()
        args = ["data", "prepare", *options, f"--data.cache_dir={here}/cache"]
        processes = [start_job(args, here) for _ in range(3)]
        for process in processes[:2]:
            time.sleep(chance.uniform(0.5, 3))
            process.kill()
        assert processes[2].wait(120) == 0, (here / "out").read_text()
        assert files_of(here / "cache") == expected


def test_invalid_text_stops_the_run_after_the_previous_step_is_saved(corpus, tmp_path):
    """The previous step is saved, and the run continues once the row is skipped."""
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_text((corpus / f"{number}.jsonl").read_text())
    options = [*options_of(tmp_path, tmp_path), "--checkpoint.every=0", "--checkpoint.resume=auto"]
    third = int(prepare_data(load_config([*options, "-q"])).orders["jsonl"].wanted_shards()[1])
    source = prepare_data(load_config([*options, "-q"])).sources["jsonl"]
    path = Path(source.files[source.shards[third][0].file].path)
    text, status = path.read_text(), path.stat()
    lines = text.splitlines(keepends=True)
    lines[1000] = "[" + lines[1000][1:]
    path.write_text("".join(lines))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    should_stop = smolds("launch", "--nproc-per-node=2", "--", *options)
    assert should_stop.returncode == 2, should_stop.text
    assert f"{path}, line 1,001: not a JSON object" in should_stop.stderr
    saved = max(rows_by_step(tmp_path))
    assert 1 < saved < STEPS and f"step {saved} is saved" in should_stop.stdout
    ended = smolds("train", *options, "--data.on_bad_row=skip")
    assert ended.returncode == 0, ended.text
    assert sorted(rows_by_step(tmp_path)) == list(range(1, STEPS + 1))
    assert f"continuing from {tmp_path}/runs/one/checkpoints/step_{saved:08}" in ended.stdout


def test_signal_stops_a_run_that_waits_for_text_and_saves_the_previous_step(corpus, prepared, tmp_path):
    """Each of two ranks waits for a shard that another process has locked; the training process tokenizes all shards."""
    options = [*options_of(corpus, tmp_path), "--checkpoint.every=0", "--data.workers=0"]
    found = prepare_data(load_config([*options, "-q"]))
    second = int(found.orders["jsonl"].wanted_shards()[0])
    folder = found.sources["jsonl"].folders[second]
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        process = start_job(["launch", "--nproc-per-node=2", "--", *options], tmp_path)
        wait_for(lambda: "waiting for text of jsonl: " in (tmp_path / "out").read_text(), process, tmp_path)
        last = max(rows_by_step(tmp_path))
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 75, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert f"step {last} is saved" in said
    resumed = smolds("train", *options, "--checkpoint.resume=auto")
    assert resumed.returncode == 0, resumed.text
    assert_same(rows_by_step(tmp_path), prepared[1], other_topologies=True)


def test_training_continues_with_available_windows_while_the_server_is_down(corpus, prepared, tmp_path):
    """And gets the same batches as from local files."""
    files = {f"/{path.name}": path.read_bytes() for path in sorted(corpus.iterdir())}
    index = "".join(f'<a href="{name}">{name}</a>' for name in files)
    server = Server(files | {"/": f"<html>{index}</html>".encode()})
    tokenizer = prepared[0] / "runs" / "one" / "tokenizer"
    options = [*options_of(corpus, tmp_path), f"--data.tokenizer={tokenizer}"]
    options.append(f"--data.source=jsonl:{server.address}/*.jsonl")
    process = start_job(["train", *options], tmp_path)
    wait_for(lambda: rows_by_step(tmp_path), process, tmp_path)
    server.behave = lambda number, content: (503, b"")
    before = max(rows_by_step(tmp_path))
    wait_for(lambda: "retrying in 4 s" in (tmp_path / "out").read_text(), process, tmp_path)
    assert max(rows_by_step(tmp_path)) > before
    server.behave = lambda number, content: (200, content)
    assert process.wait(120) == 0, (tmp_path / "out").read_text()
    assert "did not arrive completely (HTTP 503)" in (tmp_path / "out").read_text()
    server.stop()
    batches = [[row["batch"] for row in rows.values()] for rows in (rows_by_step(tmp_path), prepared[1])]
    assert len(batches[0]) == STEPS and batches[0] == batches[1]
