"""`smolds bench scale --what control`: what rank 0 does that may grow with the number of ranks, beside training, in seconds.

For every number of ranks one process is rank 0 of so many: it joins torch's fake process group, whose collectives return at
once, builds the run's engine at ZeRO 3 in it, and then does what rank 0 does, with the functions and files of a run. The
files of all other ranks are there before; no time is taken of their making. A model's matrices are narrow here: what counts
is how many there are. At ZeRO 3 every rank holds a part of everything, so that no other stage has more to keep track of.
"""

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smolds_dist.bench.common import check_at_least_one, keep, run_python
from smolds_dist.bench.train import processor, say
from smolds_dist.checkpoint.files import RANDOM, CheckpointReader, checkpoint_name, publish, write_tensors
from smolds_dist.checkpoint.resume import open_checkpoint, restore
from smolds_dist.checkpoint.writer import CheckpointWriter, Progress
from smolds_dist.config import load_config
from smolds_dist.costs.hardware import known_hardware
from smolds_dist.data.mixture import mixture_of
from smolds_dist.data.order import Piece, SourceOrder
from smolds_dist.errors import ConfigError
from smolds_dist.launching.failure import RankReport, tell_dead
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.expert_parallel import expert_parameters, skip_shared_memory_build
from smolds_dist.parallel.fragments import Fragment, cut, logical_shapes
from smolds_dist.parallel.gather import Gatherer, rows_of_all
from smolds_dist.parallel.matrix_owners import plan_for
from smolds_dist.parallel.ranks import RankInfo, rank_from_environment, system_name
from smolds_dist.parallel.topology import Topology, detect_machine, plan_topology
from smolds_dist.planner.search import best_first, candidates
from smolds_dist.settings import RunConfig

if TYPE_CHECKING:
    from smolds_dist.parallel.deepspeed_engine import DeepSpeedEngine

RANKS = [64, 256, 1024]
PER_NODE = 8
NARROW = (
    "--model.hidden_size=64", "--model.intermediate_size=32", "--model.num_attention_heads=2",
    "--model.num_key_value_heads=1", "--model.head_dim=32",
)  # fmt: skip
WORDS = 4096  # of the vocabulary
KINDS = ("value", "exp_avg", "exp_avg_sq")
SAVES = 5  # checkpoints that are written, of which two stay
STEP = 1000  # whose samples are looked up
UNIT_TOKENS = 2**22
SHORTEST = 1e-6  # seconds that are told apart from none
ASK_FOR = 0.3  # seconds in which a short piece of work is repeated


def bench_control(options: Any, settings: list[str]) -> None:
    """Measures, prints a table and, with --json and --picture, writes all numbers and draws them.

    Raises:
        ConfigError: for numbers of ranks that no nodes of eight have, or where one fails.
    """
    check_at_least_one(options, "rounds")
    for ranks in options.ranks:
        if ranks < 1 or (ranks > PER_NODE and ranks % PER_NODE):
            raise ConfigError(
                f"--ranks {ranks} is neither part of a node of {PER_NODE} nor whole nodes; use 8, 16, 24, ..."
            )
    by_ranks: dict[str, dict[str, Any]] = {}
    for number, ranks in product(range(options.rounds), options.ranks):
        say(f"round {number + 1} of {options.rounds}: rank 0 of {ranks:,}")
        with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=options.dir) as folder:
            given = ["--preset", options.preset, *NARROW, *settings, *of_run(ranks, Path(folder))]
            told = Path(folder) / "told.json"
            run_python(["-m", "smolds_dist.bench.scale_control", str(ranks), json.dumps(given), str(told)])
            answer = json.loads(told.read_text())
        before = by_ranks.setdefault(str(ranks), answer)["seconds"]
        for piece, seconds in answer["seconds"].items():
            before[piece] = min(seconds, before[piece])
    result = {
        "date": time.strftime("%Y-%m-%d"), "machine": processor(), "preset": options.preset,
        "settings": [*NARROW, *settings], "ranks": by_ranks,
    }  # fmt: skip
    keep(options, result)
    if options.picture:
        draw(result, options.picture)
    print(table(result))


def of_run(ranks: int, folder: Path) -> list[str]:
    """The settings that a run of so many ranks has here: a sequence for each, the experts shared inside a node."""
    return [
        f"--train.global_batch={ranks}", "--train.micro_batch=1", "--train.dtype=fp32", "--train.optimizer=adamw",
        "--parallel.device=cpu", "--parallel.engine=deepspeed", "--parallel.zero=3", "--parallel.expert=max",
        f"--run.dir={folder}", "--run.name=run", "--checkpoint.resume=auto", "--checkpoint.keep=2",
    ]  # fmt: skip


