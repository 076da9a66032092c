"""Worker processes that tokenize the next shards of a run, during training or in advance.

Any number of workers on any number of machines that can access the cache divide the work: whoever gets a shard's lock
tokenizes it. A worker exits when the process that started it ends for any reason.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from smolds_dist.config import load_config, save_config
from smolds_dist.data.batch import TrainingData
from smolds_dist.data.cores import free_cores, use_all_cores
from smolds_dist.data.prepare import find_data
from smolds_dist.data.sharded_source import LOOKAHEAD, ShardedSource
from smolds_dist.errors import ConfigError
from smolds_dist.files import file_message
from smolds_dist.progress import Reporter
from smolds_dist.settings import RunConfig

IDLE_SECONDS = 0.2  # between two searches, while other processes tokenize all needed shards


@dataclass(frozen=True)
class WorkerArgs:
    """Arguments of a worker process."""

    config: str  # path of the run's settings
    parent: int  # process id; the worker exits when it ends
    tokenizer: str  # folder or Hub name
    limits: dict[str, int | None]
    background: bool  # during training, at low priority


class Workers:
    """Worker processes, which end with the `with` block.

    Args:
        count: number of processes.
        background: run at low priority and ignore invalid text, which the training process reports when it needs it.
    """

    def __init__(self, config: RunConfig, data: TrainingData, count: int, background: bool):
        self._folder = tempfile.TemporaryDirectory(prefix="smolds-workers-")
        settings = Path(self._folder.name) / "config.yaml"
        save_config(config, settings)
        worker_args = WorkerArgs(str(settings), os.getpid(), data.tokenizer.name_or_path, data.limits, background)
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "smolds_dist.data.workers", json.dumps(asdict(worker_args))]
        self.processes = [
            subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()  # shards are written completely or not at all
        for process in self.processes:
            process.communicate()
        self._folder.cleanup()

    def are_running(self) -> bool:
        """Return True if at least one worker is running.

        Raises:
            ConfigError: if a worker failed, such as on invalid text.
        """
        for process in self.processes:
            if process.poll():
                message = (process.stdout.read() if process.stdout else "").strip()
                raise ConfigError(message or f"a worker exited with code {process.returncode}; see its output above.")
        return any(process.poll() is None for process in self.processes)


@contextmanager
def background_tokenization(config: RunConfig, data: TrainingData, ranks: int) -> Iterator[None]:
    """Run the background workers of a machine with `ranks` ranks while the block lasts."""
    if data.has_samples(data.stages.samples(config.train.steps)):
        yield
        return
    count = free_cores(ranks) if config.data.workers == "auto" else config.data.workers
    with Workers(config, data, count, background=True):
        yield


def wanted_shards(data: TrainingData, samples: int) -> list[tuple[ShardedSource, int]] | None:
    """Return the missing shards of the run's first `samples` samples, most urgent first; None if none is missing."""
    needed = data.taken(samples)
    missing: list[tuple[int, ShardedSource, list[int]]] = []
    for name, source in data.sources.items():
        order = data.orders[name]
        if needed[name] and not order.extend(needed[name] - 1, wait=False):
            shards = [shard for shard in order.wanted_shards().tolist() if not source.has_meta(shard)][:LOOKAHEAD]
            missing.append((first_missing_sample(data, name, order.num_known, samples), source, shards))
    missing.sort(key=lambda one: one[0])
    return [(source, shard) for _, source, shards in missing for shard in shards] if missing else None


def first_missing_sample(data: TrainingData, name: str, known: int, samples: int) -> int:
    """Return the first sample of the run that needs more than the source's first `known` samples; `samples` if none."""
    return bisect_right(range(samples), known, key=lambda sample: data.taken(sample + 1)[name])


def run_worker(args: WorkerArgs) -> None:
    """Tokenize shards until the run has all that it needs."""
    if args.background:
        os.nice(19)
    use_all_cores()
    config = load_config(["--config", args.config, "-q"])
    reporter = Reporter()
    reporter.on_update = lambda: exit_if_orphaned(args.parent)
    data = find_data(config, Path(args.tokenizer), args.limits, reporter)
    failed = set[tuple[str, int]]()
    samples = data.stages.samples(config.train.steps)
    while (wanted := wanted_shards(data, samples)) is not None:
        exit_if_orphaned(args.parent)
        if not any(try_tokenize(source, shard, failed, args.background) for source, shard in wanted):
            if args.background and wanted and failed.issuperset((source.name, shard) for source, shard in wanted):
                return
            time.sleep(IDLE_SECONDS)


def try_tokenize(source: ShardedSource, shard: int, failed: set[tuple[str, int]], background: bool) -> bool:
    """Tokenize a free shard; return True on success. Invalid text raises an error, or in the background is remembered."""
    if (source.name, shard) in failed:
        return False
    try:
        return source.tokenize_shard(shard)
    except ConfigError:
        if not background:
            raise
        failed.add((source.name, shard))
        return False


def exit_if_orphaned(parent: int) -> None:
    """Exit if the process that started this one has ended."""
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    try:
        run_worker(WorkerArgs(**json.loads(sys.argv[1])))
    except Exception as error:
        if (message := str(error) if isinstance(error, ConfigError) else file_message(error)) is None:
            raise
        print(message)
        sys.exit(2)
