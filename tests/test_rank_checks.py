"""Running jobs report a straggler, and a rank whose weights change."""

import os
import re
import signal
import sys
import threading
import time

import pytest
import torch
import warm
from ranks import ROOT, run, smolds
from test_launchers import end, start_and_wait_for_steps

from smolds_dist.checkpoint.files import checkpoints_in, step_of
from smolds_dist.launching.failure import rank_entries
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.ranks import host_name
from smolds_dist.training.rank_checks import SLOW, WINDOWS, StragglerDetector, checksums, minority

EVERY = 20  # steps of a window


def test_straggler_is_reported_in_one_line_and_in_the_metrics(small_run, tmp_path):
    """Rank 1 is repeatedly stopped and continued."""
    options = [*small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--run.name=slow", "--train.steps=100000"]
    options += [
        "--train.eval_every=0",
        "--log.sample_every=0",
        "--checkpoint.every=0",
        f"--parallel.compare_every={EVERY}",
    ]
    run_dir = tmp_path / "runs" / "slow"
    command = [warm.python(), "-m", "smolds_dist", "launch", "--nproc-per-node=2", "--", *options]
    job = start_and_wait_for_steps(command, run_dir)
    pid = next(entry["pid"] for entry in rank_entries(run_dir / "ranks") if entry["rank"] == 1)
    enough = threading.Event()

    def hold_back() -> None:
        while not enough.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.02)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.005)

    thread = threading.Thread(target=hold_back)
    thread.start()
    try:
        deadline, rows = time.monotonic() + 120, []
        while not rows:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.2)
            rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == "slow_rank"]
    finally:
        enough.set()
        thread.join()
        job.send_signal(signal.SIGTERM)
    finished = end(job, timeout=60)
    assert (rows[0]["rank"], rows[0]["host"]) == (1, host_name()) and rows[0]["times"] > SLOW
    words = rf"rank 1 on host {host_name()} took ([\d.]+) times the median compute time in the last"
    line = re.search(rf"{words} {WINDOWS * EVERY} steps", finished.text)
    assert line and float(line[1]) == pytest.approx(rows[0]["times"], abs=0.1), finished.text
    assert smolds("report", str(run_dir)).returncode == 0
    assert f"rank 1 on host {host_name()} was a straggler" in (run_dir / "log_training.md").read_text()


@pytest.mark.parametrize(
    ("part", "named"),
    [
        pytest.param("embeddings", ["rank 2 on host"], marks=pytest.mark.long),
        ("experts", ["rank 0 on host", "rank 2 on host"]),
        ("text", ["rank 2 on host"]),
    ],
)
def test_flipped_bit_is_reported_and_reaches_no_checkpoint(small_run, tmp_path, part, named):
    """Four ranks have replicas of the embeddings, and two of each expert, without a majority."""
    options = [*small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--run.name=flipped", "--train.steps=40"]
    options += ["--train.micro_batch=1", "--parallel.zero=0", "--parallel.expert=2", "--parallel.check_every=3"]
    options += ["--checkpoint.every=5", "--train.eval_every=0", "--log.sample_every=0"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    finished = run([*start, str(ROOT / "tests" / "flip_worker.py"), "2", "10", part, *options], 240)
    assert finished.returncode != 0
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("smolds: ")]
    assert all(words in line for words in named) and line.count("on host") == len(named), line
    words = (
        ["another text", "up to step 10;"] if part == "text" else ["differs from its replicas in model.", "at step 10;"]
    )
    assert all(word in line for word in words), line  # found before a checkpoint
    run_dir = tmp_path / "runs" / "flipped"
    assert [step_of(folder) for folder in checkpoints_in(run_dir / "checkpoints")] == [5]


def test_any_flipped_bit_changes_a_checksum():
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(33, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = checksums([tensor, tensor.T])
        assert before[0] == before[1]  # in any order
        integers = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16)
        for bit in range(8 * tensor.element_size() - 1):
            integers[20, 3] ^= 1 << bit
            assert checksums([tensor])[0] != before[0]
            integers[20, 3] ^= 1 << bit
        assert checksums([tensor])[0] == before[0]


def test_minority_is_returned_or_all_without_a_majority():
    assert minority({0: 5, 1: 5, 2: 5}) == []
    assert minority({0: 5, 1: 6, 2: 5}) == [1]
    assert minority({1: 5, 3: 6}) == [1, 3]
    assert minority({0: 5, 1: 5, 2: 6, 3: 6}) == [0, 1, 2, 3]


class FourRanks:
    """The attributes of a topology that `StragglerDetector` uses."""

    rank, world_size = 0, 4


def test_rank_is_a_straggler_after_three_windows_in_a_row():
    ranks, found = StragglerDetector(FourRanks()), []  # type: ignore[arg-type]
    for slow in (2.0, 2.0, 1.2, 2.0, 1.5, 2.0, 2.0):
        ranks.record(1.0)
        found.append(ranks.compare(lambda mine, slow=slow: mine + torch.tensor([0.0, 1.0, slow, 1.1])))
    assert found == [{}] * (2 + WINDOWS) + [{2: 2.0}, {}]
