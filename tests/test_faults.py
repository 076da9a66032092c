"""Faults in runs of real processes: kills, full and read-only disks, hangs, divergence."""

import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
import warm
from filelock import FileLock
from ranks import ROOT, rows_without_timing, run, smolds
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_launchers import end, start_launch

from smolds_dist.checkpoint.files import checkpoints_in, find_damage, read_manifest
from smolds_dist.checkpoint.writer import CheckpointWriter, PeerError
from smolds_dist.config import load_config
from smolds_dist.data.text import digest, is_validation
from smolds_dist.errors import ConfigError, TrainingStoppedError
from smolds_dist.launching.failure import RankReport, exit_code_of_stop, rank_entries, read_cause, record_dead_rank
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.settings import Parallel
from smolds_dist.training import build as training_build
from smolds_dist.training import trainer
from smolds_dist.training.guard import (
    MIN_OUTLIER_STEPS,
    MIN_STEPS,
    OUTLIER_WINDOW,
    WINDOW,
    LossGuard,
    LossSpikeError,
    OutlierFilter,
)

# Of each part: runs, ranks, seed.
FEW, TWENTY = [(2, 1, 1), (1, 2, 3)], [(8, 1, 1), (8, 1, 2), (4, 2, 3)]


@pytest.mark.parametrize("parts", [FEW, pytest.param(TWENTY, marks=pytest.mark.long)], ids=["few", "twenty"])
def test_runs_killed_at_random_moments_lose_nothing(small_run, tmp_path, parts):
    options = [
        *small_run, "--train.steps=20", "--checkpoint.every=1", "--train.eval_every=10", "--log.sample_every=10",
        "--parallel.device=cpu", "--train.dtype=fp32", "--model.intermediate_size=256",
    ]  # fmt: skip
    workers = []
    for number, (runs, world, seed) in enumerate(parts):
        folder = tmp_path / f"part{number}"
        command = [warm.python(), str(ROOT / "tests" / "kill_worker.py"), json.dumps(options), str(folder)]
        command += [str(runs), str(world), str(seed)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        workers.append((folder, world, subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)))
    killed, while_saving, finished = 0, 0, 0
    for folder, world, worker in workers:
        output, _ = worker.communicate(timeout=240)
        results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        expected = rows_without_timing(folder / f"reference{world}")
        samples = (folder / f"reference{world}" / "samples.jsonl").read_text()
        assert len([row for row in expected if "loss" in row]) == 20
        for result in results:
            assert not any(result["codes"]), (result, (folder / f"{result['run']}.log").read_text()[-3000:])
            run_dir = folder / result["run"]
            assert rows_without_timing(run_dir) == expected
            assert (run_dir / "samples.jsonl").read_text() == samples
            board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
            assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 21))
            assert not list(run_dir.glob("checkpoints/unfinished_*"))
            assert not any(find_damage(folder) for folder in checkpoints_in(run_dir / "checkpoints"))
            killed += result.get("killed", 0)
            while_saving += result.get("while_saving", 0)
            finished += "killed" in result
    runs = sum(runs for runs, _, _ in parts)
    assert finished == runs
    assert killed >= runs and while_saving >= runs // 4, (killed, while_saving)


def test_cause_of_an_earlier_job_is_removed(tmp_path):
    script = """
import sys
from pathlib import Path
from smolds_dist.launching.failure import RankReport
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.settings import Parallel
RankReport(Path(sys.argv[1]), RankInfo(), Parallel())
print((Path(sys.argv[1]) / "ranks" / "cause.txt").exists())
"""
    cause = tmp_path / "ranks" / "cause.txt"
    cause.parent.mkdir()
    cause.write_text("rank 1 on host n1 was killed by signal 9\n")
    time.sleep(0.05)
    (tmp_path / "script.py").write_text(script)
    finished = run([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], timeout=60)
    assert finished.stdout == "False\n", finished.text
    # A cause that another rank of this job has reported stays.
    cause.write_text("rank 1 on host n1 failed\n")
    os.utime(cause, (time.time() + 60, time.time() + 60))
    finished = run([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], timeout=60)
    assert finished.stdout == "True\n", finished.text


def test_rank_stays_silent_if_a_lost_peer_reported_a_mistake(tmp_path):
    reports = [RankReport(tmp_path, RankInfo(rank=rank), Parallel()) for rank in (0, 1)]
    reports[0].refuse(ConfigError("a mistake."))
    reports[1].fail(RuntimeError("Connection closed by peer [127.0.0.1]:4496"))
    assert exit_code_of_stop(tmp_path / "ranks", rank_entries(tmp_path / "ranks")) == 2
    assert not (tmp_path / "ranks" / "cause.txt").exists()


