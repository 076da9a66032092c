"""Unusual text, tokenizers and token files are read, skipped and counted, or rejected with an error."""

import errno
import gzip
import http.server
import json
import os
import shutil
import threading
from email.utils import formatdate
from itertools import islice

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from fuzz import cases
from hypothesis import example, given
from hypothesis import strategies as st
from test_data import configure, prepare_shards, texts_of
from test_formats import write_datatrove, write_megatron
from tokenizers.processors import TemplateProcessing

from smolds_dist.config import load_config
from smolds_dist.data import rows
from smolds_dist.data.prepare import _interleaved_texts, prepare_data
from smolds_dist.data.source import BadFileError, File, files_of, resolve
from smolds_dist.data.token_files import Flat, read_tokens
from smolds_dist.data.tokenizer import load_tokenizer, tokenizer_digest
from smolds_dist.errors import ConfigError
from smolds_dist.observe.rows import read_rows
from smolds_dist.settings import Source
from smolds_dist.training.trainer import train

ROWS = [f"row {number}: " + "some words of a text " * (1 + number % 5) for number in range(60)]


def write_jsonl(path, rows=ROWS) -> str:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return f"--data.source=jsonl:{path}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a tokenizer on `ROWS`."""
    folder = tmp_path_factory.mktemp("trained")
    return prepare_shards(configure(folder, write_jsonl(folder / "a.jsonl"))).tokenizer


def test_another_end_of_text_is_another_tokenizer(tmp_path, trained):
    other = load_tokenizer(trained.name_or_path)
    other.add_special_tokens({"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|other|>"]})
    other.save_pretrained(tmp_path / "one")
    other.eos_token = "<|other|>"
    other.save_pretrained(tmp_path / "two")
    one, two = (load_tokenizer(str(tmp_path / name)) for name in ("one", "two"))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert tokenizer_digest(one) != tokenizer_digest(two)
    source = write_jsonl(tmp_path / "a.jsonl")
    for tokenizer, name in ((one, "one"), (two, "two")):
        shards = prepare_shards(configure(tmp_path / "cache", source, f"--data.tokenizer={tmp_path / name}"))
        assert shards.train[-1] == tokenizer.eos_token_id


def test_tokenizer_with_gaps_in_its_ids_raises_error(tmp_path, trained):
    trained.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 50
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"has \d+ tokens with ids up to \d+; number them without gaps"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("write", "name", "index"), [(write_megatron, "a.bin", "a.idx"), (write_datatrove, "a.ds", "a.ds.index")]
)
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_version_of_tokens_includes_their_index(tmp_path, write, name, index, prefix):
    write(tmp_path / name, [np.arange(20, dtype=np.uint16)] * 3)
    source = Source(source=f"tokens:{prefix}{tmp_path / name}")
    (before,) = files_of(source)
    os.utime(tmp_path / index, (1, 1))
    (after,) = files_of(source)
    assert (before.path, before.size) == (after.path, after.size) and before.version != after.version


def test_change_at_a_server_without_etag_is_noticed():
    class Answer(http.server.BaseHTTPRequestHandler):
        changed = 0

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.send_header("Last-Modified", formatdate(Answer.changed, usegmt=True))
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Source(source=f"text:http://127.0.0.1:{server.server_port}/a.txt")
        (before,), Answer.changed = files_of(source), 10
        assert files_of(source)[0].version != before.version
        server.shutdown()


SKIP = ("--data.on_bad_row=skip", "--data.on_bad_file=skip")


@pytest.mark.parametrize(
    "failure",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EMFILE, "Too many open files"),
        FileNotFoundError("a"),
    ],
)
def test_file_that_cannot_be_reached_is_not_skipped(tmp_path, monkeypatch, failure):
    write_jsonl(tmp_path / "a.jsonl")

    def fail(*_):
        raise failure

    monkeypatch.setattr(rows, "open_file", fail)
    with pytest.raises(ConfigError, match=r"a.jsonl cannot be read \(.+\); fix its access and restart"):
        texts_of(configure(tmp_path, f"--data.source=jsonl:{tmp_path}/a.jsonl", *SKIP).data)


