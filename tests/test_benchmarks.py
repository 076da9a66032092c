"""Benchmarks in `benchmarks/`: their counts, and, in tests marked long, that each of them runs."""

import hashlib
import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
import torch
from ranks import EXTRAS, ROOT, run, smolds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import checkpoint, data, dense, drift, loss, plan, published, recipe, roofline, scale
from benchmarks.dense import ACTIVE, MIXTURE, TOTAL, counted_as, make_model, widths
from benchmarks.published import GENERATIONS, HALVES, compare, error_factor, fit, published_runs
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.hardware import load_hardware
from smolds_dist.costs.layout import Layout
from smolds_dist.costs.memory import parameter_counts
from smolds_dist.errors import ConfigError
from smolds_dist.model import DeepSeekV3Config
from smolds_dist.observe.rows import read_rows
from smolds_dist.settings import Model

# Commands of the pages, in order; SHORTER has options that shorten each.
PAGES = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
COMMANDS = re.findall(r"^python -m benchmarks .*", PAGES, re.MULTILINE)
SHORTER = {
    "checkpoint": "--preset debug --repeats=1",
    "data": "--rounds=1 --megabytes=1 --steps=5",
    "dense": "--steps=2 --learning-rates 1e-3 --train.eval_sequences=4",
    "drift": "--steps=2 --sequences=2 --model.num_hidden_layers=1 --data.seq_len=32",
    "loss": "--steps=2 --longest=1 --learning-rates 1e-3",
    "plan": "--what memory published --sizes 1 --ranks 1 --zero 0 --steps 2",
    "recipe": "--preset debug --steps=2 --model.num_hidden_layers=1 --data.seq_len=32",
    "rendezvous": "--ranks 8 --rounds=1",
    "roofline": "--preset debug --sequences=1 --steps=1",
    "scale": "--preset debug --dtype fp32 --sequences=2 --rounds=1 --steps=1 --ranks 1 2",
}


def benchmark(*options, **environment):
    path = f"{EXTRAS}:{ROOT}"
    return run([sys.executable, "-m", "benchmarks", *map(str, options)], 240, cwd=ROOT, PYTHONPATH=path, **environment)


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_run(command, cache, tmp_path):
    _, _, _, name, *options = shlex.split(command.partition("  #")[0])
    options += SHORTER[name].split()
    if name in ("dense", "drift", "loss", "recipe"):
        options += [f"--data.cache_dir={cache}", "--data.max_tokens=300000"]
    options += [f"--json={tmp_path / 'result.json'}", *([f"--dir={tmp_path}"] if name == "checkpoint" else [])]
    if "--plot" in options:
        options += ["--plot", str(tmp_path / "picture.png")]
    finished = benchmark(name, *options)
    assert finished.returncode == 0, finished.text
    assert json.loads((tmp_path / "result.json").read_text())


def test_every_benchmark_is_documented():
    assert {command.split()[3] for command in COMMANDS} == SHORTER.keys()


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (checkpoint.main, ["--repeats=0"], "--repeats 0 is out of range"),
        (data.main, ["--rounds=0"], "--rounds 0 is out of range"),
        (dense.main, ["--learning-rates", "0"], "must all be more than 0"),
        (dense.main, ["--model.num_experts=2"], "selects every expert"),
        (dense.main, ["--data.document_mask=true"], "document_mask is not supported"),
        (drift.main, ["--sequences=3"], "--sequences 3 is odd"),
        (loss.main, ["--ranks=0"], "--ranks 0 is out of range"),
        (plan.main, ["--sizes=9"], "between 1 and 3"),
        (recipe.main, ["--steps=0"], "--steps 0 is out of range"),
        (roofline.main, ["--model.num_experts_per_tok=99"], "lower it"),
        (roofline.main, ["--kinds"], "--kinds"),
        (scale.main, ["--ranks", "3"], "does not divide"),
    ],
)  # fmt: skip
def test_invalid_options_are_rejected(main, options, message):
    with pytest.raises(ConfigError, match=message):
        main(options)


# A mixture compared with dense models

