"""Every format of text, plain, compressed or remote, gives the same documents; how text is processed."""

import bz2
import functools
import gzip
import http.server
import json
import lzma
import struct
import threading
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from test_data import configure, documents_of, prepare_shards, texts_of

from smolds_dist.data.prepare import prepare_data
from smolds_dist.data.tokenizer import LONGEST_TOKEN
from smolds_dist.errors import ConfigError

CASES = Path(__file__).parent / "cases"
TEXTS = [f"text {number}: über alles, {'wort ' * (number % 7)}Ende\nzweite Zeile {number}" for number in range(60)]
COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}


def file_bytes(kind: str) -> bytes:
    """Return a file of this kind with `TEXTS`; a text file has only the first."""
    rows = [{"other": 1, "text": text} for text in TEXTS]
    if kind == "text":
        return TEXTS[0].encode()
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        new = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "arrow", "arrow stream"])
def test_every_format_and_compression_gives_the_same_documents(tmp_path, kind, ending):
    name = kind.split()[0]
    (tmp_path / f"a.{name}{ending}").write_bytes(COMPRESS[ending](file_bytes(kind)))
    data = configure(tmp_path, f"--data.source={name}:{tmp_path}/a.*").data
    assert texts_of(data) == (TEXTS[:1] if kind == "text" else TEXTS)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_concatenated_compressed_files_are_read_completely(tmp_path, ending):
    """As written by parallel compressors, or joined with `cat`."""
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](file_bytes("jsonl")) * 3)
    assert texts_of(configure(tmp_path, f"--data.source=jsonl:{tmp_path}/a.jsonl{ending}").data) == TEXTS * 3


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_truncated_compressed_file_is_damaged(tmp_path, ending):
    content = COMPRESS[ending](file_bytes("jsonl") * 3)
    (tmp_path / f"a.jsonl{ending}").write_bytes(content[: len(content) // 2])
    source = f"--data.source=jsonl:{tmp_path}/a.jsonl{ending}"
    with pytest.raises(ConfigError, match=rf"a.jsonl\{ending} (is damaged|, line).*skip"):
        texts_of(configure(tmp_path, source).data)
    said: list[str] = []
    texts_of(configure(tmp_path, source, "--data.on_bad_file=skip", "--data.on_bad_row=skip").data, said.append)
    assert said


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_remote_files_are_read_and_listed(tmp_path, kind):
    system = fsspec.filesystem("memory")
    for number, ending in enumerate(COMPRESS):
        with system.open(f"/corpus/{number}.{kind}{ending}", "wb") as file:
            file.write(COMPRESS[ending](file_bytes(kind)))
    for pattern in (f"memory://corpus/*.{kind}*", "memory://corpus"):
        config = configure(tmp_path, f"--data.source={kind}:{pattern}", "--data.val_fraction=0.2")
        assert texts_of(config.data) == TEXTS * len(COMPRESS)
    before = prepare_shards(config)
    assert sorted(documents_of(before)) == sorted(TEXTS * len(COMPRESS))
    assert before.files[0] == f"memory:///corpus/0.{kind}"
    with system.open(f"/corpus/0.{kind}", "wb") as file:
        file.write(file_bytes(kind))
    assert prepare_shards(config).folders != before.folders
    with pytest.raises(ConfigError, match="matches no file"):
        texts_of(configure(tmp_path, f"--data.source={kind}:memory://nowhere/*").data)
    with pytest.raises(ConfigError, match="could not be listed"):
        texts_of(configure(tmp_path, f"--data.source={kind}:nosuch://nowhere/*").data)
    system.rm("/corpus", recursive=True)


def test_local_file_system_of_fsspec_gives_the_same(tmp_path):
    for number, ending in enumerate(COMPRESS):
        (tmp_path / f"{number}.jsonl{ending}").write_bytes(COMPRESS[ending](file_bytes("jsonl")))
    for pattern in (f"file://{tmp_path}/*.jsonl*", f"file://{tmp_path}"):
        assert texts_of(configure(tmp_path, f"--data.source=jsonl:{pattern}").data) == TEXTS * len(COMPRESS)


def test_file_behind_http_is_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(COMPRESS[".gz"](file_bytes("jsonl")))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.jsonl.gz"
        assert texts_of(configure(tmp_path, f"--data.source=jsonl:{address}").data) == TEXTS
        with pytest.raises(ConfigError, match="matches no file"):
            texts_of(configure(tmp_path, f"--data.source=jsonl:{address}x").data)
        server.shutdown()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "hf"])