def test_damaged_content_is_skipped(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}'))
    (tmp_path / "c.jsonl.zst").write_bytes(b"no zstd")
    # The frame header of `zstd --long=31`, with a window of 2 GB.
    (tmp_path / "d.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(100))
    told: list[str] = []
    assert texts_of(configure(tmp_path, f"--data.source=jsonl:{tmp_path}/*.jsonl.*", *SKIP).data, told.append) == [
        "good"
    ]
    assert ["a.jsonl.gz is damaged" in told[0], "c.jsonl.zst is damaged" in told[1]] == [True, True]
    assert "d.jsonl.zst has a zstd window over 128 MB" in told[2]


def columns():
    """Return every type of text column, each with a value that is not UTF-8."""
    values = [b"good", b"R\xc9UNION", None, b"too"]
    for plain, binary in ((pyarrow.string(), pyarrow.binary()), (pyarrow.large_string(), pyarrow.large_binary())):
        yield pyarrow.array(values, binary).view(plain)
    words = pyarrow.array([b"good", b"R\xc9UNION", b"too"], pyarrow.binary()).view(pyarrow.string())
    yield pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, None, 2]), words)
    yield pyarrow.array(values, pyarrow.binary_view()).view(pyarrow.string_view())


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("column", list(columns()), ids=lambda column: str(column.type).partition("<")[0])
@pytest.mark.parametrize("nested", [False, True])
def test_invalid_utf8_raises_error_or_is_skipped(tmp_path, kind, column, nested):
    if nested:
        column = pyarrow.StructArray.from_arrays([column], ["body"])
    table = pyarrow.table({"text": column})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as out:
            out.write_table(table)
    options = [f"--data.source={kind}:{tmp_path}/a.{kind}", f"--data.text_field={'text.body' if nested else 'text'}"]
    if (
        kind == "parquet" and "dictionary" in f"{table.schema}"
    ):  # pyarrow itself decodes these, without the row's number
        with pytest.raises(ConfigError, match=r"a.parquet is damaged \(Invalid UTF8 payload\)"):
            texts_of(configure(tmp_path, *options).data)
        return
    with pytest.raises(ConfigError, match=r"row 2: not UTF-8"):
        texts_of(configure(tmp_path, *options).data)
    assert texts_of(configure(tmp_path, *options, *SKIP).data) == ["good", "too"]


def test_folder_that_datasets_saved_is_read_without_its_leftovers(tmp_path):
    saved = datasets.Dataset.from_dict({"text": ROWS})
    saved.save_to_disk(tmp_path / "one")
    datasets.load_from_disk(tmp_path / "one").map(lambda row: {"text": row["text"].upper()})
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "several")
    for source in ("arrow:one", "arrow:one/*.arrow", "hf:one", "hf:several"):
        kind, _, path = source.partition(":")
        data = configure(tmp_path / "cache", f"--data.source={kind}:{tmp_path}/{path}").data
        (given_source,) = data.mixed.values()
        read_as, files = resolve(given_source, tmp_path / "cache")
        assert sum(len(list(rows.rows_of(file, read_as))) for file in files) == len(ROWS)


def jsonl_of(folder, content: bytes) -> list:
    path = folder / "fuzzed.jsonl"
    path.write_bytes(content)
    return [
        row
        for _, row in rows.rows_of(File(str(path), len(content), ""), Source(source=f"jsonl:{path}", text_field="text"))
    ]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("text"), inner, max_size=3)
    ),
)
LINE = st.binary(max_size=40) | ANYTHING.map(lambda value: json.dumps(value).encode())


