"""On a real Slurm cluster of two virtual nodes: srun, launching in an allocation, batch scripts, time limits, scancel."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ranks
import slurm_cluster
import warm
from ranks import PATIENCE, ROOT, Finished
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_ladder import plan_tiny

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.ladder.command import ladder
from smolds_dist.observe.rows import read_rows
from smolds_dist.training.trainer import train

# Slurm's daemons watch, signal and kill only processes they started. Forked ones (see warm.py) are for jobs that end by
# themselves.
run, smolds = partial(ranks.run, cold=True), partial(ranks.smolds, cold=True)
needs_slurm = pytest.mark.skipif(bool(slurm_cluster.available()), reason=str(slurm_cluster.available()))
BIN = str(Path(sys.executable).parent)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def forking(cluster):
    """The cluster for jobs that end by themselves: their Python is forked from one that has imported everything."""
    return cluster | {"PATH": f"{Path(warm.python()).parent}:{cluster['PATH']}"}


@pytest.fixture
def repository(tmp_path):
    """A folder to submit from, with the scripts."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    return tmp_path


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]


def reference(options: list[str], tmp_path: Path) -> list[tuple[int, float]]:
    """The same run in this process, uninterrupted."""
    train(load_config([*options, "--run.name=reference"]))
    return losses(tmp_path / "runs" / "reference")


def assert_same(ours: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [step for step, _ in ours] == [step for step, _ in expected]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in expected], rel=1e-3)


def submit(command: str, options: list[str], cluster: dict[str, str], cwd: Path) -> str:
    """Submit a command line from the docs with further options; return the job id."""
    line = f"{command.replace('sbatch ', 'sbatch --parsable ', 1)} {shlex.join(options)}"
    finished = run(["bash", "-c", line], timeout=30, cwd=cwd, **cluster)
    assert finished.returncode == 0, finished.text
    return finished.stdout.strip()


def wait_for(condition, timeout: float, what: str) -> None:
    deadline = time.monotonic() + PATIENCE * timeout
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE * timeout} s"
        time.sleep(0.2)


def is_gone(job: str, cluster: dict[str, str]) -> bool:
    return not run(["squeue", "--noheader", "--jobs", job], timeout=30, **cluster).stdout.strip()


