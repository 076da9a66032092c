"""Corpora, tokenizers and shards."""

import json
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenized import load_all

from smolds_dist.config import load_config
from smolds_dist.data import sharded_source, shards, validation
from smolds_dist.data.batch import batch_digest, evaluation_batch
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.data.prepare import prepare_data
from smolds_dist.data.source import files_of
from smolds_dist.data.text import ReadStats, digest, documents, is_validation
from smolds_dist.errors import ConfigError
from smolds_dist.settings import Data, RunConfig, Source, Train
from smolds_dist.stages import resolve_stages


def configure(cache, *options: str):
    return load_config(
        [
            "--preset=debug",
            f"--data.cache_dir={cache}",
            "--data.tokenizer_vocab_size=300",
            "--data.seq_len=32",
            *options,
        ]
    )


def prepare_shards(config):
    """Return the shards of a single source, and the tokenizer."""
    data = prepare_data(config)
    (name,) = data.sources
    return load_all(data, name)


def texts_of(data, say=lambda _: None) -> list[str]:
    """Return all documents of a configuration's sources."""
    return [
        document.text
        for source in data.mixed.values()
        for document in documents(source, files_of(source), data, ReadStats(say))
    ]


def test_every_source_yields_the_same_documents(tmp_path):
    texts = ["first text\n", "zweiter Text: äöü\n", 'a "third"\n']
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    rows = [{"text": text, "other": 1} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for source in ("text:*.txt", "jsonl:*.jsonl", "parquet:*.parquet"):
        kind, pattern = source.split(":")
        data = configure(tmp_path, f"--data.source={kind}:{tmp_path}/{pattern}").data
        assert texts_of(data) == texts


def test_standard_library_is_large_real_text():
    data = load_config(["--preset=debug"]).data
    texts = texts_of(data)
    assert sum(map(len, texts)) > 10_000_000
    assert any("class ArgumentParser" in text for text in texts)


@pytest.mark.parametrize(
    ("source", "content", "fix"),
    [
        ("text:nothing/*.txt", "", "check the pattern"),
        ("jsonl:bad.jsonl", '{"text": "a"}\nno json\n', "line 2"),
        ("jsonl:bad.jsonl", '{"body": "a"}\n', "--data.text_field"),
        ("text:bad.txt", "a single one", "split it into several"),
        ("jsonl:bad.jsonl", '{"text": "too"}\n{"text": "short"}\n', "fewer than one sequence"),
        ("parquet:bad.parquet", None, "to body"),
    ],
)
def test_invalid_source_raises_error_with_fix(tmp_path, monkeypatch, source, content, fix):
    monkeypatch.chdir(tmp_path)
    _, _, name = source.partition(":")
    if content is None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "a"}]), tmp_path / name)
    elif content:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=fix):
        prepare_shards(configure(tmp_path / "cache", f"--data.source={source}"))


def write_rows(folder, kind: str, values: list) -> str:
    """Write these values to the column `text` of a file of this kind, with None as null; return the source."""
    folder = folder / "source"
    folder.mkdir()
    rows = [{"text": value} for value in values]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
        return f"parquet:{folder}/rows.parquet"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}" if kind == "hf" else f"jsonl:{folder}/rows.jsonl"