def growth(result: dict[str, Any], piece: str) -> float:
    """The power of the number of ranks that the seconds of a piece grow with between the two largest numbers, where what is
    constant counts least. 1 is as the ranks."""
    numbers = sorted(map(int, result["ranks"]))[-2:]
    first, last = (result["ranks"][str(n)]["seconds"][piece] for n in (numbers[0], numbers[-1]))
    return math.log(last / first) / math.log(numbers[-1] / numbers[0]) if len(numbers) > 1 else 0.0


def table(result: dict[str, Any]) -> str:
    """A line for each piece of work."""
    ranks = result["ranks"]
    lines = [
        f"{result['preset']}, narrow, on {result['machine']}",
        "processor time of rank 0 in ms, and the power of the number of ranks that it grows with at the end",
        f"{'ranks':46}" + "".join(f"{int(n):>12,}" for n in ranks) + f"{'power':>8}",
        f"{'parts of tensors, of all ranks':46}" + "".join(f"{one['parts']:>12,}" for one in ranks.values()),
    ]
    for piece in next(iter(ranks.values()))["seconds"]:
        cells = "".join(f"{one['seconds'][piece] * 1e3:>12,.2f}" for one in ranks.values())
        lines.append(f"{piece:46}{cells}{growth(result, piece):>8.2f}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds over ranks, both logarithmic, a line for each piece; the dotted one grows as the ranks do."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 6.5), dpi=110, facecolor="white", layout="constrained")
    numbers = sorted(map(int, result["ranks"]))
    lines = {
        piece: [result["ranks"][str(n)]["seconds"][piece] for n in numbers]
        for piece in result["ranks"][str(numbers[0])]["seconds"]
    }
    styles = [(f"C{number}", style) for style in ("-", "--", "-.") for number in range(10)]
    ordered = sorted(lines.items(), key=lambda line: -line[1][-1])
    for (piece, seconds), (colour, style) in zip(ordered, styles, strict=False):
        axes.plot(numbers, seconds, style, color=colour, marker="o", markersize=3, label=piece)
    highest = ordered[0][1][0]
    axes.plot(numbers, [2 * highest * n / numbers[0] for n in numbers], ":", color="grey", label="as the ranks")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(numbers, [f"{n:,}" for n in numbers])
    axes.set_xlabel("ranks")
    axes.set_ylabel("processor time of rank 0 (s)")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


# The process that is rank 0


def join_fake_ranks(rank: int, world: int) -> RankInfo:
    """Makes this process a rank of so many, all others of which are missing: collectives return at once, and what they
    should bring from others is this rank's own, or nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    here = min(PER_NODE, world)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank % here), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    skip_shared_memory_build()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return rank_from_environment()


def fragments_of(engine: "DeepSpeedEngine", rank: int, kinds: tuple[str, ...] = KINDS) -> Iterator[Fragment]:
    """What any rank holds at ZeRO 3, all zeros, told from what this one holds: the ranks that share a parameter, for experts
    those that have the same ones, each have an equal part of it, in their order."""
    experts, expert = expert_parameters(engine.model), engine.topology.expert
    parameter: Any
    for name, parameter in engine.model.named_parameters():
        length = parameter.ds_tensor.numel()
        place, first_expert = rank, 0
        if name in experts:
            place, first_expert = rank // expert, rank % expert * parameter.ds_shape[0]
        tensors = {kind: torch.zeros(length) for kind in kinds}
        yield from cut(logical_shapes(name, parameter.ds_shape, first_expert), place * length, tensors)


def tensors_of(engine: "DeepSpeedEngine", rank: int) -> dict[str, torch.Tensor]:
    """What any rank writes into its file of a checkpoint, by key."""
    tensors = {
        f"{one.name}:{kind}:{one.start}": tensor
        for one in fragments_of(engine, rank)
        for kind, tensor in one.tensors.items()
    }
    return tensors | {f"{RANDOM}rank_{rank:05}:cpu:0": torch.get_rng_state()}


class Times:
    """Processor time by piece of work, so that waiting for the disk or for other programs does not count."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = defaultdict(list)

    def take(self, piece: str, work: Callable[[], Any], again: bool = True) -> Any:
        """What `work` gives; where it may be done `again`, it is, for `ASK_FOR` seconds."""
        end = time.perf_counter() + (ASK_FOR if again else 0)
        while True:
            # Of this thread: the clock of a process with several may step back (seen in a virtual machine).
            begin = time.thread_time()
            result = work()
            self._taken[piece].append(max(time.thread_time() - begin, SHORTEST))
            if time.perf_counter() >= end:
                return result

    def least(self) -> dict[str, float]:
        """Seconds: the shortest of each piece's times, because others make them only longer."""
        return {piece: min(taken) for piece, taken in self._taken.items()}


