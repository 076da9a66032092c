"""`smolds bench train`: its contenders, and step times without compile time."""

import io
import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ranks import EXTRAS, ROOT, smolds
from test_captured import OperatorRecorder

from smolds_dist.bench import train as bench_train
from smolds_dist.bench.contenders import CONTENDERS, Gate, Task
from smolds_dist.bench.train import bench, run_trial, variants_of
from smolds_dist.errors import ConfigError
from smolds_dist.model import device
from smolds_dist.model.moe import SwiGLU
from smolds_dist.parallel import captured, make_engine
from smolds_dist.parallel.topology import has_compiler
from smolds_dist.training import clock, compiling

needs_compiler = pytest.mark.skipif(not has_compiler("cpu"), reason="Inductor needs a C++ compiler")
SMALL = (
    "--model.num_hidden_layers=1", "--model.hidden_size=32", "--model.intermediate_size=16",
    "--data.tokenizer_vocab_size=300", "--data.seq_len=32",
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train", "--preset=debug", "--train.optimizer=muon"], "--optimizers"),
        (["train", "--preset=debug", "--against=/nowhere"], "git worktree add"),
        (["train", "--ranks", "3"], "--ranks \\[3\\] does not divide"),
        (["train", "--rounds=0"], "--rounds 0 is out of range"),
        (["roofline"], "python -m benchmarks"),
    ],
    ids=str,
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        bench(options)


def test_muon_and_another_commit_have_their_own_rows(tmp_path):
    given = [
        "--preset=debug",
        "--dtype=fp32",
        "--sequences=1",
        "--rounds=1",
        "--steps=1",
        "--only",
        "smolds",
        "--no-compile",
    ]
    finished = smolds("bench", "train", *given, f"--against={ROOT}", f"--json={tmp_path / 'train.json'}", *SMALL)
    assert finished.returncode == 0, finished.text
    result = json.loads((tmp_path / "train.json").read_text())
    assert list(result["contenders"]) == ["smolds", "smolds, --against", "smolds, Muon"]
    assert all(one["tokens_per_s"] > 0 and one["compile_seconds"] == 0 for one in result["contenders"].values())


class TwoSteps:
    """A gate that ends the contender after two steps."""

    def __init__(self):
        self.steps = 0

    def before(self) -> None:
        if self.steps == 2:
            raise EOFError

    def after(self) -> None:
        self.steps += 1


@pytest.mark.parametrize("variant", ["", "compile", "graphs"])
@pytest.mark.parametrize("name", ["smolds", "dense"])
def test_smolds_and_its_dense_counterpart_train_in_every_mode(monkeypatch, name, variant):
    """In CUDA's branches: traced instead of compiled, with a recorder of operators for CUDA's graphs."""
    engines = []
    monkeypatch.setattr(captured, "CudaRecorder", OperatorRecorder)
    monkeypatch.setattr(compiling, "try_to_compile", partial(compiling.try_to_compile, backend="aot_eager"))
    made = make_engine.make_engine
    monkeypatch.setattr(make_engine, "make_engine", lambda *args: engines.append(made(*args)) or engines[0])
    gate = TwoSteps()
    with device.as_family("cuda"), pytest.raises(EOFError):
        CONTENDERS[name](Task(name, "debug", 64, 2, 16, "bf16", "cpu", variant, SMALL[:3]), gate)
    (engine,) = engines
    compiling.undo_compile(engine.model)
    assert gate.steps == 2 and engine.optimizer_steps == 2
    assert (engine._captured is not None) == (variant == "graphs")
    (block,) = engine.model.model.layers
    assert isinstance(block.mlp, SwiGLU) == (name == "dense")
    if name == "dense":  # as wide as the two experts of a token
        assert block.mlp.down_proj.weight.shape == (32, 2 * 16)


def bench_without_processes(monkeypatch, tmp_path, answers, *options) -> dict:
    """Run `smolds bench train` with `answers(task)` for the processes'; return its result."""
    monkeypatch.setattr(clock, "matrix_product_peak", lambda *_, **__: 1e12)
    monkeypatch.setattr(bench_train, "run_trial", lambda task, *_: answers(task))
    given = ["train", "--preset=debug", "--dtype=bf16", f"--json={tmp_path / 'train.json'}", *options, *SMALL]
    try:
        bench(given)
    finally:
        result = json.loads((tmp_path / "train.json").read_text())
    return result


