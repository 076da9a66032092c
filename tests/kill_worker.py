"""Run training killed by SIGKILL at random moments until it finishes; print one JSON line per run.

Every attempt forks one process per rank from this one, which has only imported modules: a start takes milliseconds and many
kills fit into a minute. Run by test_faults.py.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import deepspeed  # noqa: F401  imported before the fork, like the others
import tensorboard  # noqa: F401

from smolds_dist.config import load_config
from smolds_dist.training.trainer import train

LIMIT = 60  # seconds per attempt


def start(options: list[str], world: int, log: Path) -> list[int]:
    """Fork the ranks of one attempt; return their process ids."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with log.open("ab") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                if world > 1:
                    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                    os.environ |= {name: str(value) for name, value in names.items()}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                code = train(load_config(options))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def end_of(pids: list[int], seconds: float, saving: Path | None = None) -> list[int] | None:
    """Return all exit codes, or None if the ranks were still running after that time and were killed.

    Args:
        saving: a run folder: wait with the kill until a checkpoint is being written there.
    """
    deadline = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while time.monotonic() < deadline or (saving and not is_saving(saving)):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = ended[1]
        if len(codes) == len(pids):
            return list(codes.values())
        time.sleep(0.001)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return None


def is_saving(run_dir: Path) -> bool:
    return any(run_dir.glob("checkpoints/unfinished_*"))


def survive(options: list[str], run_dir: Path, world: int, kills: int, chance: random.Random, usual: float) -> dict:
    """Kill the run `kills` times at random moments, every other time during a save, then let it finish."""
    result = {"run": run_dir.name, "killed": 0, "while_saving": 0}
    log = run_dir.parent / f"{run_dir.name}.log"
    for attempt in range(kills + 1):
        last = attempt == kills
        for leftover in run_dir.glob("checkpoints/unfinished_*"):
            shutil.rmtree(leftover)  # so that the next one is detected
        saving = run_dir if attempt % 2 else None
        pids = start(options, world, log)
        codes = end_of(pids, LIMIT if last else chance.uniform(0.1, 0.8) * usual, None if last else saving)
        if codes is not None:
            break
        result["killed"] += 1
        result["while_saving"] += is_saving(run_dir)
    return result | {"codes": codes}


def main(options: list[str], folder: Path, runs: int, world: int, seed: int) -> None:
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    reference = [*options, f"--run.dir={folder}", f"--run.name=reference{world}"]
    codes = end_of(start(reference, world, folder / "reference.log"), LIMIT)
    usual = time.monotonic() - begin
    print(json.dumps({"run": f"reference{world}", "codes": codes}), flush=True)
    for number in range(runs):
        name = f"killed{world}_{seed}_{number}"
        arguments = [*options, f"--run.dir={folder}", f"--run.name={name}", "--checkpoint.resume=auto"]
        print(json.dumps(survive(arguments, folder / name, world, 2, chance, usual)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
