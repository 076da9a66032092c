"""Everything that needs an NVIDIA GPU, in parts of under ten minutes; run as launch/gpu.sh.

Each part can be run alone and repeated. Its output goes to FOLDER/PART.log, its results to FOLDER, and one row per part to
FOLDER/summary.md. Results of other parts stay there, so several calls fill one table. Needs no network. A part that fails or
exceeds its limit does not stop the others. With --small, all of it runs in minutes on a CPU: that tests these commands, not
a GPU.
"""

import argparse
import configparser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import OFFLINE
from smolds_dist.errors import ConfigError, OptionParser

PATIENCE = 20  # seconds that a part gets to end after its limit
REFERENCE, LARGER, LOCAL = "smollm2-deepseek-255m", "moe-1b-a200m", "smollm2-deepseek-255m-local"
FASTEST = ("--variants", "grouped_mm/bf16/compile")  # of transformers; the part `contenders` tries all others
TINY = (
    "--model.hidden_size=32", "--model.intermediate_size=32", "--model.num_hidden_layers=2",
    "--model.num_attention_heads=2", "--model.num_key_value_heads=1", "--model.head_dim=16",
)  # fmt: skip
TINY_TEXT = ("--data.max_tokens=100000", "--data.seq_len=32")
SHOW_SECONDS = 1230  # of steps
STOP_AFTER = 510  # seconds from a part's start until the run saves and stops
STOPPED = 75  # exit code then


@dataclass
class Part:
    """Commands that run one after the other, until one fails."""

    what: str
    commands: list[list[str]]
    limit: int = 570  # seconds for all commands
    codes: tuple[int, ...] = (0,)  # exit codes of success
    environment: dict[str, str] = field(default_factory=dict)