SMALL = dict(vocab_size=96, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, head_dim=12)
ON_TEXT = [f"--model.{name}={size}" for name, size in SMALL.items() if name != "vocab_size"]
ON_TEXT += ["--data.tokenizer_vocab_size=300", "--data.seq_len=32", "--train.eval_sequences=12", "--train.dtype=fp32"]
WITH_SHARED = dict(SMALL, n_shared_experts=1)


@pytest.mark.parametrize("sizes", [SMALL, WITH_SHARED])
@pytest.mark.parametrize("name", [MIXTURE, ACTIVE, TOTAL])
def test_sizes_and_flops_match_the_model(name, sizes):
    settings, S = Model(**sizes), 24
    width = widths(settings)[name]
    model = make_model(DeepSeekV3Config(**sizes), width, seed=0).train()
    counted = counted_as(settings, width)
    assert sum(parameter_counts(counted)) == sum(parameter.numel() for parameter in model.parameters())
    model.config._attn_implementation = "eager"
    ids = torch.arange(2 * S).view(2, S)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=ids, labels=ids).loss.backward()
    # As in test_model.py: masked scores are computed too, and a sequence's last token has no label.
    B, heads, dims = len(ids), sizes["num_attention_heads"], 2 * sizes["head_dim"]
    masked = 6 * B * sizes["num_hidden_layers"] * heads * dims * (S * S - S * (S + 1) / 2)
    last_tokens = 6 * B * sizes["hidden_size"] * sizes["vocab_size"]
    assert counter.get_total_flops() == ids.numel() * flops_per_token(counted, S) + masked - last_tokens


def test_flops_of_the_active_size_are_the_mixtures_without_the_router():
    settings = Model(**SMALL)
    cost = {name: flops_per_token(counted_as(settings, width), 24) for name, width in widths(settings).items()}
    router = 6 * SMALL["num_hidden_layers"] * SMALL["hidden_size"] * settings.num_experts
    assert cost[MIXTURE] - cost[ACTIVE] == router
    parameters = {name: sum(parameter_counts(counted_as(settings, width))) for name, width in widths(settings).items()}
    assert parameters[MIXTURE] - parameters[TOTAL] == router / 6
    assert parameters[ACTIVE] < parameters[TOTAL] and cost[ACTIVE] < cost[TOTAL]