def documents_of(shards) -> list[str]:
    """Return the documents of both splits, each split in the order of the corpus."""
    texts = []
    for tokens in (shards.train, shards.val):
        ends = np.flatnonzero(tokens == shards.tokenizer.eos_token_id)
        texts += [shards.tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
    return [text.removesuffix(shards.tokenizer.eos_token) for text in texts]


LINES = [f"row {number}: a text that is long enough to be some tokens, and no longer" for number in range(60)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_rows_without_text_are_skipped_and_counted(tmp_path, capsys, kind):
    source = write_rows(tmp_path, kind, [None, "", *LINES, " \n\t", None])
    shards = prepare_shards(configure(tmp_path / "cache", f"--data.source={source}", "--data.val_fraction=0.2"))
    assert sorted(documents_of(shards)) == sorted(LINES)
    assert f"{source}: 4 of 64 rows contain no text (null, empty or blank); skipped.\n" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
@pytest.mark.parametrize("value", [7, 1.5, True, ["a", "list"], {"an": "object"}], ids=repr)
def test_row_without_string_raises_error(tmp_path, kind, value):
    source = write_rows(tmp_path, kind, [value, None])
    column = {int: "int64", float: "double", bool: "bool", list: "list<element: string>", dict: "struct<an: string>"}
    name = rf"{'' if kind == 'hf' else 'rows.'}\S*, (line|row) 1: .* has a value of type {type(value).__name__} "
    if kind == "parquet":
        name = rf"rows.parquet has values of type {re.escape(column[type(value)])} in the column 'text'"
    with pytest.raises(ConfigError, match=name):
        prepare_shards(configure(tmp_path / "cache", f"--data.source={source}"))


def test_skipped_rows_are_recorded_with_file_and_row(tmp_path, capsys):
    rows = [
        json.dumps({"text": "kept"}).encode(),
        b"no json",
        b'{"text": "\xe9"}',
        b'{"body": "a"}',
        b'{"text": [1]}',
        b"5",
    ]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "one.jsonl").write_bytes(b"\n".join(rows[:2]))
    options = ["--data.source=jsonl:" + f"{tmp_path}/*.jsonl", "--data.on_bad_row=skip"]
    data = configure(tmp_path, *options).data
    said: list[str] = []
    assert texts_of(data, said.append) == ["kept", "kept"]
    assert said == [
        f"{tmp_path}/{name}.jsonl, line 2: not a JSON object; this and similar rows are skipped."
        for name in ("bad", "one")
    ]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    folder = prepare_shards(configure(tmp_path / "cache", *options, "--data.val_fraction=0.2")).folders[0]
    assert [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()] == [
        {"file": f"{tmp_path}/{name}.jsonl", "line": line, "kind": kind, "why": why}
        for name, line, kind, why in (
            ("bad", 2, "no JSON object", "not a JSON object"),
            ("bad", 3, "no UTF-8", "not UTF-8 text"),
            ("bad", 4, "no field", "no field 'text'; set --data.text_field to body"),
            (
                "bad",
                5,
                "type list",
                "the field 'text' has a value of type list instead of a string; no field contains text",
            ),
            ("bad", 6, "no JSON object", "not a JSON object"),
            ("one", 2, "no JSON object", "not a JSON object"),
        )
    ]
    assert (
        "6 of 68 rows were skipped (3 no JSON object, 1 no UTF-8, 1 no field, 1 type list)" in capsys.readouterr().err
    )
    (tmp_path / "good.jsonl").unlink()
    for number, why in enumerate(
        ("not a JSON", "not UTF-8", "no field 'text'.* to body", "type list", "not a JSON"), 1
    ):
        (tmp_path / "one.jsonl").write_bytes(rows[0] + b"\n\n" + rows[number])
        data = configure(tmp_path, f"--data.source=jsonl:{tmp_path}/one.jsonl").data
        with pytest.raises(ConfigError, match=f"one.jsonl, line 3: .*{why}.*on_bad_row skip"):
            texts_of(data)


def test_byte_order_marks_and_windows_line_ends_are_removed(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"of an editor")
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "first"}\r\n{"text": "\\ufeffsecond \\ufeff"}\r\n')
    for source, texts in (("text:*.txt", ["of an editor"]), ("jsonl:*.jsonl", ["first", "second \ufeff"])):
        kind, pattern = source.split(":")
        assert texts_of(configure(tmp_path, f"--data.source={kind}:{tmp_path}/{pattern}").data) == texts


