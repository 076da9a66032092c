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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from smolds_dist.config import load_config, save_config
from smolds_dist.data.batch import TrainingData
from smolds_dist.data.cores import free_cores, use_all_cores
from smolds_dist.data.prepare import find_data
from smolds_dist.data.sharded_source import LOOKAHEAD, ShardedSource
from smolds_dist.data.staged_order import StagedOrder
from smolds_dist.errors import ConfigError
from smolds_dist.files import file_message, replace_text
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
    position: str  # path of a file with the number of consumed samples


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
        self._position = Path(self._folder.name) / "position"
        self.set_position(0)
        tokenizer = data.tokenizer.name_or_path
        worker_args = WorkerArgs(str(settings), os.getpid(), tokenizer, data.limits, background, str(self._position))
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

    def set_position(self, samples: int) -> None:
        """Record how many samples of the run were consumed."""
        replace_text(self._position, str(samples))

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


class DiskBudget:
    """Deletes consumed tokens from one machine's cache to make room for those needed next (`data.disk_budget_gb`); used by
    one process per machine. Metadata is kept, so the sample order needs no tokens; a later epoch tokenizes them again.

    Args:
        budget: bytes of tokens that may be cached.
    """

    def __init__(self, data: TrainingData, budget: float):
        self._data, self._budget = data, budget
        self._windows: list[tuple[int, int, int]] = []

    def enforce(self, samples: int) -> bool:
        """Delete the oldest consumed shards if the cache exceeds the budget.

        Returns:
            True if the run has entered another window.
        """
        at = [order.window_of(taken) for _, order, taken in sharded_orders(self._data, samples)]
        if at == self._windows:
            return False
        self._windows = at
        over = cached_bytes(self._data) - self._budget
        for source, order, taken in sharded_orders(self._data, samples):
            for shard in order.consumed_shards(taken).tolist():
                over -= source.remove(shard) if over > 0 else 0
        return True


def sharded_orders(data: TrainingData, samples: int) -> list[tuple[ShardedSource, StagedOrder, int]]:
    """Return sources of several shards, their orders, and each one's last sample among the run's first `samples`."""
    taken = data.taken(samples)
    several = {name: source for name, source in data.sources.items() if len(source.shards) > 1}
    return [(source, data.orders[name], max(0, taken[name] - 1)) for name, source in several.items()]


def cached_bytes(data: TrainingData) -> int:
    """Return the bytes of all cached tokens."""
    return sum(source.cached_bytes() for source in data.sources.values())


@contextmanager
def background_tokenization(config: RunConfig, data: TrainingData, ranks: int) -> Iterator[Callable[[int], None]]:
    """Run the background workers of a machine with `ranks` ranks while the block lasts.

    Yields:
        A function to call after each step with the number of consumed samples.
    """
    gigabytes = config.data.disk_budget_gb
    if gigabytes is None and data.has_samples(data.stages.samples(config.train.steps)):
        yield lambda samples: None
        return
    count = free_cores(ranks) if config.data.workers == "auto" else config.data.workers
    with Workers(config, data, count, background=True) as workers:
        budget = DiskBudget(data, 1e9 * gigabytes) if gigabytes else None

        def done(samples: int) -> None:
            if budget and budget.enforce(samples):
                workers.set_position(samples)

        yield done


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
    budget = config.data.disk_budget_gb if args.background else None
    while True:
        exit_if_orphaned(args.parent)
        wanted = wanted_shards(data, samples)
        if budget is not None:
            wanted = within_budget(data, 1e9 * budget, Path(args.position), wanted or [])
        elif wanted is None:
            return
        if not any(try_tokenize(source, shard, failed, args.background) for source, shard in wanted):
            if args.background and wanted and failed.issuperset((source.name, shard) for source, shard in wanted):
                return
            time.sleep(IDLE_SECONDS)


def within_budget(
    data: TrainingData, budget: float, position: Path, wanted: list[tuple[ShardedSource, int]]
) -> list[tuple[ShardedSource, int]]:
    """Return the shards for which the budget has room: first deleted ones that the run needs next, then `wanted`."""
    for source in data.sources.values():
        source.count_cached()
    if cached_bytes(data) >= budget:
        return []
    again = [
        (source, shard)
        for source, order, taken in sharded_orders(data, int(position.read_text()))
        for shard in order.upcoming_shards(taken).tolist()
        if not source.has_tokens(shard)
    ]
    return again[:LOOKAHEAD] + wanted


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
