"""What `smolds bench` compares: dense models beside a mixture, and steps without what torch.compile takes."""

import io
import json
import os
from types import SimpleNamespace

import pytest
import torch
from ranks import EXTRAS, ROOT, smolds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from smolds_dist.bench import contenders
from smolds_dist.bench.contenders import Gate, Task
from smolds_dist.bench.dense import ACTIVE, MIXTURE, TOTAL, counted_as, make_model, widths
from smolds_dist.bench.train import take_turn, variants_of
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.memory import parameter_counts
from smolds_dist.model import DeepSeekV3Config
from smolds_dist.observe.rows import read_rows
from smolds_dist.settings import Model
from smolds_dist.training.compiling import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler("cpu"), reason="Inductor needs a C++ compiler")
SMALL = dict(vocab_size=96, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, head_dim=12)
ON_TEXT = [f"--model.{name}={size}" for name, size in SMALL.items() if name != "vocab_size"]
ON_TEXT += ["--data.tokenizer_vocab_size=300", "--data.seq_len=32", "--train.eval_sequences=12", "--train.dtype=fp32"]
WITH_SHARED = dict(SMALL, n_shared_experts=1)


@pytest.mark.parametrize("sizes", [SMALL, WITH_SHARED])
@pytest.mark.parametrize("name", [MIXTURE, ACTIVE, TOTAL])
def test_sizes_and_flops_are_the_models_own(name, sizes):
    settings, S = Model(**sizes), 24
    width = widths(settings)[name]
    model = make_model(DeepSeekV3Config(**sizes), width, seed=0).train()
    counted = counted_as(settings, width)
    assert sum(parameter_counts(counted)) == sum(parameter.numel() for parameter in model.parameters())
    model.config._attn_implementation = "eager"
    ids = torch.arange(2 * S).view(2, S)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=ids, labels=ids).loss.backward()
    # As in test_model.py: what the mask hides is multiplied too, and a sequence's last token predicts nothing.
    B, heads, dims = len(ids), sizes["num_attention_heads"], 2 * sizes["head_dim"]
    masked = 6 * B * sizes["num_hidden_layers"] * heads * dims * (S * S - S * (S + 1) / 2)
    last_tokens = 6 * B * sizes["hidden_size"] * sizes["vocab_size"]
    assert counter.get_total_flops() == ids.numel() * flops_per_token(counted, S) + masked - last_tokens


def test_the_active_sizes_flops_are_the_mixtures_without_its_router():
    settings = Model(**SMALL)
    cost = {name: flops_per_token(counted_as(settings, width), 24) for name, width in widths(settings).items()}
    router = 6 * SMALL["num_hidden_layers"] * SMALL["hidden_size"] * settings.num_experts
    assert cost[MIXTURE] - cost[ACTIVE] == router
    parameters = {name: sum(parameter_counts(counted_as(settings, width))) for name, width in widths(settings).items()}
    assert parameters[MIXTURE] - parameters[TOTAL] == router / 6
    assert parameters[ACTIVE] < parameters[TOTAL] and cost[ACTIVE] < cost[TOTAL]


