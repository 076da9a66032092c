"""`train.compile`: the same losses and gradients as uncompiled; compiles once, before the first step."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from ranks import rows_without_timing, smolds
from test_model import GQA, GQA_FAMILY, LATENT_FAMILY, build, tokens

from smolds_dist.config import load_config
from smolds_dist.model import device, enable_activation_checkpointing
from smolds_dist.parallel.topology import has_compiler
from smolds_dist.training import build as training_build
from smolds_dist.training import compiling
from smolds_dist.training.compiling import separate_caches, should_compile, try_to_compile, undo_compile
from smolds_dist.training.trainer import train

needs_compiler = pytest.mark.skipif(not has_compiler("cpu"), reason="Inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Reset what other tests have compiled, which would count here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    undo_compile(torch.nn.Module())


def graphs() -> int:
    """Count the graphs compiled in this process or loaded from the cache on disk."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_here(model, dtype: str, backend: str) -> None:
    topology = SimpleNamespace(micro_batch=2, dtype=dtype, engine="local", zero=0)
    error = try_to_compile(
        SimpleNamespace(model=model, device=torch.device("cpu")), topology, 24, model.config, backend
    )
    assert error is None


def loss_and_gradients(model) -> list[torch.Tensor]:
    loss = model(input_ids=tokens(2, 24), labels=tokens(2, 24)).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@needs_compiler
@pytest.mark.parametrize(
    ("settings", "dtype", "recomputed", "tolerance", "backend"),
    [
        (dict(GQA_FAMILY, num_hidden_layers=2), "fp32", "none", 1e-5, "aot_eager"),
        (dict(LATENT_FAMILY, num_hidden_layers=2, num_nextn_predict_layers=1), "fp32", "full", 1e-5, "aot_eager"),
        (dict(GQA, num_hidden_layers=1), "fp32", "attention", 1e-5, "aot_eager"),
        (dict(GQA, num_hidden_layers=1), "fp32", "experts", 1e-5, "aot_eager"),
        pytest.param(dict(GQA, num_hidden_layers=1), "bf16", "none", 3e-2, "inductor", marks=pytest.mark.long),
    ],
)
def test_gradients_equal_the_uncompiled_models(settings, dtype, recomputed, tolerance, backend):
    model = build(settings).train()
    if dtype == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    enable_activation_checkpointing(model, recomputed)
    expected = loss_and_gradients(model)
    compile_here(model, dtype, backend)
    before = graphs()
    actual = loss_and_gradients(model)
    assert 0 < before == graphs()
    assert all(block.compiled_attend is not None for block in model.model.layers)
    for one, other in zip(actual, expected, strict=True):
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm() + 1e-7


@needs_compiler
@pytest.mark.parametrize(
    ("settings", "recomputed", "backend"),
    [
        (dict(GQA_FAMILY, num_hidden_layers=2, num_nextn_predict_layers=1), "none", "aot_eager"),
        (dict(LATENT_FAMILY, num_hidden_layers=2), "full", "aot_eager"),
        (dict(GQA, num_hidden_layers=2), "attention", "aot_eager"),
        pytest.param(dict(GQA_FAMILY, num_hidden_layers=2), "none", "inductor", marks=pytest.mark.long),
    ],
)
def test_whole_blocks_compile_in_the_branches_of_cuda(settings, recomputed, backend):
    with device.as_family("cuda"):
        model = build(settings).train()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        enable_activation_checkpointing(model, recomputed)
        mixtures = [block.mlp for block in model.model.layers if hasattr(block.mlp, "tokens_per_expert")]
        expected, counts = loss_and_gradients(model), [mixture.tokens_per_expert.clone() for mixture in mixtures]
        compile_here(model, "bf16", backend)
        for block in model.model.layers:
            parts = block.compiled_layer, block.compiled_attend, getattr(block.mlp, "compiled_mix", None)
            assert [part is not None for part in parts] == ([0, 1, 1] if recomputed == "attention" else [1, 0, 0])
        for mixture in mixtures:
            mixture.tokens_per_expert.zero_()
        before = graphs()
        actual = loss_and_gradients(model)
    assert 0 < before == graphs()
    for one, other in zip(counts, mixtures, strict=True):
        assert (one - other.tokens_per_expert).abs().sum() <= 0.05 * one.sum()  # rounding changes few choices
    for one, other in zip(actual, expected, strict=True):
        assert (one.float() - other.float()).norm() <= 5e-2 * other.float().norm() + 1e-7