def test_nested_fields_and_their_nulls(tmp_path, kind):
    rows: list[dict] = [
        {"id": 0, "doc": {"text": "one", "n": 1}},
        {"id": 1, "doc": None},
        {"id": 2, "doc": {"text": None, "n": 1}},
    ]
    rows.append({"id": 3, "doc": {"text": "four", "n": 2}})
    name = "jsonl" if kind == "hf" else kind
    (tmp_path / "d").mkdir()
    if name == "jsonl":
        (tmp_path / "d" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = pyarrow.Table.from_pylist(rows)
        write = pyarrow.parquet.write_table if kind == "parquet" else pyarrow.feather.write_feather
        write(table, tmp_path / "d" / f"a.{kind}")
    source = f"hf:{tmp_path}/d" if kind == "hf" else f"{kind}:{tmp_path}/d"
    assert texts_of(configure(tmp_path, f"--data.source={source}", "--data.text_field=doc.text").data) == [
        "one",
        "four",
    ]
    for field in ("doc.body", "body", "id.text"):
        with pytest.raises(ConfigError, match=r"set --data\.text_field to doc\.text"):
            texts_of(configure(tmp_path, f"--data.source={source}", f"--data.text_field={field}").data)
    with pytest.raises(ConfigError, match=r"doc\.n.*set --data\.text_field to doc\.text"):
        texts_of(configure(tmp_path, f"--data.source={source}", "--data.text_field=doc.n").data)


def test_folder_stands_for_the_files_of_its_kind(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.jsonl", "deep/b.jsonl.gz", "notes.md"):
        (tmp_path / name).write_bytes(COMPRESS[".gz" if name.endswith("gz") else ""](file_bytes("jsonl")))
    assert texts_of(configure(tmp_path, f"--data.source=jsonl:{tmp_path}").data) == TEXTS * 2


# How text is processed; each of these files failed once.


def case(tmp_path, name: str, *options: str):
    return configure(tmp_path, f"--data.source=jsonl:{CASES}/{name}", "--data.val_fraction=0.1", *options)


def rows_of_case(name: str) -> list[dict]:
    lines = (CASES / name).read_text(encoding="utf-8-sig").splitlines()
    return [json.loads(line) for line in lines]


def test_case_null_rows(tmp_path, capsys):
    written = [row["text"] for row in rows_of_case("null_rows.jsonl")]
    whole = [text for text in written if text and text.strip()]
    assert sorted(documents_of(prepare_shards(case(tmp_path, "null_rows.jsonl")))) == sorted(whole)
    assert f"{len(written) - len(whole)} of {len(written)} rows contain no text" in capsys.readouterr().err


def test_case_numbers(tmp_path):
    with pytest.raises(
        ConfigError, match=r"numbers.jsonl, line 1: the field 'text' has a value of type int.*no field contains"
    ):
        prepare_shards(case(tmp_path, "numbers.jsonl"))


def test_case_control_tokens(tmp_path):
    written = [row["text"] for row in rows_of_case("control_tokens.jsonl")]
    shards = prepare_shards(case(tmp_path, "control_tokens.jsonl"))
    eos = shards.tokenizer.eos_token_id
    assert sorted(documents_of(shards)) == sorted(written)
    assert (shards.train == eos).sum() + (shards.val == eos).sum() == len(written)
    allowed = prepare_shards(case(tmp_path, "control_tokens.jsonl", "--data.allow_control_tokens=true"))
    spelled = sum(text.count("<|endoftext|>") for text in written)
    assert (allowed.train == eos).sum() + (allowed.val == eos).sum() == len(written) + spelled


def test_case_byte_order_mark(tmp_path):
    written = [row["text"] for row in rows_of_case("byte_order_mark.jsonl")]
    assert sorted(documents_of(prepare_shards(case(tmp_path, "byte_order_mark.jsonl")))) == sorted(written)


def test_case_nested_field(tmp_path):
    written = [row["doc"]["text"] for row in rows_of_case("nested_field.jsonl")]
    shards = prepare_shards(case(tmp_path, "nested_field.jsonl", "--data.text_field=doc.text"))
    assert sorted(documents_of(shards)) == sorted(written)


def test_case_compressed(tmp_path):
    with gzip.open(CASES / "compressed.jsonl.gz", "rt") as lines:
        written = [json.loads(line)["text"] for line in lines]
    assert sorted(documents_of(prepare_shards(case(tmp_path, "compressed.jsonl.gz")))) == sorted(written)


def test_case_one_bad_row(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"one_bad_row.jsonl, line 61: not a JSON object; .*--data.on_bad_row skip"):
        prepare_shards(case(tmp_path, "one_bad_row.jsonl"))
    shards = prepare_shards(case(tmp_path, "one_bad_row.jsonl", "--data.on_bad_row=skip"))
    assert len(documents_of(shards)) == 120
    assert "1 of 121 rows were skipped (1 no JSON object)" in capsys.readouterr().err
    assert json.loads((shards.folders[0] / "bad_rows.jsonl").read_text())["line"] == 61


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path):
    texts = ["one\u2028two\u0085three\x0cfour", "five\r\nsix"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in texts), newline=""
    )
    assert texts_of(configure(tmp_path, f"--data.source=jsonl:{tmp_path}/a.jsonl").data) == texts


