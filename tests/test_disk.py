"""Disks that are full or read-only, neighbours and signals: one message, and nothing half-written is left."""

import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from test_faults import needs_mount, on_file_system

from smolds_dist.checkpoint.new_folder import new_file, new_folder
from smolds_dist.cli import main
from smolds_dist.errors import ConfigError
from smolds_dist.files import replace_text, replaced
from smolds_dist.observe.report import report

ADVICE = "check that it exists and is writable, and the disk's free space."


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder under `folder`, with what files hold."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


@pytest.fixture(scope="module")
def reported_run(kept_run, tmp_path_factory):
    """A copy of the run of six steps with its reports."""
    folder = tmp_path_factory.mktemp("reported") / "one"
    shutil.copytree(kept_run[0], folder, symlinks=True)
    report([str(folder), "--html"])
    return folder


COMMANDS = {  # R: a run; T: a folder that holds nothing; of each, bytes that a file can have
    "export": (30_000, "export R --to T/new/exported --no-check"),
    "gguf": (50_000, "export R --to T/new/model.gguf --format gguf --no-check"),
    "convert": (50_000, "checkpoint convert R --to T/new/run"),
    "average": (50_000, "checkpoint average R --steps 2:6:2 --to T/new/run"),
    "branch": (1_000, "branch R --step 4 --to T/new/run"),
    "import": (50_000, "import R/export --to T/new/run"),
    "report": (9_000, "report R"),
    "html": (60_000, "report R --html"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_without_room_a_command_ends_with_a_message_and_leaves_what_was_there(reported_run, tmp_path, capsys, name):
    most, command = COMMANDS[name]
    words = [word.replace("R", str(reported_run)).replace("T/", f"{tmp_path}/") for word in command.split()]
    before = contents(reported_run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))  # as a full disk
    try:
        with pytest.raises(SystemExit, match="2"):
            main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (message,) = capsys.readouterr().err.splitlines()
    target = str(tmp_path / "new") if "--to" in words else str(reported_run)
    assert message.startswith(f"smolds: {target}/") and message.endswith(ADVICE)
    assert not list(tmp_path.iterdir())
    assert contents(reported_run) == before


DRIVER = """
import contextlib, io, json, os, sys
from smolds_dist.cli import main
for words in json.loads(sys.argv[1]):
    if words[0] == "mount":
        os.spawnvp(os.P_WAIT, "mount", words)
        continue
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        code = None
        try:
            main(words)
        except SystemExit as end:
            code = end.code
            raise
        finally:
            sys.__stdout__.write(json.dumps([code, said.getvalue()]) + chr(10))
"""


@needs_mount
def test_prepare_train_and_resume_on_a_full_and_on_a_read_only_disk(kept_run, tmp_path):
    (run, options), small = kept_run, tmp_path / "small"
    fresh = [*options, f"--run.dir={small}", f"--data.tokenizer={run}/tokenizer", f"--data.cache_dir={small}/cache"]
    commands = [
        ["data", "prepare", "--", *fresh],
        ["train", *fresh, "--run.name=new"],
        ["train", *options, f"--run.dir={small}", "--checkpoint.resume=auto", "--train.steps=8"],
        ["checkpoint", "rm", f"{small}/one", "--step", "2"],
    ]
    words = json.dumps([*commands[:3], ["mount", "-o", "remount,ro", str(small)], *commands])
    (tmp_path / "driver.py").write_text(DRIVER)
    script = f"""
        cp -r {run} {small}/one
        cat /dev/zero >{small}/ballast 2>/dev/null
        {shlex.quote(sys.executable)} {tmp_path}/driver.py {shlex.quote(words)}
        cp -r {small} {tmp_path}/after
    """
    finished = on_file_system(small, "size=4m", script)
    ended = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("[")]
    for _, text in ended:
        assert "Traceback" not in text and text.count("\n") == 1, text
    room, fixed, lock = "No space left on device", "Read-only file system", "held_out/"
    words_of = [(2, lock, room), (2, lock, room), (1, f"{small}/one/samples.jsonl", room)]
    words_of += [(2, lock, fixed), (2, lock, fixed), (2, "cannot be written", fixed), (2, f"{small}/one", fixed)]
    assert len(ended) == 7, finished.text
    for (code, text), (expected, *parts) in zip(ended, words_of, strict=True):
        assert code == expected and all(part in text for part in parts), (code, text, parts)
    after = tmp_path / "after"
    assert {path.name for path in after.iterdir()} == {"one", "cache", "ballast"}
    assert not [path for path in contents(after) if "part" in path or "writing" in path or "unfinished" in path]
    kept = contents(run / "checkpoints")
    assert kept.items() <= contents(after / "one" / "checkpoints").items()


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("command", ["export", "import"])
def test_a_signal_ends_export_and_import_and_nothing_is_left(reported_run, tmp_path, command, number, code):
    source = reported_run / "export" if command == "import" else reported_run
    words = [warm.python(), "-m", "smolds_dist", command, str(source), "--to", str(tmp_path / "new" / "it")]
    for _ in range(20):  # an import may be done before the signal comes
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=warm.environment())
        while process.poll() is None and not [*tmp_path.glob("new/.it.*.part")]:
            time.sleep(0.001)
        process.send_signal(number)
        _, text = process.communicate(timeout=60)
        if process.returncode:
            break
        shutil.rmtree(tmp_path / "new")
    assert process.returncode == code and not text, text
    assert not list(tmp_path.iterdir())


def write_twice(new, to: Path, write) -> None:
    with new(to) as slow:
        with new(to) as fast:
            write(fast, "first")
        write(slow, "second")


def break_off(path: Path) -> None:
    with replaced(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt


def test_of_two_processes_that_write_the_same_place_the_first_wins(tmp_path):
    for new, write in (
        (new_folder, lambda part, text: (part / "file").write_text(text)),
        (new_file, lambda part, text: part.write_text(text)),
    ):
        to = tmp_path / new.__name__
        with pytest.raises(ConfigError, match="exists; choose another"):
            write_twice(new, to, write)
        assert (to / "file" if to.is_dir() else to).read_text() == "first"
    path = tmp_path / "text"
    with replaced(path) as slow:
        slow.write_text("slow")
        replace_text(path, "fast")
        assert path.read_text() == "fast"
    assert path.read_text() == "slow"
    with pytest.raises(KeyboardInterrupt):
        break_off(path)
    assert {one.name for one in tmp_path.iterdir()} == {"new_folder", "new_file", "text"}
    assert path.read_text() == "slow"
