"""Worker processes: they tokenise the units that a run will want next, while it trains or long before.

Any number of them, on any number of machines that see the cache, share the work: whoever gets a unit's lock makes it. A
worker ends with the process that started it, however that ends.
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
from smolds_dist.data.order import SampleOrder
from smolds_dist.data.prepare import find_data
from smolds_dist.data.sharded_source import AT_ONCE, ShardedSource
from smolds_dist.errors import ConfigError
from smolds_dist.files import file_message, replace_text
from smolds_dist.progress import Reporter
from smolds_dist.settings import RunConfig

IDLE = 0.2  # seconds between two looks, where others are making all that is wanted


@dataclass(frozen=True)
class WorkerArgs:
    """What a worker is told."""

    config: str  # path of the run's settings
    parent: int  # process without which it ends
    tokenizer: str  # a folder, or a name on the Hub
    limits: dict[str, int | None]
    ahead: bool  # of a training, whose cores it must leave alone
    position: str  # path of a file that says how many samples of the run have been trained on


class Workers:
    """Some worker processes; they end with the `with` block.

    Args:
        count: how many.
        ahead: at low priority, passing over what is wrong with the text: the training will tell it when it gets there.
    """

    def __init__(self, config: RunConfig, data: TrainingData, count: int, ahead: bool):
        self._folder = tempfile.TemporaryDirectory(prefix="smolds-workers-")
        settings = Path(self._folder.name) / "config.yaml"
        save_config(config, settings)
        self._position = Path(self._folder.name) / "position"
        self.tell_position(0)
        tokenizer = data.tokenizer.name_or_path
        worker_args = WorkerArgs(str(settings), os.getpid(), tokenizer, data.limits, ahead, str(self._position))
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
            process.kill()  # a unit is written whole or not at all
        for process in self.processes:
            process.communicate()
        self._folder.cleanup()

    def tell_position(self, samples: int) -> None:
        """So many samples of the run have been trained on."""
        replace_text(self._position, str(samples))

    def busy(self) -> bool:
        """Whether one of them still works.

        Raises:
            ConfigError: for what is wrong with the text.
        """
        for process in self.processes:
            if process.poll():
                said = (process.stdout.read() if process.stdout else "").strip()
                raise ConfigError(said or f"a worker process ended with exit code {process.returncode}; see above.")
        return any(process.poll() is None for process in self.processes)


class DiskBudget:
    """Tokens that lie behind a run give way to those that it wants next (`data.disk_budget_gb`): of one machine's cache, for
    one process of it. What a unit held stays known, so that the order does not need its tokens; they are made again where a
    later epoch wants them.

    Args:
        budget: bytes of tokens that may be there.
    """

    def __init__(self, data: TrainingData, budget: float):
        self._data, self._budget = data, budget
        self._at: list[tuple[int, int]] = []

    def keep(self, samples: int) -> bool:
        """The run has come so far: removes what lies behind, the oldest first, where there is too much.

        Returns:
            Whether it has come to another window.
        """
        at = [order.window_of(taken) for _, order, taken in unit_orders(self._data, samples)]
        if at == self._at:
            return False
        self._at = at
        over = bytes_there(self._data) - self._budget
        for source, order, taken in unit_orders(self._data, samples):
            for unit in order.consumed_shards(taken).tolist():
                over -= source.remove(unit) if over > 0 else 0
        return True


def unit_orders(data: TrainingData, samples: int) -> list[tuple[ShardedSource, SampleOrder, int]]:
    """Sources that are made of several units, with their orders, and the last of their samples among the run's first."""
    taken = data.taken(samples)
    several = {name: source for name, source in data.sources.items() if len(source.units) > 1}
    return [(source, data.orders[name], max(0, taken[name] - 1)) for name, source in several.items()]


def bytes_there(data: TrainingData) -> int:
    """Bytes of all tokens that are there."""
    return sum(source.bytes_there() for source in data.sources.values())


