"""A ladder's plan: sizes, steps and learning rates of its runs, in `ladder.yaml`.

Each rung is one size. Its trunk trains at a constant rate up to 80 % of the largest number of tokens and then decays (WSD,
arXiv 2404.06395, section 4.2). For each smaller number a branch continues the trunk's checkpoint at 80 % of it with a decay,
so that every point of the ladder is the end of a complete schedule.
"""

import math
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.files import replace_text
from smolds_dist.inputs import Positive, convert, printable, read_yaml
from smolds_dist.planner.family import Size, head_step, sized, weights
from smolds_dist.rules import validate
from smolds_dist.settings import Model, RunConfig
from smolds_dist.stages import UNITS

PLAN = "ladder.yaml"
DECAY = 5  # a decay is the last fifth of a run, so steps are multiples of 5
# Defaults of all runs: only the last validation loss is needed.
OPTIONS = ["--train.eval_every=0", "--log.sample_every=0", "--log.sample_prompts=[]", "--log.tensorboard=false"]
# Settings that a rung cannot have, and options that a ladder cannot have
RUNS = (
    "run.dir run.name train.steps train.lr train.schedule train.decay_fraction train.stages train.time_budget "
    "checkpoint.every checkpoint.keep checkpoint.keep_every checkpoint.keep_best checkpoint.resume"
).split()
OWN = {*RUNS, "train.mup_base_width", "train.mup_base_depth"} - {"train.lr", "checkpoint.every"}
NUMBER_OF_SIZES = 5
MOST_PER_WEIGHT = 10_000  # tokens for each active weight
MOST_TOKENS = 1e14


@dataclass
class Rung:
    """One size, and what is trained of it."""

    name: str
    steps: list[Positive]  # a run for each, ascending; multiples of the first
    every: Positive  # steps between checkpoints
    settings: dict[str, Any]  # by their dotted names
    held_out: bool = False  # not fitted, but compared with the prediction
    factors: list[float] = field(default_factory=list)  # further rates at its last steps, as multiples of the best


@contextmanager
def named(rung: Rung) -> Iterator[None]:
    """Name the rung in errors."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"rung {rung.name}: {error}") from None


@dataclass
class Ladder:
    """The contents of `PLAN`."""

    options: list[str]  # of every run
    rates: list[float]  # tried on the first rung at its most steps; one: used by all runs
    rungs: list[Rung]

    @cached_property
    def config(self) -> RunConfig:
        return load_config(self.options, prog="smolds ladder")

    def config_of(self, rung: Rung) -> RunConfig:
        """Return a rung's settings; raise a `ConfigError` that names the rung if they are invalid."""
        values = asdict(self.config)
        for name, value in rung.settings.items():
            section, _, key = name.partition(".")
            if name in RUNS:
                raise ConfigError(
                    f"{PLAN}: rung {rung.name}: {name} is set by the ladder for each of its runs; remove it."
                )
            if key not in values.get(section, {}):
                raise ConfigError(f"{PLAN}: rung {rung.name}: {name} is not a setting; remove it.")
            values[section][key] = value
        config = convert(values, RunConfig, Path(f"{PLAN}: rung {rung.name}"), "set values as in a run's config.yaml")
        with named(rung):
            validate(config)
        return config

    def step_tokens(self, rung: Rung) -> int:
        config = self.config_of(rung)
        return config.train.global_batch * config.data.seq_len