def options_of(small_run: list[str]) -> list[str]:
    return [*small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--log.tensorboard=false"]


@needs_slurm
def test_two_nodes_equal_one_process_by_srun_and_by_launch(small_run, tmp_path, cluster):
    options = options_of(small_run)
    expected = reference(options, tmp_path)
    options += ["--parallel.expert=2"]
    by_hand = [warm.python(), "-m", "smolds_dist", "train", *options, "--run.name=srun"]
    finished = run(["srun", "--nodes=2", "--ntasks=2", *by_hand], timeout=120, **cluster)
    assert finished.returncode == 0, finished.text
    assert "2 ranks over gloo on 2 nodes" in finished.stdout
    assert_same(losses(tmp_path / "runs" / "srun"), expected)

    launch = [warm.python(), "-m", "smolds_dist", "launch", "--", *options, "--run.name=launch"]
    finished = run(["salloc", "--nodes=2", "--ntasks-per-node=1", *launch], timeout=120, **cluster)
    assert finished.returncode == 0, finished.text
    assert_same(losses(tmp_path / "runs" / "launch"), expected)
    hosts = [json.loads(path.read_text())["host"] for path in sorted((tmp_path / "runs/launch/ranks").glob("*.json"))]
    assert hosts == ["n1", "n2"]
    jobs = [json.loads(path.read_text())["job"] for path in sorted((tmp_path / "runs/launch/ranks").glob("*.json"))]
    assert jobs[0] == jobs[1]  # else the watchdog takes each for another job's


@needs_slurm
@pytest.mark.parametrize("ahead_of", ["a signal", pytest.param("the time limit", marks=pytest.mark.long)])
def test_warning_saves_requeues_and_resumes_and_scancel_saves_too(small_run, tmp_path, cluster, repository, ahead_of):
    """The command of the docs on two nodes. Slurm warns every step of a time limit, as `scancel --signal` does, up to 30 s
    before the 60 s."""
    commands = re.findall(r"^sbatch .*$", (ROOT / "docs" / "slurm.md").read_text(), re.MULTILINE)
    assert len(commands) == 1
    minutes = 2 if ahead_of == "the time limit" else 20
    layout = f"sbatch --nodes=2 --ntasks-per-node=1 --time={minutes} --signal=USR1@60 "
    options = [*options_of(small_run)[2:], "--log.tensorboard=true", "--parallel.expert=2", "--train.lr=5e-4"]
    options += ["--train.schedule=wsd", "--train.decay_fraction=0"]  # losses do not depend on the number of steps
    options += ["--train.eval_every=0", "--log.sample_every=0", "--checkpoint.every=0"]
    # More steps than any machine runs before the signal.
    job = submit(commands[0].replace("sbatch ", layout, 1), [*options, "--train.steps=20000"], cluster, repository)
    run_dir, output = tmp_path / "runs" / "night", repository / f"slurm-{job}.out"

    def starts() -> list[int]:
        return [row["step"] for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == "start"]

    if ahead_of == "a signal":
        wait_for(lambda: losses(run_dir), 90, "first step")
        run(["scancel", "--signal=USR1", job], timeout=30, **cluster)
    wait_for(lambda: len(starts()) > 1 and len(losses(run_dir)) >= starts()[1] + 2, 300, "steps after the requeue")
    run(["scancel", job], timeout=30, **cluster)
    wait_for(lambda: is_gone(job, cluster), 60, "end of the job")
    text = output.read_text()
    assert "stopped by SIGUSR1 after step" in text and "continuing from" in text, text[-3000:]
    steps = len(losses(run_dir))
    assert max((run_dir / "checkpoints").glob("step_*")).name == f"step_{steps:08}", text[-3000:]
    # The reference has the same topology: over this many steps, rounding differs between topologies.
    launched = ranks.smolds(
        "launch", "--nproc-per-node=2", "--", "--preset=debug", *options, "--run.name=reference", f"--train.steps={steps}",
        timeout=240,
    )  # fmt: skip
    assert launched.returncode == 0, launched.text
    assert losses(run_dir) == losses(tmp_path / "runs" / "reference")
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, steps + 1))


