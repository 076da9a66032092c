"""`python -m benchmarks rendezvous`: rank 0's CPU time to join 64, 256 and 1,024 ranks, compare them and plan for them.

The other ranks are threads of a few processes, which join the store and agree as ranks do, with a real plan: eight per node,
each node's first with a port of its own. The watchdog's files exist for all ranks.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path

from smolds_dist.bench.common import bench_parser, write_result
from smolds_dist.bench.train import log
from smolds_dist.config import load_config
from smolds_dist.settings import RunConfig

PER_NODE = 8
PER_PROCESS = 128  # ranks that one process plays


def main(args: list[str]) -> None:
    """Measure, print a table and, with --json, write all numbers."""
    parser = bench_parser("python -m benchmarks rendezvous", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024], help="numbers of ranks")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the shortest time of each part counts")
    parser.add_argument("--play", type=int, nargs=3, help="internal: world, first and last rank")
    options = parser.parse_args(args)
    if options.play:
        world, first, last = options.play
        config = config_of(world)
        with ThreadPoolExecutor(last - first) as pool:
            list(pool.map(partial(play, config, world), range(first, last)))
        return
    result: dict[str, dict[str, float]] = {}
    for number in range(options.rounds):
        for world in options.ranks:
            log(f"round {number + 1}/{options.rounds}: {world} ranks")
            for part, seconds in measure(world).items():
                before = result.setdefault(str(world), {}).get(part, seconds)
                result[str(world)][part] = min(before, seconds)
    write_result(options, {"ranks": result})
    parts = next(iter(result.values()))
    print(f"{'CPU ms of rank 0':<34}" + "".join(f"{int(world):>10,}" for world in result))
    for part in parts:
        print(f"{part:<34}" + "".join(f"{1000 * one[part]:>10,.1f}" for one in result.values()))


def config_of(world: int) -> RunConfig:
    return load_config(["--preset=moe-7b-a1b", f"--train.global_batch={world}", "--parallel.device=cpu"])


def play(config: RunConfig, world: int, rank: int) -> dict[str, float]:
    """Be a rank: join, agree on the plan, and on the text. Return this process's CPU seconds by part."""
    from smolds_dist.parallel.agreement import check_same_text, package_versions, plan_from
    from smolds_dist.parallel.ranks import RankInfo
    from smolds_dist.parallel.rendezvous import WaitPolicy, rendezvous

    value = {
        "rank": rank, "local_rank": rank % PER_NODE, "host": f"node{rank // PER_NODE}", "ranks_here": PER_NODE,
        "versions": package_versions(), "settings": json.loads(json.dumps(asdict(config), default=str)),
        "machine": {"devices": ["cpu"], "device_count": 64, "bf16": True, "memory": 10**12, "name": "cpu"}, "shared": True,
        "address": [f"10.0.{rank // PER_NODE // 256}.{rank // PER_NODE % 256}", 4000] if rank % PER_NODE == 0 else None,
    }  # fmt: skip
    identity = {"tokenizer": "t" * 64, "contents": {"default": "c" * 32}, "host": value["host"]}
    seconds = [time.thread_time()]
    joined = rendezvous(RankInfo(rank, rank % PER_NODE, world, PER_NODE), WaitPolicy(300))
    seconds.append(time.thread_time())
    joined.agree("plan", lambda: value, partial(plan_from, config))
    seconds.append(time.thread_time())
    joined.agree("data", lambda: identity, check_same_text)
    seconds.append(time.thread_time())
    if rank == 0:
        time.sleep(2)  # the others read the last decision from its store
    names = ("join the store", "facts: gather, compare, plan", "text: gather, compare")
    return {name: end - begin for name, (begin, end) in zip(names, pairwise(seconds), strict=True)}


def measure(world: int) -> dict[str, float]:
    """Return the CPU seconds of rank 0's main thread, by part."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "benchmarks", "rendezvous", "--play", str(world)]
    cuts = [*range(1, world, PER_PROCESS), world]
    others = [subprocess.Popen([*command, str(first), str(last)]) for first, last in pairwise(cuts)]
    try:
        times = play(config_of(world), world, 0)
    finally:
        for other in others:
            other.wait(120)
    return times | watch(world)


def watch(world: int) -> dict[str, float]:
    """Return the CPU seconds of one look of rank 0's watchdog, before and after the first step."""
    from smolds_dist.activity import ACTIVITY
    from smolds_dist.launching.failure import RankReport
    from smolds_dist.parallel.ranks import RankInfo
    from smolds_dist.settings import Parallel

    with tempfile.TemporaryDirectory() as folder:
        report = RankReport(Path(folder), RankInfo(0, 0, 1), Parallel())
        report.world_size = world
        for rank in range(1, world):
            here = report.entry["system"] if rank < PER_NODE else f"node{rank // PER_NODE}"
            entry = report.entry | {"rank": rank, "system": here}
            (report.folder / f"rank_{rank:05}.json").write_text(json.dumps(entry))

        def look() -> float:
            before = time.thread_time()
            report._exchange_progress()
            report._report_dead_rank()
            return time.thread_time() - before

        ACTIVITY.passes = 0
        early = look()
        ACTIVITY.passes = 1
        look()
        late = min(look() for _ in range(5))
        report.end()
    return {"one look of the watchdog, at first": early, "one look, after the first step": late}
