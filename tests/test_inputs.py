"""Damaged or untrusted JSON and YAML files: an error, exit code 2, quickly, without effects on other runs."""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from fuzz import cases, damaged, flipped
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from smolds_dist import cli
from smolds_dist.checkpoint.files import DamagedCheckpointError, best_checkpoint, read_manifest
from smolds_dist.config import load_config
from smolds_dist.costs.hardware import load_hardware
from smolds_dist.data.tokenizer import load_tokenizer
from smolds_dist.errors import ConfigError
from smolds_dist.inputs import printable, read_yaml
from smolds_dist.interchange.model_folder import check_settings, check_sizes, weight_files
from smolds_dist.launching.failure import rank_entries
from smolds_dist.observe.report import _check, training_log
from smolds_dist.observe.rows import read_rows, truncate_rows
from smolds_dist.observe.runs import read_run, table
from smolds_dist.training.trainer import train

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD = {
    "empty": b"", "null": b"null", "list": b"[]", "object": b"{}", "deep": b"[" * 100_000, "not UTF-8": b"\xff\xfe{",
    "deep pairs": b'{"a":' * 100 + b"1" + b"}" * 100, "bomb": BOMB.encode(), "escape": b'{"\x1b[31m": "\x1b]0;x\x07"}',
    "digits": b'{"step": ' + b"9" * 5000 + b"}", "itself": b"a: &a [*a]", "object of Python": b"a: !!python/object:os.x {}",
    "sixties": b"a: 1" + b":00" * 100_000, "fifo": None, "folder": None,
}  # fmt: skip
CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 16, "head_dim": 4, "eos_token_id": [0, 2], "rope_theta": 1e4,
    "rope_scaling": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def write_odd(path: Path, name: str) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    if name == "fifo":
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    else:
        path.write_bytes(ODD[name])


def main(monkeypatch, capsys, *args: object) -> tuple[int, str]:
    """Return exit code and output of a command, and check that it is quick."""
    monkeypatch.setattr(sys, "argv", ["smolds", *map(str, args)])
    begin = time.process_time()
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    assert time.process_time() - begin < 5  # including the first command's imports
    out = capsys.readouterr()
    return code, out.out + out.err


