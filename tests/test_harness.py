"""lm-evaluation-harness on our models, with a task whose data is local."""

import json
import os
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from conftest import options_of_small_run
from ranks import EXTRAS, ROOT, Finished, run, smolds

from smolds_dist.errors import ConfigError
from smolds_dist.inference.evaluate import evaluate_model
from smolds_dist.inference.generate import load_model
from smolds_dist.observe.rows import read_rows

QUESTIONS = [
    {
        "question": "the quick brown fox jumps over",
        "choices": [" the lazy dog", " second", " print(number)"],
        "answer": 0,
    },
    {"question": "def add(first, second):", "choices": [" small networks", "\n    return first + second"], "answer": 1},
    {"question": "a mixture of experts sends", "choices": [" runs", " def", " every token to two"], "answer": 2},
    {
        "question": "for number in range(10):",
        "choices": ["\n    print(number", " the dark forest and so on"],
        "answer": 0,
    },
    {"question": "a mixture of", "choices": [" dogs", " forests", " experts"], "answer": 1},
]


def write_task(folder, name):
    """Write a multiple-choice task over `QUESTIONS`."""
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def likeliest(model, tokenizer, question):
    """Return the choice whose tokens have the largest sum of log probabilities after the question."""
    prompt = tokenizer(question["question"], add_special_tokens=False).input_ids
    sums = []
    for choice in question["choices"]:
        ids = tokenizer(question["question"] + choice, add_special_tokens=False).input_ids
        with torch.no_grad():
            shares = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(shares[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))))
    return sums.index(max(sums))


needs_harness = pytest.mark.skipif(
    not (EXTRAS / "lm_eval").is_dir(), reason="no .venv/extras; ./launch/test.sh makes it"
)
PATH = os.pathsep.join((str(EXTRAS), str(ROOT)))


@pytest.fixture(scope="module")
def commands(kept_run, corpus, cache, tmp_path_factory):
    """Run the commands that need the harness in one process, which imports it once; return results by name."""
    folder, run_dir = tmp_path_factory.mktemp("harness"), str(kept_run[0])
    write_task(folder / "tasks", "quiz")
    evaluate = ["eval", run_dir, "--tasks"]
    asked = {
        "scored": [
            *evaluate, "quiz,qui?", "--include-path", str(folder / "tasks"), "--json", str(folder / "result.json"),
            "--batch-size", "3",
        ],
        "unknown": [*evaluate, "quiz"],
        "refused": [
            "train", *options_of_small_run(corpus, cache, folder), "--eval.tasks=hellaswag", "--run.name=refused"
        ],
    }  # fmt: skip
    script = str(ROOT / "tests" / "cli_worker.py")
    finished = run([sys.executable, script, json.dumps([*asked.values()])], timeout=240, PYTHONPATH=PATH)
    assert finished.returncode == 0, finished.text
    results = [Finished(**json.loads(line)) for line in finished.stdout.splitlines() if line.startswith("{")]
    return folder, dict(zip(asked, results, strict=True))


@needs_harness
def test_a_local_task_is_scored_as_by_hand(kept_run, commands):
    folder, finished = commands
    scored = finished["scored"]
    assert scored.returncode == 0, scored.text
    assert "quiz" in scored.stdout and "acc" in scored.stdout
    model, tokenizer = load_model(kept_run[0])
    right = [likeliest(model, tokenizer, question) == question["answer"] for question in QUESTIONS]
    assert 0 < sum(right) < len(right)
    result = json.loads((folder / "result.json").read_text())
    assert result["results"]["quiz"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert result["harness"]


@needs_harness
def test_unknown_task_is_named(commands):
    unknown = commands[1]["unknown"]
    assert unknown.returncode == 2 and "quiz is not a task" in unknown.stderr and "Traceback" not in unknown.stderr


@needs_harness
def test_task_that_cannot_be_loaded_is_reported_before_the_first_step(commands):
    folder, refused = commands[0], commands[1]["refused"]
    assert refused.returncode == 2 and "--eval.tasks hellaswag could not be loaded" in refused.stderr, refused.text
    assert "check the network" in refused.stderr and "Traceback" not in refused.stderr
    assert not read_rows(folder / "runs" / "refused" / "metrics.jsonl")


def test_mistakes_raise_errors(kept_run):
    run_dir = str(kept_run[0])
    for args, words in (
        ([run_dir, "--limit", "3"], "need --tasks"),
        ([run_dir, "--tasks", "quiz", "--data.seq_len=16"], "have their own text"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluate_model(args)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the harness is there")
def test_missing_harness_raises_error_with_fix(kept_run):
    with pytest.raises(ConfigError, match="smolds-dist\\[eval\\]"):
        evaluate_model([str(kept_run[0]), "--tasks", "quiz"])


@needs_harness
@pytest.mark.long  # three starts that import the harness and DeepSpeed, two minutes
@pytest.mark.parametrize("layout", [["--parallel.expert=2"], ["--parallel.zero=3", "--parallel.expert=1"]])
def test_scores_while_training_are_those_of_the_steps_checkpoint(small_run, tmp_path, layout):
    """On two expert-parallel ranks and on two with sharded weights; five questions do not divide evenly among two ranks.
    Training continues unchanged."""
    write_task(tmp_path / "tasks", "quiz")
    write_generating_task(tmp_path / "tasks", "spell")
    path = {"PYTHONPATH": PATH}
    options = [*small_run, "--train.lr=0.01", "--train.steps=12", "--checkpoint.every=6", *layout]
    asked = [
        "--eval.tasks=quiz,spell",
        f"--eval.include_path={tmp_path / 'tasks'}",
        "--eval.every=6",
        "--eval.batch_size=2",
    ]
    start = ["launch", "--nproc-per-node=2", "--"]
    scored = smolds(*start, *options, *asked, "--run.name=scored", timeout=400, **path)
    assert scored.returncode == 0, scored.text
    run_dir = tmp_path / "runs" / "scored"
    scores = {row["step"]: row["tasks"] for row in read_rows(run_dir / "metrics.jsonl") if "tasks" in row}
    assert list(scores) == [6, 12] and scores[6].keys() == {"quiz/acc", "spell/chrf"}
    assert "step 6: quiz/acc " in scored.stdout
    answer = tmp_path / "answer.json"
    again = ["eval", str(run_dir), "--step", "6", "--tasks", "quiz", "spell", "--json", str(answer)]
    finished = smolds(*again, "--include-path", str(tmp_path / "tasks"), timeout=400, **path)
    assert finished.returncode == 0, finished.text
    results = json.loads(answer.read_text())["results"]
    by_itself = {"quiz/acc": results["quiz"]["acc,none"], "spell/chrf": results["spell"]["chrf,none"]}
    assert scores[6] == pytest.approx(by_itself)
    assert scores[6]["spell/chrf"] > 0
    plain = smolds(*start, *options, "--run.name=plain", timeout=400)
    assert plain.returncode == 0, plain.text
    both = [read_rows(run_dir.parent / name / "metrics.jsonl") for name in ("scored", "plain")]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in both]
    assert losses[0] == losses[1]


def write_generating_task(folder, name):
    """Write a task of texts to continue until the end of the line."""
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}", "target_delimiter": "",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "chrf"}],
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