@pytest.fixture
def memory_group():
    """Create a memory cgroup of 200 MB, v1 or v2; return its folder."""
    groups = Path("/sys/fs/cgroup")
    groups = groups / "memory" if (groups / "memory").is_dir() else groups
    folder = groups / f"smolds-test-{os.getpid()}"
    try:
        folder.mkdir()
        limit = next(folder / name for name in ("memory.limit_in_bytes", "memory.max") if (folder / name).exists())
        limit.write_text("200000000")
    except (OSError, StopIteration) as error:
        pytest.skip(f"cannot create a memory cgroup here: {error!r}")
    yield folder
    folder.rmdir()


def test_out_of_memory_is_reported_only_for_the_affected_rank(memory_group, tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
Path(sys.argv[3] + "/cgroup.procs").write_text(str(os.getpid())) if sys.argv[3] else None
from smolds_dist.launching.failure import RankReport
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.settings import Parallel
rank = int(sys.argv[2])
RankReport(Path(sys.argv[1]), RankInfo(rank=rank), Parallel())
if rank:
    print("begun", flush=True)
    sys.stdin.read()
bytearray(1_000_000_000) if sys.argv[3] else os.kill(os.getpid(), signal.SIGKILL)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "b"), "1", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    finished = run([sys.executable, "-c", script, str(tmp_path / "a"), "0", str(memory_group)], timeout=60)
    assert finished.returncode == -signal.SIGKILL, finished.text
    other.communicate(timeout=60)
    assert other.returncode == -signal.SIGKILL
    assert all(
        record_dead_rank(folder, rank_entries(folder))
        for folder in (tmp_path / "a" / "ranks", tmp_path / "b" / "ranks")
    )
    word = "was killed by signal 9"
    why = "its control group, which is limited to 0.2 GB, is out of memory"
    assert read_cause(tmp_path / "a" / "ranks").endswith(f"{word}: {why}")
    assert read_cause(tmp_path / "b" / "ranks").endswith(word)


def test_out_of_memory_is_reported_for_ranks_that_have_not_started(memory_group, tmp_path):
    script = """
import os, sys
from pathlib import Path
from smolds_dist.launching.output import run_ranks, run_single
Path(sys.argv[2] + "/cgroup.procs").write_text(str(os.getpid()))
rank = [sys.executable, "-c", "bytearray(1_000_000_000)"]
print(run_ranks(rank, dict(os.environ), Path(sys.argv[1]), False), run_single(rank, dict(os.environ)))
"""
    finished = run([sys.executable, "-c", script, str(tmp_path), str(memory_group)], timeout=60)
    why = "its control group, which is limited to 0.2 GB, is out of memory"
    assert finished.stdout == (
        f"(137, 'a rank was killed before it had started: {why}') (137, 'the process was killed by signal 9: {why}')\n"
    )
    assert finished.stderr.count(f": {why}") == 2