def test_text_that_spells_a_control_token_is_text(tmp_path):
    lines = [line.replace("long", "<|endoftext|>") for line in LINES]
    source = write_rows(tmp_path, "jsonl", lines)
    shards = prepare_shards(configure(tmp_path / "cache", f"--data.source={source}", "--data.val_fraction=0.2"))
    assert sorted(documents_of(shards)) == sorted(lines)
    assert shards.val_bytes == sum(len(line) for line in documents_of(shards)[-int((shards.val == 0).sum()) :])
    # a prompt may contain control tokens
    assert shards.tokenizer("<|endoftext|>").input_ids == [shards.tokenizer.eos_token_id]


def test_tokenizer_that_truncates_and_pads_encodes_whole_documents(corpus, cache, tmp_path):
    source = f"--data.source=text:{corpus}/*.txt"
    tokenizer = prepare_shards(configure(cache, source)).tokenizer
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(16)
    backend.enable_padding(length=16)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shards = prepare_shards(
        configure(tmp_path, source, f"--data.tokenizer={tmp_path / 'tokenizer'}", "--data.val_fraction=0.2")
    )
    assert sorted(documents_of(shards)) == sorted(path.read_text() for path in corpus.glob("*.txt"))


GOOD = "a text that is long enough to be tokenised, and that goes on for a while. " * 60
DAMAGED = [
    ("text", "empty.txt", b" \n", "is empty"),
    ("text", "torn.txt", b"half a character: \xc3", r"is not UTF-8 text \(byte 18\)"),
    ("jsonl", "empty.jsonl", b"\n", "is empty"),
    ("parquet", "torn.parquet", b"PAR1 and nothing more", "is damaged"),
]


@pytest.mark.parametrize(("kind", "name", "content", "what"), DAMAGED)
def test_empty_or_damaged_file_raises_error_or_is_skipped(tmp_path, capsys, kind, name, content, what):
    good = [{"text": f"{GOOD} {number}"} for number in range(2)]
    if kind == "text":
        for number, row in enumerate(good):
            (tmp_path / f"0{number}.txt").write_text(row["text"])
    elif kind == "jsonl":
        (tmp_path / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good), tmp_path / "0.parquet")
    (tmp_path / name).write_bytes(content)
    source = f"--data.source={kind}:{tmp_path}/*.{name.rpartition('.')[2]}"
    with pytest.raises(ConfigError, match=f"{name} {what}.*on_bad_file skip"):
        prepare_shards(configure(tmp_path / "cache", source))
    skipping = configure(tmp_path / "cache", source, "--data.on_bad_file=skip")
    texts = documents_of(prepare_shards(skipping))
    assert re.search(f"{name} {what}.*; (the rest of it was )?skipped", capsys.readouterr().err)
    assert sorted(texts) == sorted(row["text"] for row in good)


@pytest.mark.parametrize("name", ["tokens.bin", "documents", "meta.json"])
@pytest.mark.parametrize("what", ["units/*", "held_out"])
def test_damaged_shard_is_reported_and_rewritten(corpus, tmp_path, capsys, what, name):
    config = configure(tmp_path, f"--data.source=text:{corpus}/*.txt", "--data.val_fraction=0.15")
    before = prepare_shards(config)
    (folder,) = tmp_path.glob(f"{what}/*/")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-3])
    again = prepare_shards(config)
    assert f"{folder} is damaged: " in capsys.readouterr().err
    assert (folder / name).read_bytes() == content
    assert np.array_equal(before.train, again.train) and np.array_equal(before.val, again.val)


def test_unknown_tokenizer_raises_error(corpus, tmp_path):
    config = configure(tmp_path, f"--data.source=text:{corpus}/*.txt", "--data.tokenizer=no/such-tokenizer")
    with pytest.raises(ConfigError, match="or `train`"):
        prepare_shards(config)