def test_a_contender_that_fails_drops_out_and_smolds_own_failure_ends_with_an_error(monkeypatch, tmp_path, capsys):
    def answers(task):
        if task.contender == "masked" or task.variant == bad:
            raise ConfigError("CUDA out of memory.")
        return {"seconds": [0.1], "memory": 10**9}

    only = ["--only", "smolds", "dense", "masked", "transformers"]
    only += ["--variants", "grouped_mm/bf16/compile", "--optimizers", "adamw"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bad = "grouped_mm/bf16/compile"
    result = bench_without_processes(monkeypatch, tmp_path, answers, *only)
    assert list(result["contenders"]) == ["smolds, graphs", "smolds, compiled", "smolds", "dense graphs"]
    assert result["failed"] == {"transformers grouped_mm/bf16/compile": "CUDA out of memory."}
    assert "transformers grouped_mm/bf16/compile failed: CUDA out of memory." in capsys.readouterr().out
    bad = "graphs"
    with pytest.raises(ConfigError, match=r"smolds, graphs failed: CUDA out of memory\.$"):
        bench_without_processes(monkeypatch, tmp_path, answers, *only)
    rest = json.loads((tmp_path / "train.json").read_text())
    assert list(rest["contenders"]) == ["smolds, compiled", "smolds", "transformers grouped_mm/bf16/compile"]
    assert list(rest["failed"]) == ["smolds, graphs", "dense graphs"]


def test_no_round_begins_that_would_exceed_the_minutes(monkeypatch, tmp_path):
    now = iter(range(0, 10_000, 40))  # every look at the clock takes 40 s
    monkeypatch.setattr(bench_train.time, "monotonic", lambda: next(now))
    answers = {"seconds": [0.1], "memory": 10**9}
    options = ["--only", "smolds", "--no-compile", "--optimizers", "adamw", "--rounds=9"]
    for minutes, rounds in ((0, 9), (1, 1), (4, 3)):
        result = bench_without_processes(monkeypatch, tmp_path, lambda _: answers, *options, f"--minutes={minutes}")
        assert len(result["contenders"]["smolds"]["by_round"]) == rounds


@pytest.mark.long
@needs_compiler
def test_smolds_compiles_before_its_first_step():
    answer = run_trial(Task("smolds", "debug", 64, 1, 16, "fp32", "cpu", "compile", SMALL[:3]), 2, 1)
    assert len(answer["seconds"]) == 2 and not answer["compiling"]


def test_a_step_that_compiles_does_not_count(monkeypatch):
    answers = io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n3\n"))
    torch._dynamo.reset()
    # An expert's number of rows changes from step to step; "eager" skips generating machine code, which is slow.
    double = torch.compile(lambda rows: rows * 2, backend="eager", dynamic=False)
    gate = Gate(SimpleNamespace(device="cpu"), answers)
    lengths = [2, 2, 3, 3, 4, 2, 3]  # compiled at the first, the third and the fifth
    for length in lengths:
        gate.before()
        double(torch.ones(length))
        gate.after()
    warm, measured = map(json.loads, answers.getvalue().splitlines())
    assert [len(warm["seconds"]), len(warm["compiling"])] == [1, 1]
    assert [len(measured["seconds"]), len(measured["compiling"])] == [3, 3]


def test_the_trainer_is_tried_with_the_loops_best_experts_of_each_mode():
    task = Task("trainer", "debug", 64, 1, 16, "bf16", "cpu")
    trials = {
        "transformers eager/bf16": 3.0, "transformers grouped_mm/bf16": 2.0,
        "transformers eager/bf16/compile": 1.0, "transformers grouped_mm/autocast/compile": 4.0,
    }  # fmt: skip
    wanted = ["eager/autocast", "eager/bf16", "grouped_mm/autocast/compile", "grouped_mm/bf16/compile"]
    assert variants_of(task, trials, ("", "/compile")) == wanted
    assert variants_of(task, trials, ("",)) == wanted[:2]
    task.contender = "masked"
    assert variants_of(task, trials, ("", "/compile")) == ["autocast", "bf16"]


@pytest.mark.long
@pytest.mark.skipif(not EXTRAS.is_dir(), reason="no .venv/extras; ./launch/test.sh makes it")
@needs_compiler
def test_transformers_is_compiled_under_its_trainer(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(EXTRAS), str(ROOT))))
    sizes = (*SMALL[:3], "--model.num_experts=2", "--model.num_experts_per_tok=1")
    plain, compiled = (
        run_trial(Task("trainer", "debug", 64, 1, 16, "fp32", "cpu", variant, sizes), 2, 1)
        for variant in ("grouped_mm/fp32", "grouped_mm/fp32/compile")
    )
    assert len(plain["seconds"]) == len(compiled["seconds"]) == 2
    assert not plain["compiling"] and compiled["compiling"]