def test_second_signal_exits_immediately(small_run, tmp_path):
    options = [*small_run, "--run.name=slow", "--train.global_batch=20000", "--train.micro_batch=2"]  # minutes a step
    command = [warm.python(), "-m", "smolds_dist", "train", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=warm.environment()
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs" / "slow" / "config.yaml").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None  # it would finish its step first
    process.send_signal(signal.SIGTERM)
    finished = end(process, timeout=5)
    assert finished.returncode == 143, finished.text
    assert "(saved)" not in finished.stdout


def can_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs root, to mount small file systems")


def on_file_system(folder: Path, mount_options: str, script: str, timeout: float = 120):
    """Run a shell script with a private file system at `folder`, which ends with it."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o {mount_options} tmpfs {shlex.quote(str(folder))}"
    return run(["unshare", "--mount", "sh", "-c", f"{mount}\n{script}"], timeout)


@needs_mount
@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_full_disk_is_reported_and_older_checkpoints_stay_complete(small_run, tmp_path, on_error):
    """Two checkpoints fit; then another file fills the disk; later it is removed."""
    small = tmp_path / "small"
    options = [
        *small_run, f"--run.dir={small}", "--run.name=full", f"--checkpoint.on_error={on_error}", "--train.steps=2000",
        "--train.eval_every=0", "--log.sample_every=0", "--checkpoint.every=5", "--checkpoint.keep=2",
    ]  # fmt: skip
    smolds_command = f"{shlex.quote(sys.executable)} -m smolds_dist"
    script = f"""
        {smolds_command} train {shlex.join(options)} & run=$!
        while ! test -e {small}/full/checkpoints/latest; do sleep 0.05; done
        head -c 1G /dev/zero >{small}/ballast 2>/dev/null
        for i in $(seq 30); do kill -0 $run 2>/dev/null || break; sleep 0.1; done
        if kill -0 $run 2>/dev/null; then sleep 1; rm {small}/ballast; sleep 1; kill -TERM $run; fi
        wait $run; echo "code $?"
        rm -f {small}/ballast
        cp -r {small}/full {tmp_path}/full
    """
    finished = on_file_system(small, "size=6m", script)
    text = finished.stdout
    steps = [row["step"] for row in read_rows(tmp_path / "full" / "metrics.jsonl") if "loss" in row]
    assert "could not be written (" in finished.stderr and "No space left on device" in finished.stderr, finished.text
    verified = smolds("checkpoint", "verify", str(tmp_path / "full"))
    assert verified.returncode == 0, verified.text
    assert steps == list(range(1, len(steps) + 1)), finished.text
    assert "Traceback" not in finished.stderr, finished.text
    if on_error == "stop":
        assert "code 1" in text and "older ones are complete" in finished.stderr, finished.text
    else:
        assert "code 143" in text and "training continues" in finished.stderr, finished.text


@needs_mount
def test_read_only_folder_is_one_sentence(small_run, tmp_path):
    options = [*small_run, f"--run.dir={tmp_path / 'fixed'}", "--run.name=new"]
    script = f"{shlex.quote(sys.executable)} -m smolds_dist train {shlex.join(options)}"
    finished = on_file_system(tmp_path / "fixed", "ro", script)
    assert finished.returncode == 2, finished.text
    assert "cannot be written (Read-only file system); choose another --run.dir" in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_locked_run_folder_is_rejected(small_run, tmp_path):
    (tmp_path / "runs" / "held").mkdir(parents=True)
    with FileLock(tmp_path / "runs" / "held" / "lock"):
        finished = smolds("train", *small_run, "--run.name=held")
    assert finished.returncode == 2, finished.text
    assert "is in use by another training process" in finished.stderr
    assert [path.name for path in (tmp_path / "runs" / "held").iterdir()] == ["lock"]


def test_hung_rank_ends_the_job_and_all_stacks_are_kept(small_run, tmp_path):
    arguments = [
        *small_run, "--run.name=stopped", "--parallel.device=cpu", "--train.steps=100000", "--train.eval_every=0",
        "--log.sample_every=0", "--checkpoint.every=0", "--parallel.timeout=4",
    ]  # fmt: skip
    run_dir = tmp_path / "runs" / "stopped"
    process = start_launch("torchrun", arguments, run_dir)
    os.kill(json.loads((run_dir / "ranks" / "rank_00001.json").read_text())["pid"], signal.SIGSTOP)
    finished = end(process, timeout=30)
    assert finished.returncode == 1, finished.text
    lines = [line for line in finished.stderr.splitlines() if line.startswith("smolds: ")]
    assert len(lines) == 1, finished.text
    assert "rank 1 on host" in lines[0] and "it was stopped by a signal" in lines[0]
    stacks = (run_dir / "ranks" / "stacks.txt").read_text()
    assert str(run_dir / "ranks" / "stacks.txt") in lines[0]
    assert "rank 0 on host" in stacks and "run_steps" in stacks  # the main thread's stack
    assert "rank 1 on host" in stacks and "no answer" in stacks


def test_diverged_run_stops_with_its_last_good_checkpoint(small_run, tmp_path):
    options = [
        *small_run, "--run.name=diverged", "--train.lr=1e30", "--train.grad_clip=0", "--train.warmup_steps=1",
        "--train.steps=50", "--train.nonfinite_limit=4", "--checkpoint.every=1", "--log.sample_every=0",
    ]  # fmt: skip
    finished = smolds("train", *options, "--train.eval_every=0")
    assert finished.returncode == 1, finished.text
    assert "smolds: loss or gradient was NaN or infinite in 4 steps in a row" in finished.stderr
    assert "Traceback" not in finished.stderr
    rows = read_rows(tmp_path / "runs" / "diverged" / "metrics.jsonl")
    assert [row.get("skipped", False) for row in rows][-5:] == [False, True, True, True, True]
    assert "NaN" not in (tmp_path / "runs" / "diverged" / "metrics.jsonl").read_text()  # JSON has no NaN
    saved = checkpoints_in(tmp_path / "runs" / "diverged" / "checkpoints")
    assert saved and not any(find_damage(folder) for folder in saved)


@pytest.fixture
def spiky(corpus, small_run, tmp_path):
    """Return the options of a run with a real spike: one document of noise in repetitive text."""
    for path in corpus.glob("*.txt"):
        (tmp_path / path.name).write_text(path.read_text())
    chance = random.Random(3)
    noise = ""
    while not noise or is_validation(digest(noise.encode()), 0.5):
        noise = "".join(chr(chance.randrange(33, 127)) for _ in range(400))
    (tmp_path / "00_noise.txt").write_text(noise)
    return [
        *small_run, "--run.name=spiky", f"--data.source=text:{tmp_path}/*.txt", "--train.steps=240",
        "--train.global_batch=2", "--train.micro_batch=1", "--train.eval_every=0", "--log.sample_every=0",
        "--train.spike_threshold=8", "--train.spike_steps=1", "--checkpoint.every=10", "--train.lr=3e-3",
        "--data.val_fraction=0.01", "--parallel.device=cpu",
    ]  # fmt: skip


def assert_rolled_back(run_dir: Path, options: list[str]) -> None:
    rows = read_rows(run_dir / "metrics.jsonl")
    events = [row for row in rows if row.get("event") == "rollback"]
    assert events
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 241))
    for event in events:
        assert event["skipped_samples"] == 2 * (event["spike_end"] - event["step"])
        assert event["step"] % 10 == 0 and event["step"] < event["spike_begin"]
    # No spike is left: the samples that caused them were skipped.
    again = LossGuard(load_config(options).train)
    for row in rows:
        if "loss" in row:
            again.check(row["step"], row["loss"], True)


def test_spike_rolls_back_and_skips_the_samples(spiky, tmp_path, monkeypatch, capsys):
    """Only one model is in memory at a time."""
    before = []

    def build(*args):
        assert not [one for one in before if one() is not None], "two models are held"
        training = built(*args)
        before.append(weakref.ref(training.engine.model))
        return training

    built = trainer.build
    for module in (trainer, training_build):  # a rollback builds too
        monkeypatch.setattr(module, "build", build)
    assert trainer.train(load_config(spiky)) == 0
    assert len(before) > 1 and "with other samples" in capsys.readouterr().out
    assert_rolled_back(tmp_path / "runs" / "spiky", spiky)


@pytest.mark.long
def test_tokens_after_a_rollback_are_those_trained_on(spiky, tmp_path):
    """A later stage of larger batches begins earlier, by the skipped steps of the data."""
    options = [*spiky, "--train.stages=[{until: 230}, {global_batch: 4}]"]
    config = load_config(options)
    assert trainer.train(config) == 0
    rows = read_rows(tmp_path / "runs" / "spiky" / "metrics.jsonl")
    skipped = max(row["skipped_steps"] for row in rows if row.get("event") == "rollback")
    begun = next(row["step"] for row in rows if row.get("event") == "stage")
    assert begun == 230 - skipped
    expected = config.data.seq_len * (2 * begun + 4 * (240 - begun))
    assert [row["tokens"] for row in rows if "loss" in row][-1] == expected
    assert read_manifest(tmp_path / "runs" / "spiky" / "checkpoints" / "step_00000240").tokens == expected


@pytest.mark.long
def test_ranks_roll_back_together(spiky, tmp_path):
    finished = smolds("launch", "--nproc-per-node=2", "--", *spiky, timeout=120)
    assert finished.returncode == 0, finished.text
    assert_rolled_back(tmp_path / "runs" / "spiky", spiky)


def test_outliers_are_skipped_and_a_resumed_run_skips_the_same(spiky, tmp_path, capfd):
    options = [*spiky, "--train.spike_threshold=0", "--train.skip_steps=3", "--checkpoint.keep=30", "--train.steps=90"]
    assert trainer.train(load_config(options)) == 0
    run_dir = tmp_path / "runs" / "spiky"
    rows = rows_without_timing(run_dir)
    steps = [row for row in rows if "loss" in row]
    outliers = [row["step"] for row in steps if "outlier" in row]
    assert outliers and all(row["skipped"] and "load" not in row for row in steps if "outlier" in row)
    assert [row["outliers"] for row in steps] == [sum(one <= row["step"] for one in outliers) for row in steps]
    out = capfd.readouterr()
    assert f"step {outliers[0]} of 90" in out.err and "update skipped: outlier 1 of the run" in out.err
    # Judged by plain Python: the window holds all steps before, outliers included.
    for place, row in enumerate(steps):
        recent = steps[max(0, place - OUTLIER_WINDOW) : place]
        limits = {
            name: mean(one[name] for one in recent) + 3 * stdev(one[name] for one in recent)
            for name in ("loss", "grad_norm") * (place >= MIN_OUTLIER_STEPS)
        }
        assert ("outlier" in row) == any(row[name] > limit for name, limit in limits.items())
    before = (outliers[0] - 1) // 10 * 10
    checkpoint = run_dir / "checkpoints" / f"step_{before:08}"
    resumed = [f"--checkpoint.resume={checkpoint}", "--checkpoint.every=0"]
    assert trainer.train(load_config([*options, *resumed, "--run.name=one"])) == 0
    finished = smolds("launch", "--nproc-per-node=2", "--", *options, *resumed, "--run.name=two", timeout=120)
    assert finished.returncode == 0, finished.text
    for name, tolerance in {"one": 0.0, "two": 1e-5}.items():
        again = [row for row in rows_without_timing(tmp_path / "runs" / name) if "loss" in row]
        assert [row["step"] for row in again if "outlier" in row] == outliers
        assert again[-1]["outliers"] == len(outliers)
        losses = [row["loss"] for row in steps[before:]]
        assert [row["loss"] for row in again] == pytest.approx(losses, rel=tolerance, abs=0)


def test_outlier_filter_compares_with_recent_steps():
    usual = [(3 + 0.1 * (step % 3), 1 + 0.1 * (step % 5)) for step in range(OUTLIER_WINDOW)]

    def accepts(steps: list[tuple[float, float]], loss: float, norm: float) -> bool:
        outliers = OutlierFilter(6.0)
        for one in steps:
            outliers.add(*one)
        again = OutlierFilter(6.0, outliers.state())
        results = {one.accepts(norm, {"mean_loss": torch.tensor(loss)}) for one in (outliers, again)}
        assert len(results) == 1
        return results.pop()

    assert accepts(usual, 3.5, 1.5) and accepts(usual, 0.1, 0.01)
    assert not accepts(usual, 4.0, 1.2) and not accepts(usual, 3.1, 2.5)
    few = [*usual[: MIN_OUTLIER_STEPS - 1], *[(math.nan, math.inf)] * OUTLIER_WINDOW]
    assert accepts(few, 100.0, 100.0) and not accepts([*few, usual[0]], 100.0, 100.0)
    after_a_jump = [*usual, *[(9.0, 5.0)] * 4]
    assert not accepts(after_a_jump[:-1], 9.0, 5.0) and accepts(after_a_jump, 9.0, 5.0)


def guard(**settings) -> LossGuard:
    config = load_config(["--preset=debug", *(f"--train.{name}={value}" for name, value in settings.items())])
    return LossGuard(config.train)


def test_guard_distinguishes_spikes_from_noise_and_a_single_bad_batch():
    watch = guard(spike_threshold=8, spike_steps=3)
    step = 0
    for step in range(1, 3 * WINDOW):
        watch.check(step, 5 - step / 100 + 0.1 * (step % 3), True)
    watch.check(step + 1, 50.0, True)
    watch.check(step + 2, 2.1, True)  # reset: nothing has happened
    for offset, loss in enumerate((9.0, 8.0)):
        watch.check(step + 3 + offset, loss, True)
    with pytest.raises(LossSpikeError) as spike:
        watch.check(step + 5, 9.5, True)
    assert (spike.value.begin, spike.value.end) == (step + 3, step + 5)


def test_guard_is_silent_at_the_start_and_when_it_is_off():
    watch = guard(spike_threshold=8, spike_steps=1)
    for step in range(1, MIN_STEPS):
        watch.check(step, 5.0 + 100 * (step % 2), True)
    off = guard()
    for step in range(1, 200):
        off.check(step, 1.0 if step < 150 else 1e6, True)


def test_guard_counts_skipped_steps_in_a_row():
    watch = guard(nonfinite_limit=3)
    for applied in (False, False, True, False, False):
        watch.check(1, 1.0, applied)
    with pytest.raises(TrainingStoppedError, match="3 steps in a row, up to step 9"):
        watch.check(9, float("nan"), False)


def test_checkpoint_without_a_ranks_file_times_out(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("smolds_dist.checkpoint.writer.LONG", 0.1)
    config = load_config([*small_run, "--run.name=lost", "--parallel.timeout=0.3"])
    writer = CheckpointWriter(
        config, plan_topology(config, detect_machine(), RankInfo(0, 0, 2)), {}, lambda samples: {}
    )
    folder = tmp_path / "unfinished_step_00000001"
    folder.mkdir()
    (folder / "rank_00000.json").write_text(json.dumps({"bytes": 0, "sha256": "0" * 64}))
    began = time.monotonic()
    with pytest.raises(PeerError, match="rank 1 has not written its file"):
        writer._collect_rank_files(folder)
    assert time.monotonic() - began < 5