def test_shards_hold_every_document_once(corpus, cache):
    config = configure(cache, f"--data.source=text:{corpus}/*.txt", "--data.val_fraction=0.2")
    shards = prepare_shards(config)
    end = shards.tokenizer.eos_token
    parts = {split: shards.tokenizer.decode(getattr(shards, split)).split(end)[:-1] for split in ("train", "val")}
    written = sorted(path.read_text() for path in corpus.glob("*.txt"))
    assert sorted(parts["train"] + parts["val"]) == written
    assert 2 <= len(parts["val"]) <= 16
    assert shards.val_bytes == sum(len(text.encode()) for text in parts["val"])
    # the entropy is that of the validation tokens
    _, counts = np.unique(shards.val, return_counts=True)
    frequency = counts / counts.sum()
    assert shards.val_unigram_entropy == pytest.approx(-(frequency * np.log(frequency)).sum())
    # a second call reads the cache; the tokenizer's folder can be the setting
    assert prepare_shards(config).folders == shards.folders
    own = configure(cache, f"--data.source=text:{corpus}/*.txt", f"--data.tokenizer={shards.tokenizer.name_or_path}")
    assert np.array_equal(prepare_shards(own).tokenizer.vocab, shards.tokenizer.vocab)


def test_single_document_raises_error_and_one_of_two_is_for_validation(tmp_path):
    text = " ".join(f"word{i % 97} and{i % 13}" for i in range(2_000))
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "copy.txt").write_text(text)
    config = configure(tmp_path, f"--data.source=text:{tmp_path}/*.txt")
    with pytest.raises(ConfigError, match=r"is a single document, .*; split it into several files or rows"):
        prepare_shards(config)
    (tmp_path / "two.txt").write_text(text[::-1])
    shards = prepare_shards(config)
    sides = [documents_of(shards)[: len(shards.train_documents)], documents_of(shards)[len(shards.train_documents) :]]
    assert sorted(map(sorted, sides)) == sorted([[text, text], [text[::-1]]])


def test_validation_set_has_bounded_size_and_later_documents_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "VALIDATION_BYTES", 1000)
    rows = [f"document {number} with words of its own, {number * 37}, and some more" for number in range(400)]
    for count in (200, 400):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[:count]))
        shards = prepare_shards(
            configure(tmp_path, f"--data.source=jsonl:{tmp_path}/a.jsonl", "--data.val_fraction=0.2")
        )
        low = [row for row in rows[:count] if is_validation(digest(row.encode()), 0.2)]
        assert (
            documents_of(shards) == [row for row in rows[:count] if row not in low] + low[: len(shards.val_documents)]
        )
        assert 1000 <= shards.val_bytes < 1000 + max(map(len, rows)) < sum(map(len, low))


def test_max_tokens_stops_reading(corpus, cache):
    limited = configure(cache, f"--data.source=text:{corpus}/*.txt", "--data.max_tokens=5000")
    whole_of_it = configure(cache, f"--data.source=text:{corpus}/*.txt")
    counts = [prepare_data(config).sources["text"] for config in (limited, whole_of_it)]
    counts[1].count_cached()
    found = [source.tokens_found for source in counts]
    longest = found[1] / 40 * 2
    assert 5000 <= found[0] < 5000 + longest < found[1]
    few, all_of_it = prepare_shards(limited), prepare_shards(whole_of_it)
    assert 2500 < few.train_tokens <= found[0] and few.val_tokens < 2000 + longest
    assert np.array_equal(few.train[:2000], all_of_it.train[:2000])


def prepare_in_process(cache, source, queue):
    writes = []
    original = sharded_source.write_shard
    sharded_source.write_shard = lambda *args, **kwargs: (writes.append(1), time.sleep(0.5), original(*args, **kwargs))
    shards = prepare_shards(configure(cache, source))
    queue.put((len(writes), int(shards.train.astype(np.int64).sum())))