@dataclass(frozen=True)
class LadderRun:
    """One run of a ladder; its name has what determines it, so that an edited plan trains other runs."""

    rung: Rung
    steps: int
    lr: float
    trunk: "LadderRun | None" = None  # that it branches from

    @property
    def name(self) -> str:
        return f"{self.rung.name}-{self.steps}-lr{self.lr:g}"

    @property
    def first(self) -> int:
        """Steps that it takes from the trunk."""
        return self.steps // DECAY * (DECAY - 1) if self.trunk else 0

    def options(self, folder: Path) -> list[str]:
        """Return its training options after the ladder's; a branch's, in addition to the trunk's."""
        kept = self.rung.steps[0] // DECAY * (DECAY - 1) if len(self.rung.steps) > 1 and not self.trunk else 0
        own: dict[str, Any] = {
            "train.steps": self.steps, "checkpoint.every": self.rung.every, "checkpoint.keep": 1,
            "checkpoint.keep_every": kept, "checkpoint.keep_best": False,
        }  # fmt: skip
        if self.trunk is None:
            own |= self.rung.settings | {
                "train.schedule": "wsd", "train.decay_fraction": 1 / DECAY, "train.lr": self.lr, "run.dir": folder,
                "run.name": self.name,
            }  # fmt: skip
        return options_of(own)


