"""Every command of README.md and docs/, in the order of the pages, shortened by options at its end."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from ranks import EXTRAS, ROOT, run
from test_harness import write_task
from test_import import make_model

from smolds_dist.data.tokenizer import load_tokenizer
from smolds_dist.observe.rows import read_rows

# In an order in which each page has what the ones before it made.
PAGES = (
    "getting-started training data launching slurm checkpoints watching export-and-import public-models planning benchmarks "
    "architecture support troubleshooting"
).split()
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES)]
FILES.append(ROOT / "docs" / "run" / "README.md")
BLOCKS = [block for file in FILES for block in re.findall(r"```bash\n(.*?)```", file.read_text(), re.DOTALL)]
# A command that stands on two pages runs once.
COMMANDS = list(dict.fromkeys(line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()))
SCRIPTS = [command for command in COMMANDS if command.startswith("./")]
# sbatch: see test_slurm.py; benchmarks: see test_benchmarks.py
USES = [command for command in COMMANDS if not command.startswith(("./", "sbatch", "python -m benchmarks"))]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def shorter(cache):
    """What each program is given in addition."""
    text = f" --data.cache_dir={cache} --data.max_tokens=300000"
    speed = " --preset debug --dtype fp32 --sequences=2 --rounds=1 --steps=1"
    training = f" --train.eval_sequences=4 --log.sample_tokens=4{text}"
    return {
        "smolds train": f"{training} --train.steps=2",
        "smolds train resume": f"{training} --train.steps=3",
        "smolds train profile": f"{training} --train.steps=13",
        "smolds train show": f"{training} --train.steps=2 --train.global_batch=4 --train.micro_batch=2",
        "smolds launch": f"{training} --train.steps=2",
        "smolds launch resume": f"{training} --train.steps=4",
        "smolds checkpoint": "",
        "smolds report": "",
        "smolds runs": "",
        "smolds bench train": f"{speed} --only smolds transformers --no-compile",
        "smolds data": "",
        "smolds plan": "",
        "torchrun": f"{training} --train.steps=2",
        "smolds slurm": "",
        "smolds doctor": "",
        "smolds generate": " --max-new-tokens=4",
        "smolds export": "",
        "smolds import": f" --data.cache_dir={cache}",
        "smolds train import": " --train.eval_sequences=4 --log.sample_tokens=4 --train.steps=2",
        "smolds eval": " --max-tokens=1000",
        "smolds eval tasks": " --limit=2",
        "pdoc smolds_dist": "",
        "./launch/quickstart.sh": f"{training} --train.steps=2",
        "./launch/test.sh": " -q tests/test_config.py",
    }


@pytest.mark.skipif(shutil.which("smolds", path=PATH) is None, reason="smolds is not installed: pip install -e .")
def test_uses_run_as_written(shorter, corpus, kept_run, tmp_path):
    (tmp_path / "corpus").symlink_to(corpus)
    tokenizer = load_tokenizer(str(kept_run[0] / "tokenizer"))
    make_model(tmp_path / "SmolLM2-135M", tokenizer, "smollm2_135m")
    (tmp_path / "prompts.txt").write_text("def add\nfor number in")
    for name in ("docs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)  # whose packages a run trains on
    write_task(tmp_path / "tasks", "quiz")
    done = set()
    for command in USES:
        if command.startswith(("tensorboard", "smolds board")):
            names = ("first", "pair") if "first" in command else ("first", "pair", "zero2", "mine")
            assert_board_serves(command, tmp_path, names)
            done.add("board")
            continue
        words = {"torchrun": 1, "smolds bench": 3}
        program = next((" ".join(command.split()[:n]) for start, n in words.items() if command.startswith(start)), None)
        program = program or " ".join(command.split()[:2])
        asked = {"--checkpoint.resume": "resume", "--profile.steps": "profile"}
        kind = next((f"{program} {what}" for option, what in asked.items() if option in command), program)
        if "docs/run" in command and program == "smolds train":
            kind = "smolds train show"
        if "again/config" in command or "smollm2/config" in command:
            kind = "smolds train import"
        if "--tasks" in command:
            kind = "smolds eval tasks"
        if "--dry-run" in command:
            assert run(["bash", "-c", command], timeout=60, cwd=tmp_path, PATH=PATH).returncode == 0
            continue
        needs_extras = "--tasks" in command
        packages = {"PYTHONPATH": f"{EXTRAS}{os.pathsep}{ROOT}"} if needs_extras else {}
        finished = run(["bash", "-c", command + shorter[kind]], timeout=240, cwd=tmp_path, PATH=PATH, **packages)
        assert finished.returncode == 0, f"{command}\n{finished.text}"
        done.add(kind)
    assert done == {"board", *(kind for kind in shorter if not kind.startswith("./"))}
    assert list((tmp_path / "runs" / "traced" / "profile").iterdir())
    first = read_rows(tmp_path / "runs" / "first" / "metrics.jsonl")
    assert [row["step"] for row in first if "loss" in row] == [1, 2, 3, 4]


def assert_board_serves(command: str, cwd: Path, names: tuple[str, ...]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    board = subprocess.Popen(
        [*command.split(), f"--port={port}"], cwd=cwd, env=os.environ | {"PATH": PATH}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=5) as answer:
                    runs = answer.read().decode()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                runs = ""
            if all(name in runs for name in names):
                return
            assert time.monotonic() < deadline, f"{command}: no runs shown, only {runs!r}"
            assert board.poll() is None, f"{command}: ended with exit code {board.returncode}"
            time.sleep(0.5)
    finally:
        board.kill()
        board.wait()


def test_mixture_of_the_page_is_the_example():
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    assert block and block[1] in (ROOT / "examples" / "mixture.yaml").read_text()


@pytest.mark.skipif(not (ROOT / ".venv" / "installed-tests").exists(), reason="no .venv; ./launch/test.sh makes it")
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_work(script, shorter, tmp_path):
    extra = shorter[script] + (f" --run.dir={tmp_path}" if "quickstart" in script else "")
    finished = run(["bash", "-c", script + extra], timeout=240, cwd=ROOT)
    assert finished.returncode == 0, finished.text
    if "quickstart" in script:
        for text in ("validation loss", "share of the tokens per expert", "smolds board", "unigram entropy"):
            assert text in finished.stdout
        assert list(tmp_path.glob("quickstart-*/export/model.safetensors"))


def test_python_on_the_pages_runs(shorter, tmp_path):
    (code,) = [block for file in FILES for block in re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)]
    options = "".join(f", {option!r}" for option in shorter["smolds train"].split())
    assert '"first"]' in code
    finished = run([sys.executable, "-c", code.replace('"first"]', f'"first"{options}]')], timeout=120, cwd=tmp_path)
    assert finished.returncode == 0, finished.text
    loss, export = finished.stdout.split()[-2:]
    assert float(loss) > 0 and (tmp_path / export / "model.safetensors").exists()


def test_pages_are_all_here_and_every_link_leads_somewhere():
    assert {file.stem for file in (ROOT / "docs").glob("*.md")} == set(PAGES)
    assert len((ROOT / "README.md").read_text().splitlines()) < 180
    for file in FILES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def test_two_commands_are_in_the_readme():
    assert SCRIPTS == ["./launch/quickstart.sh", "./launch/test.sh"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_the_gpus_script_says_where_there_is_none(tmp_path):
    finished = run([str(ROOT / "launch" / "gpu.sh"), str(tmp_path / "results")], 60, PYTHON=sys.executable)
    assert finished.returncode == 2
    assert "sees no NVIDIA GPU" in finished.stderr and len(finished.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
