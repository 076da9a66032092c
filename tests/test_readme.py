"""Every command of README.md and docs/, by page, shortened by appended options, with its expected output and files."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import ROOT, run
from test_import import make_model

from smolds_dist.data.tokenizer import load_tokenizer
from smolds_dist.observe.rows import read_rows

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The example run's generated pages have no commands.
PAGES = [page for page in PAGES if page.parent.name != "run" or page.name == "README.md"]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
SITE = Path(torch.__file__).parents[1]

# Commands that no test below runs, with the reason.
NOT_HERE = {
    "./launch/": "test_scripts_run runs them",
    "sbatch ": "test_slurm.py submits it to a real cluster",
    "smolds plan --ladder": "test_recommend.py plans with a ladder's law",
    "smolds eval exported --tasks": "test_harness.py scores such a task, against a count by hand",
    "smolds doctor --hostfile": "test_doctor_hosts.py checks three hosts",
    "pdoc ": "test_examples.py runs it and reads its warnings",
    "smolds train --config examples/recipes": "test_recipes.py trains each, with its sizes and steps divided",
    "smolds ladder run": "test_ladder.py trains one",
    "smolds ladder fit": "test_ladder.py fits one",
    "python -m benchmarks": "run by hand; test_benchmarks.py runs each with small options",
}


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("source ")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(""))


EVERYWHERE = {name_of(page): commands_of(page) for page in PAGES}
SCRIPTS = [command for command in EVERYWHERE["README"] if command.startswith("./")]
# A command in README and on a page runs once.
HERE = {
    page: [
        command
        for command in dict.fromkeys(commands)
        if not command.startswith(tuple(NOT_HERE)) and (page == "README" or command not in EVERYWHERE["README"])
    ]
    for page, commands in EVERYWHERE.items()
}

# Commands that take half a minute on a quiet machine and run with --all.
LONG = ("smolds plan --calibrate",)

SIZES = (
    " --model.hidden_size=32 --model.intermediate_size=32 --model.num_hidden_layers=2 --model.num_attention_heads=2"
    " --model.num_key_value_heads=1 --model.head_dim=16"
)
DATA = " --data.cache_dir=CACHE --data.max_tokens=40000 --data.tokenizer=tokenizer --data.seq_len=32"
SHORT = " --train.eval_sequences=4 --log.sample_tokens=4 --train.warmup_steps=1 --train.global_batch=4"
TINY = f"{SIZES}{DATA}{SHORT}"


@dataclass
class Case:
    """How a command is shortened, and its expected output and files."""

    start: str  # the command's beginning, a regular expression
    extra: str = ""  # appended options
    output: str = ""  # standard output must match it, a regular expression
    files: tuple[str, ...] = ()  # patterns of files that it must write
    steps: int = 0  # steps that the named run must have in its metrics


# The first match of a command applies.
CASES = [
    Case("smolds (board|tensorboard)|tensorboard"),  # see `assert_board_serves`
    Case(
        "smolds train .*--run.name first .*--checkpoint.resume auto",
        f"{TINY} --train.steps=3",
        "continuing from runs/first/checkpoints/step_00000002",
        ("runs/first/export/model.safetensors",),
        3,
    ),
    Case("smolds train .*--profile.steps", f"{TINY} --train.steps=13", files=("runs/traced/profile/*",), steps=13),
    Case(
        "smolds train --config examples/mixture",
        f"{TINY} --train.steps=2",
        r"own: 64 tokens, .*\npython: 192 tokens",
        steps=2,
    ),
    Case("smolds train --config docs/run", f"{TINY} --train.micro_batch=2 --train.steps=1", "stdlib", steps=1),
    Case("smolds train --config runs/decay", "", "continuing from runs/decay/checkpoints/step_00000002", steps=4),
    Case("smolds train --config runs/", f"{SHORT} --train.steps=1", "continuing from runs/", steps=1),
    Case("smolds train", f"{TINY} --train.steps=2", "validation loss", ("runs/*/export/model.safetensors",), 2),
    Case("smolds launch --dry-run", "", "-m smolds_dist train --preset debug"),
    Case("smolds launch .*--checkpoint.resume", f"{TINY} --train.steps=4", "ZeRO 3(.|\n)*continuing from", steps=4),
    Case(
        "smolds launch .*--parallel.zero 2",
        f"{TINY} --train.steps=1",
        "DeepSpeed ZeRO 2, expert parallel size 2",
        steps=1,
    ),
    Case("smolds launch", f"{TINY} --train.steps=1", "share of routed tokens per expert", steps=1),
    Case("torchrun", f"{TINY} --train.steps=1", "2 ranks over gloo", steps=1),
    Case(
        "smolds branch",
        " --train.steps=4",
        "runs/decay begins with step 2 of runs/trunk; its checkpoint is hard links",
        ("runs/decay/config.yaml", "runs/decay/parent.json", "runs/decay/metrics.jsonl"),
    ),
    Case("smolds checkpoint ls", "", r"\n +3 .*\n +4 .*ZeRO 3"),
    Case("smolds checkpoint verify", "", "step_00000004  ok"),
    Case("smolds checkpoint convert", "", "wrote runs/archive", ("runs/archive/checkpoints/*/manifest.json",)),
    Case(
        "smolds checkpoint average",
        " --steps=3,4",
        "mean of 2 checkpoints to runs/average",
        ("runs/average/checkpoints/*/manifest.json", "runs/average/config.yaml"),
    ),
    Case("smolds checkpoint rm", ""),
    Case("smolds report .* --html", "", "", ("runs/*/report.html",)),
    Case("smolds report .* --rebuild", "", "", ("runs/first/tensorboard/events.*",)),
    Case("smolds report .* --to", "", "", ("runs/compared/training_metrics.png",)),
    Case("smolds report", "", "", ("runs/first/log_training.md", "runs/first/training_metrics.png")),
    Case("smolds runs diff", "", r"run\.name +first +pair|loss +\d"),
    Case("smolds runs", "", r"first +finished +3 of 3 "),
    Case("smolds data stats", TINY, "the run takes"),
    Case("smolds data prepare", TINY, r"text: (\d+) of \1 shards tokenized"),
    Case("smolds data order", TINY, r'"index": 7, "stage": 1, "seq_len": 32, "source": "text", "file": '),
    Case("smolds data show", "", r"== batch (\w{8}), recorded as \1\n"),
    Case("smolds slurm --prepare", "", "#SBATCH --array="),
    Case("smolds slurm .*--spares 1", "", "#SBATCH --nodes=3\n"),
    Case("smolds slurm", "", "#SBATCH --nodes=2\n"),
    Case("smolds doctor", "", r"two CPU processes over gloo: \d+ us"),
    Case(
        "smolds generate .*--prompts",
        " --max-new-tokens=4",
        r'\{"prompt": "def add", "text": ".*\n\{"prompt": "for number in"',
    ),
    Case("smolds generate", " --max-new-tokens=4", "def ."),
    Case("smolds export .*gguf", "", " to gguf/", ("gguf/*.gguf",)),
    Case(
        "smolds export", "", "which computes the same logits", ("exported/model.safetensors", "exported/tokenizer.json")
    ),
    Case(
        "smolds import",
        " --data.cache_dir=CACHE",
        "to runs/",
        ("runs/*/checkpoints/*/manifest.json", "runs/*/config.yaml"),
    ),
    Case(
        "smolds experts",
        " --max-tokens=1000 --min-count=5",
        r"By kind of token: at most \d\.\d+ bits",
        ("**/experts.json",),
    ),
    Case("smolds eval", " --max-tokens=1000", r"loss \d+\.\d+ nats per token, .* bits per\s+byte"),
    Case("smolds plan --calibrate", "", "", ("here.yaml",)),
    Case("smolds plan", "", "start it with"),
    Case("smolds ladder plan", "", "sum (.|\n)*train it with", ("runs/ladder/ladder.yaml",)),
    Case("smolds ladder slurm", "", "sbatch --dependency=afterok", ("runs/ladder/rungs.sbatch",)),
    Case("smolds bench launches", " --model.num_hidden_layers=1 --data.seq_len=32 --sequences=1", "the host waits"),
    Case(
        "smolds bench train",
        " --preset debug --dtype fp32 --sequences=1 --rounds=1 --steps=1 --only smolds transformers --no-compile",
        "transformers",
    ),
]


def case_of(command: str) -> Case:
    return next(case for case in CASES if re.match(case.start, command))


def finish(command: str, folder: Path, cache: Path) -> None:
    """Run a command of a page, shortened, and check its case."""
    if "board" in command.split(" --")[0]:
        assert_board_serves(command, folder)
        return
    case = case_of(command)
    marker = folder / "begun"
    marker.touch()
    whole = command + case.extra.replace("CACHE", str(cache))
    finished = run(["bash", "-c", whole], timeout=120, cwd=folder, PATH=PATH)
    assert finished.returncode == 0, f"{whole}\n{finished.text}"
    assert re.search(case.output, finished.stdout), f"{whole}\n{finished.text}"
    for pattern in case.files:
        written = [path for path in folder.glob(pattern) if path.stat().st_mtime_ns >= marker.stat().st_mtime_ns]
        assert written and all(path.stat().st_size for path in written), f"{whole}\nwrote no {pattern}"
    if case.steps:
        (name,) = re.findall(r"--run.name (\w+)|--config runs/(\w+)", command)
        rows = read_rows(folder / "runs" / "".join(name) / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, case.steps + 1)), whole


def assert_board_serves(command: str, folder: Path) -> None:
    names = [path.parent.name for path in folder.glob("runs/*/tensorboard")]
    names = [name for name in names if f"runs/{name}" in command] or names
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    board = subprocess.Popen(
        [*command.split(), f"--port={port}"], cwd=folder, env=os.environ | {"PATH": PATH}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
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
            time.sleep(0.2)
    finally:
        board.kill()
        board.wait()


@pytest.fixture(scope="module")
def readme(corpus, cache, kept_run, tmp_path_factory):
    """The folder in which all commands of README have run; each other page continues in a copy of it."""
    if shutil.which("smolds", path=PATH) is None:
        pytest.skip("smolds is not installed: pip install -e .")
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(kept_run[0] / "tokenizer", folder / "tokenizer")
    make_model(folder / "SmolLM2-135M", load_tokenizer(str(folder / "tokenizer")), "smollm2_135m")
    (folder / "prompts.txt").write_text("def add\nfor number in")
    for name, target in {"corpus": corpus, "docs": ROOT / "docs", "examples": ROOT / "examples"}.items():
        (folder / name).symlink_to(target)
    # The example run trains on the packages of .venv: here on a few of their files.
    packages = folder / ".venv" / "lib" / "python3.11" / "site-packages"
    for package, files in {"torch": "utils/*.py", "transformers": "utils/c*.py"}.items():
        shutil.copytree(SITE / package / "utils", packages / package / "utils", ignore=all_but(files))
    for command in HERE["README"]:
        finish(command, folder, cache)
    return folder


def all_but(files: str):
    def ignored(folder: str, names: list[str]) -> list[str]:
        kept = {path.name for path in Path(folder).parent.glob(files)}
        return [name for name in names if name not in kept]

    return ignored


@pytest.mark.parametrize("page", [page for page, commands in HERE.items() if commands])
def test_commands_of_the_page_run_as_expected(page, readme, cache, tmp_path):
    if page == "README":
        return  # the fixture `readme` has run it
    folder = tmp_path / "here"
    shutil.copytree(readme, folder, symlinks=True)
    for command in HERE[page]:
        if not command.startswith(LONG):
            finish(command, folder, cache)


@pytest.mark.long
def test_long_commands_run_as_expected(readme, cache):
    for command in dict.fromkeys(command for page in HERE.values() for command in page if command.startswith(LONG)):
        finish(command, readme, cache)


def test_every_command_has_a_case_and_every_case_a_command():
    commands = [command for page in HERE.values() for command in page]
    assert {id(case_of(command)) for command in commands} == {id(case) for case in CASES}


def test_mixture_of_the_page_is_the_example():
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    assert block and block[1] in (ROOT / "examples" / "mixture.yaml").read_text()


@pytest.mark.skipif(not (ROOT / ".venv" / "installed-tests").exists(), reason="no .venv; ./launch/test.sh makes it")
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run(script, cache, tmp_path):
    extra = {
        "quickstart": f"{TINY} --train.steps=4 --train.warmup_steps=2 --run.dir={tmp_path}",
        "test": " -q tests/test_clock.py",
    }
    extra = extra[Path(script).stem].replace("CACHE", str(cache)).replace("=tokenizer", "=train")
    finished = run(["bash", "-c", script + extra], timeout=240, cwd=ROOT)
    assert finished.returncode == 0, finished.text
    if "quickstart" in script:
        for text in ("validation loss", "share of routed tokens per expert", "smolds board", "unigram entropy"):
            assert text in finished.stdout
        assert list(tmp_path.glob("quickstart-*/export/model.safetensors"))
    else:
        assert re.search(r"\d+ passed", finished.stdout)


def test_python_on_the_pages_runs(kept_run, cache, tmp_path):
    (code,) = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    extra = f"{TINY} --train.steps=2".replace("CACHE", str(cache)).replace("=tokenizer", f"={kept_run[0]}/tokenizer")
    options = "".join(f", {option!r}" for option in extra.split())
    assert '"first"]' in code
    (tmp_path / "code.py").write_text(code.replace('"first"]', f'"first"{options}]'))
    finished = run([sys.executable, str(tmp_path / "code.py")], timeout=120, cwd=tmp_path)
    assert finished.returncode == 0, finished.text
    loss, export = finished.stdout.split()[-2:]
    assert float(loss) > 0 and (tmp_path / export / "model.safetensors").exists()


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_link_has_a_target():
    assert len((ROOT / "README.md").read_text().splitlines()) < 180
    for page in PAGES:
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / target if target else page
            assert target.exists(), f"{page.name} links to {target}"
            assert not heading or heading in headings(target), f"{page.name} links to #{heading} of {target.name}"


def test_two_commands_are_in_the_readme():
    assert SCRIPTS == ["./launch/quickstart.sh", "./launch/test.sh"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_the_gpu_script_reports_a_missing_gpu(tmp_path):
    finished = run([str(ROOT / "launch" / "gpu.sh"), str(tmp_path / "results")], 60, PYTHON=sys.executable)
    assert finished.returncode == 2
    assert "sees no NVIDIA GPU" in finished.stderr and len(finished.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
