"""Generating from runs, checkpoints and exports; perplexity against transformers' own loss."""

import json
import math
import shutil

import pytest
import torch
from ranks import smolds

from smolds_dist.config import load_config
from smolds_dist.data.prepare import prepare_data
from smolds_dist.data.source import files_of
from smolds_dist.data.text import documents
from smolds_dist.errors import ConfigError
from smolds_dist.inference.evaluate import evaluate_model
from smolds_dist.inference.generate import generate, load_model
from smolds_dist.inference.samples import complete_lines, continue_prompts
from smolds_dist.observe.rows import read_rows

PROMPTS = ["def add", "a mixture of experts", "for number in range(10):", "x"]


@pytest.fixture(scope="module")
def model_and_tokenizer(kept_run):
    return load_model(kept_run[0], step=4)


def test_prompts_together_continue_as_each_alone(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    together = continue_prompts(model, tokenizer, PROMPTS, 12, seed=0, temperature=0)
    alone = [continue_prompts(model, tokenizer, [prompt], 12, seed=0, temperature=0)[0] for prompt in PROMPTS]
    assert together == alone
    assert all(
        text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(together, PROMPTS, strict=True)
    )


def test_choice_is_narrowed_by_temperature_top_k_and_top_p(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer

    def texts(**options) -> set[str]:
        return {continue_prompts(model, tokenizer, ["def add"], 8, seed=seed, **options)[0] for seed in range(4)}

    greedy = texts(temperature=0)
    assert len(greedy) == 1
    assert texts(top_k=1) == greedy
    assert texts(top_p=1e-6) == greedy
    assert len(texts(temperature=2.0, top_k=0)) == 4


def test_shown_text_has_whole_lines_and_no_control_characters():
    assert (
        complete_lines("def f():\n    return 'é'\x1b[2J\n\n    unfini")
        == "    | def f():\n    |     return 'é'\\x1b[2J"
    )
    assert complete_lines("one\tline") == "    | one\\tline"


def test_texts_end_at_the_end_of_text_token(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    seen = []
    hook = model.lm_head.register_forward_hook(
        lambda _m, _i, logits: seen.append(1) or (logits.index_fill(-1, torch.tensor(tokenizer.eos_token_id), 1e9))
    )
    ended = continue_prompts(model, tokenizer, PROMPTS[:2], 6, seed=0)
    assert ended == PROMPTS[:2] and len(seen) == 1
    went_on = continue_prompts(model, tokenizer, PROMPTS[:1], 6, seed=0, stop_at_end=False)
    assert went_on[0].count(tokenizer.eos_token) == 6
    hook.remove()


def test_command_streams_one_prompt_and_writes_json_for_many(kept_run, exported_now, tmp_path, capsys):
    run_dir, _ = kept_run
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    for source in ([str(run_dir)], [str(run_dir), "--step", "6"], [str(run_dir / "checkpoints" / "latest")]):
        generate([*source, "--prompt", PROMPTS[0], "--temperature", "0", "--max-new-tokens", "6"])
        streamed = capsys.readouterr().out
        generate(
            [
                *source,
                "--prompts",
                str(tmp_path / "prompts.txt"),
                "--temperature",
                "0",
                "--max-new-tokens",
                "6",
                "--batch-size",
                "3",
            ]
        )
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["prompt"] for row in rows] == PROMPTS
        assert rows[0]["text"] == streamed.removesuffix("\n") == exported_now


def test_a_prompt_is_a_line_and_positions_end(kept_run, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes("oak \u2028 elm\r\nash\n".encode())
    generate([str(kept_run[0] / "export"), "--prompts", str(path), "--max-new-tokens", "2"])
    printed = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in printed.out.split("\n")[:-1]] == ["oak \u2028 elm", "ash"]
    assert not printed.err
    shutil.copytree(kept_run[0] / "export", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text()) | {"max_position_embeddings": 4}
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    generate([str(tmp_path / "short"), "--prompt", "oak", "--max-new-tokens", "8", "--temperature", "0"])
    assert "exceed the model's 4 positions" in capsys.readouterr().err
    path.write_bytes(b"oak\xe9\n")
    with pytest.raises(ConfigError, match=r"prompts.txt is not UTF-8 text .* use a UTF-8 text file"):
        generate([str(tmp_path / "short"), "--prompts", str(path)])


@pytest.fixture
def exported_now(kept_run):
    """Return the continuation of the first prompt by the run's own export."""
    model, tokenizer = load_model(kept_run[0] / "export")
    return continue_prompts(model, tokenizer, PROMPTS[:1], 6, seed=0, temperature=0)[0]


def test_mistakes_raise_errors(kept_run, tmp_path):
    run_dir = str(kept_run[0])
    for args, words in (
        ([run_dir, "--top-p", "0"], "more than 0"),
        ([run_dir, "--max-new-tokens", "0"], "at least 1"),
        ([run_dir, "--prompts", str(tmp_path / "none")], "none cannot be read"),
        ([run_dir, "--step", "5"], "no checkpoint of step 5"),
        ([str(tmp_path)], "contains no model"),
    ):
        with pytest.raises(ConfigError, match=words):
            generate(args)
    for args, words in (
        ([run_dir, "--train.steps=3"], "not an option of smolds eval"),
        ([run_dir, "--max-tokens", "1"], "at least 2"),
        ([str(tmp_path)], "--data.source"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluate_model(args)


def test_eval_of_validation_set_equals_training(kept_run, tmp_path, capsys):
    run_dir, options = kept_run
    evaluated = [row for row in read_rows(run_dir / "metrics.jsonl") if "val_loss" in row][-1]
    evaluate_model([str(run_dir), "--max-tokens", str(5 * 32), "--json", str(tmp_path / "eval.json")])
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["tokens"] == 5 * 31
    assert result["loss"] == pytest.approx(evaluated["val_loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(evaluated["val_bits_per_byte"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert f"{result['loss']:.4f} nats per token" in capsys.readouterr().out
    assert len(prepare_data(load_config(options)).sources["text"].validation.tokens) > 5 * 32


def test_eval_of_another_source_counts_every_token(kept_run, corpus, tmp_path):
    run_dir, _ = kept_run
    source = f"text:{corpus}/0[01].txt"
    evaluate_model(
        [str(run_dir / "export"), f"--data.source={source}", "--data.seq_len=48", "--json", str(tmp_path / "e")]
    )
    result = json.loads((tmp_path / "e").read_text())
    model, tokenizer = load_model(run_dir / "export")
    config = load_config([f"--data.source={source}", "--run.name=x"])
    source = config.data.mixed["text"]
    texts = [document.text for document in documents(source, files_of(source), config.data)]
    ids = [token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    total = 0.0
    for start in range(0, len(ids), 48):
        part = torch.tensor([ids[start : start + 48]])
        with torch.no_grad():
            logits = model(input_ids=part).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], part[0, 1:], reduction="sum").item()
    assert result["tokens"] == len(ids) - math.ceil(len(ids) / 48)
    assert result["loss"] == pytest.approx(total / result["tokens"], rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2) * len(ids) / num_bytes, rel=1e-6)


def test_the_command_prints_a_text(kept_run):
    finished = smolds(
        "generate", str(kept_run[0]), "--prompt", "def add", "--max-new-tokens", "3", "--temperature", "0"
    )
    assert finished.returncode == 0, finished.text
    assert finished.stdout.startswith("def add") and finished.stderr == ""
