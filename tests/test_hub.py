"""A dataset of the Hub: a local web server implements the Hub's listing and reading of a dataset."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ranks import smolds

SHA = "a" * 40
ROWS = [f"row {number} with some words, {number * 7}" for number in range(1000)]
FILES = {
    f"data/train-{number:05}-of-00002.jsonl": "".join(
        json.dumps({"text": row}) + "\n" for row in ROWS[number::2]
    ).encode()
    for number in range(2)
}


def entry(path: str) -> dict:
    return {"type": "file", "oid": hashlib.sha1(FILES[path]).hexdigest(), "size": len(FILES[path]), "path": path}


class Hub(BaseHTTPRequestHandler):
    """Answers every fifth request for a range of a file with 503."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if re.fullmatch(r"/api/datasets/some/set(/revision/\w+)?", path):
            siblings = [{"rfilename": file} for file in FILES]
            self.answer({"_id": "0", "id": "some/set", "sha": SHA, "private": False, "siblings": siblings, "tags": []})
        elif found := re.fullmatch(r"/api/datasets/some/set/tree/\w+/?(.*)", path):
            folder = {"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"}
            files = [entry(file) for file in FILES]
            whole = "recursive=true" in query.lower()
            self.answer(files if found[1] else [folder, *files] if whole else [folder])
        elif (found := re.fullmatch(r"/datasets/some/set/resolve/\w+/(.*)", path)) and found[1] in FILES:
            self.send_part(FILES[found[1]])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_part(self, content: bytes):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        self.server.parts += bool(asked)
        if asked and self.server.parts % 5 == 2:
            self.send(503, b"", {})
            return
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}"
        self.send(206 if asked else 200, part, headers)

    def send(self, status: int, content: bytes, headers: dict):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content), "X-Repo-Commit": SHA}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.parts = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_dataset_is_read_file_by_file_and_later_without_a_network(small_run, hub, tmp_path):
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": f"{tmp_path}/hf",
        "HF_HUB_OFFLINE": "0",
    }
    options = [*small_run, "--data.source=hf:some/set", f"--data.cache_dir={tmp_path}/cache", "--log.tensorboard=false"]
    options += ["--data.seq_len=16", "--train.eval_sequences=2"]
    online = smolds("train", *options, "--run.name=online", cold=True, **environment)
    assert online.returncode == 0, online.text
    assert re.search(r"HTTP Error 503 .*/resolve/a+/data/train-0000[01]-of-00002.jsonl", online.stderr)
    assert "hf: 768 tokens, " in online.stdout
    hub.shutdown()
    hub.server_close()
    offline = smolds("data", "show", str(tmp_path / "runs" / "online"), "--step", "6", cold=True, **environment)
    assert offline.returncode == 0, offline.text  # the batch equals the recorded one
    shown = smolds("data", "stats", "--json", "--", *options, "--run.name=stats", cold=True, **environment)
    told = json.loads(shown.stdout)
    assert told["files"] == 2 and told["documents"] == len(ROWS) and told["copies"] == 0