@needs_slurm
def test_killed_rank_ends_the_step_and_is_named(small_run, tmp_path, cluster):
    options = [*options_of(small_run), "--train.steps=3000", "--train.eval_every=0", "--run.name=killed"]
    launch = [sys.executable, "-m", "smolds_dist", "launch", "--", *options]
    process = subprocess.Popen(
        ["salloc", "--nodes=2", "--ntasks-per-node=1", *launch],
        env=warm.environment() | cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run_dir = tmp_path / "runs" / "killed"
    try:
        wait_for(lambda: losses(run_dir), 60, "first step")
        kill_rank(1, run_dir)
        began = time.monotonic()
        stdout, stderr = process.communicate(timeout=15)
    finally:
        process.kill()
    finished = Finished(process.returncode, stdout, stderr)
    assert time.monotonic() - began < 15
    assert finished.returncode != 0
    assert finished.stderr.count("smolds: rank 1 on host n2 was killed by signal 9") == 1, finished.text
    assert "Traceback" not in finished.stderr


def kill_rank(rank: int, run_dir: Path) -> None:
    """Find the rank by its command line, because the cluster has its own pid namespace."""
    found = [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_rank(pid, rank, str(run_dir.parent))
    ]
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def is_rank(pid: int, rank: int, run_folder: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return False
    return f"SLURM_PROCID={rank}".encode() in environment and run_folder in command and "train" in command


@pytest.mark.long
@needs_slurm
def test_nodes_with_different_cores_train_with_the_ranks_of_the_smallest(small_run, tmp_path):
    with slurm_cluster.slurm_cluster(tmp_path / "slurm", cpus=(3, 1)) as environment:
        environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        launch = [warm.python(), "-m", "smolds_dist", "launch"]
        options = ["--", *options_of(small_run), "--train.steps=1"]
        nodes = ["salloc", "--nodes=2", "--ntasks=4"]
        finished = run([*nodes, *launch, *options, "--run.name=uneven"], timeout=120, **environment)
        assert finished.returncode == 0, finished.text
        assert "2 ranks over gloo on 2 nodes" in finished.stdout
        finished = run([*nodes, *launch, "--nproc-per-node=2", *options], timeout=60, **environment)
        assert finished.returncode == 2, finished.text
        assert "exceed the 1 cores of the allocation's smallest node" in finished.stderr


OWN_GPU = """
import os, sys
from smolds_dist.config import load_config
from smolds_dist.parallel.ranks import join_ranks
from smolds_dist.parallel.topology import Machine, plan_topology
shown = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
topology = plan_topology(load_config(sys.argv[1:]), Machine(("cuda", "cpu"), len(shown), True), join_ranks())
print("rank", topology.rank, topology.local_rank, ",".join(shown), topology.torch_device)
"""


@needs_slurm
def test_each_task_trains_on_the_gpu_that_slurm_shows_it(small_run, tmp_path):
    """Slurm with devices that it takes for GPUs: by --gpus-per-task each task sees one, otherwise all of its node."""
    (tmp_path / "rank.py").write_text(OWN_GPU)
    rank = [warm.python(), str(tmp_path / "rank.py"), *small_run]
    with slurm_cluster.slurm_cluster(tmp_path / "slurm", gpus=True) as environment:
        environment |= {"PATH": f"{BIN}:{os.environ['PATH']}"}

        def ranks_of(*command: str) -> Finished:
            finished = run([*command], timeout=60, **environment)
            return replace(finished, stdout="".join(sorted(re.findall("rank .*\n", finished.stdout))))

        allocate = ["salloc", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1"]
        launch = [warm.python(), "-m", "smolds_dist", "launch", "--dry-run", "--", *small_run, "--parallel.device=cpu"]
        shown = run([*allocate, *launch], timeout=60, **environment)
        srun = shlex.split(re.search("^srun .*", shown.stdout, re.MULTILINE)[0])
        own = ranks_of(*allocate, *srun[: srun.index("--kill-on-bad-exit=1")], *rank)
        assert own.stdout == "rank 0 0 0 cuda:0\nrank 1 1 1 cuda:0\nrank 2 0 0 cuda:0\nrank 3 1 1 cuda:0\n", own.text
        node = ranks_of("srun", "--nodes=1", "--ntasks=2", "--gpus-per-node=2", *rank)
        assert node.stdout == "rank 0 0 0,1 cuda:0\nrank 1 1 0,1 cuda:1\n", node.text
        one = ranks_of("srun", "--nodes=1", "--ntasks=2", "--gpus-per-node=1", *rank)
        assert "local rank 1 has no GPU, because this node has 1; start fewer ranks." in one.stderr


@needs_slurm
def test_array_job_reads_its_line_of_options(small_run, tmp_path, forking, repository):
    (repository / "sweep.txt").write_text("--train.seed 1\n--train.seed 2 --train.steps 3\n")
    options = [*options_of(small_run), "--train.steps=2"]
    layout = "--ntasks-per-node=1 --nodes=1 --array=1-2"
    job = submit(f"sbatch {layout} slurm/array.sbatch sweep.txt", options, forking, repository)
    wait_for(lambda: is_gone(job, forking), 90, "end of the jobs")
    runs = {n: tmp_path / "runs" / f"sweep-{job}-{n}" for n in (1, 2)}
    assert [len(losses(runs[n])) for n in (1, 2)] == [2, 3]
    assert losses(runs[1])[0] != losses(runs[2])[0]


@needs_slurm
def test_array_job_tokenizes_what_the_run_needs(small_run, tmp_path, forking):
    options = [*options_of(small_run), "--run.name=prepared", f"--data.cache_dir={tmp_path}/cache"]
    start = ["slurm", "--prepare", "--nodes=2", "--time=5", "--submit", "--", *options]
    submitted = ranks.smolds(*start, cwd=tmp_path, **forking)
    assert submitted.returncode == 0, submitted.text
    assert "tokenization in 2 tasks" in submitted.stdout
    job = submitted.stdout.split()[2].rstrip(":")
    wait_for(lambda: is_gone(job, forking), 90, "end of the jobs")
    texts = [(tmp_path / f"slurm-{job}_{task}.out").read_text() for task in (0, 1)]
    assert all(re.search(r"text: (\d+) of \1 shards tokenized", text) for text in texts), texts
    found = sorted((tmp_path / "cache" / "units").glob("*/*/meta.json"))
    trained = ranks.smolds("train", *options, "--train.steps=1")
    assert trained.returncode == 0, trained.text
    assert sorted((tmp_path / "cache" / "units").glob("*/*/meta.json")) == found != []


def test_rendered_script_quotes_all_user_input(small_run, tmp_path):
    evil = f"$(touch {tmp_path}/ran); `touch {tmp_path}/ran` 'quoted'"
    (tmp_path / "text").mkdir()
    start = ["slurm", "--nodes", "4", "--gpus-per-node", "8", "--time", "1-12:00:00", "--account", "lab"]
    finished = smolds(*start, "--", *small_run, "--train.global_batch=64", f"--log.sample_prompts=[{json.dumps(evil)}]")
    assert finished.returncode == 0, finished.text
    script = finished.stdout
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1-12:00:00", "--account=lab"):
        assert f"#SBATCH {line}\n" in script
    own_gpu = smolds(
        *start[:3], "--tasks-per-node=8", "--gpus-per-task=1", "--time=5", "--", *small_run, "--train.global_batch=64"
    )
    assert "#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-task=1\n" in own_gpu.stdout, own_gpu.text
    # The shell parses the command to the given arguments, and none of it has run.
    shown = script.replace(f"{sys.executable} -m smolds_dist", f"{sys.executable} -c 'import sys; print(sys.argv)'")
    shell = run(["bash", "-c", shown.replace("scontrol", "echo")], timeout=30, cwd=tmp_path)
    assert repr(f"--log.sample_prompts=[{json.dumps(evil)}]") in shell.stdout, shell.text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (["--nodes=2", "--"], "--time"),
        (["--time=soon", "--"], "H:MM:SS"),
        (["--time=5", "--job-name=a\n#SBATCH --x", "--"], "not allowed in a batch script"),
        (["--time=5", "--nodes=0", "--"], "at least 1"),
        (["--time=5"], "after `--`"),
        (["--time=5", "--", "--checkpoint.resume=never"], "omit it"),
        (["--time=5", "--gpus-per-node=8", "--", "--parallel.expert=3"], "valid values"),
        (["--time=5", "--gpus-per-node=8", "--gpus-per-task=1", "--"], "omit one"),
        (["--time=5", "--gpus-per-task=2", "--"], "each rank uses one GPU"),
    ],
)
def test_mistake_is_one_sentence(options, fix, tmp_path):
    finished = ranks.smolds("slurm", *options, cwd=tmp_path)
    assert finished.returncode == 2, finished.text
    assert fix in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.long
@needs_slurm
@pytest.mark.parametrize("instead", ["spare", "queue", "fewer"])
def test_faulty_node_is_excluded_from_the_restart(small_run, tmp_path, cluster, instead):
    """A spare node of the allocation replaces it, the job is requeued without it, or it continues on fewer nodes."""
    steps = 60 if instead == "spare" else 400
    options = [*options_of(small_run), "--run.name=mo ved", f"--train.steps={steps}", "--checkpoint.every=5"]
    options += ["--train.eval_every=0", "--log.sample_every=0"]
    nodes = ["--nodes=2", "--tasks-per-node=1"] if instead == "fewer" else ["--nodes=1", "--tasks-per-node=2"]
    asked = [*nodes, "--time=10", "--restarts=2", "--output=job.out", "--submit"]
    asked += {"spare": ["--spares=1"], "queue": [], "fewer": ["--restarts-shrink"]}[instead]
    finished = smolds("slurm", *asked, "--", *options, cwd=tmp_path, **cluster)
    assert finished.returncode == 0, finished.text
    (job,) = re.findall(r"^submitted job (\d+):", finished.stdout)
    run_dir = tmp_path / "runs" / "mo ved"
    wait_for(lambda: losses(run_dir), 90, "first step")
    bad = json.loads((run_dir / "ranks" / "rank_00001.json").read_text())["host"]
    kill_rank(1, run_dir)
    wait_for(lambda: is_gone(job, cluster), 300, "end of the job")
    text = (tmp_path / "job.out").read_text()
    assert f"rank 1 on host {bad} was killed by signal 9" in text
    assert (f"is requeued without {bad}." in text) == (instead == "queue"), text
    state = json.loads((run_dir / "state.json").read_text())
    assert state["host"] in {"n1", "n2"} - {bad} and state["ranks"] == (1 if instead == "fewer" else 2), text
    assert [step for step, _ in losses(run_dir)] == list(range(1, steps + 1)), text


@pytest.mark.long
@needs_slurm
def test_a_ladders_array_waits_for_the_rates_and_a_warned_task_is_requeued_and_resumes(
    small_run, tmp_path, cluster, monkeypatch, capsys
):
    for name, value in (cluster | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    folder = plan_tiny(tmp_path / "ladder", small_run, "--tokens=5.12K")
    plan = (folder / "ladder.yaml").read_text().replace("rates: [0.02]", "rates: [0.02, 1000.0]")
    plan = plan.replace("name: 48x2\n  steps: [20]", "name: 48x2\n  steps: [600]")
    (folder / "ladder.yaml").write_text(plan)
    capsys.readouterr()
    assert ladder(["slurm", str(folder), "--time=20", "--submit"]) == 0
    shown = capsys.readouterr().out
    rates, rungs = re.fullmatch(r"submitted job (\d+): learning rates\nsubmitted job (\d+): 3 rungs\n", shown).groups()
    wait_for(lambda: [*folder.glob("48x2-600-*/metrics.jsonl")], 200, "run of the rung")
    assert is_gone(rates, cluster)
    trunk = next(folder.glob("48x2-600-*/metrics.jsonl")).parent
    wait_for(lambda: losses(trunk), 60, "first step")
    run(["scancel", "--signal=USR1", f"{rungs}_1"], timeout=30, **cluster)
    wait_for(lambda: is_gone(rungs, cluster), 200, "end of the array")
    starts = [row["step"] for row in read_rows(trunk / "metrics.jsonl") if row.get("event") == "start"]
    assert len(starts) == 2 and 0 < starts[1] < 600, (tmp_path / f"slurm-{rungs}_1.out").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert len(results["points"]) == 3 and sorted(one["lr"] for one in results["sweep"])[-1] == 1000
    state = run(["scontrol", "show", "job", f"{rungs}_0"], timeout=30, **cluster).stdout
    assert not state or "JobState=COMPLETED" in state


def test_a_ladders_scripts_are_written_and_their_commands_printed(small_run, tmp_path, capsys):
    folder = plan_tiny(tmp_path / "my ladder", small_run, "--rates=2")
    capsys.readouterr()
    assert ladder(["slurm", str(folder), "--time=20", "--gpus-per-node=1", "--jobs=2", "--job-name=x"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"sbatch '{folder}/rates.sbatch'"
    assert second == f"sbatch --dependency=afterok:JOB '{folder}/rungs.sbatch'"
    script = (folder / "rungs.sbatch").read_text()
    for line in ("--array=0-2", "--signal=USR1@120", "--gpus-per-node=1", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    shown = re.sub("^srun .* ladder run", "echo", script, flags=re.MULTILINE)
    shell = run(["bash", "-c", shown], timeout=30, cwd=tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert shell.stdout == f"{folder} --jobs=2 --nproc-per-node=1 --only 48x2\n", shell.text
    with pytest.raises(ConfigError, match="--account 'a b' has characters"):
        ladder(["slurm", str(folder), "--time=20", "--account=a b"])
    with pytest.raises(ConfigError, match="--time '' is not a time limit"):
        ladder(["slurm", str(folder)])