def parts(folder: Path, small: bool = False) -> dict[str, Part]:
    """Return all parts by name, in the order in which they run."""
    python = [sys.executable]
    environment = {"SMOLDS_TEST_DEVICE": "cpu"} if small else {}
    preset = "debug" if small else REFERENCE

    def tests(name: str, chosen: str, *more: str) -> list[list[str]]:
        if small:
            chosen = f"({chosen}) and ({'w2e2z1' if name == 'ranks' else 'graphs_train'})"
        results = f"--junitxml={folder / f'{name}.xml'}"
        return [
            [
                *python,
                "-m",
                "pytest",
                "-m",
                "gpu",
                "-q",
                "--durations=10",
                results,
                "-k",
                chosen,
                *more,
                "tests/test_gpu.py",
            ]
        ]

    def speed(name: str, preset: str, sequences: int, *more: str) -> list[list[str]]:
        size, rounds = (
            ["--preset", preset, "--sequences", str(sequences)],
            ["--rounds", "2", "--steps", "10", "--minutes", "8.5"],
        )
        if small:
            size, rounds = (
                ["--preset", "debug", "--sequences", "1", *TINY, *TINY_TEXT],
                ["--rounds", "1", "--steps", "1"],
            )
            more = ("--only", "smolds", "dense", "masked", "--no-compile", "--optimizers", "adamw")
        dtype = ["--dtype", "fp32" if small else "bf16"]
        return [
            [
                *python,
                "-m",
                "smolds_dist",
                "bench",
                "train",
                *size,
                *dtype,
                *more,
                *rounds,
                f"--json={folder / name}.json",
            ]
        ]

    def benchmark(name: str, file: str, preset: str, *more: str) -> list[list[str]]:
        more = ("--steps", "2", *TINY, *TINY_TEXT) if small else more
        return [[*python, "-m", "benchmarks", name, "--preset", preset, *more, f"--json={folder / file}.json"]]

    def train(name: str, preset: str, *more: str) -> list[str]:
        start = [*python, "-m", "smolds_dist", "train", "--preset", "debug" if small else preset]
        return [
            *start,
            *more,
            *((*TINY, *TINY_TEXT) if small else ()),
            f"--run.dir={folder / 'runs'}",
            f"--run.name={name}",
        ]

    def show(last: bool) -> list[list[str]]:
        """The run is stopped by SIGUSR1, saves and exits; the next part resumes it."""
        seconds, stop = (6, 14) if small else (SHOW_SECONDS, STOP_AFTER)
        options = [f"--data.source=text:{sysconfig.get_path('purelib')}/t*/**/*.py", "--data.on_bad_file=skip"]
        options += ["--data.tokenizer_vocab_size=16384", "--data.window_tokens=4000000", "--train.steps=100000"]
        options += [f"--train.time_budget={seconds}", "--train.global_batch=64", "--train.warmup_steps=200"]
        options += ["--checkpoint.resume=auto", "--checkpoint.keep=1", "--checkpoint.keep_best=false"]
        options += ["--log.sample_every=1000", '--log.sample_prompts=["def ", "class Stack:\\n", "import "]']
        if small:
            options += ["--train.global_batch=2", "--train.warmup_steps=3", "--data.tokenizer_vocab_size=300"]
        timed = [] if last else ["timeout", "--preserve-status", "--signal=USR1", str(stop)]
        report = [*python, "-m", "smolds_dist", "report", str(folder / "runs" / "show")]
        return [[*timed, *train("show", REFERENCE, *options)], report]

    profile = [*OFFLINE, "--train.steps=40", "--train.global_batch=16", "--profile.steps=31:32", "--train.compile=true"]
    profile += ["--train.eval_sequences=1", "--log.sample_tokens=1", "--checkpoint.every=0"]
    workers = (
        ["--numprocesses=6"] if find_spec("xdist") and not small else []
    )  # most of a test's time is starting a process
    others = [
        "--only",
        "transformers",
        "trainer",
        "deepspeed",
        "masked",
        "smolds",
        "--no-compile",
        "--optimizers",
        "adamw",
    ]
    best = ["--only", "smolds", "dense", "transformers", "trainer", *FASTEST, "--optimizers", "adamw"]
    return {
        "tests": Part(
            "GPU tests: kernels, compiled blocks, CUDA graphs, runs and checkpoints",
            tests("tests", "not one_card", *workers),
            environment=environment,
        ),
        "ranks": Part(
            "several ranks on one GPU over NCCL: ZeRO 0 to 3, expert-parallel sizes 1 and 2, AdamW and Muon",
            tests("ranks", "one_card"), environment=environment,
        ),
        "speed-16": Part(
            "training speed of the reference model, 16 x 1,024 tokens, and of the fastest alternatives",
            speed("speed-16", REFERENCE, 16, *best),
        ),
        "speed-64": Part("the same with 64 x 1,024 tokens", speed("speed-64", REFERENCE, 64, *best)),
        "speed-1b": Part("the same with moe-1b-a200m, 8 x 2,048 tokens", speed("speed-1b", LARGER, 8, *best)),
        "contenders": Part(
            "all alternatives without torch.compile, 16 x 1,024 tokens", speed("contenders", REFERENCE, 16, *others)
        ),
        "roofline": Part(
            "time of a step by kind of kernel, and its bounds",
            benchmark("roofline", "roofline", preset, "--dtype", "bf16", "--sequences", "16"),
        ),
        "profile": Part(
            "trace and memory snapshot of two compiled steps, 16 x 1,024 tokens, and their kernels",
            [train("profile", REFERENCE, *profile), [*python, "-m", "benchmarks.kernels", str(folder / "runs" / "profile")]],
        ),
        "recipe": Part(
            "minutes of the local recipe, 10,000 steps of 8 x 512 tokens",
            benchmark("recipe", "recipe", "debug" if small else LOCAL),
        ),
        "losses": Part(
            "200 steps compiled, without and with CUDA graphs, against plain ones: the first losses within 1e-3",
            benchmark("drift", "losses", preset),
        ),
        "show-1": Part(
            "a run of 25 minutes on Python source, first third; report and plot", show(last=False), codes=(0, STOPPED)
        ),
        "show-2": Part("second third: resumes", show(last=False), codes=(0, STOPPED)),
        "show-3": Part("last third: resumes and ends", show(last=True)),
    }  # fmt: skip