@pytest.fixture(scope="module")
def copied(kept_run, tmp_path_factory):
    """A folder with a run to be damaged and one that stays intact."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("bad", "good"):
        shutil.copytree(kept_run[0], folder / name, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = {"model.embed_tokens.weight": (64, 8), "model.layers.1.mlp.up_proj.weight": (16, 8)}
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, folder / "model.safetensors")
    return folder


def check_sentence(error: Exception) -> None:
    assert str(error).isprintable()


def sign(folder: Path, content: bytes) -> None:
    """Write a manifest with a matching digest, as an attacker can."""
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.json.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")


# File by kind, and the commands that read it; RUNS is the folder of runs, BAD the damaged run.
COMMANDS = {
    "config.yaml": (["runs", "RUNS"], ["report", "BAD", "--rebuild-tensorboard"], ["train", "--config", "FILE"]),
    "state.json": (["runs", "RUNS"],),
    "submitted.json": (["runs", "RUNS"],),
    "metrics.jsonl": (["report", "BAD"], ["runs", "RUNS"]),
    "checkpoints/step_00000004/manifest.json": (["checkpoint", "ls", "BAD"], ["checkpoint", "verify", "BAD"]),
    "hardware.yaml": (["plan", "--hardware", "FILE", "--", "--preset", "debug"],),
}
KEEPS = ("runs", "checkpoint")  # commands that also list intact ones


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", COMMANDS)
def test_odd_files_are_errors_and_affect_no_other_run(copied, monkeypatch, capsys, kind, odd):
    bad = copied / "bad"
    path = bad / kind
    whole = path.read_bytes() if path.is_file() else None
    digest = bad / "checkpoints" / "step_00000004" / "manifest.json.sha256"
    signed = digest.read_text()
    events = sorted((bad / "tensorboard").glob("*")) if (bad / "tensorboard").is_dir() else []
    try:
        write_odd(path, odd)
        if path.name == "manifest.json" and path.is_file():
            sign(path.parent, ODD[odd])
        for command in COMMANDS[kind]:
            if (kind, odd, command[0]) == ("config.yaml", "object", "train"):
                continue  # all defaults: it would train
            names = {"RUNS": copied, "BAD": bad, "FILE": path}
            code, text = main(monkeypatch, capsys, *(names.get(word, word) for word in command))
            assert "Traceback" not in text and "\x1b" not in text and "\x07" not in text
            if command[0] in KEEPS:
                assert code in (0, 1), text
                assert "good" in text or "step" in text
            elif not (kind == "config.yaml" and odd == "object"):
                assert code == 2 and len(text.strip().splitlines()) <= 2 + text.count("is damaged"), text
        assert not events or sorted((bad / "tensorboard").glob("*")) == events
    finally:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if whole is not None:
            path.write_bytes(whole)
        digest.write_text(signed)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "command", [["generate", "MODEL"], ["import", "MODEL", "--to", "NEW"], ["eval", "MODEL", "--data.source=stdlib"]]
)
def test_odd_models_are_errors(model, tmp_path, monkeypatch, capsys, command, file, odd):
    folder = shutil.copytree(model, tmp_path / "model")
    write_odd(folder / file, odd)
    if file == "tokenizer_config.json" and odd in ("object", "deep pairs", "escape"):
        return
    names = {"MODEL": folder, "NEW": tmp_path / "new"}
    code, text = main(monkeypatch, capsys, *(names.get(word, word) for word in command))
    assert code == 2 and "Traceback" not in text and "\x1b" not in text and len(text.splitlines()) == 1, text
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**7), ("hidden_size", 10**18), ("num_attention_heads", -1), ("vocab_size", 10**9),
     ("num_hidden_layers", 3), ("hidden_size", 10**5), ("intermediate_size", 10**6), ("rope_theta", float("nan")),
     ("rms_norm_eps", "1e-5"), ("model_type", None), ("rope_scaling", []), ("num_local_experts", 10**6)],
)  # fmt: skip
def test_sizes_that_contradict_the_weights_are_rejected(model, tmp_path, monkeypatch, capsys, field, value):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(CONFIG | {field: value}))
    code, text = main(monkeypatch, capsys, "generate", folder)
    assert code == 2 and str(folder / "config.json") in text and len(text.splitlines()) == 1, text


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "model.bin"]
)
def test_weights_outside_the_folder_are_not_read(model, tmp_path, name):
    folder = shutil.copytree(model, tmp_path / "model")
    shutil.copy(model / "model.safetensors", tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ConfigError, match="not a safetensors file of its folder"):
        weight_files(folder)


@cases()
@given(values=damaged(CONFIG))
def test_any_model_config_is_checked_or_rejected(model, values):
    path = model / "fuzzed"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(values, default=str))
    shutil.copy(model / "model.safetensors", path)
    try:
        check_sizes(path, check_settings(path))
    except ConfigError as error:
        check_sentence(error)


@cases()
@given(data=st.data())
def test_any_manifest_is_read_or_damaged(copied, data):
    folder = copied / "fuzzed" / "checkpoints" / "step_00000006"
    whole = (copied / "good" / "checkpoints" / "step_00000006" / "manifest.json").read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    as_json = damaged(json.loads(whole)).map(lambda values: json.dumps(values).encode())
    sign(folder, data.draw(as_json | flipped(whole)))
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpointError as error:
        check_sentence(error)
    else:
        assert manifest.samples >= 0 and manifest.layout and best_checkpoint({folder: manifest}) in (folder, None)


@cases()
@given(data=st.data())
def test_any_run_is_listed(copied, tmp_path_factory, data):
    folder = copied / "fuzzed"
    folder.mkdir(exist_ok=True)
    for name in ("config.yaml", "metrics.jsonl", "state.json", "samples.jsonl"):
        shutil.copy(copied / "good" / name, folder)
    name = data.draw(st.sampled_from(["config.yaml", "metrics.jsonl", "state.json"]))
    whole = (folder / name).read_bytes()
    if name == "metrics.jsonl":
        rows = [json.loads(line) for line in whole.splitlines()]
        place = data.draw(st.integers(0, len(rows) - 1))
        rows[place] = data.draw(damaged(rows[place]))
        content = "\n".join(map(json.dumps, rows)).encode()
    else:
        content = json.dumps(data.draw(damaged(yaml.safe_load(whole)))).encode()
    (folder / name).write_bytes(data.draw(st.just(content) | flipped(whole)))
    assert len(table([read_run(copied / "good"), read_run(folder)]).splitlines()) == 3
    try:
        _check(folder)
        assert training_log(folder)
    except ConfigError as error:
        check_sentence(error)


@cases()
@given(text=st.text(alphabet="ab:*&[]{},-?!|>'\"#%@ \n<0", max_size=60))
def test_any_yaml_is_read_or_rejected(copied, text):
    path = copied / "any.yaml"
    path.write_text(text)
    try:
        read_yaml(path, "fix it", dict)
    except ConfigError as error:
        check_sentence(error)


def test_a_ranks_process_id_is_of_one_process(tmp_path):
    """A signal to process id -1 would reach all of the user's processes."""
    good = {"rank": 0, "host": "n", "pid": 7, "system": "s", "started": 1.0, "state": "running"}
    for number, pid in enumerate((7, -1, 0, "7", None)):
        (tmp_path / f"rank_{number:05}.json").write_text(json.dumps(good | {"pid": pid}))
    assert [entry["pid"] for entry in rank_entries(tmp_path)] == [7]