def test_many_processes_have_one_writer(corpus, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    source = f"--data.source=text:{corpus}/*.txt"
    processes = [context.Process(target=prepare_in_process, args=(tmp_path, source, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    assert sum(writes for writes, _ in results) == 1
    assert len({checksum for _, checksum in results}) == 1


def hang_while_writing(cache, source, started):
    def write_and_wait(*_args):
        started.set()
        time.sleep(600)

    shards.is_validation = write_and_wait
    prepare_shards(configure(cache, source))


def test_killed_writer_leaves_no_valid_shard(corpus, tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    source = f"--data.source=text:{corpus}/*.txt"
    process = context.Process(target=hang_while_writing, args=(tmp_path, source, started))
    process.start()
    assert started.wait(60)
    assert list((tmp_path / "units").glob("*/*.writing-*"))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    shards = prepare_shards(configure(tmp_path, source))
    assert shards.train_tokens == len(shards.train) > 1000
    assert not list((tmp_path / "units").glob("*/*.writing-*"))


def test_edited_file_is_tokenized_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words " * 3000)
    (tmp_path / "b.txt").write_text("more words " * 3000)
    config = configure(tmp_path, f"--data.source=text:{tmp_path}/*.txt")
    before = prepare_shards(config).folders
    path.write_text("other words " * 3000)
    assert prepare_shards(config).folders != before


def test_evaluation_batch_is_padded_with_ignored_sequences():
    ids, labels = evaluation_batch(np.arange(100, dtype=np.uint16), 10, range(2, 6), num_sequences=4)
    assert ids[:, 0].tolist() == [20, 30, 30, 30]
    assert torch.equal(labels[:2], ids[:2])
    assert (labels[2:] == -100).all()


def test_prefetched_batches_equal_requested_ones(corpus, cache):
    data = prepare_data(configure(cache, f"--data.source=text:{corpus}/*.txt"))
    assembled = []

    class Watched:
        def wait_for_samples(self, samples: int) -> None:
            pass

        stages = resolve_stages(RunConfig(data=Data(seq_len=data.stages.at(1).seq_len), train=Train(global_batch=8)))

        def batch(self, indices: range) -> torch.Tensor:
            assembled.append(indices)
            return data.batch(indices)

    ahead = BatchPrefetcher(Watched(), (1, 2), [2])
    # the second rank's half of consecutive batches, then of another batch after a rollback
    for step in (1, 2, 3, 8, 9):
        indices = range(8 * step - 4, 8 * step)
        batch = ahead.take(step)
        for _ in range(2):  # like before the backward pass of each micro batch
            ahead.prefetch_next()
        ids = torch.cat([micro_batch.ids for micro_batch in batch.micro_batches])
        assert [len(micro_batch.ids) for micro_batch in batch.micro_batches] == [2, 2]
        assert torch.equal(ids, data.batch(indices)) and batch.digest == batch_digest(ids, indices)
    ahead.close()
    starts = [indices.start for indices in assembled]
    assert {4, 12, 20, 60, 68} <= set(starts) <= {4, 12, 20, 28, 60, 68, 76} and len(starts) == len(set(starts))


def test_error_during_prefetch_is_raised():
    class Failing:
        def wait_for_samples(self, samples: int) -> None:
            pass

        stages = resolve_stages(RunConfig(train=Train(global_batch=2)))

        def batch(self, indices: range) -> torch.Tensor:
            if indices.start:
                raise OSError("the disk is gone")
            return torch.zeros(len(indices), 4, dtype=torch.int64)

    ahead = BatchPrefetcher(Failing(), (0, 1), [2])
    ahead.take(1)
    ahead.prefetch_next()
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(2)
    ahead.close()


@pytest.mark.parametrize("pattern", ["corpus[v2]/?.txt", "corpus[v2]/a[1].txt", "corpus[v2]", "corpus[v2]/**/*.txt"])
def test_existing_path_is_not_a_pattern(tmp_path, pattern):
    (tmp_path / "corpus[v2]").mkdir()
    for name in ("a[1].txt", "b.txt"):
        (tmp_path / "corpus[v2]" / name).write_text("text")
    found = [file.path for file in files_of(Source(source=f"text:{tmp_path}/{pattern}"))]
    first, second = (str(tmp_path / "corpus[v2]" / name) for name in ("a[1].txt", "b.txt"))
    expected = {"corpus[v2]/?.txt": [second], "corpus[v2]/a[1].txt": [first]}
    assert found == expected.get(pattern, [first, second])