def test_the_dense_model_is_llama_with_the_mixtures_other_weights():
    config = dict(SMALL, max_position_embeddings=64)
    model = make_model(DeepSeekV3Config(**config), 64, seed=0).eval()
    mixture = dict(make_model(DeepSeekV3Config(**config), None, seed=0).named_parameters())
    for name, parameter in model.named_parameters():
        assert ".mlp." in name or torch.equal(parameter, mixture[name])
    ours = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(**config | {"intermediate_size": 64}, rms_norm_eps=ours.rms_norm_eps, rope_theta=ours.rope_theta,
                    tie_word_embeddings=True)
    ).eval()  # fmt: skip
    llama.load_state_dict(model.state_dict())  # strict: both have the same names
    ids = torch.arange(60).view(2, 30)
    torch.testing.assert_close(model(input_ids=ids).logits, llama(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_dense_trains_all_models_on_the_batches_of_smolds_train(corpus, cache, tmp_path):
    text = [f"--data.source=text:{corpus}/*.txt", f"--data.cache_dir={cache}", *ON_TEXT]
    given = ["--preset=debug", *text, "--train.warmup_steps=2"]
    written = [f"--json={tmp_path / 'dense.json'}", f"--plot={tmp_path / 'dense.png'}"]
    rates = ["--learning-rates", "1e-5", "2e-3"]
    finished = benchmark("dense", *given, "--steps=12", *rates, *written)
    assert finished.returncode == 0, finished.text
    result = json.loads((tmp_path / "dense.json").read_text())
    # A learning rate of almost 0 is never the best.
    assert {one["learning_rate"] for one in result["models"].values()} == {2e-3}
    by_tokens = result["runs"]["tokens"]
    assert len({run["batches"] for run in by_tokens.values()}) == 1
    assert len({tuple(run["val_losses"].values()) for run in by_tokens.values()}) == 3
    for budget, cost in (("flops", "flops_per_token"), ("seconds", "step_seconds")):
        for name, one in result["models"].items():
            run = result["runs"][budget][name]
            spent = run["steps"] * one[cost] / (12 * result["models"][MIXTURE][cost])
            assert spent == pytest.approx(1, abs=0.5 / run["steps"] + 0.02)
            assert list(run["val_losses"])[-1] == str(run["steps"])
    assert (tmp_path / "dense.png").read_bytes().startswith(b"\x89PNG")
    for name in (MIXTURE, ACTIVE, TOTAL):
        assert name in finished.stdout

    same = [
        f"--run.dir={tmp_path}",
        "--run.name=same",
        "--train.steps=12",
        "--train.lr=2e-3",
        "--parallel.engine=local",
    ]
    trained = smolds("train", *given, *same, "-q", "--log.sample_every=0")
    assert trained.returncode == 0, trained.text
    rows = read_rows(tmp_path / "same" / "metrics.jsonl")
    assert sum(int(row["batch"], 16) for row in rows if "batch" in row) % 2**32 == int(
        by_tokens[MIXTURE]["batches"], 16
    )
    (val_loss,) = [row["val_loss"] for row in rows if "val_loss" in row]
    assert by_tokens[MIXTURE]["val_losses"]["12"] == pytest.approx(val_loss, abs=1e-6)


# Published runs


def test_published_throughput_on_both_halves():
    """The errors in docs/planning.md, with a margin that a broken formula exceeds on at least one half."""
    found = compare()
    for half, runs, factor, share in ((HALVES[0], 30, 1.08, 0.85), (HALVES[1], 25, 1.22, 0.65)):
        own = [one for one in found if one.run.half == half]
        assert len(own) >= runs and error_factor(own) <= factor and sum(one.hit for one in own) >= share * len(own)


def test_a_run_has_a_source_and_only_its_name_decides_its_half():
    runs = published_runs()
    layout = Layout(16, 8, 8, 1, 4, 2, 1024, "bf16")
    assert len({run.name for run in runs}) == len(runs) >= 32
    for one in runs:
        assert "http" in one.source or "arXiv" in one.source
        assert one.half == HALVES[int(hashlib.sha256(one.name.encode()).hexdigest(), 16) % 2]
        assert replace(one, published=1.0, source="", layout=layout).half == one.half


@pytest.mark.long
def test_hardware_parameters_are_fitted_on_the_fitted_half():
    for key, (utilization, overhead, _) in fit().items():
        machine = load_hardware(key)
        assert (machine.utilization, machine.overhead) == (utilization, overhead)


@pytest.fixture
def coarse(monkeypatch):
    monkeypatch.setattr(published, "UTILISATIONS", (0.3, 0.6))
    monkeypatch.setattr(published, "OVERHEADS", (1e-3, 8e-3))


@pytest.mark.long
def test_the_fit_ignores_the_tested_half(coarse, monkeypatch):
    before, runs = fit(), published_runs()
    wrong = [replace(run, published=run.published * (3 if run.half == "tested" else 1)) for run in runs]
    monkeypatch.setattr(published, "published_runs", lambda: wrong)
    assert fit() == before
    faster = [replace(run, published=run.published * (3 if run.half == "fitted" else 1)) for run in runs]
    monkeypatch.setattr(published, "published_runs", lambda: faster)
    assert fit() != before


def test_a_generation_with_few_runs_takes_its_neighbors_parameters(coarse, monkeypatch):
    """Runs that fit one pair exactly: four runs determine the pair, one only the utilization, none nothing."""
    run = next(run for run in published_runs() if run.half == "fitted" and run.hardware == "h100")
    pairs = {"gb200": (0.6, 1e-3, 4), "b200": (0.3, 8e-3, 1)}
    made = []
    for key, (utilization, overhead, count) in pairs.items():
        machine = replace(load_hardware(key), utilization=utilization, overhead=overhead)
        moved = replace(run, hardware=key)
        exact = replace(moved, published=published.predict_run(moved, machine).predicted)
        made += count * [exact]
    assert all(one.half == "fitted" for one in made)
    monkeypatch.setattr(published, "published_runs", lambda: made)
    found = fit()
    assert found["gb200"] == (0.6, 1e-3, 4) and found["b200"][1:] == (1e-3, 1)
    assert found["h100"] == (*found["b200"][:2], 0) == found["a100"]
    assert list(found) == [key for keys in reversed(GENERATIONS) for key in keys]
