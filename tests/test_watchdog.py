"""The watchdog: a job hangs if no rank makes progress, and the stuck rank is named."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import warm
from ranks import ROOT

from smolds_dist.activity import ACTIVITY, Activity, Work, beat, doing
from smolds_dist.errors import ConfigError
from smolds_dist.launching import failure
from smolds_dist.launching.failure import RankReport, read_cause
from smolds_dist.launching.hang import Answer, _cause
from smolds_dist.launching.restarts import BLAMED
from smolds_dist.parallel.flight_recorder import Collective
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.settings import Parallel

TIMEOUT = 2.0
RANK = f"""
import sys, time
from pathlib import Path
from smolds_dist.activity import ACTIVITY, beat, doing
from smolds_dist.launching.failure import RankReport
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.settings import Parallel
rank = int(sys.argv[2])
report = RankReport(Path(sys.argv[1]), RankInfo(rank, rank, 2), Parallel(timeout={TIMEOUT}, grace=0.5))
ACTIVITY.passes = 7

def save(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        beat()
        time.sleep(0.1)

def wait_for_others():
    time.sleep(60)

with doing("training"):
    exec(sys.argv[3])
report.end()
"""


def start(folder, *programs: str) -> list[subprocess.Popen]:
    environment = warm.environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), program],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank, program in enumerate(programs)
    ]  # fmt: skip


def wait_for_entry(folder, ranks: int = 1) -> dict:
    """Return rank 0's entry once all ranks have theirs."""
    deadline = time.monotonic() + 20
    while len(entries := failure.rank_entries(folder / "ranks")) < ranks and time.monotonic() < deadline:
        time.sleep(0.1)
    return entries[0]


REFUSE = 'from smolds_dist.errors import ConfigError; report.refuse(ConfigError("no such file.")); sys.exit(2)'
JOIN = """
with doing("importing", 60):
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2)
    dist.all_reduce(torch.ones(3))
    group = dist.new_group([0, 1])
"""
# As if a broken driver did not return, without Python's lock.
BLOCK = """
import ctypes
torch._C._distributed_c10d._dump_fr_trace_json = lambda: ctypes.PyDLL(None).sleep(100)
"""
JOBS = {
    "stuck later": ["wait_for_others()", f"save({3 * TIMEOUT}); save = None; time.sleep(60)"],
    "own limit": ["wait_for_others()", 'with doing("importing", 60): time.sleep(5)'],
    "mistake": ["wait_for_others()", REFUSE],
    # As with NCCL, whose waiting rank has no function of torch.distributed on its stack
    "missing rank": [f"{JOIN}dist.all_reduce(torch.ones(7), async_op=True); time.sleep(60)", f"{JOIN}time.sleep(60)"],
    "different collectives": [
        f"{JOIN}dist.all_reduce(torch.ones(7, 2), group=group)",
        f"{JOIN}dist.all_to_all_single(torch.ones(4), torch.ones(4), group=group)",
    ],
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Return the folder, processes and start of jobs that run at the same time."""
    started = {}
    for name, programs in JOBS.items():
        folder = tmp_path_factory.mktemp("job")
        started[name] = (folder, start(folder, *programs), time.monotonic())
    yield started
    for _, ranks, _ in started.values():
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_a_rank_that_makes_progress_keeps_a_waiting_one_alive_until_it_stops(jobs):
    """Rank 0 waits all the time. Rank 1 works for three times the timeout, then gets stuck."""
    folder, ranks, begun = jobs["stuck later"]
    output = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert time.monotonic() - begun > 4 * TIMEOUT
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert sum(text.count("smolds: ") for text in output) == 1
    assert re.search(r"for [234] s while training", read_cause(folder / "ranks"))
    stacks = (folder / "ranks" / "stacks.txt").read_text()
    assert "rank 0 on host" in stacks and "7 forward passes, training" in stacks and "wait_for_others" in stacks


def test_work_with_a_limit_of_its_own_is_no_hang(jobs):
    folder, ranks, _ = jobs["own limit"]
    assert ranks[1].wait(60) == 0
    assert json.loads((folder / "ranks" / "rank_00000.json").read_text())["doing"] == "training"
    assert ranks[0].wait(60) == 1  # and then nobody makes progress


def test_hang_names_the_collective_that_a_rank_has_not_joined(jobs):
    folder, ranks, _ = jobs["missing rank"]
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    cause = r"rank 1 on host \S+ was stuck for \d s while training, in .*; the others wait in all_reduce 2 of group 0 "
    assert re.match(cause + r"\(ranks 0-1; float \[7\]\) \(stacks", read_cause(folder / "ranks"))
    assert "forward passes, training in all_reduce 2 of" in (folder / "ranks" / "stacks.txt").read_text()


def test_hang_names_each_ranks_collective_if_they_differ(jobs):
    folder, ranks, _ = jobs["different collectives"]
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    assert (
        "while training in different collectives: rank 0 in all_reduce 1 of group 1 (ranks 0-1; float [7, 2]); "
        "rank 1 in all_to_all 1 of group 1 (ranks 0-1; float [4])"
    ) in read_cause(folder / "ranks")


@pytest.mark.long
def test_ranks_whose_recorders_block_end(tmp_path):
    program = f"{JOIN}{BLOCK}dist.all_reduce(torch.ones(7), group=group) if rank else time.sleep(60)"
    assert [rank.communicate(timeout=60) and rank.returncode for rank in start(tmp_path, program, program)] == [1, 1]
    assert "all_reduce" in (tmp_path / "ranks" / "rank_00001.crash").read_text()


def test_mistake_on_one_rank_ends_the_others_with_code_2(jobs):
    folder, ranks, _ = jobs["mistake"]
    for rank, text in zip(ranks, ["smolds: no such file.\n", ""], strict=True):  # rank 0 prints for all
        assert rank.communicate(timeout=30)[1] == text and rank.returncode == 2
    assert failure.exit_code_of_stop(folder / "ranks", failure.rank_entries(folder / "ranks")) == 2


def test_cause_and_mistake_of_another_job_end_nobody(tmp_path):
    ranks = start(tmp_path, "save(4)", "save(4)")
    wait_for_entry(tmp_path, 2)
    for name in (failure.CAUSE, failure.REFUSED, "hanging"):
        (tmp_path / "ranks" / name).write_text("rank 0 on host a failed\n10.0.0.1:29500:::\n")
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    for rank in ranks:
        assert rank.stderr.read() == ""
        rank.stderr.close()


def test_rank_of_an_earlier_start_exits(tmp_path):
    hold = "report.token = 'first'; save(60)"
    (rank,) = start(tmp_path, hold)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ranks" / "progress").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    (tmp_path / "ranks" / failure.TOKEN).write_text("first")
    time.sleep(2)
    assert rank.poll() is None
    (tmp_path / "ranks" / failure.TOKEN).write_text("second")
    assert rank.communicate(timeout=10)[1] == "" and rank.returncode == 1


def test_second_job_on_this_host_is_rejected_and_harms_nothing(tmp_path, monkeypatch):
    (rank,) = start(tmp_path, "save(60)")
    entry = tmp_path / "ranks" / "rank_00000.json"
    try:
        before = wait_for_entry(tmp_path)["pid"]
        monkeypatch.setenv("MASTER_PORT", "2")
        with pytest.raises(ConfigError, match="is in use by another training process"):
            RankReport(tmp_path, RankInfo(0, 0, 2), Parallel())
        assert json.loads(entry.read_text())["pid"] == before and rank.poll() is None
    finally:
        rank.send_signal(signal.SIGKILL)
        rank.communicate()


def test_job_of_the_same_name_on_this_host_is_rejected_too(tmp_path):
    """`deepspeed` has the same address and port for all jobs."""
    (rank,) = start(tmp_path, "save(60)")
    try:
        wait_for_entry(tmp_path)
        (second,) = start(tmp_path, "save(1)")
        assert "is in use by another training process" in second.communicate(timeout=60)[1]
        time.sleep(2.5)
        assert rank.poll() is None
    finally:
        rank.kill()
        rank.communicate()


def test_jobs_at_the_same_loopback_address_of_two_hosts_have_different_names(monkeypatch):
    names = {}
    for address in ("127.0.0.1", "localhost", "10.0.0.1"):
        monkeypatch.setenv("MASTER_ADDR", address)
        for host in ("a", "b"):
            monkeypatch.setenv("SLURMD_NODENAME", host)
            names[address, host] = failure.job_token()
    assert len(set(names.values())) == 5 and names["10.0.0.1", "a"] == names["10.0.0.1", "b"]


def test_ranks_that_an_earlier_job_of_the_same_name_has_left_are_no_failure(tmp_path):
    """Four ranks were killed; two start again at the same address."""
    killed = start(tmp_path, *["save(60)"] * 4)
    try:
        wait_for_entry(tmp_path, 4)
    finally:
        for rank in killed:
            rank.kill()
            rank.communicate()
    (first,) = start(tmp_path, "save(4)")  # before rank 1 has replaced its entry
    assert first.communicate(timeout=60)[1] == "" and first.returncode == 0


def test_rank_that_ends_while_its_entry_is_read_is_no_failure(tmp_path, monkeypatch):
    report = RankReport(tmp_path, RankInfo(), Parallel())
    entries = failure.rank_entries(tmp_path / "ranks")

    def end_now(pid: int) -> str:
        report.end()
        return "X"

    monkeypatch.setattr(failure, "process_state", end_now)
    assert not failure.record_dead_rank(tmp_path / "ranks", entries)


def test_progress_that_cannot_be_written_is_progress(tmp_path):
    """The disk is full or the folder was removed."""
    (rank,) = start(tmp_path, f"import shutil; shutil.rmtree(report.folder); save({4 * TIMEOUT})")
    assert rank.communicate(timeout=60)[1] == "" and rank.returncode == 0


def test_activity_names_each_threads_innermost_work():
    activity = Activity(
        works={1: [Work("training", 0, 0), Work("evaluating", 0, 0)], 2: [Work("writing", 9, 0)], 3: []}
    )
    assert str(activity) == "evaluating, writing" and str(Activity()) == "starting"
    with doing("loading"), doing("verifying"):
        assert str(ACTIVITY) == "verifying"
        before = ACTIVITY.last
        beat()
        assert ACTIVITY.last > before


def test_rank_lost_on_one_of_several_hosts_blames_none(tmp_path):
    report = RankReport(tmp_path, RankInfo(0, 0, 1), Parallel(grace=0.1))
    report.world_size = 4
    for rank, host in ((1, "host2"), (2, "host3")):
        entry = report.entry | {"rank": rank, "host": host, "system": host, "pid": 1}
        (report.folder / f"rank_{rank:05}.json").write_text(json.dumps(entry))
    report.fail(
        RuntimeError("Connection closed by peer [10.77.0.2]:4496. This means that the remote peer failed. GLHF!")
    )
    cause = "one of the hosts host2, host3 was killed or lost its network (RuntimeError: Connection closed by peer"
    assert read_cause(report.folder).startswith(cause) and "GLHF" not in read_cause(report.folder)
    assert not BLAMED.search(read_cause(report.folder))


def in_collective(size: int, number: int = 3, ranks: list[int] | None = None) -> dict:
    return {"collective": Collective("all_to_all", number, "2", ranks or [0, 1, 2, 3, 4], ["BFloat16"], [[size, 8]])}


def answer(**changed) -> Answer:
    usual = {"passes": 5, "doing": "training", "at": "step (x.py:1)", "waits": True, "connected": True, "stacks": ""}
    return Answer(**usual | changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({2: None}, "rank 2 on host host2 did not answer for 60 s: it hangs, or its host does"),
        (
            {0: in_collective(6, 3, [0, 2]), 2: None},
            "rank 2 on host host2 did not answer for 60 s: it hangs, or its host does; the others wait in all_to_all 3 of "
            "group 2 (ranks 0, 2; bfloat16 [6, 8])",
        ),
        (
            {3: {"passes": 4}},
            "rank 3 on host host2 was stuck for 60 s while training, in step (x.py:1); the others wait",
        ),
        (
            {1: {"waits": False, "doing": "saving a checkpoint"}},
            "rank 1 on host host1 was stuck for 60 s while saving a checkpoint, in step (x.py:1); the others wait",
        ),
        (
            {2: {"connected": False}, 3: {"connected": False}},
            "ranks 2, 3 on host host2 lost their network: no connection to the other hosts for 60 s",
        ),
        (
            {rank: {"connected": False} for rank in (2, 3, 4)},
            "ranks 0, 1 on host host1 lost their network: no connection to the other hosts for 60 s",
        ),
        ({}, "the ranks have waited for each other for 60 s while training"),
        (
            {rank: in_collective(7) for rank in range(5)},
            "the ranks have waited for each other for 60 s while training in all_to_all 3 of group 2 "
            "(ranks 0-4; bfloat16 [7, 8])",
        ),
        (
            {rank: in_collective(6 + rank // 4) for rank in range(5)},
            "the ranks have waited for each other for 60 s while training with different sizes: ranks 0, 1, 2, 3 in "
            "all_to_all 3 of group 2 (ranks 0-4; bfloat16 [6, 8]); rank 4 in all_to_all 3 of group 2 "
            "(ranks 0-4; bfloat16 [7, 8])",
        ),
        (
            {0: in_collective(6, 3, [0, 2]), 2: in_collective(6, 2, [0, 2]) | {"passes": 4}},
            "rank 2 on host host2 was stuck for 60 s while training, in step (x.py:1), waiting in all_to_all 2 of group 2 "
            "(ranks 0, 2; bfloat16 [6, 8]); the others wait in all_to_all 3 of group 2 (ranks 0, 2; bfloat16 [6, 8])",
        ),
    ],
)
def test_stuck_rank_is_named_and_not_the_one_that_waits_for_it(changes, message):
    hosts = ["host1", "host1", "host2", "host2", "host3"]
    entries = [{"rank": rank, "host": host, "system": host, "pid": os.getpid()} for rank, host in enumerate(hosts)]
    answered = {rank: changes.get(rank, {}) for rank in range(len(hosts))}
    answers = {rank: answer(**values) for rank, values in answered.items() if values is not None}
    assert _cause(entries, answers, 60.0) == message
