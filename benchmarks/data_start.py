"""For `benchmarks.data`: time to the first step on a large corpus, and the cost of tokenization in the background."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import stdlib_texts
from smolds_dist.observe.rows import read_rows

START_MEGABYTES, PREPARE_MEGABYTES = 1000, 200
FILES = 4
WARM_UP = 10  # steps before the speed is measured


def write_corpus(folder: Path, megabytes: int) -> None:
    """Write numbered files of the standard library's documents."""
    texts, number = stdlib_texts(20), 0
    folder.mkdir()
    for file in range(FILES):
        with (folder / f"{file}.jsonl").open("w") as out:
            while out.tell() < megabytes * 10**6 // FILES:
                out.write(json.dumps({"text": f"# {number}\n{texts[number % len(texts)]}"}) + "\n")
                number += 1


def settings(folder: Path, cache: Path) -> list[str]:
    """Return options of a `debug` run over the corpus, with an existing tokenizer."""
    from smolds_dist.config import load_config
    from smolds_dist.data.prepare import prepare_data

    made = load_config(["--preset", "debug", "-q", f"--data.cache_dir={folder}/tokenizer", "--data.max_tokens=100000"])
    tokenizer = prepare_data(made).tokenizer.name_or_path
    return [
        "--preset", "debug", f"--data.source=jsonl:{folder}/text", f"--data.tokenizer={tokenizer}",
        f"--data.cache_dir={cache}", "--train.steps=100000", "-q",
    ]  # fmt: skip


def start(folder: Path, rounds: int, megabytes: int | None, steps: int) -> dict[str, Any]:
    """Measure seconds from the start of `smolds train` to the end of its first step, with nothing and with everything
    tokenized; and tokens per second after that, with a background worker and with a prepared corpus, in turns."""
    write_corpus(folder / "text", megabytes or START_MEGABYTES)
    prepared = settings(folder, folder / "prepared")
    subprocess.run([sys.executable, "-m", "smolds_dist", "data", "prepare", "--", *prepared], check=True)
    seconds: dict[str, list[float]] = {"ahead": [], "prepared": []}
    speeds: dict[str, list[float]] = {"ahead": [], "prepared": []}
    for _ in range(rounds):
        for name in seconds:
            cache = folder / name
            if name == "ahead":
                shutil.rmtree(cache, ignore_errors=True)
            first, speed = one_run(settings(folder, cache), folder / "runs", steps)
            seconds[name].append(first)
            speeds[name].append(speed)
    result = {f"{name}_s": median(values) for name, values in seconds.items()}
    result |= {f"{name}_tokens_per_s": median(values) for name, values in speeds.items()}
    ratio = median(speeds["ahead"]) / median(speeds["prepared"])
    return {"megabytes": megabytes or START_MEGABYTES, **result, "ratio": ratio, "seconds": seconds, "speeds": speeds}


def one_run(given: list[str], runs: Path, steps: int) -> tuple[float, float]:
    """Return seconds to the end of the first step, and tokens per second over `steps` steps."""
    shutil.rmtree(runs, ignore_errors=True)
    options = [*given, f"--run.dir={runs}", "--run.name=one", "--log.tensorboard=false", "--train.eval_every=0"]
    begin = time.time()
    command = [sys.executable, "-m", "smolds_dist", "train", *options, "--log.sample_every=0", "--checkpoint.every=0"]
    process = subprocess.Popen(command)
    rows: dict[int, dict] = {}
    while WARM_UP + steps not in rows:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with exit code {process.returncode}")
        time.sleep(0.5)
        rows = {row["step"]: row for row in read_rows(runs / "one" / "metrics.jsonl") if "loss" in row}
    process.send_signal(signal.SIGKILL)
    process.wait()
    first, last = rows[WARM_UP], rows[WARM_UP + steps]
    return rows[1]["time"] - begin, (last["tokens"] - first["tokens"]) / (last["time"] - first["time"])


def prepare(folder: Path, rounds: int, megabytes: int | None, _steps: int) -> dict[str, Any]:
    """Measure seconds of `smolds data prepare` with one worker and with two, in turns, including its start."""
    write_corpus(folder / "text", megabytes or PREPARE_MEGABYTES)
    given = settings(folder, folder / "cache")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers in seconds:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            begin = time.perf_counter()
            command = [sys.executable, "-m", "smolds_dist", "data", "prepare", "--workers", str(workers), "--", *given]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[workers].append(time.perf_counter() - begin)
    one, two = median(seconds[1]), median(seconds[2])
    return {
        "megabytes": megabytes or PREPARE_MEGABYTES,
        "one_s": one,
        "two_s": two,
        "ratio": one / two,
        "seconds": seconds,
    }