def test_the_dense_model_is_llama_and_shares_the_mixtures_other_weights():
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
    llama.load_state_dict(model.state_dict())  # strict: neither has what the other has not
    ids = torch.arange(60).view(2, 30)
    torch.testing.assert_close(model(input_ids=ids).logits, llama(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_bench_dense_trains_as_smolds_train_on_the_same_batches_for_all(corpus, cache, tmp_path):
    text = [f"--data.source=text:{corpus}/*.txt", f"--data.cache_dir={cache}", *ON_TEXT]
    given = ["--preset=debug", *text, "--train.warmup_steps=2"]
    written = [f"--json={tmp_path / 'dense.json'}", f"--picture={tmp_path / 'dense.png'}"]
    rates = ["--learning-rates", "1e-5", "2e-3"]
    finished = smolds("bench", "dense", *given, "--steps=12", *rates, *written)
    assert finished.returncode == 0, finished.text
    result = json.loads((tmp_path / "dense.json").read_text())
    # A rate that hardly changes anything is the best of nobody.
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


def test_bench_scale_tells_what_ranks_hold_and_read(tmp_path):
    told = tmp_path / "scale.json"
    asked = ["--what", "build", "resume", "export", "generate", "--ranks", "2", "--zero", "1", "3", f"--json={told}"]
    given = ["--preset=debug", "--dtype=fp32", "--data.seq_len=32", f"--dir={tmp_path}"]
    finished = smolds("bench", "scale", *given, *asked)
    assert finished.returncode == 0, finished.text
    first, third = json.loads(told.read_text())["layouts"]
    assert (first["zero"], third["zero"]) == (1, 3)
    for row in (first, third):
        assert row["build"] > row["kept"] / 2 and row["export"] >= 0 and row["resume"] > 0
        assert 0 <= row["generate"] < row["build"]
    # At ZeRO 3 a rank reads what it holds of weights and moments; at ZeRO 1 also the weights that others update.
    assert third["read"] == pytest.approx(third["state"], rel=0.01)
    assert first["read"] < 1.4 * first["state"]
    assert "peak of resume" in finished.stdout
    wrong = smolds("bench", "scale", "--what", "speed", "build")
    assert wrong.returncode == 2 and "--what speed goes alone" in wrong.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--learning-rates", "0"], "must all be more than 0"),
        (["--steps=0"], "--steps 0 is out of range"),
        (["--model.num_experts=2"], "chooses every expert"),
        (["--data.document_mask=true"], "is not for smolds bench dense"),
    ],
    ids=str,
)
def test_bench_dense_refuses(options, said):
    finished = smolds("bench", "dense", *options)
    assert finished.returncode == 2
    assert said in finished.stderr and len(finished.stderr.strip().splitlines()) == 1


def test_bench_train_takes_its_optimizers_by_an_option_of_its_own():
    finished = smolds("bench", "train", "--preset=debug", "--train.optimizer=muon")
    assert finished.returncode == 2
    assert "--optimizers" in finished.stderr and len(finished.stderr.strip().splitlines()) == 1


def test_muon_and_another_commit_have_rows_of_their_own(tmp_path):
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
    given.append(f"--against={ROOT}")
    finished = smolds("bench", "train", *given, f"--json={tmp_path / 'train.json'}", *ON_TEXT[:-1])
    assert finished.returncode == 0, finished.text
    result = json.loads((tmp_path / "train.json").read_text())
    assert list(result["contenders"]) == ["smolds", "smolds, --against", "smolds, Muon"]
    assert all(one["tokens_per_s"] > 0 and one["compile_seconds"] == 0 for one in result["contenders"].values())


def test_another_commit_has_to_be_a_checkout(tmp_path):
    finished = smolds("bench", "train", "--preset=debug", f"--against={tmp_path}")
    assert finished.returncode == 2
    assert "git worktree add" in finished.stderr and len(finished.stderr.strip().splitlines()) == 1


@needs_compiler
def test_smolds_compiles_before_its_first_step():
    sizes = ("--model.num_hidden_layers=1", "--model.hidden_size=32", "--model.intermediate_size=16")
    answer = take_turn(Task("smolds", "debug", 64, 1, 16, "fp32", "cpu", "compile", sizes), 2, 1)
    assert len(answer["seconds"]) == 2 and not answer["compiling"]


def test_a_step_in_which_something_is_compiled_does_not_count(monkeypatch):
    answers = io.StringIO()
    monkeypatch.setattr(contenders, "_answers", answers, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n3\n"))
    torch._dynamo.reset()
    # The number of a mixture's rows changes from step to step; "eager" writes no machine code, which takes long.
    double = torch.compile(lambda rows: rows * 2, backend="eager", dynamic=False)
    gate = Gate(SimpleNamespace(device="cpu"))
    lengths = [2, 2, 3, 3, 4, 2, 3]  # compiled anew at the first, the third and the fifth
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


@pytest.mark.skipif(not EXTRAS.is_dir(), reason="no .venv/extras; ./launch/test.sh makes it")
@needs_compiler
def test_transformers_is_compiled_under_its_trainer(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(EXTRAS), str(ROOT))))
    sizes = ("--model.num_hidden_layers=1", "--model.num_experts=2", "--model.num_experts_per_tok=1")
    sizes += ("--model.hidden_size=32", "--model.intermediate_size=16")
    plain, compiled = (
        take_turn(Task("trainer", "debug", 64, 1, 16, "fp32", "cpu", variant, sizes), 2, 1)
        for variant in ("grouped_mm/fp32", "grouped_mm/fp32/compile")
    )
    assert len(plain["seconds"]) == len(compiled["seconds"]) == 2
    assert not plain["compiling"] and compiled["compiling"]
