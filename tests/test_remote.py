"""Sources on a web server that is slow, fails, truncates responses, or is unavailable for a while."""

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pyarrow.parquet
import pytest
from test_data import configure, documents_of, prepare_shards, texts_of

from smolds_dist.data import remote, shards
from smolds_dist.errors import ConfigError

ROWS = [f"row {number} " + "with a few words " * (number % 13) for number in range(2000)]


class Server(ThreadingHTTPServer):
    """Serves files from memory.

    Args:
        behave: given the number of a GET request, from 1, and the bytes of its response, returns the HTTP status and the
            bytes to send, after which the connection is closed.
    """

    daemon_threads = True

    def __init__(self, files, behave=lambda number, content: (200, content), ranges=True, port=0):
        self.files, self.behave, self.ranges, self.requests = files, behave, ranges, Counter()
        super().__init__(("127.0.0.1", port), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        content = self.server.files.get(self.path.partition("?")[0])
        if content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranges else None
        status = 206 if asked else 200
        if asked:
            content = content[int(asked[1]) : int(asked[2]) + 1]
        sent = content
        if self.command == "GET":
            self.server.requests["GET"] += 1
            answer, sent = self.server.behave(self.server.requests["GET"], content)
            if answer != 200:
                self.send_error(answer)
                return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(sent)


def file_bytes(kind: str) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), out, row_group_size=100)
    return out.getvalue().to_pybytes()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 2**14)  # several requests per file
    servers = []

    def start(*args, **kwargs) -> Server:
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def slow(_number, content):
    time.sleep(0.05)
    return 200, content


def failing(number, content):
    return (503, b"") if number % 5 == 2 else (200, content)


def truncating(number, content):
    return 200, content[: len(content) // 2] if number % 5 == 2 else content


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("behave", "said"),
    [(slow, None), (failing, "HTTP 503"), (truncating, "retrying in 1 s")],
    ids=["slow", "failing", "truncating"],
)
def test_every_row_is_read_once_from_a_bad_server(tmp_path, serve, capsys, kind, behave, said):
    server = serve({f"/a.{kind}": file_bytes(kind)}, behave)
    data = configure(tmp_path, f"--data.source={kind}:{server.address}/a.{kind}").data
    assert texts_of(data) == ROWS
    assert server.requests["GET"] > 3
    err = capsys.readouterr().err
    if said is None:
        assert not err
    else:
        assert all(
            re.match(r"http://127.0.0.1:\d+/a.\w+ did not arrive completely \(", line) for line in err.splitlines()
        )
        assert said in err


def test_server_without_ranges_sends_complete_files(tmp_path, serve, capsys):
    server = serve({"/a.jsonl": file_bytes("jsonl")}, truncating, ranges=False)
    data = configure(tmp_path, f"--data.source=jsonl:{server.address}/a.jsonl").data
    assert texts_of(data) == ROWS
    assert "did not arrive completely" in capsys.readouterr().err


def test_chunks_of_a_remote_file_cover_the_file(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 2_000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 2_000)
    for kind in ("jsonl", "parquet"):
        server = serve({f"/a.{kind}": file_bytes(kind)})
        config = configure(
            tmp_path / kind, f"--data.source={kind}:{server.address}/a.{kind}", "--data.val_fraction=0.1"
        )
        found = prepare_shards(config)
        assert len(found.folders) > 3
        assert sorted(documents_of(found)) == sorted(ROWS)


def test_missing_file_is_not_retried(tmp_path, serve, capsys):
    server = serve({"/a.jsonl": file_bytes("jsonl")}, lambda number, content: (403, b""))
    with pytest.raises(ConfigError, match="matches no file"):
        texts_of(configure(tmp_path, f"--data.source=jsonl:{server.address}/b.jsonl").data)
    with pytest.raises(ConfigError, match=r"cannot be read|is damaged"):
        texts_of(configure(tmp_path, f"--data.source=jsonl:{server.address}/a.jsonl").data)
    assert "retrying" not in capsys.readouterr().err


def test_unavailable_server_is_retried(tmp_path, serve, capsys):
    files = {"/a.jsonl": file_bytes("jsonl")}
    server = serve(files)
    data = configure(tmp_path, f"--data.source=jsonl:{server.address}/a.jsonl").data
    server.behave = lambda number, content: (
        (threading.Thread(target=server.stop).start(), (503, b""))[1] if number == 2 else (200, content)
    )
    back = threading.Timer(4, lambda: serve(files, port=server.server_port))
    back.start()
    assert texts_of(data) == ROWS
    assert "retrying in 2 s" in capsys.readouterr().err