@cases()
@given(lines=st.lists(LINE | st.builds(lambda value: json.dumps({"text": value}).encode(), ANYTHING), max_size=6))
@example(lines=[b'{"text": "a", "n": ' + b"9" * 5000 + b"}", b'{"text": ' + b"9" * 5000 + b"}"])
@example(
    lines=[
        b"[" * 100_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b'{"a":' * 300 + b"1" + b"}" * 300,
        b'{"text": "\\u0000"}',
    ]
)
@example(lines=[b'{"\\ud800": "x"}', b'{"\\u001b[31m": "x"}'])
def test_any_line_is_text_or_reported(tmp_path_factory, lines):
    folder = tmp_path_factory.getbasetemp()
    for row in jsonl_of(folder, b"\n".join(lines)):
        assert row is None or isinstance(row, (str, rows.BadRow))
        words = row.why if isinstance(row, rows.BadRow) else row or ""
        words.encode()
        assert not isinstance(row, rows.BadRow) or words.isprintable()


def test_long_integers_are_skipped(tmp_path):
    digits = b"9" * 5000
    found = jsonl_of(tmp_path, b'{"text": "a", "n": ' + digits + b'}\n{"text": ' + digits + b"}")
    assert found[0] == "a" and found[1].kind == "type int"


@cases()
@given(change=st.tuples(st.integers(0), st.binary(min_size=1, max_size=4)), kind=st.sampled_from(["parquet", "arrow"]))
@example(change=(125911, b"\x80"), kind="parquet")
def test_damaged_columns_are_text_or_reported(tmp_path_factory, change, kind):
    folder = tmp_path_factory.getbasetemp()
    whole, path = folder / f"whole.{kind}", folder / f"fuzzed.{kind}"
    if not whole.exists():
        write = pyarrow.parquet.write_table if kind == "parquet" else pyarrow.feather.write_feather
        write(
            pyarrow.table({"text": ROWS, "n": range(len(ROWS))}),
            whole,
            compression="none" if kind == "parquet" else "uncompressed",
        )
    content = bytearray(whole.read_bytes())
    at = change[0] % len(content)
    content[at : at + len(change[1])] = change[1]
    path.write_bytes(content)
    try:
        for _, row in rows.rows_of(
            File(str(path), len(content), ""), Source(source=f"{kind}:{path}", text_field="text")
        ):
            assert row is None or isinstance(row, (str, rows.BadRow))
    except (BadFileError, ConfigError) as error:
        str(error).encode()


@cases()
@given(
    change=st.tuples(st.integers(0), st.binary(min_size=1, max_size=8)),
    name=st.sampled_from(["a.bin", "a.idx", "a.ds", "a.ds.index", "a.npy"]),
)
def test_damaged_token_files_give_every_token_once_or_raise_error(tmp_path_factory, change, name):
    folder = tmp_path_factory.getbasetemp() / "token files"
    if not folder.exists():
        folder.mkdir()
        documents = [np.arange(length, dtype=np.uint16) for length in (5, 0, 17, 3)]
        write_megatron(folder / "a.bin", documents)
        write_datatrove(folder / "a.ds", documents)
        np.save(folder / "a.npy", np.concatenate(documents))
    path = folder / (
        name if name == "a.npy" else name.split(".")[0] + (".bin" if name in ("a.bin", "a.idx") else ".ds")
    )
    damaged = folder / name
    whole = damaged.read_bytes()
    at = change[0] % len(whole)
    damaged.write_bytes(whole[:at] + change[1] + whole[at + len(change[1]) :])
    try:
        file = File(str(path), path.stat().st_size, "")
        found = list(read_tokens(file, Source(source=f"tokens:{path}", token_dtype="uint16"), (0, 0)))
        documents = [row.tokens if isinstance(row, Flat) else row for _, row in found]
        count = sum(map(len, documents))
        assert all(document.dtype.kind in "ui" for document in documents)
        if name != "a.npy":
            content = path.read_bytes()
            assert b"".join(document.tobytes() for document in documents) == content and count
    except BadFileError as error:
        str(error).encode()
    finally:
        damaged.write_bytes(whole)