def test_wrong_column_of_last_file_is_reported_early(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    tokenizer = prepare_shards(configure(tmp_path, f"--data.source=jsonl:{tmp_path}/0.jsonl")).tokenizer.name_or_path
    (tmp_path / "9.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    monkeypatch.setattr("smolds_dist.data.shards.tokenize", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ConfigError, match=r"9\.jsonl, line 1: no field 'text'"):
        prepare_shards(configure(tmp_path, f"--data.source=jsonl:{tmp_path}/*.jsonl", f"--data.tokenizer={tokenizer}"))


def test_tokens_have_a_maximum_length(tmp_path):
    (tmp_path / "a.txt").write_text(("字" * 3000 + "\n") * 20)
    (tmp_path / "b.txt").write_text("abcdefghij" * 3000)
    tokenizer = prepare_data(configure(tmp_path, f"--data.source=text:{tmp_path}/*.txt")).tokenizer
    longest = max(tokenizer.get_vocab(), key=len)
    assert 8 < len(longest) <= LONGEST_TOKEN


# Pre-tokenized data.


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """Return a tokenizer's folder, and documents encoded by it."""
    folder = tmp_path_factory.mktemp("tokenized")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = prepare_shards(configure(folder, f"--data.source=jsonl:{folder}/a.jsonl")).tokenizer
    return tokenizer, [np.array(tokenizer(text).input_ids, dtype=np.uint16) for text in TEXTS]


def write_megatron(path: Path, documents: list[np.ndarray]) -> None:
    """Write the layout of Megatron-LM's IndexedDatasetBuilder, with two sequences per document."""
    halves = [part for ids in documents for part in np.array_split(ids, 2)]
    lengths = np.array([len(part) for part in halves], dtype=np.int32)
    with path.with_suffix(".idx").open("wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(halves), len(documents) + 1))
        index.write(lengths.tobytes())
        index.write((2 * np.concatenate(([0], np.cumsum(lengths)[:-1]))).astype(np.int64).tobytes())
        index.write((2 * np.arange(len(documents) + 1)).astype(np.int64).tobytes())
    path.write_bytes(np.concatenate(halves).tobytes())


def write_datatrove(path: Path, documents: list[np.ndarray]) -> None:
    path.write_bytes(np.concatenate(documents).tobytes())
    ends = np.cumsum([len(ids) for ids in documents]).astype(np.uint64)
    path.with_name(path.name + ".index").write_bytes(ends.tobytes())


def write_npy(path: Path, documents: list[np.ndarray]) -> None:
    np.save(path, np.concatenate(documents).astype(np.int32))


def write_flat(path: Path, documents: list[np.ndarray]) -> None:
    path.write_bytes(np.concatenate(documents).astype(np.uint32).tobytes())


WRITERS = {"a.bin": write_megatron, "a.ds": write_datatrove, "a.npy": write_npy, "b.bin": write_flat}


@pytest.mark.parametrize("name", WRITERS)
def test_pretokenized_data_is_used_unchanged(tmp_path, tokenized, name):
    tokenizer, documents = tokenized
    eos = tokenizer.eos_token_id
    closed = [np.append(ids, eos) for ids in documents]
    flat = name in ("a.npy", "b.bin")
    WRITERS[name](tmp_path / name, closed if flat else documents)
    options = [f"--data.source=tokens:{tmp_path}/a*" if name != "b.bin" else f"--data.source=tokens:{tmp_path}/b.bin"]
    options += [f"--data.tokenizer={tokenizer.name_or_path}", "--data.token_dtype=uint32", "--data.val_fraction=0.2"]
    shards = prepare_shards(configure(tmp_path, *options))
    table = shards.train_documents
    found = np.split(np.asarray(shards.train), table["start"][1:])
    assert len(found) > 30 and 3 < (np.asarray(shards.val) == eos).sum() < 30
    for ids, number in zip(found, table["number"].tolist(), strict=True):
        assert ids.tolist() == closed[number - 1].tolist()
    assert shards.val_bytes == sum(len(text.encode()) for text in documents_of(shards)[-(shards.val == eos).sum() :])


def test_pretokenized_data_that_does_not_fit_raises_error(tmp_path, tokenized):
    tokenizer, documents = tokenized
    given = [f"--data.source=tokens:{tmp_path}/a.npy", f"--data.tokenizer={tokenizer.name_or_path}"]
    np.save(tmp_path / "a.npy", np.concatenate([*documents, [len(tokenizer)]]).astype(np.int32))
    with pytest.raises(
        ConfigError, match=f"a.npy has the token id {len(tokenizer)} in document 1, but the tokenizer has ids 0 to"
    ):
        prepare_shards(configure(tmp_path, *given))
    np.save(tmp_path / "a.npy", np.ones(1000))
    with pytest.raises(ConfigError, match="contains float64 values instead of token ids"):
        prepare_shards(configure(tmp_path, *given))
    with pytest.raises(ConfigError, match="a tokenizer is trained on text"):
        configure(tmp_path, given[0])
    (tmp_path / "c.bin").write_bytes(b"123")
    with pytest.raises(ConfigError, match="not a whole number of uint16 ids"):
        prepare_shards(configure(tmp_path, given[1], f"--data.source=tokens:{tmp_path}/c.bin"))
    write_megatron(tmp_path / "d.bin", documents)
    (tmp_path / "d.bin").write_bytes(np.concatenate(documents[1:]).tobytes())
    with pytest.raises(ConfigError, match="its index"):
        prepare_shards(configure(tmp_path, given[1], f"--data.source=tokens:{tmp_path}/d.bin"))
    (tmp_path / "e.ds").write_bytes(b"1234")
    with pytest.raises(ConfigError, match=r"no e\.ds\.index next to it"):
        prepare_shards(configure(tmp_path, given[1], f"--data.source=tokens:{tmp_path}/e.ds"))