def main() -> None:
    parser = OptionParser(prog="launch/gpu.sh", usage="launch/gpu.sh [options] [FOLDER] [PART...]", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("gpu-results"), help="default: gpu-results")
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all, in this order")
    parser.add_argument("--list", action="store_true", help="print the parts")
    parser.add_argument("--dry", action="store_true", help="print the commands")
    parser.add_argument("--small", action="store_true", help="tiny settings on a CPU")
    try:
        sys.exit(run(parser.parse_args()))
    except ConfigError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace) -> int:
    """Run the chosen parts; return the exit code.

    Raises:
        ConfigError: for an unknown part, or without a GPU.
    """
    folder = options.folder.absolute()
    every = parts(folder, options.small)
    if unknown := [name for name in options.parts if name not in every]:
        raise ConfigError(f"{unknown[0]!r} is not a part; use some of {', '.join(every)}.")
    chosen = {name: every[name] for name in options.parts or every}
    if options.list:
        print("\n".join(f"{name:12}{part.limit:>5} s  {part.what}" for name, part in chosen.items()))
        return 0
    if options.dry:
        for name, part in chosen.items():
            print(f"# {name}")
            for command in part.commands:
                print(shlex.join([*(f"{key}={value}" for key, value in part.environment.items()), *command]))
        return 0
    machine = "a CPU, small settings" if options.small else gpu_name()
    if missing := missing_packages():
        print(f"gpu.sh: not installed: {', '.join(missing)}; parts that need them fail", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in chosen.items():
        print(f"== {name}: {part.what}", flush=True)
        row = run_part(name, part, folder) | {"machine": machine, "date": time.strftime("%Y-%m-%d %H:%M")}
        rows = record(folder, name, row)
        print(f"== {name}: {row['result']} after {row['seconds']:.0f} s; {row['note']}\n", flush=True)
    print(summary({name: rows[name] for name in every if name in rows}))
    return 0 if all(rows[name]["result"] == "passed" for name in chosen) else 1


def gpu_name() -> str:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"{sys.executable} sees no NVIDIA GPU; run gpu.sh on a machine that has one, with a CUDA build of torch (PYTHON "
            "names another Python)."
        )
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def missing_packages() -> list[str]:
    """Return the packages of setup.cfg that this Python lacks: those of a run, of pytest and of the Trainer."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    extras = config["options.extras_require"]
    wanted = f"{config['options']['install_requires']}\n{extras['bench']}\npytest"
    names = [re.match(r"[\w-]+", line) for line in wanted.split("\n") if 'platform == "darwin"' not in line]
    return [name[0] for name in names if name and not is_installed(name[0])]


def is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def run_part(name: str, part: Part, folder: Path) -> dict[str, Any]:
    """Run a part's commands, with their output on the terminal and in a file."""
    began, result = time.monotonic(), "passed"
    log = folder / f"{name}.log"
    for old in (log, log.with_suffix(".json")):
        old.unlink(missing_ok=True)
    for command in part.commands:
        left = part.limit - (time.monotonic() - began)
        code = run_command(command, max(1.0, left), log, part.environment)
        if code in (124, -signal.SIGKILL) and time.monotonic() - began >= part.limit - 1:
            result = f"exceeded {part.limit} s"
            break
        if code not in part.codes:
            result = f"failed with exit code {code}"
            break
    return {"result": result, "seconds": round(time.monotonic() - began, 1), "note": note(name, folder)}


def run_command(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> int:
    """Run a command and return its exit code; at its limit it is interrupted and, if that does not help, killed."""
    limited = ["timeout", "--signal=INT", f"--kill-after={PATIENCE}", f"{seconds:.0f}", *command]
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            limited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=os.environ | environment,
        )  # fmt: skip
        assert process.stdout
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                sys.stdout.write(line)
                sys.stdout.flush()
            return process.wait()
        except BaseException:  # such as Ctrl-C, which `timeout` does not get from the terminal
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


def note(name: str, folder: Path) -> str:
    """Return a part's main numbers: of a speed, those of the first row; else the last line of its output."""
    lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    try:
        rows = json.loads((folder / f"{name}.json").read_text())["contenders"]
    except (OSError, ValueError, KeyError):
        return last
    first, *others = rows.items()
    peers = {other: one for other, one in others if not other.startswith(("smolds", "dense"))}
    text = f"{first[0]}: {first[1]['tokens_per_s']:,.0f} tokens/s, MFU {first[1]['flops_utilization']:.1%}"
    if peers:
        best = max(peers, key=lambda other: peers[other]["tokens_per_s"])
        text += f", {first[1]['tokens_per_s'] / peers[best]['tokens_per_s']:.2f} x {best}"
    return text


def record(folder: Path, name: str, row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Add a part's row to those of earlier calls, and write the table; return all rows."""
    file = folder / "summary.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    rows[name] = row
    file.write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "summary.md").write_text(summary({one: rows[one] for one in parts(folder) if one in rows}) + "\n")
    return rows


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """Format one row per part, as Markdown."""
    lines = ["| part | result | seconds | | machine | date |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        text = row["note"].replace("|", "/")
        lines.append(f"| {name} | {row['result']} | {row['seconds']:.0f} | {text} | {row['machine']} | {row['date']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