def options_of(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={'null' if value is None else value}" for name, value in settings.items()]


def runs_of(rung: Rung, best: float) -> list[LadderRun]:
    """Return the runs of a rung at the best rate, the trunk first, and at multiples of it."""
    trunk = LadderRun(rung, rung.steps[-1], best)
    branches = [LadderRun(rung, steps, best, trunk) for steps in rung.steps[:-1]]
    return [trunk, *branches, *(replace(trunk, lr=significant(best * factor)) for factor in rung.factors)]


def sweep_of(ladder: Ladder, rates: list[float]) -> list[LadderRun]:
    """Return the runs of the first rung that find the best rate; at its most tokens, as the rate falls with them."""
    rung = ladder.rungs[0]
    return [LadderRun(rung, rung.steps[-1], rate) for rate in rates]


def significant(rate: float) -> float:
    """Round a rate to the digits that run names have."""
    return float(f"{rate:.4g}")


def make_ladder(
    options: list[str],
    sizes: list[Size],
    held_out: Size | None,
    tokens: str,
    rates: int,
    held_out_rates: int,
    experts: list[int],
) -> Ladder:
    """Return the plan of a ladder.

    Args:
        options: training options.
        sizes: default: `NUMBER_OF_SIZES` below the options' model.
        held_out: default: the largest of `sizes`.
        tokens: comma-separated multiples of the smallest number: per active weight, or absolute such as 4M.
        rates: number of learning rates to try on the smallest rung, each twice the one before, around train.lr.
        held_out_rates: the same for the hold-out rung, around the best.
        experts: numbers of experts of further rungs of each fitted size; 1: a dense twin.

    Raises:
        ConfigError: if a size, number of tokens or option does not fit.
    """
    ladder = Ladder([*OPTIONS, *options], [], [])
    config = ladder.config
    sizes = sizes or default_sizes(config)
    usual = {config.model.num_experts: None}  # a size's name has only other numbers of experts
    by_cost = sorted(
        {replace(size, experts=usual.get(size.experts or 0, size.experts)) for size in sizes},
        key=lambda size: (weights(sized(config, size))[0], size.experts or 0),
    )
    held_out = held_out or by_cost[-1]
    by_cost = [size for size in by_cost if size != held_out]
    if len(by_cost) < 2:
        raise ConfigError(f"--sizes leaves {len(by_cost)} sizes without the hold-out {held_out}; name at least two.")
    asked = parse_tokens(tokens)
    counts = [count for count in experts if count != config.model.num_experts]
    others = [replace(size, experts=count) for size in by_cost for count in counts]
    for size in [*(size for size in dict.fromkeys([*by_cost, *others]) if size != held_out), held_out]:
        same = replace(size, experts=None)  # rungs of one size see the same tokens
        active, step_tokens = weights(sized(config, same))[0], config.train.global_batch * config.data.seq_len
        amounts = [amount.tokens(active) / step_tokens for amount in asked]
        steps, every = steps_of(amounts, config.checkpoint.every)
        ladder.rungs.append(Rung(str(size), steps, every, size_settings(config, sized(config, size).model)))
    warmup = min(config.train.warmup_steps, ladder.rungs[0].steps[0] // 10)
    for rung in ladder.rungs:
        rung.settings |= {"train.warmup_steps": warmup} | transfer(options, by_cost[0])
    last = ladder.rungs[-1]
    last.held_out, last.steps = True, last.steps[-1:]
    middle = held_out_rates // 2
    last.factors = [2.0 ** (n - middle) for n in range(held_out_rates) if n != middle]
    ladder.rates = [significant(config.train.lr * 2.0 ** (n - rates // 2)) for n in range(max(1, rates))]
    check_ladder(ladder, Path(PLAN))
    return ladder


def transfer(options: list[str], smallest: Size) -> dict[str, Any]:
    """Return the settings with which the smallest rung's best learning rate is the others', unless the options set
    train.mup."""
    base = {"train.mup_base_width": smallest.width, "train.mup_base_depth": smallest.depth}
    asked = any(word.partition("=")[0] == "--train.mup" for word in options)
    return base if asked else {"train.mup": True} | base


def _check_options(options: list[str], config: RunConfig) -> None:
    for word in options:
        if (name := word.partition("=")[0].removeprefix("--")) in OWN:
            raise ConfigError(f"--{name} is set by the ladder for each of its runs; remove it.")
    if config.train.stages:
        raise ConfigError("train.stages cannot be part of a ladder, whose runs have stages of their own; unset it.")
    if config.train.time_budget:
        raise ConfigError("--train.time_budget changes the number of tokens that a ladder compares; unset it.")


@dataclass(frozen=True)
class Amount:
    """A number of tokens, absolute or per active weight."""

    number: float
    per_weight: bool

    def tokens(self, active: int) -> float:
        return self.number * active if self.per_weight else self.number


def parse_tokens(text: str) -> list[Amount]:
    """Return the numbers of tokens, ascending.

    Raises:
        ConfigError: for another form, or if one is not a multiple of the smallest.
    """
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", word.strip())
        number = float(match[1]) * UNITS[match[2]] if match else 0.0
        if not match or not 0 < number <= MOST_TOKENS:
            raise ConfigError(
                f"--tokens {word!r} is not a number up to {MOST_TOKENS:g}; write 20 for each active weight, or 4M in total."
            )
        found.append(Amount(number, not match[2]))
        if found[-1].per_weight and found[-1].number > MOST_PER_WEIGHT:
            raise ConfigError(
                f"--tokens {word} for each active weight exceeds {MOST_PER_WEIGHT:,}; write a total with K, M or B."
            )
    found.sort(key=lambda one: one.number)
    if len({one.per_weight for one in found}) > 1:
        raise ConfigError(f"--tokens {text} has numbers per weight and in total; write all in one form.")
    for one in found:
        ratio = one.number / found[0].number
        if not math.isclose(ratio, round(ratio), rel_tol=1e-9):  # 0.3 is a multiple of 0.1
            raise ConfigError(
                f"--tokens {text}: {one.number:g} is not a multiple of {found[0].number:g}, the smallest, at whose "
                "checkpoints the others branch; use multiples such as 10,20,40."
            )
    return list(dict.fromkeys(found))


def steps_of(amounts: list[float], most: int) -> tuple[list[int], int]:
    """Return steps in the ratios of `amounts`, rounded once, and the steps between checkpoints: about `most` or fewer (0: no
    limit), but no more than one checkpoint in 100 steps; they divide the step at which the first one's decay begins."""
    wanted = math.ceil(amounts[0] * (DECAY - 1) / DECAY / most) if most else 1
    parts = max(1, min(wanted, int(amounts[0] / 100)))
    first = max(1, round(amounts[0] / DECAY / parts)) * DECAY * parts
    return [first * round(amount / amounts[0]) for amount in amounts], first // DECAY * (DECAY - 1) // parts


def default_sizes(config: RunConfig) -> list[Size]:
    """Return sizes below the model's, with about its ratio of width to depth, evenly spaced in the logarithm of weights."""
    m = config.model
    step = head_step(config)
    least = m.first_k_dense_replace + 1
    depths = {
        width: max(least, round(m.num_hidden_layers * width / m.hidden_size))
        for width in range(step, m.hidden_size, step)
    }
    found = {size: math.log(weights(sized(config, size))[0]) for size in (Size(*one) for one in depths.items())}
    if len(found) < 3:
        raise ConfigError(
            f"a model of {m.num_attention_heads} heads has {len(found)} smaller widths with whole heads, and a ladder needs "
            "3; set --sizes, such as 64x2,64x4,128x4."
        )
    logs = sorted(found.values())
    count = min(NUMBER_OF_SIZES, len(found))
    goals = [logs[0] + (logs[-1] - logs[0]) * n / (count - 1) for n in range(count)]
    return sorted({min(found, key=lambda size: abs(found[size] - goal)) for goal in goals})


def size_settings(config: RunConfig, model: Model) -> dict[str, Any]:
    """Return the model's settings that differ from the ladder's."""
    own, base = asdict(model), asdict(config.model)
    return {f"model.{name}": value for name, value in own.items() if value != base[name]}


def write_ladder(ladder: Ladder, folder: Path, command: str) -> None:
    """Write the plan with comments, to be read and edited."""
    text = yaml.safe_dump(asdict(ladder), sort_keys=False, default_flow_style=None, width=120)
    replace_text(
        folder / PLAN,
        f"# {printable(command)}\n# After an edit, `smolds ladder run {shlex.quote(str(folder))}` trains what is missing.\n"
        "# rates: learning rates tried on the first rung, for the last number of its steps.\n"
        f"# steps: of the runs of a rung; multiples of {DECAY} and of the first.\n{text}",
    )


def read_ladder(folder: Path) -> Ladder:
    """Read and check a plan.

    Raises:
        ConfigError: if there is none, or an edit made it invalid.
    """
    path = folder / PLAN
    if not path.is_file():
        raise ConfigError(f"{folder} has no {PLAN}; make it with `smolds ladder plan --to {folder}`.")
    ladder = read_yaml(path, "undo the last edit, or plan again", Ladder)
    check_ladder(ladder, path)
    return ladder


def check_ladder(ladder: Ladder, path: Path) -> None:
    """Raise a `ConfigError` if a plan cannot be trained; `path` is its file."""
    _check_options(ladder.options, ladder.config)
    if not ladder.rungs or not ladder.rates or min(ladder.rates) <= 0:
        raise ConfigError(f"{path} needs at least one rung and one rate above 0; add them.")
    names = [rung.name for rung in ladder.rungs]
    for rung in ladder.rungs:
        if not re.fullmatch(r"[\w.+=-]+", rung.name) or names.count(rung.name) > 1:
            raise ConfigError(f"{path}: the rung's name {rung.name!r} is not a unique folder name; choose another.")
        first = rung.steps[0] if rung.steps else 0
        if not first or rung.steps != sorted(set(rung.steps)) or any(n % first or n % DECAY for n in rung.steps):
            raise ConfigError(
                f"{path}: steps {rung.steps} of {rung.name} are not ascending multiples of {DECAY} and of the first; change "
                "them."
            )
        if len(rung.steps) > 1 and first // DECAY * (DECAY - 1) % rung.every:
            raise ConfigError(
                f"{path}: every {rung.every} of {rung.name} does not divide {first // DECAY * (DECAY - 1)}, the step at "
                "which its first branch begins; lower it."
            )
        if min(rung.factors, default=1) <= 0:
            raise ConfigError(f"{path}: factors {rung.factors} of {rung.name} are not above 0; raise them.")
        ladder.config_of(rung)