@needs_compiler
def test_run_compiles_only_before_its_first_step(small_run, monkeypatch, tmp_path):
    """Run 14 steps with changing numbers of rows per expert, validation losses, samples and checkpoints."""
    compiled = []

    def counted(*args):
        compiled.append(compiling.compile_model(*args))
        compiled.append(graphs())

    monkeypatch.setattr(training_build, "compile_model", counted)
    options = [
        *small_run,
        "--train.steps=14",
        "--train.eval_every=6",
        "--log.sample_every=6",
        "--checkpoint.every=7",
        "--train.qk_clip=100",
    ]
    for name, setting in (("eager", "off"), ("compiled", "on")):
        train(load_config([*options, f"--run.name={name}", f"--train.compile={setting}"]))
    assert compiled[0] is False and compiled[2] is True
    assert compiled[1] == 0 < compiled[3] == graphs()
    eager, other = (rows_without_timing(tmp_path / "runs" / name) for name in ("eager", "compiled"))
    assert len(eager) == len(other)
    for one, two in zip(eager, other, strict=True):
        for key in ("loss", "val_loss", "grad_norm", "max_logit"):
            assert one.get(key) == pytest.approx(two.get(key), abs=1e-5)


@needs_compiler
@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.long)])
def test_ranks_compile_one_after_the_other(small_run, tmp_path, zero):
    options = [*small_run, f"--parallel.zero={zero}"]
    for name, setting in (("eager", "off"), ("compiled", "on")):
        finished = smolds(
            "launch",
            "--nproc-per-node=2",
            "--",
            *options,
            f"--run.name={name}",
            f"--train.compile={setting}",
            timeout=240,
        )
        assert finished.returncode == 0, finished.text
        assert finished.stdout.count("compiled in") == (setting == "on")
    eager, other = (rows_without_timing(tmp_path / "runs" / name) for name in ("eager", "compiled"))
    for one, two in zip(eager, other, strict=True):
        assert one.get("loss") == pytest.approx(two.get("loss"), abs=1e-5)


@pytest.mark.long
@needs_compiler
def test_compiled_code_is_cached_for_later_runs(small_run, tmp_path):
    cache = tmp_path / "cache"
    made = []
    for name in ("first", "second"):
        options = [*small_run, "--train.steps=2", "--train.compile=on", f"--run.name={name}"]
        finished = smolds("train", *options, timeout=240, TORCHINDUCTOR_CACHE_DIR=str(cache))
        assert finished.returncode == 0, finished.text
        made.append(set(cache.rglob("*.so")))
    assert made[0] and made[0] == made[1]
    # Inductor alone crashes here on a CPU with AVX-512
    options = [*small_run, "--train.steps=2", "--train.compile=on", "--run.name=narrow"]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "ATEN_CPU_CAPABILITY": "avx2"}
    finished = smolds("train", *options, timeout=240, cold=True, **environment)
    assert finished.returncode == 0, finished.text


def test_every_cpu_instruction_set_has_its_cache(monkeypatch, tmp_path):
    capability = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "SSE"))
    for _ in range(2):
        separate_caches()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "SSE" / capability)


def test_failed_compile_is_one_line(small_run, tmp_path):
    options = [*small_run, "--train.compile=on", "--run.name=one"]
    finished = smolds(
        "train", *options, cold=True, CXX=shutil.which("false"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
    )
    assert finished.returncode == 0, finished.text
    assert finished.stderr.count("compiling failed") == 1
    assert (
        "the run continues uncompiled (--train.compile off)" in finished.stderr and "Traceback" not in finished.stderr
    )
    assert len(rows_without_timing(tmp_path / "runs" / "one")) >= 6


def test_auto_compiles_long_runs_if_a_compiler_is_installed():
    assert should_compile(True, "cpu", 0, False) and not should_compile(False, "cpu", 1e9, True)
    assert should_compile("auto", "cpu", 3600, True) and not should_compile("auto", "cpu", 60, True)
    assert should_compile("auto", "cuda", 300, True) and not should_compile("auto", "mps", 1e9, True)
    assert not should_compile("auto", "cpu", 3600, False)


def test_compiler_is_looked_up_like_inductor_does(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not has_compiler("cpu")
    (tmp_path / "mine").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "mine", 0o755)
    monkeypatch.setenv("CXX", "mine")
    assert has_compiler("cpu")
