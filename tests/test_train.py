"""Full runs from the command line: output files, resume and errors."""

import json
import math
import shutil

import pytest
import torch
from conftest import options_of_small_run
from ranks import rows_without_timing, run_ranks, smolds
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from smolds_dist.checkpoint.resume import check_resumable
from smolds_dist.config import load_config
from smolds_dist.data.batch import evaluation_batch
from smolds_dist.data.prepare import prepare_data
from smolds_dist.errors import ConfigError
from smolds_dist.inference.samples import sample
from smolds_dist.observe.rows import load_table, read_rows
from smolds_dist.observe.summary import facts
from smolds_dist.training.trainer import train


def rows_of(run_dir):
    """Return a run's training rows and evaluation rows."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]


@pytest.fixture(scope="module")
def options(corpus, cache, tmp_path_factory):
    """Of the run in `finished`."""
    return [*options_of_small_run(corpus, cache, tmp_path_factory.mktemp("finished")), "--run.name=one"]


@pytest.fixture(scope="module")
def finished(options):
    """Train six steps in this process. Read only."""
    config = load_config(options)
    train(config)
    return config.run_dir


def test_run_folder_is_complete(finished, options):
    training, evaluation = rows_of(finished)
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluation] == [3, 6]
    for row in training:
        assert row["tokens"] == row["step"] * 8 * 32
        assert len(row["load"]) == 2
        for layer in row["load"]:
            assert sum(layer) == pytest.approx(1, abs=1e-3)
        violations = [max(layer) * 8 - 1 for layer in row["load"]]
        assert row["max_vio"] == pytest.approx(sum(violations) / 2, abs=1e-3)
        # Rounded to one decimal, which is more than 0.1% on a slow machine.
        assert row["tokens_per_s"] == pytest.approx(8 * 32 / sum(row["seconds"].values()), rel=1e-3, abs=0.06)
        assert math.hypot(*row["grad_norms"].values()) == pytest.approx(row["grad_norm"], rel=1e-3)
        assert set(row["grad_norms"]) == {"embeddings", "attention", "routers", "experts", "norms"}
        assert all(0 < entropy <= math.log(8) + 1e-5 for entropy in row["router_entropy"])
        assert [sum(layer) for layer in row["router_histogram"]] == [8 * 32 * 8] * 2
        assert all(sum(biases) == pytest.approx(0, abs=1e-4) and any(biases) for biases in row["bias"])
        assert 0 < row["mfu"] < 1 and 0.05 < row["memory_gb"] < 20
    window = [[sum(row["load"][layer][e] for row in training) / 6 for e in range(8)] for layer in range(2)]
    assert training[-1]["max_vio_window"] == pytest.approx(sum(max(load) * 8 - 1 for load in window) / 2, abs=1e-3)
    assert training[-1]["loss"] < training[0]["loss"]

    board = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = board.Tags()["scalars"]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx([row["loss"] for row in training])
    assert [event.step for event in board.Scalars("validation/bits_per_byte")] == [3, 6]
    assert {"train/lr", "train/grad_norm", "speed/tokens_per_s", "balance/max_vio", "validation/loss"} <= set(tags)
    assert sum(tag.startswith("load_layer_") for tag in tags) == 2 * 8

    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (3, "def "), (3, "import "), (6, "def "), (6, "import "),
    ]  # fmt: skip
    assert all(row["text"].startswith(row["prompt"]) for row in samples)
    assert load_config(["--config", str(finished / "config.yaml")]) == load_config(options)
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == [
        "latest", "step_00000004", "step_00000006",
    ]  # fmt: skip


def test_final_prompts_are_sampled_once(small_run, tmp_path):
    train(
        load_config([*small_run, "--run.name=one", '--log.sample_prompts=["def "]', '--log.final_prompts=["while "]'])
    )
    samples = read_rows(tmp_path / "runs" / "one" / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [(3, "def "), (6, "def "), (6, "while ")]


def test_export_loads_and_has_the_validation_loss_that_was_logged(finished, options):
    _, evaluation = rows_of(finished)
    model = AutoModelForCausalLM.from_pretrained(finished / "export")
    (source,) = prepare_data(load_config(options)).sources.values()
    ids, labels = evaluation_batch(source.validation.tokens, 32, range(5), 5)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss.item()
    assert loss == pytest.approx(evaluation[-1]["val_loss"], rel=1e-5)

    # The last micro batch of two is padded with an ignored sequence, so four sequences count.
    for block in model.model.layers:
        block.mlp.tokens_per_expert.zero_()
    with torch.no_grad():
        model(input_ids=ids[:4])
    violations = [block.mlp.tokens_per_expert.max() / (4 * 32 * 2 / 8) - 1 for block in model.model.layers]
    assert evaluation[-1]["val_max_vio"] == pytest.approx(torch.stack(violations).mean().item(), abs=1e-5)
    biases = [block.mlp.gate.e_score_correction_bias for block in model.model.layers]
    assert all(bias.any() for bias in biases)
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    assert tokenizer.decode(tokenizer("def add(first)").input_ids) == "def add(first)"
    assert "lm_head.weight" not in load_file(finished / "export" / "model.safetensors")


def test_resumed_run_equals_the_uninterrupted_one(finished, small_run, tmp_path):
    train(load_config([*small_run, "--run.name=two", "--train.steps=6"]))
    two = tmp_path / "runs" / "two"
    # As if killed at step 5: one more row than the last checkpoint, and half a line.
    lines = (two / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (two / "metrics.jsonl").write_text("".join(kept) + '{"step": 6, "lo')
    shutil.rmtree(two / "checkpoints" / "step_00000006")
    (two / "checkpoints" / "unfinished_step_00000006").mkdir()
    train(load_config([*small_run, "--run.name=two", "--checkpoint.resume=auto"]))
    assert rows_without_timing(two) == rows_without_timing(finished)
    weights = [load_file(run / "export" / "model.safetensors") for run in (two, finished)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    board = EventAccumulator(str(two / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_existing_run_is_never_overwritten(finished, options):
    before = (finished / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"--checkpoint\.resume auto"):
        train(load_config(options))
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--train.global_batch=16"], "train.global_batch 8"),
        (["--model.num_experts=4"], "model.num_experts 8"),
        (["--data.seq_len=16"], "data.seq_len 32"),
    ],
)
def test_resume_with_another_model_or_data_is_rejected(finished, options, changed, named):
    config = load_config([*options, "--checkpoint.resume=auto", *changed])
    with pytest.raises(ConfigError, match=named):
        check_resumable(config)


def test_resume_auto_of_a_new_name_starts_a_new_run(small_run, tmp_path):
    train(load_config([*small_run, "--run.name=new", "--checkpoint.resume=auto", "--train.steps=1"]))
    assert [row["step"] for row in rows_of(tmp_path / "runs" / "new")[0]] == [1]


def test_bf16_with_muon_wsd_and_latent_attention_trains_and_resumes(small_run, tmp_path):
    options = [
        *small_run, "--run.name=mixed", "--train.dtype=bf16", "--train.optimizer=muon", "--train.schedule=wsd",
        "--model.attention=latent", "--model.scoring_func=sigmoid", "--model.n_shared_experts=1",
        "--train.activation_checkpointing=full",
    ]  # fmt: skip
    train(load_config([*options, "--train.steps=4"]))
    train(load_config([*options, "--train.steps=6", "--checkpoint.resume=auto"]))
    training, _ = rows_of(tmp_path / "runs" / "mixed")
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert training[-1]["loss"] < training[0]["loss"]
    weights = load_file(tmp_path / "runs" / "mixed" / "export" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert weights["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_seed_changes_the_run_and_nothing_else_does(small_run, tmp_path):
    losses = {}
    for name, options in {"a": [], "b": ["--train.micro_batch=8"], "c": ["--train.seed=1"]}.items():
        train(load_config([*small_run, f"--run.name={name}", "--train.steps=2", *options]))
        losses[name] = [row["loss"] for row in rows_of(tmp_path / "runs" / name)[0]]
    assert losses["a"] == pytest.approx(losses["b"], rel=1e-5)
    assert losses["a"] != pytest.approx(losses["c"], rel=1e-5)


def test_generate_continues_a_prompt(finished):
    texts = []
    for _ in range(2):
        result = smolds("generate", str(finished), "--prompt", "def ", "--max-new-tokens", "5", "--seed", "3")
        assert result.returncode == 0, result.text
        texts.append(result.stdout)
    assert texts[0] == texts[1]
    assert texts[0].startswith("def ")
    assert len(texts[0]) > len("def ") + 1


def test_sample_moves_a_prompts_trailing_space_to_the_next_word(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    state = torch.random.get_rng_state()
    texts = [sample(model, tokenizer, "def ", 6, seed) for seed in (0, 1, 0)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert texts[0] == texts[2] != texts[1]
    assert all(text.startswith("def ") for text in texts)
    # Temperature 0: the best token that begins with a space, then greedy.
    word = tokenizer("def", return_tensors="pt").input_ids
    logits = model(input_ids=word).logits[0, -1]
    first = max((i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith(" ")), key=lambda i: logits[i])
    begun = torch.cat((word, torch.tensor([[first]])), dim=1)
    expected = model.generate(begun, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert sample(model, tokenizer, "def ", 6, seed=0, temperature=0) == tokenizer.decode(expected[0])


def test_generate_without_a_model_is_rejected(tmp_path):
    result = smolds("generate", str(tmp_path), "--prompt", "def ")
    assert result.returncode == 2
    assert "contains no model" in result.stderr
    assert "Traceback" not in result.stderr


def test_load_table_shows_shares_and_violation():
    rows = [{"step": 1, "load": [[0.5, 0.25, 0.25, 0.0]]}, {"step": 2, "load": [[0.0, 0.25, 0.25, 0.5]]}]
    assert load_table(rows).splitlines()[1].split() == ["0", "25.0%", "25.0%", "25.0%", "25.0%", "0.00"]
    assert load_table(rows, last=1).splitlines()[1].split() == ["0", "0.0%", "25.0%", "25.0%", "50.0%", "1.00"]


def test_facts_are_those_of_the_last_layout():
    def start(topology: str) -> dict:
        return {"step": 0, "event": "start", "topology": topology, "host": "n1"}

    def step(rate: float, phases: dict) -> dict:
        found = {"tokens_per_s": rate, "mfu": rate / 1000, "seconds": phases, "memory_gb": rate / 10}
        return {"step": 1, "load": [[0.5, 0.0]], "max_vio_window": 1.0, **found}

    two = [start("2 ranks"), *3 * [step(90, {"all_to_all": 0.5, "forward": 0.5})]]
    found = facts([*two, start("2 ranks"), *two[1:], start("1 rank"), step(10, {"forward": 1.0})])
    assert found["speed"].startswith("10 tokens/s") and found["time of a step"] == "forward 100.0%"
    assert found["memory"].startswith("1.00 GB")
    assert found["experts"] == "MaxVio 1.00 over the last 7 steps, 1 of 2 without tokens in the last step"
    assert facts([*two, start("2 ranks"), step(10, {"forward": 1.0})])["speed"].startswith("90 tokens/s")
    some = [
        step(10, {"all_to_all": 0.25, "forward": 0.75}),
        step(10, {"forward": 1.0}),
    ]  # all-to-alls in some steps only
    assert facts(some)["time of a step"] == "forward 75.0%, all-to-all 25.0%"
    assert facts([step(10, {"forwurd": 1.0}), step(10, {"forward": 1.0})])["memory"]  # a damaged row


def test_trains_without_deepspeed(small_run):
    script = (
        "import sys; sys.modules['deepspeed'] = None\n"  # as if it were not installed
        "from smolds_dist.cli import main; main()"
    )
    import sys

    from ranks import run

    result = run([sys.executable, "-c", script, "train", *small_run, "--run.name=bare", "--train.steps=1"], timeout=120)
    assert result.returncode == 0, result.text


@pytest.mark.parametrize("zero", [0, pytest.param(2, marks=pytest.mark.long)])
def test_bf16_ranks_accumulate_gradients_in_fp32(zero):
    finished = run_ranks(2, "accumulation_worker.py", f"--parallel.zero={zero}", "--parallel.expert=2")
    (deviation,) = [float(line.split()[1]) for line in finished.stdout.splitlines() if line.startswith("DEVIATION")]
    assert deviation < 0.02