def measure(world: int, given: list[str]) -> dict[str, Any]:
    """Seconds of rank 0 of `world` by piece of work, and how many parts of tensors all ranks hold."""
    from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
    from smolds_dist.parallel.balancer import Balancer
    from smolds_dist.parallel.deepspeed_engine import DeepSpeedEngine
    from smolds_dist.parallel.fragments import tensor_shapes
    from smolds_dist.training.build import new_engine

    times = Times()
    config = load_config(given, benchmark=True)
    info = join_fake_ranks(0, world)
    topology = times.take("topology of the run", lambda: plan_topology(config, detect_machine(), info))
    times.take("smolds plan", lambda: plan(config, world))
    times.take("samples of a step", samples_of_steps(config, topology))
    times.take("expert groups, by DeepSpeed", lambda: make_expert_groups(topology.expert), again=False)

    settings = config.model.architecture() | {"vocab_size": WORDS}
    model_config = DeepSeekV3Config(**settings)
    with torch.device("meta"):
        shapes = tensor_shapes(DeepSeekV3ForCausalLM(model_config))
    engine = times.take("engine, with DeepSpeed", lambda: new_engine(model_config, config, topology, None), again=False)
    assert isinstance(engine, DeepSpeedEngine)
    engine.allocate_optimizer_state(lambda name: KINDS[1:], 1)
    balancer = Balancer(engine.model, config.train.balance_rate)

    held = parts_of_all_ranks(engine, shapes, world)
    measure_plans(times, engine, shapes, held, world)
    measure_comparisons(times, engine, topology)
    measure_watching(times, config, info)
    writer = CheckpointWriter(config, topology, shapes, lambda samples: {})
    write_all(writer, engine, world)
    measure_saving(times, writer, engine, balancer)
    measure_resuming(times, config, topology, engine, balancer)
    return {"parts": len(held), "seconds": times.least()}


