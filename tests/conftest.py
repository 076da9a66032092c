import atexit
import faulthandler
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# Tests must not depend on the number of cores or the Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two workers share the cores: with models this small, most of several threads would busy-wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # code that Inductor cached for another kind of CPU crashes
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="smolds-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

SENTENCES = [
    "the quick brown fox jumps over the lazy dog and runs into the dark forest",
    "def add(first, second):\n    return first + second",
    "a mixture of experts sends every token to two of eight small networks",
    "for number in range(10):\n    print(number, number * number)",
]


STDERR = pytest.StashKey[int]()
LONGEST = [
    f"test_{name}.py"
    for name in (
        "parity",
        "cluster",
        "readme",
        "prefetch",
        "faults",
        "launchers",
        "contract",
        "import",
        "slurm",
        "export",
        "compile",
        "restarts",
        "inputs",
        "rank_checks",
        "harness",
        "gguf",
    )
]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked long, as before a release")


def pytest_configure(config):
    """Set what tests/fuzz.py reads while tests are collected, and where a crash is reported."""
    if config.getoption("--all"):
        os.environ.setdefault("SMOLDS_FUZZ_CASES", "20000")
    config.stash[STDERR] = os.dup(2)


def pytest_runtest_setup(item):
    """Let a crash print its stack past pytest's capture; a run trained in this process points faulthandler elsewhere."""
    faulthandler.enable(item.config.stash[STDERR])


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report):
    """Print how a pytest-xdist worker died, and `rank_N.crash` of a run that it trained."""
    code = report.node.gateway._io.popen.wait(5)
    folders = Path(tempfile.gettempdir()).glob(f"pytest-of-*/pytest-current/*{report.node.gateway.id}")
    crashes = [path.read_text() for folder in folders for path in folder.glob("**/ranks/rank_*.crash")]
    print(f"\n{crashitem}: its worker ended with code {code}\n" + "\n".join(filter(None, crashes)))


def pytest_collection_modifyitems(config, items):
    """Deselect tests marked long unless --all is set; sort the longest files first, so that two workers end together."""
    if not config.getoption("--all"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter):
    """Print the time of every file that takes over ten seconds; CONTRIBUTING.md has a table of a quiet run."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section(f"time by file, of {sum(seconds.values()) / 60:.1f} worker minutes")
    for file, total in seconds.most_common():
        if total < 10:
            break
        terminalreporter.write_line(f"{total:7.1f}s {file}")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with forty small text files, about 100 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = [f"{number + i} {SENTENCES[(number * 7 + i * i) % 4]}." for i in range(40)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache for the session, so that the corpus is tokenized once."""
    return tmp_path_factory.mktemp("cache")


def options_of_small_run(corpus, cache, folder):
    """Return the options of a run that takes a second, in `folder`/runs."""
    options = {
        "data.source": f"text:{corpus}/*.txt", "data.cache_dir": cache, "data.tokenizer_vocab_size": 300,
        "data.seq_len": 32, "data.val_fraction": 0.1, "run.dir": folder / "runs", "train.steps": 6,
        "train.global_batch": 8, "train.micro_batch": 2, "train.warmup_steps": 2, "train.eval_every": 3,
        "train.eval_sequences": 5, "checkpoint.every": 2, "log.sample_every": 3, "log.sample_tokens": 4,
        "model.hidden_size": 32, "model.intermediate_size": 32, "model.num_hidden_layers": 2,
        "model.num_attention_heads": 2, "model.num_key_value_heads": 1, "model.head_dim": 16,
        "parallel.expert": "max",  # several ranks then use all-to-all
    }  # fmt: skip
    return ["--preset", "debug", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture
def small_run(corpus, cache, tmp_path):
    return options_of_small_run(corpus, cache, tmp_path)


@pytest.fixture(scope="session")
def kept_run(corpus, cache, tmp_path_factory):
    """A run of six steps with checkpoints after 2, 4 and 6, and its options. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("kept")
    options = [
        *options_of_small_run(corpus, cache, folder), "--run.name=one", "--checkpoint.keep=3", "--log.tensorboard=false",
        "--train.schedule=wsd", "--train.decay_fraction=0",
    ]  # fmt: skip
    from smolds_dist.config import load_config
    from smolds_dist.training.trainer import train

    train(load_config(options))
    return folder / "runs" / "one", options
