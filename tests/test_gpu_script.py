"""launch/gpu.sh: its parts, their commands, limits and results, on a CPU with small settings; and the GPU tests on a CPU."""

import json
import os
import subprocess
import sys
import time
from importlib import import_module

import pytest
from ranks import EXTRAS, ROOT, run

from benchmarks import drift, gpu, kernels
from benchmarks.gpu import Part, parts
from smolds_dist.bench import train as bench_train
from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError


def script(*arguments: str, timeout: float = 120):
    """Run the script; accelerate, which the Trainer needs, is beside the main environment."""
    path = f"{EXTRAS}{os.pathsep}{ROOT}"
    command = [str(ROOT / "launch" / "gpu.sh"), *map(str, arguments)]
    return run(command, timeout, PYTHON=sys.executable, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="")


class ParsedError(Exception):
    """Ends a command whose options are accepted."""


def parsed(*_args, **_options):
    raise ParsedError


@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.long)])
def test_all_commands_parse(monkeypatch, tmp_path, small):
    expressions = []
    for part in parts(tmp_path, small).values():
        assert part.limit < 600 and part.what
        for command in part.commands:
            _, flag, module, *args = command[command.index(sys.executable) :]
            assert flag == "-m"
            if module == "pytest":
                expressions.append(args)
            elif module == "smolds_dist" and args[0] == "train":
                load_config(args[1:])
            elif module == "smolds_dist" and args[:2] == ["bench", "train"]:
                monkeypatch.setattr(bench_train, "measure", parsed)
                with pytest.raises(ParsedError):
                    bench_train.bench(args[1:])
            elif module == "benchmarks":
                benchmark = import_module(f"benchmarks.{args[0]}")
                monkeypatch.setattr(benchmark, "measure", parsed)
                with pytest.raises(ParsedError):
                    benchmark.main(args[1:])
            else:
                assert args[-1].startswith(str(tmp_path / "runs"))
    assert [args[-1] for args in expressions] == ["tests/test_gpu.py"] * 2


