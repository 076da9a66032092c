"""Several sources in one run: the same tokens in every topology and after a resume, validation sets, unique documents."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import yaml
from ranks import smolds
from test_data import configure, documents_of
from tokenized import load_all

from smolds_dist.checkpoint.files import CheckpointReader, read_manifest
from smolds_dist.checkpoint.resume import check_contents
from smolds_dist.config import load_config
from smolds_dist.data.batch import UniqueTexts, search_sorted, sketch_of
from smolds_dist.data.prepare import prepare_data
from smolds_dist.data.text import digest, is_validation
from smolds_dist.errors import ConfigError
from smolds_dist.observe.data_command import data as data_command
from smolds_dist.observe.report import figure_of, training_log
from smolds_dist.observe.rows import read_rows
from smolds_dist.training.trainer import train

STEPS, BATCH = 50, 8


def sentences(chance: np.random.RandomState, words: list[str], count: int) -> list[str]:
    return [" ".join(chance.choice(words, chance.randint(5, 60))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Create a folder with two corpora, the second small, and the YAML of a run over both with a stage at 80 %."""
    folder = tmp_path_factory.mktemp("mixed")
    chance = np.random.RandomState(0)
    (folder / "web").mkdir()
    for number in range(3):
        rows = sentences(chance, "a word of small text between the pages which the model reads".split(), 220)
        (folder / "web" / f"{number}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    rows = sentences(chance, "def return if else for in while x y ( ) : = + 1 2".split(), 16)
    (folder / "code.jsonl").write_text("".join(json.dumps({"doc": {"content": row}}) + "\n" for row in rows))
    settings = {
        "preset": "debug",
        "data": {
            "sources": {
                "web": {"source": f"jsonl:{folder}/web/*.jsonl", "weight": 0.7},
                "code": {"source": f"jsonl:{folder}/code.jsonl", "text_field": "doc.content", "weight": 0.3},
            },
            "seq_len": 32, "tokenizer_vocab_size": 300, "val_fraction": 0.1, "cache_dir": str(folder / "cache"),
        },
        "model": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16,
        },
        "train": {
            "steps": STEPS, "global_batch": BATCH, "micro_batch": 4, "dtype": "fp32", "eval_every": 25,
            "eval_sequences": 6, "warmup_steps": 10, "lr": 1e-3,
            "seed": 1, "stages": [{"until": 0.8}, {"until": 1.0, "weights": {"web": 0.3, "code": 0.7}}],
        },
        "parallel": {"device": "cpu"},
        "checkpoint": {"every": 20, "keep": 9},
        "log": {"tensorboard": False, "sample_every": 0, "level": "quiet"},
        "run": {"dir": str(folder / "runs")},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


def options_of(mixed, *more: str) -> list[str]:
    return ["--config", str(mixed / "run.yaml"), *more]


@pytest.fixture(scope="module")
def whole_run(mixed):
    """Run it in one process without interruption."""
    train(load_config(options_of(mixed, "--run.name=whole")))
    return mixed / "runs" / "whole"


def steps_of(run) -> dict[int, dict]:
    return {row["step"]: row for row in read_rows(run / "metrics.jsonl") if "loss" in row}


def test_two_ranks_and_a_resumed_run_see_the_same_tokens(mixed, whole_run):
    expected = steps_of(whole_run)
    assert expected[20]["epochs"]["code"] > 1  # stopped in its second epoch
    pair = smolds(
        "launch",
        "--nproc-per-node=2",
        "--",
        *options_of(mixed, "--run.name=pair", "--train.micro_batch=2"),
        timeout=200,
    )
    assert pair.returncode == 0, pair.text
    checkpoint = whole_run / "checkpoints" / "step_00000020"
    going_on = options_of(mixed, "--run.name=resumed", "--train.micro_batch=1", f"--checkpoint.resume={checkpoint}")
    resumed = smolds("launch", "--nproc-per-node=2", "--", *going_on, timeout=200)
    assert resumed.returncode == 0, resumed.text
    for name, first in (("pair", 1), ("resumed", 21)):
        found = steps_of(mixed / "runs" / name)
        assert sorted(found) == list(range(first, STEPS + 1))
        for step, row in found.items():
            for number in ("batch", "seen_texts", "unique_texts", "epochs"):
                assert row[number] == expected[step][number], (name, step, number)
            assert row["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), (name, step)
    assert len({row["batch"] for row in expected.values()}) == STEPS


def test_shares_are_exact_in_every_step_and_change_with_the_stage(mixed, whole_run):
    found = prepare_data(load_config(options_of(mixed)))
    due = Counter[str]()
    counts = Counter[str]()
    for step, row in steps_of(whole_run).items():
        shares = {"web": 0.7, "code": 0.3} if step <= 40 else {"web": 0.3, "code": 0.7}
        indices = np.arange((step - 1) * BATCH, step * BATCH)
        counts += Counter(sample.source.name for sample in found.samples(indices))
        for name, share in shares.items():
            due[name] += share * BATCH
            assert abs(counts[name] - due[name]) < 1
            samples = round(row["epochs"][name] * found.orders[name].num_samples)
            assert samples == counts[name]


def test_validation_is_by_source_and_its_mean_by_share(mixed, whole_run):
    rows = [row for row in read_rows(whole_run / "metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in rows] == [25, 50]
    share = (0.8 * 0.7 + 0.2 * 0.3, 0.8 * 0.3 + 0.2 * 0.7)
    for row in rows:
        for number in ("val_loss", "val_bits_per_byte"):
            mean = share[0] * row[f"{number}/web"] + share[1] * row[f"{number}/code"]
            assert row[number] == pytest.approx(mean, rel=1e-6)
        assert row["val_loss/web"] != row["val_loss/code"]
    log = training_log(whole_run)
    assert f"| {rows[-1]['val_loss/code']:.4f} | {rows[-1]['val_bits_per_byte/code']:.3f} |" in log
    assert "Mixture: 70% web + 30% code until step 40, then 70% code + 30% web until step 50." in log


def test_changed_sources_raise_error_but_later_stages_may_add_sources(mixed, whole_run, tmp_path):
    checkpoint = whole_run / "checkpoints" / "step_00000020"
    given = [*options_of(mixed), f"--run.dir={tmp_path}", "--run.name=other", f"--checkpoint.resume={checkpoint}"]

    def refused(*options: str) -> str:
        with pytest.raises(ConfigError) as error:
            train(load_config([*given, *options]))
        return str(error.value)

    assert "was trained on 70% web + 30% code until step 20, but this run's settings are 60%" in refused(
        "--data.sources.web.weight=0.6", "--data.sources.code.weight=0.4"
    )
    assert "was trained with text_field doc.content of the source 'code'" in refused(
        "--data.sources.code.text_field=doc"
    )
    assert "then 70% code" in refused(
        '--train.stages=[{"until": 0.1}, {"until": 1.0, "weights": {"web": 0.3, "code": 0.7}}]'
    )
    manifest = read_manifest(checkpoint)
    earlier = CheckpointReader(checkpoint, replace(manifest, data=manifest.data | {"order": 2}))
    with pytest.raises(ConfigError, match="version 2 of the sample order, but this run has version 3;"):
        check_contents(earlier, prepare_data(load_config(options_of(mixed))))
    # the same up to step 20, then only a third source
    settings = yaml.safe_load((mixed / "run.yaml").read_text())
    new = mixed / "new.jsonl"
    new.write_text("".join(json.dumps({"text": f"row {n} of new text " * 9}) + "\n" for n in range(60)))
    settings["data"]["sources"]["new"] = {"source": f"jsonl:{new}", "weight": 0}
    settings["train"]["stages"] = [{"until": 0.4}, {"until": 1.0, "weights": {"new": 1}}]
    settings["data"]["tokenizer"] = "train"
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(settings))
    train(load_config(["--config", str(tmp_path / "later.yaml"), *given[2:]]))
    rows = steps_of(tmp_path / "other")
    assert sorted(rows) == list(range(21, STEPS + 1))
    assert rows[50]["epochs"]["web"] == rows[21]["epochs"]["web"] and rows[50]["epochs"]["new"] > 1
    # text already trained on must still exist
    code = (mixed / "code.jsonl").read_text()
    try:
        (mixed / "code.jsonl").write_text(code + json.dumps({"doc": {"content": "x " * 99}}) + "\n")
        assert "the text of the source 'code' has changed since" in refused("--run.name=another")
    finally:
        (mixed / "code.jsonl").write_text(code)


def test_run_that_exceeds_max_epochs_raises_error(mixed):
    with pytest.raises(
        ConfigError, match=r"takes 4,\d{3} tokens of the source 'code', which has .* more than its max_epochs 2;"
    ):
        prepare_data(load_config(options_of(mixed, "--data.sources.code.max_epochs=2")))
    prepare_data(load_config(options_of(mixed, "--data.sources.code.max_epochs=9")))


def test_no_source_trains_on_validation_documents(tmp_path):
    """Complete documents in both splits; also for copies, and for a source so small that `val_fraction` selects nothing."""
    rows = [f"document {number} with words of its own, {number * 37}, and some more" for number in range(300)]
    write = lambda name, texts: (tmp_path / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))  # noqa: E731
    few = [text for text in rows if not is_validation(digest(text.encode()), 0.01)][:20]
    write("all.jsonl", rows)
    write("some.jsonl", rows[100:200])
    write("few.jsonl", [*few, *few[::-1]])
    sources = {name: {"source": f"jsonl:{tmp_path}/{name}.jsonl"} for name in ("all", "some", "few")}
    for order in (["all", "some", "few"], ["few", "some", "all"]):
        given = {name: sources[name] for name in order}
        config = configure(tmp_path / "cache", f"--data.sources={json.dumps(given)}", "--data.val_fraction=0.01")
        found = prepare_data(config)
        trained, held_out = set[str](), set[str]()
        for name in order:
            one = load_all(found, name)
            texts, count = documents_of(one), len(one.train_documents)
            trained |= set(texts[:count])
            held_out |= set(texts[count:])
            assert len(texts) == count + len(one.val_documents) and set(texts) <= set(rows)
            assert {digest(text.encode()) for text in texts[count:]} == set(one.val_documents["text"].tolist())
        assert trained | held_out == set(rows) and not trained & held_out
        small = load_all(found, "few")
        lowest = sorted(few, key=lambda text: digest(text.encode()))
        chosen = documents_of(small)[len(small.train_documents) :]
        assert 4 <= len(chosen) <= 6 and set(chosen) == set(lowest[: len(chosen) // 2])  # a tenth, each twice


# Unique documents.


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Train one and a half epochs on a shuffled corpus in which a tenth of the documents are copies of others."""
    folder = tmp_path_factory.mktemp("copies")
    chance = np.random.RandomState(1)
    rows = sentences(chance, "alpha beta gamma delta epsilon zeta eta theta iota kappa".split(), 900)
    rows = [*rows, *(rows[n] for n in chance.choice(900, 100, replace=False))]
    chance.shuffle(rows)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options = [
        "--preset=debug", f"--data.source=jsonl:{folder}/a.jsonl", f"--data.cache_dir={folder}/cache", "--data.seq_len=64",
        "--data.tokenizer_vocab_size=300", "--data.val_fraction=0.05", "--train.eval_sequences=2", "--log.sample_every=0",
        "--log.tensorboard=false", f"--run.dir={folder}/runs", "--run.name=copies", "--checkpoint.every=20", "-q",
        "--model.hidden_size=32", "--model.num_hidden_layers=1", "--model.num_attention_heads=2", "--model.head_dim=16",
        "--model.num_key_value_heads=1", "--model.intermediate_size=32", "--parallel.device=cpu",
    ]  # fmt: skip
    samples = prepare_data(load_config(options)).orders["jsonl"].num_samples
    options.append(f"--train.steps={samples * 3 // 2 // 8}")
    train(load_config(options))
    return folder, options


def test_unique_documents_are_counted_correctly(copies):
    folder, options = copies
    config = load_config(options)
    found = prepare_data(config)
    source, eos = found.sources["jsonl"], found.tokenizer.eos_token_id
    assert len(source.shards) == 1
    tokens = source.tokens(0)
    starts = np.concatenate(([0], np.flatnonzero(tokens == eos)[:-1] + 1)).tolist()
    beginnings = {}
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        beginnings[start] = tuple(tokens[start : end - 1][:50].tolist())
    seen, unique = 0, set()
    rows = steps_of(folder / "runs" / "copies")
    for step, row in rows.items():
        for sample in found.samples(np.arange((step - 1) * 8, step * 8)):
            here = [
                beginnings[t]
                for _, start, length in sample.spans
                for t in range(start, start + length)
                if t in beginnings
            ]
            seen += len(here)
            unique |= set(here)
        assert (row["seen_texts"], row["unique_texts"]) == (seen, len(unique))
    # About a tenth of the first epoch's documents are repeated, and all of the second's.
    one = found.orders["jsonl"].num_samples // 8
    assert 0.86 < rows[one]["unique_texts"] / rows[one]["seen_texts"] < 0.97
    assert rows[max(rows)]["unique_texts"] - rows[one]["unique_texts"] < 8
    assert rows[max(rows)]["seen_texts"] > 1.4 * rows[one]["seen_texts"]


def test_curve_of_unique_documents_is_plotted(copies, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = {}
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *xy, **how: (lines.update({how.get("label"): xy}), plot(self, *xy, **how))[1]
    )
    figure_of([copies[0] / "runs" / "copies"]).savefig(tmp_path / "picture.png")
    rows = steps_of(copies[0] / "runs" / "copies")
    assert list(lines["copies, unique"][1]) == [row["unique_texts"] for row in rows.values()]
    assert list(lines["copies, seen"][1]) == [row["seen_texts"] for row in rows.values()]
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_counting_continues_with_and_without_a_checkpoint(copies, tmp_path):
    folder, options = copies
    expected = steps_of(folder / "runs" / "copies")
    checkpoint = folder / "runs" / "copies" / "checkpoints"
    newest = sorted(checkpoint.glob("step_*"))[0]
    step = read_manifest(newest).step
    train(load_config([*options, f"--run.dir={tmp_path}", f"--checkpoint.resume={newest}"]))
    for number, row in steps_of(tmp_path / "copies").items():
        assert number > step
        assert (row["seen_texts"], row["unique_texts"]) == (
            expected[number]["seen_texts"],
            expected[number]["unique_texts"],
        )


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_state_of_the_counter_is_restored(copies, monkeypatch, kind):
    found = prepare_data(load_config(copies[1]))
    if kind == "sketch":
        monkeypatch.setattr("smolds_dist.data.batch.LARGEST_EXACT", 100)
    one, two, exact = UniqueTexts(found), UniqueTexts(found), UniqueTexts(found)
    one.add(range(0, 400))
    assert one.state()[0] == kind
    two.restore(*one.state())
    for counter in (one, two):
        counter.add(range(400, 500))
    assert (one.seen, one.unique) == (two.seen, two.unique)
    monkeypatch.undo()
    exact.add(range(0, 500))
    assert one.seen == exact.seen and one.unique == pytest.approx(exact.unique, rel=0.03)


def test_merged_sketches_equal_the_full_one():
    """The basis of the count: the estimate depends only on the set of documents, not on order or repetition."""
    texts = np.random.RandomState(0).randint(0, 2**62, 50_000).tolist()
    estimate = sketch_of(texts).get_estimate()
    assert estimate == pytest.approx(50_000, rel=0.03)
    assert sketch_of([*texts[::-1], *texts[:1000]]).get_estimate() == pytest.approx(estimate, rel=0.02)


def test_first_from_is_searchsorted():
    values = np.sort(np.random.RandomState(0).randint(0, 100, 57)).astype(np.uint64)
    for wanted in (np.arange(110, dtype=np.uint64), np.zeros(0, np.uint64)):
        assert search_sorted(values, wanted).tolist() == np.searchsorted(values, wanted).tolist()


# smolds data.


def test_data_show_prints_the_documents_trained_on(mixed, whole_run, capsys):
    lines = {}
    for name in ("web/0.jsonl", "web/1.jsonl", "web/2.jsonl", "code.jsonl"):
        rows = [json.loads(line) for line in (mixed / name).read_text().splitlines()]
        lines[str(mixed / name)] = [row["text"] if "text" in row else row["doc"]["content"] for row in rows]
    found = prepare_data(load_config(options_of(mixed)))
    for step in (1, 45):
        capsys.readouterr()
        assert data_command(["show", str(whole_run), "--step", str(step)]) == 0
        shown = capsys.readouterr().out
        assert f"recorded as {steps_of(whole_run)[step]['batch']}" in shown
        assert data_command(["show", str(whole_run), "--step", str(step), "--json"]) == 0
        samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [sample["index"] for sample in samples] == list(range((step - 1) * BATCH, step * BATCH))
        for sample in samples:
            for part in sample["parts"]:
                text = lines[part["file"]][part["document"] - 1]
                ids = found.tokenizer(text).input_ids[part["start"] :]
                assert str(found.tokenizer.decode(ids)).startswith(part["text"])
                assert f"{part['file']}, line {part['document']:,}" in shown
    assert data_command(["show", str(whole_run), "--step", "1", "--rank", "0", "--json"]) == 0
    for args, fix in ((["--step", "999"], "steps up to 50"), (["--step", "1", "--rank", "7"], "from 0 to 0")):
        with pytest.raises(ConfigError, match=fix):
            data_command(["show", str(whole_run), *args])


def test_ranks_share_a_step_among_them(mixed, whole_run):
    """The two halves of a step of two ranks form the step; later changes of files are reported."""
    shown = smolds("data", "show", str(whole_run), "--step", "5", "--json")
    assert shown.returncode == 0, shown.text
    rows = read_rows(whole_run / "metrics.jsonl")
    copy = mixed / "runs" / "copied"
    copy.mkdir(exist_ok=True)
    start = next(row for row in rows if row.get("event") == "start") | {"world_size": 2}
    step = next(row for row in rows if row["step"] == 5) | {"batch": "00000000"}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (start, step)))
    (copy / "config.yaml").write_text((whole_run / "config.yaml").read_text())
    (copy / "tokenizer").mkdir(exist_ok=True)
    for path in (whole_run / "tokenizer").iterdir():
        (copy / "tokenizer" / path.name).write_bytes(path.read_bytes())
    halves = [smolds("data", "show", str(copy), "--step", "5", "--rank", str(rank), "--json") for rank in (0, 1)]
    assert all(half.returncode == 1 for half in halves)  # the digest is not the recorded one
    texts = [line for half in halves for line in half.stdout.splitlines() if line.startswith("{")]
    assert texts == shown.stdout.splitlines()
    assert "the files of its sources have changed" in halves[0].stdout


def test_order_is_printed_as_positions(mixed, capsys):
    assert data_command(["order", "--", *options_of(mixed), "--samples", "10:30"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == list(range(10, 30))
    assert {line["source"] for line in lines} == {"web", "code"}
    assert all(set(line) == {"index", "stage", "seq_len", "source", "file", "document", "start"} for line in lines)
    with pytest.raises(ConfigError, match="not a range"):
        data_command(["order", "--samples", "9:3", "--", *options_of(mixed)])


def test_stats_count_what_is_there(copies, capsys):
    folder, options = copies
    assert data_command(["stats", "--json", "--", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    found = load_all(prepare_data(load_config(options)), "jsonl")
    texts = [json.loads(line)["text"] for line in (folder / "a.jsonl").read_text().splitlines()]
    assert told["files"] == 1 and told["documents"] == 1000 and told["copies"] == len(texts) - len(set(texts)) == 100
    assert told["tokens"] == found.train_tokens + found.val_tokens
    assert told["bytes_per_token"] == pytest.approx(sum(len(t) for t in texts) / told["tokens"], abs=1e-3)
    assert sum(told["lengths"].values()) == 1000
    assert data_command(["stats", "--", *options]) == 0
    shown = capsys.readouterr().out
    assert "100 documents (10.0%) are duplicates" in shown and "█" in shown
    assert re.search(r"jsonl: [\d,]+ tokens, 1\.\d+ epochs of", shown)
    with pytest.raises(ConfigError, match="use prepare, show, stats or order"):
        data_command(["tell"])


def test_plan_shows_tokens_of_each_source(mixed):
    planned = smolds("plan", "--hardware", "h100", "--nodes", "1", "--", *options_of(mixed, "--train.micro_batch=null"))
    assert planned.returncode == 0, planned.text
    assert "text: 70% web + 30% code until step 40, then 70% code + 30% web until step 50" in planned.stdout
    assert "tokens: 4,864 of code, 7,936 of web" in planned.stdout