def plan(config: RunConfig, world: int) -> None:
    """What `smolds plan` searches through for so many GPUs."""
    here = min(PER_NODE, world)
    machine = known_hardware("h100")
    assert machine
    asked = replace(
        config,
        parallel=replace(config.parallel, zero="auto", expert="auto", device="auto"),
        train=replace(config.train, micro_batch=None),
    )
    best_first(list(candidates(asked, machine, world // here, here, 0.0)), machine)


def samples_of_steps(config: RunConfig, topology: Topology) -> Callable[[], list[list[Piece]]]:
    """Finds a rank's samples of the next step, each time that it is called; the first is the one after step `STEP`.

    The source is one of so many units of `UNIT_TOKENS` tokens that the run stays in its first epoch.
    """
    mixture = mixture_of(config)
    size, length = config.train.global_batch, config.data.seq_len
    units = -(-2 * STEP * size * length // UNIT_TOKENS)
    orders = [
        SourceOrder(
            units,
            lambda following, _: [Piece(int(following[0]), 0, UNIT_TOKENS)],
            length,
            config.train.seed,
            config.data.window_tokens,
        )
        for _ in mixture.names
    ]
    step = STEP

    def find() -> list[list[Piece]]:
        nonlocal step
        for order, taken in zip(orders, mixture.totals(step * size).tolist(), strict=True):
            order.extend(taken - 1)
        first = (step - 1) * size + topology.rank * topology.per_rank
        source, number = mixture.look_up(np.arange(first, first + topology.per_rank))
        step += 1
        return [pieces for at, order in enumerate(orders) for pieces in order.pieces(number[source == at])]

    find()  # gets to know all that comes before
    return find


def make_expert_groups(expert: int) -> None:
    """The groups that AutoEP makes, where there are none yet, of the ranks that share experts and of those that have the
    same ones."""
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(expert)


def parts_of_all_ranks(engine: "DeepSpeedEngine", shapes: dict[str, tuple[int, ...]], world: int) -> np.ndarray:
    """Rank, number of the logical tensor by its name, start and length of all that all ranks hold [M, 4]."""
    number = {name: place for place, name in enumerate(sorted(shapes))}
    return np.array(
        [
            (rank, number[one.name], one.start, len(one.tensors["value"]))
            for rank in range(world)
            for one in fragments_of(engine, rank, ("value",))
        ]
    )


def measure_plans(
    times: Times, engine: "DeepSpeedEngine", shapes: dict[str, tuple[int, ...]], held: np.ndarray, world: int
) -> None:
    """Who computes which matrix (Muon), and who sends what to the export."""
    names = sorted(shapes)
    own = [(0, *row) for row in held[held[:, 0] == 0].tolist()]
    times.take("parts of all ranks, exchanged", lambda: rows_of_all(own, 5, engine.device))

    # All in one partition: DeepSpeed's are a few, and together they have no more parts.
    is_matrix = np.array([len(shapes[name]) == 2 for name in names])
    matrices = {name: shapes[name] for name in names if len(shapes[name]) == 2}
    renumbered = np.cumsum(is_matrix) - 1
    rows = held[is_matrix[held[:, 1]]]
    rows = np.column_stack((rows[:, 0], renumbered[rows[:, 1]], rows[:, 2], np.zeros(len(rows), np.int64), rows[:, 3]))
    times.take("owners of the matrices (Muon)", lambda: plan_for(rows, matrices, world, 0, np.zeros(world)))

    gatherer = Gatherer(engine.fragments(), names, engine.device, torch.float32)
    times.take("export: index of the parts", lambda: gatherer.find_in(held))
    wanted = [[name] for name in names[:world]] + [[]] * max(0, world - len(names))
    times.take("export: a tensor for every rank", lambda: gatherer(wanted))


def measure_comparisons(times: Times, engine: Engine, topology: Topology) -> None:
    """Ranks that are slow, and weights that are not the same; the latter as at ZeRO 1, because at ZeRO 3 none should be."""
    from smolds_dist.training.rank_checks import SlowRanks, find_difference

    slow = SlowRanks(topology)
    times.take("slow ranks", lambda: slow.compare(engine.sum_over_ranks))
    names = list(expert_parameters(engine.model))
    times.take(
        "weights that should be the same", lambda: find_difference(engine.model, replace(topology, zero=1), names)
    )


def measure_watching(times: Times, config: RunConfig, info: RankInfo) -> None:
    """Looking for ranks of this host that are dead, which every rank does once a second."""
    report = RankReport(config.run_dir, info, config.parallel)
    for rank in range(1, info.world_size):
        node = rank // info.ranks_per_node
        own = report.entry | {"rank": rank, "system": f"node {node}" if node else system_name()}
        (report.folder / f"rank_{rank:05}.json").write_text(json.dumps(own))
    job = report.entry["job"]
    times.take("dead ranks, before the first step", lambda: tell_dead(report.folder, job, report.near()))
    report.beat()
    report.near()
    times.take("dead ranks, from then on", lambda: tell_dead(report.folder, job, report.near()))
    report.end()


def write_all(writer: CheckpointWriter, engine: "DeepSpeedEngine", world: int) -> None:
    """Files and entries of all ranks but rank 0."""
    folder = writer.root / "written"
    folder.mkdir(parents=True)
    for rank in range(1, world):
        path = folder / f"rank_{rank:05}.safetensors"
        path.with_suffix(".json").write_text(json.dumps(write_tensors(path, tensors_of(engine, rank))))


def measure_saving(times: Times, writer: CheckpointWriter, engine: Engine, balancer: Any) -> None:
    """Rank 0's part of `SAVES` checkpoints, all with the same files."""
    written = writer.root / "written"
    for step in range(1, SAVES + 1):
        unfinished = writer.root / f"unfinished_{checkpoint_name(step)}"
        shutil.copytree(written, unfinished, copy_function=os.link)
        own = times.take("save: keys and ranges of rank 0", lambda: writer._live(engine, balancer), again=False)
        path = unfinished / "rank_00000.safetensors"
        entry = times.take("save: file of rank 0", lambda: write_tensors(path, own), again=False)  # noqa: B023
        path.with_suffix(".json").write_text(json.dumps(entry))
        manifest = writer._manifest(engine, Progress(step), None)
        files = times.take(
            "save: entries of all ranks",
            lambda: writer._files_of_all_ranks(unfinished),  # noqa: B023
            again=False,
        )
        manifest.files.update(files)
        times.take(
            "save: every tensor once in the files",
            lambda: CheckpointReader(unfinished, manifest).check_coverage(),  # noqa: B023
            again=False,
        )
        newest = times.take("save: manifest", lambda: publish(unfinished, manifest), again=False)  # noqa: B023
        if step > writer.config.checkpoint.keep:
            times.take("save: retention, one removed", lambda: writer._retain(newest), again=False)  # noqa: B023
    shutil.rmtree(written)


def measure_resuming(times: Times, config: RunConfig, topology: Topology, engine: Engine, balancer: Any) -> None:
    """Rank 0's part of a resume on as many ranks, and a resume on one."""
    reader = times.take("resume: check of the checkpoint", lambda: open_checkpoint(config, topology), again=False)
    times.take("resume: state of rank 0", lambda: restore(reader, engine, balancer, topology), again=False)
    alone = replace(topology, world_size=1)
    times.take("resume on one rank: check", lambda: open_checkpoint(config, alone), again=False)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    Path(sys.argv[3]).write_text(json.dumps(measure(int(sys.argv[1]), json.loads(sys.argv[2]))))
