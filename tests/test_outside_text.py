"""Text, tokenizers and token files as strangers make them: read, or skipped and counted, or refused with a sentence."""

import http.server
import json
import os
import threading
from email.utils import formatdate

import numpy as np
import pytest
from test_data import configure, prepare_shards
from test_formats import write_datatrove, write_megatron

from smolds_dist.data.source import files_of
from smolds_dist.data.tokenizer import load_tokenizer, tokenizer_digest
from smolds_dist.errors import ConfigError
from smolds_dist.settings import Source

ROWS = [f"row {number}: " + "some words of a text " * (1 + number % 5) for number in range(60)]


def write_jsonl(path, rows=ROWS) -> str:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return f"--data.source=jsonl:{path}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer that was trained on `ROWS`."""
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


def test_tokenizer_with_gaps_in_its_ids_is_refused(tmp_path, trained):
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