@contextmanager
def tokenising_ahead(config: RunConfig, data: TrainingData, ranks: int) -> Iterator[Callable[[int], None]]:
    """The workers that a machine with so many ranks of a training should have, while the block lasts.

    Yields:
        What is to be told after each step how many samples of the run have been trained on.
    """
    gigabytes = config.data.disk_budget_gb
    if gigabytes is None and data.has_samples(config.train.steps * config.train.global_batch):
        yield lambda samples: None
        return
    count = free_cores(ranks) if config.data.workers == "auto" else config.data.workers
    with Workers(config, data, count, ahead=True) as workers:
        budget = DiskBudget(data, 1e9 * gigabytes) if gigabytes else None

        def done(samples: int) -> None:
            if budget and budget.keep(samples):
                workers.tell_position(samples)

        yield done


def wanted_units(data: TrainingData, samples: int) -> list[tuple[ShardedSource, int]] | None:
    """Units that the run's first `samples` samples want and that are not there yet, the most urgent first; None where that
    cannot be said any more, as all is known."""
    needed = data.taken(samples)
    missing: list[tuple[int, ShardedSource, list[int]]] = []
    for name, source in data.sources.items():
        order = data.orders[name]
        if needed[name] and not order.extend(needed[name] - 1, wait=False):
            units = [unit for unit in order.wanted_units().tolist() if not source.has_meta(unit)][:AT_ONCE]
            missing.append((first_missing_sample(data, name, order.num_known, samples), source, units))
    missing.sort(key=lambda one: one[0])
    return [(source, unit) for _, source, units in missing for unit in units] if missing else None


def first_missing_sample(data: TrainingData, name: str, known: int, samples: int) -> int:
    """The first sample of the run for which the source's first `known` samples are not enough; `samples`, if none is."""
    return bisect_right(range(samples), known, key=lambda sample: data.taken(sample + 1)[name])


def run_worker(args: WorkerArgs) -> None:
    """Makes units until there are all that the run wants."""
    if args.ahead:
        os.nice(19)
    use_all_cores()
    config = load_config(["--config", args.config, "-q"])
    reporter = Reporter()
    reporter.heartbeat = lambda: exit_if_orphaned(args.parent)
    data = find_data(config, Path(args.tokenizer), args.limits, reporter)
    refused = set[tuple[str, int]]()
    samples = config.train.steps * config.train.global_batch
    budget = config.data.disk_budget_gb if args.ahead else None
    while True:
        exit_if_orphaned(args.parent)
        wanted = wanted_units(data, samples)
        if budget is not None:
            wanted = within_budget(data, 1e9 * budget, Path(args.position), wanted or [])
        elif wanted is None:
            return
        if not any(try_tokenize(source, unit, refused, args.ahead) for source, unit in wanted):
            if args.ahead and wanted and refused.issuperset((source.name, unit) for source, unit in wanted):
                return
            time.sleep(IDLE)


def within_budget(
    data: TrainingData, budget: float, position: Path, wanted: list[tuple[ShardedSource, int]]
) -> list[tuple[ShardedSource, int]]:
    """Of the wanted units those for which there is room, after those that the run comes to next and that were removed."""
    for source in data.sources.values():
        source.count_cached()
    if bytes_there(data) >= budget:
        return []
    again = [
        (source, unit)
        for source, order, taken in unit_orders(data, int(position.read_text()))
        for unit in order.upcoming_shards(taken).tolist()
        if not source.has_tokens(unit)
    ]
    return again[:AT_ONCE] + wanted


def try_tokenize(source: ShardedSource, unit: int, refused: set[tuple[str, int]], ahead: bool) -> bool:
    """Whether the unit was made here. One that cannot be made is refused, or, ahead of a training, remembered."""
    if (source.name, unit) in refused:
        return False
    try:
        return source.tokenize_shard(unit)
    except ConfigError:
        if not ahead:
            raise
        refused.add((source.name, unit))
        return False


def exit_if_orphaned(parent: int) -> None:
    """Ends this process where the one that started it is gone."""
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