@pytest.mark.parametrize("name", ["no", "2024", "on", "null", "1e3"])
def test_names_that_yaml_reads_as_another_type_must_be_quoted(tmp_path, name):
    path = tmp_path / "names.yaml"
    sources = "data:\n  sources:\n    {}: {{source: stdlib}}\n    web: {{source: stdlib}}\n"
    path.write_text(sources.format(name))
    with pytest.raises(ConfigError, match="quote it"):
        load_config(["--config", str(path)])
    path.write_text(sources.format(f"'{name}'"))
    assert list(load_config(["--config", str(path)]).data.sources) == [name, "web"]


@pytest.mark.parametrize("place", range(4))
def test_truncating_rows_drops_only_a_damaged_line(kept_run, copied, capsys, place):
    """A resume calls `truncate_rows` before it writes."""
    path = shutil.copy(kept_run[0] / "metrics.jsonl", copied / "metrics.jsonl")
    rows = read_rows(kept_run[0] / "metrics.jsonl")
    lines = Path(path).read_bytes().splitlines(keepends=True)
    Path(path).write_bytes(b"".join([*lines[:place], lines[place].replace(b":", b"\xff", 1), *lines[place + 1 :]]))
    assert truncate_rows(Path(path), 6) == rows[:place] + rows[place + 1 :]


def test_untrusted_text_is_printed_as_one_line():
    assert printable("a\x1b]0;x\x07\nb\ud800 é") == "a\\x1b]0;x\\x07\\nb\\ud800 é"


def test_hardware_out_of_range_is_rejected(tmp_path):
    path = tmp_path / "machine.yaml"
    entry = yaml.safe_load((Path(cli.__file__).parent / "costs" / "hardware.yaml").read_text())["h100"]
    for field, value in (("memory", -1), ("per_node", 0), ("bandwidth", float("nan")), ("peak", {"bf16": "x"})):
        path.write_text(yaml.safe_dump({"here": entry | {field: value}}))
        with pytest.raises(ConfigError, match=field):
            load_hardware(str(path))


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "intermediate_size", "num_experts"])
def test_checkpoint_whose_config_is_larger_than_its_tensors_is_rejected(copied, tmp_path, monkeypatch, capsys, field):
    run = shutil.copytree(copied / "good", tmp_path / "run", symlinks=True)
    folder = run / "checkpoints" / "step_00000006"
    values = json.loads((folder / "manifest.json").read_bytes())
    values["config"]["model"][field] *= 1000
    sign(folder, json.dumps(values).encode())
    code, text = main(monkeypatch, capsys, "generate", folder)
    assert code == 2 and len(text.splitlines()) == 1, text


def test_a_resume_drops_only_a_damaged_line(kept_run, copied, tmp_path):
    shutil.copytree(copied / "good", tmp_path / "one", symlinks=True)
    path = tmp_path / "one" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff", *lines[1:]]))
    rows = [json.loads(line) for line in [lines[0], *lines[2:]]]
    options = [option for option in kept_run[1] if not option.startswith("--run.dir")]
    train(load_config([*options, f"--run.dir={tmp_path}", "--checkpoint.resume=auto", "--train.steps=7"]))
    assert read_rows(path)[: len(rows)] == rows


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_odd_tokenizers_are_rejected(kept_run, tmp_path, name):
    folder = shutil.copytree(kept_run[0] / "tokenizer", tmp_path / "tokenizer")
    for odd in ODD:
        write_odd(folder / name, odd)
        if odd != "object" or name == "tokenizer.json":  # without settings it has no end-of-text token
            with pytest.raises(ConfigError, match="tokenizer"):
                load_tokenizer(str(folder))