def test_changed_byte_of_a_shard_is_detected_and_it_is_rewritten(tmp_path, trained, capsys):
    options = [write_jsonl(tmp_path / "a.jsonl"), f"--data.tokenizer={trained.name_or_path}", "--data.val_fraction=0.2"]
    config = configure(tmp_path / "cache", *options)
    prepare_shards(config)
    for pattern in ("units/*/*/", "held_out/*/"):
        (folder,) = (tmp_path / "cache").glob(pattern)
        for name in ("tokens.bin", "documents"):
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
            prepare_shards(config)
            assert (
                f"{folder} is damaged: {name} has another checksum than when it was written" in capsys.readouterr().err
            )
            assert (folder / name).read_bytes() == content


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_tokenizer_learns_from_all_files_in_turn(tmp_path, kind):
    for letter in "abc":
        rows = [letter * 90] * (50 if kind == "jsonl" else 1)
        content = "".join(json.dumps({"text": row}) + "\n" for row in rows) if kind == "jsonl" else rows[0]
        (tmp_path / f"{letter}.{kind}").write_text(content)
    source = Source(source=f"{kind}:{tmp_path}/*.{kind}", text_field="text")
    data = configure(tmp_path, f"--data.source={source.source}").data
    texts = list(islice(_interleaved_texts(source, files_of(source), data, 60), 3))
    assert sorted(texts) == ["a" * 20, "b" * 20, "c" * 20]


def test_run_continues_if_its_text_has_moved(small_run, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "before")
    options = [
        *small_run,
        "--log.sample_every=0",
        "--train.eval_every=0",
        "--log.tensorboard=false",
        "--run.name=moved",
        "--checkpoint.resume=auto",
    ]
    train(load_config([*options, f"--data.source=text:{tmp_path}/before/*.txt", "--train.steps=4"]))
    (tmp_path / "before").rename(tmp_path / "after")
    train(load_config([*options, f"--data.source=text:{tmp_path}/after/*.txt", "--train.steps=6"]))
    steps = [row["step"] for row in read_rows(tmp_path / "runs" / "moved" / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    text = sorted((tmp_path / "after").iterdir())
    for path in text:
        path.write_text(path.read_text().upper())
    with pytest.raises(ConfigError, match="has changed"):
        train(load_config([*options, f"--data.source=text:{tmp_path}/after/*.txt", "--train.steps=8"]))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_documents_end_with_end_of_text_and_no_validation_copy_is_trained_on(tmp_path, trained, packing):
    for number in range(4):
        write_jsonl(tmp_path / f"{number}.jsonl", ROWS[number * 15 : number * 15 + 15] + ROWS[:15])
    given_options = [f"--data.source=jsonl:{tmp_path}/*.jsonl", f"--data.tokenizer={trained.name_or_path}"]
    given_options += ["--data.document_mask=true", f"--data.packing={packing}", "--data.val_fraction=0.001"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smolds_dist.data.shards.SHARD_BYTES", 100)
        found = prepare_data(configure(tmp_path / "cache", *given_options))
    (source,), (order,) = found.sources.values(), found.orders.values()
    assert len(source.shards) == 4 and source.validation.beyond
    order.extend(None)
    trained_on = set()
    for shard in range(4):
        for span in source.spans_in(np.array([shard]), True):
            tokens = source.tokens(shard)[span.start : span.start + span.length]
            assert tokens[-1] == trained.eos_token_id
            table = source.table(shard)
            inside = (table["start"] >= span.start) & (table["start"] < span.start + span.length)
            trained_on |= set(table["text"][inside].tolist())
    assert trained_on and not trained_on & set(source.validation.documents["text"].tolist())


def test_missing_beginning_of_text_is_reported_once(tmp_path, trained, capsys):
    adding = load_tokenizer(trained.name_or_path)
    begin = (adding.bos_token, adding.bos_token_id)
    adding.backend_tokenizer.post_processor = TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    adding.save_pretrained(tmp_path / "adding")
    config = configure(tmp_path, write_jsonl(tmp_path / "a.jsonl"), f"--data.tokenizer={tmp_path / 'adding'}")
    for told in (1, 0):
        assert prepare_shards(config).train[0] != begin[1]
        assert (
            capsys.readouterr().err.count(f"adds {begin[0]} at the beginning of text; training documents do not")
            == told
        )