def test_dry_run_prints_the_commands_and_the_list_the_parts(tmp_path):
    finished = script("--dry", tmp_path / "results", "recipe", "show-2")
    assert finished.returncode == 0, finished.text
    _, recipe, name, train, report = finished.stdout.splitlines()
    assert "-m benchmarks recipe --preset smollm2-deepseek-255m-local" in recipe and name == "# show-2"
    assert train.startswith("timeout --preserve-status --signal=USR1 510 ") and "smolds_dist report" in report
    listed = script("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(parts(tmp_path)) and "570 s" in listed[0]
    assert not list(tmp_path.iterdir())


def test_unknown_part_is_one_line(tmp_path):
    finished = script("--small", tmp_path / "results", "speed")
    assert finished.returncode == 2 and "'speed' is not a part; use some of tests, ranks" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_fails_or_exceeds_its_limit_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    """The limit ends a command that ignores its interrupt, and its child processes; results of earlier calls stay."""
    stubborn = """if True:
        import signal, subprocess, time
        signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
        child = subprocess.Popen(["sh", "-c", "trap '' INT; sleep 60; sleep 60"])
        print("child", child.pid, flush=True)
        for _ in range(60):
            time.sleep(1)
    """
    made = {
        "tests": Part("", [python("print('9 passed')")]),
        "ranks": Part("", [python("import sys; print('1 failed'); sys.exit(3)"), python("print('not run')")]),
        "roofline": Part("", [python(stubborn)], limit=2),
        "show-1": Part("", [python("raise SystemExit(75)"), python("print('report')")], codes=(0, 75)),
    }
    monkeypatch.setattr(gpu, "parts", lambda *_: made)
    monkeypatch.setattr(gpu, "PATIENCE", 1)
    (tmp_path / "roofline.json").write_text("{}")  # of an earlier call
    assert gpu.run(gpu_options(tmp_path, "ranks", "roofline", "show-1")) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert {name: row["result"] for name, row in rows.items()} == {
        "ranks": "failed with exit code 3", "roofline": "exceeded 2 s", "show-1": "passed",
    }  # fmt: skip
    assert rows["roofline"]["note"] == "interrupted" and not (tmp_path / "roofline.json").exists()
    assert (tmp_path / "ranks.log").read_text() == "1 failed\n"
    child = int((tmp_path / "roofline.log").read_text().split()[1])
    assert not is_alive(child)
    assert gpu.run(gpu_options(tmp_path, "tests")) == 0
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| tests", "| ranks", "| roofline", "| show-1"]
    assert "| tests | passed | 0 | 9 passed | a CPU, small settings |" in capsys.readouterr().out


def gpu_options(folder, *chosen):
    return gpu.argparse.Namespace(folder=folder, parts=list(chosen), small=True, list=False, dry=False)


def is_alive(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if (
            subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip("Z\n ")
            == ""
        ):
            return False
        time.sleep(0.1)
    return True


def test_a_speeds_note_compares_with_the_best_alternative(tmp_path):
    rates = {
        "smolds, graphs": 300.0,
        "smolds": 100.0,
        "dense graphs": 400.0,
        "transformers x": 150.0,
        "trainer x": 200.0,
    }
    rows = {name: {"tokens_per_s": 1e3 * rate, "flops_utilization": 0.3} for name, rate in rates.items()}
    (tmp_path / "speed-16.json").write_text(json.dumps({"contenders": rows}))
    (tmp_path / "speed-16.log").write_text("a table\n")
    assert gpu.note("speed-16", tmp_path) == "smolds, graphs: 300,000 tokens/s, MFU 30.0%, 1.50 x trainer x"
    (tmp_path / "recipe.log").write_text("\nminutes: 8\n\n")
    assert gpu.note("recipe", tmp_path) == "minutes: 8"


def test_one_part_runs_with_small_settings(tmp_path):
    finished = script("--small", tmp_path / "results", "roofline")
    assert finished.returncode == 0, finished.text
    assert json.loads((tmp_path / "results" / "roofline.json").read_text())["kinds"]
    assert "| roofline | passed |" in (tmp_path / "results" / "summary.md").read_text()


@pytest.mark.long
def test_all_parts_run_with_small_settings(tmp_path):
    finished = script("--small", tmp_path, timeout=900)
    assert finished.returncode == 0, finished.text
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert list(rows) == list(parts(tmp_path)) and {row["result"] for row in rows.values()} == {"passed"}
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {"runs/show/training_metrics.png", "runs/show/log_training.md", "runs/show/export"} <= made
    assert any(path.startswith("runs/profile/profile/") for path in made)


# Parts of test_gpu.py that no other test covers; all of it with --all.
FAST = "compiled_blocks or graphs or micro_batch or phase or w2e2z1"


@pytest.mark.parametrize("chosen", [FAST, pytest.param("", marks=pytest.mark.long)])
def test_the_gpu_tests_run_on_a_cpu(chosen):
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-k", chosen, "tests/test_gpu.py"]
    finished = run(command, 240, cwd=ROOT, SMOLDS_TEST_DEVICE="cpu")
    assert finished.returncode == 0, finished.text
    assert " passed" in finished.stdout and "failed" not in finished.stdout


def event(name: str, begin: float, seconds: float, kind: str = "kernel") -> dict:
    return {"ph": "X", "cat": kind, "name": name, "ts": 1e6 * begin, "dur": 1e6 * seconds}


def test_kernels_are_counted_and_the_gpu_is_busy_while_any_runs():
    """Kernels of two streams overlap."""
    events = [
        event("step", 0, 10, "user_annotation"), event("matmul", 1, 2), event("matmul", 2, 2), event("add", 2.5, 0.5),
        event("Memset", 6, 1, "gpu_memset"), {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    found = kernels.kernels_of(events)
    assert found["calls"] == {"matmul": 2, "add": 1, "Memset": 1} and found["seconds"]["matmul"] == pytest.approx(4)
    assert (found["busy"], found["traced"]) == pytest.approx((4, 10))
    shown = kernels.table(found)
    assert (
        "matmul" in shown.splitlines()[1]
        and "4 kernels of 3 kinds; the GPU is busy for 4,000.0 of 10,000.0 ms, 40.0%" in shown
    )
    assert kernels.table(kernels.kernels_of(events[:1])) == "no kernels: not a trace of a GPU"
    with pytest.raises(ConfigError, match="has no trace"):
        kernels.main(["nowhere"])


def drift_of(first: float, later: float, yardstick: float = 0.0, **more) -> str | None:
    losses = [1.0 + first] * drift.FIRST + [1.0 + later] * 5
    far = drift.differences([1.0] * 15, losses)
    near = drift.differences([1.0] * 15, [1.0] * 10 + [1.0 - yardstick] * 5)
    found = {"plain again": near, "half micro batches": near, "compiled": far}
    return drift.check({"differences": found, "tolerance": 1e-3, "compiled": True, "graphs": False} | more)


def test_losses_may_drift_as_far_as_another_rounding_lets_them():
    assert drift_of(9e-4, 9e-4) is None and drift_of(9e-4, 3e-2, 2e-2) is None
    assert "first 10 steps differ by up to 2.0e-03" in drift_of(2e-3, 0, 2e-2)
    assert "differ by up to 5.0e-02, more than 4.0e-02" in drift_of(9e-4, 5e-2, 2e-2)
    assert "differ by up to nan" in drift_of(0, float("nan"))
    assert "was not compiled" in drift_of(0, 0, compiled=False)
