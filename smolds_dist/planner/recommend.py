"""`smolds plan --ladder DIR --budget-gpu-hours N`: the member of a ladder's family with the lowest loss for a budget."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from smolds_dist.config import load_config
from smolds_dist.costs.hardware import Hardware
from smolds_dist.costs.memory import checkpoint_bytes, with_vocabulary
from smolds_dist.costs.step_time import RunTime, run_time
from smolds_dist.errors import ConfigError
from smolds_dist.files import replace_text
from smolds_dist.inputs import read_json, read_yaml
from smolds_dist.planner.family import Size, head_step, sized, weights
from smolds_dist.planner.outlook import FAR, Outlook, load_fit
from smolds_dist.planner.scaling_law import FittedLaw
from smolds_dist.planner.search import Candidate, best_first, candidates, fits
from smolds_dist.progress import duration
from smolds_dist.settings import RunConfig

WITHIN = 1.01  # a smaller model's loss over the lowest
DEPTHS = (0.8, 1.0, 1.25)  # tried, times the ladder's at the same width
MARGIN = 1.03  # the same for the coarse search, because the shallowest members are faster than its own
COARSE = 10  # sizes whose layouts are all tried
DECAY = 0.2  # fraction of the steps, as in the ladder's runs
MIN_STEPS = 1000  # that the batch leaves
TRUSTED = 0.5  # relative error of a noise scale


class Cluster(NamedTuple):
    """Machines and time."""

    machine: Hardware
    nodes: int
    per_node: int
    hours: float  # device hours
    max_vio: float


@dataclass(frozen=True)
class Record:
    """What the runs of a ladder say about a larger one."""

    fitted: FittedLaw
    sizes: list[Size]
    settings: dict[str, Any]  # training settings of the largest rung by their dotted names
    lr: float
    noise: list[tuple[float, float, float]]  # loss, noise scale in tokens and its standard error


@dataclass(frozen=True)
class Member:
    """A model of the family with its best layout, trained as long as the budget allows."""

    size: Size
    config: RunConfig
    layout: Candidate
    steps: int
    run: RunTime
    outlook: Outlook
    loss: float

    @property
    def tokens(self) -> float:
        return self.steps * self.layout.tokens_per_step

    @property
    def weights(self) -> tuple[int, int]:
        return self.outlook.active, self.outlook.total


Family = list[tuple[Size, RunConfig]]  # by active and total weights


def read_record(ladder: Path, config: RunConfig) -> Record:
    """Read a ladder's folder.

    Raises:
        ConfigError: if a file is missing or not the ladder's, or the family in `config` is another.
    """
    fitted = load_fit(ladder, config)
    advice = f"run `smolds ladder run {ladder}` again"
    plan = read_yaml(ladder / "ladder.yaml", advice, dict[str, Any])
    results = read_json(ladder / "results.json", advice, dict[str, Any])
    try:
        rungs = [rung["settings"] for rung in plan["rungs"]]
        twins = {point.run for point in fitted.dense.points} if fitted.dense else set()
        runs = [one for one in results["runs"] if one.get("noise_scale") and one.get("run") not in twins]
        scales = [(one["loss"], one["noise_scale"]) for one in runs]
        noise = [(loss, scale["tokens"], scale["error"]) for loss, scale in scales]
        names = "model.hidden_size", "model.num_hidden_layers", "model.num_experts"
        sizes = [Size(*(rung.get(name, _value(config, name)) for name in names)) for rung in rungs]
        settings = {name: value for name, value in rungs[-1].items() if name.startswith("train.")}
        record = Record(fitted, sizes, settings, float(results["best_rate"]), noise)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{ladder} has a ladder.yaml or results.json of another version ({error}); {advice}."
        ) from None
    optimizer = load_config(plan["options"], prog="smolds ladder").train.optimizer
    if config.train.optimizer != optimizer:
        raise ConfigError(
            f"the ladder's best rate is of --train.optimizer {optimizer}, but the training options have "
            f"{config.train.optimizer}; repeat its options: {' '.join(plan['options'])}."
        )
    trained = sorted({point.active for point in fitted.points})
    named = [weights(sized(config, size))[0] for size in sizes if size.experts == config.model.num_experts]
    if not set(named) & set(trained):
        raise ConfigError(
            f"the training options give the ladder's sizes {', '.join(f'{one:,}' for one in named) or 'no'} active weights, "
            f"but its runs have {', '.join(f'{one:,.0f}' for one in trained)}; repeat its options: "
            f"{' '.join(plan['options'])}."
        )
    return record


def _value(config: RunConfig, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """Return the configuration with values by their dotted names."""
    for name, value in settings.items():
        section, _, field = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


def members(config: RunConfig, record: Record) -> Family:
    """Return the members of the family, by active and total weights: widths of whole heads and depths around the ladder's,
    up to `FAR` times the FLOPs per token of its largest size."""
    most = FAR * max(point.active for point in record.fitted.points)
    found: dict[tuple[int, int], tuple[Size, RunConfig]] = {}
    for width in range(head_step(config), 10**6, head_step(config)):
        before = len(found)
        for depth in {depth_of(record, width, factor) for factor in DEPTHS}:
            try:
                own = sized(config, Size(width, depth))
            except ConfigError:  # fewer layers than the family's dense ones
                before = -1
                continue
            if (at := weights(own))[0] <= most:
                found.setdefault(at, (Size(width, depth), own))
        if len(found) == before:
            break
    return [found[at] for at in sorted(found)]


def depth_of(record: Record, width: int, factor: float = 1.0) -> int:
    """Return `factor` times the ladder's depth at a width: a power law through its sizes, so that depths which do not change
    with the width stay, and a constant ratio stays too."""
    widths, depths = np.log([(size.width, size.depth) for size in record.sizes]).T
    slope = np.polyfit(widths, depths, 1)[0] if np.ptp(widths) > 0 else 1.0
    return max(1, round(factor * math.exp(depths.mean() + slope * (math.log(width) - widths.mean()))))


def trained(
    size: Size, config: RunConfig, fitted: FittedLaw, cluster: Cluster, hints: Sequence[dict[str, Any]] = ()
) -> Member:
    """Return a member with its fastest layout, trained for the whole budget.

    Args:
        hints: layouts of members of similar sizes; if one of them fits, no others are tried.

    Raises:
        ConfigError: if none fits.
    """
    machine, nodes, per_node, hours, max_vio = cluster
    several = [with_settings(config, hint) for hint in hints] or [config]
    found = [one for tried in several for one in candidates(tried, machine, nodes, per_node, max_vio)]
    if hints and not any(fits(one, machine) for one in found):
        return trained(size, config, fitted, cluster)
    best = best_first(found, machine)[0]
    saved = checkpoint_bytes(with_vocabulary(config), best.layout)

    def lasting(steps: int) -> RunTime:
        return run_time(best.time.total, steps, best.layout, machine, config.checkpoint.every, saved)

    steps = bisect_right(range(1, 10**9), hours, key=lambda steps: lasting(steps).device_hours)
    outlook = Outlook.of(fitted, config)
    loss = outlook.loss(steps * best.tokens_per_step) if steps else math.inf
    return Member(size, config, best, steps, lasting(steps), outlook, loss)


def search_coarsely(family: Family, record: Record, cluster: Cluster) -> dict[int, Member]:
    """Return members of about `COARSE` sizes by their place in the family, up to the first that does not fit. They have the
    ladder's depths: deeper ones take more time, so that losses of mixed depths have several minima.

    Raises:
        ConfigError: if the smallest one does not fit, or the budget buys no step of it.
    """
    logs = [math.log(weights(config)[0]) for _, config in family]
    alike = [place for place, (size, _) in enumerate(family) if size.depth == depth_of(record, size.width)]
    goals = np.linspace(logs[0], logs[-1], COARSE)
    places = sorted({0} | {min(alike or [0], key=lambda place: abs(logs[place] - goal)) for goal in goals})
    found: dict[int, Member] = {}
    for place in places:
        try:
            found[place] = trained(*family[place], record.fitted, cluster)
        except ConfigError:
            if not found:
                raise
            break
    if not any(one.steps for one in found.values()):
        step = found[0].layout.time.total * found[0].layout.layout.world / 3600
        raise ConfigError(
            f"--budget-gpu-hours {cluster.hours:g} buys no step of {found[0].size}, which takes {step:.2g} device hours; "
            "raise it, or lower --train.global_batch."
        )
    return found


def search(family: Family, record: Record, cluster: Cluster) -> tuple[list[Member], Member, Member, str]:
    """Return the members tried, by weights; the one with the lowest loss; the smallest within `WITHIN` of it; and what keeps
    the best from being larger.

    Since layouts change slowly with size, members between those of the coarse search take their neighbors' layouts.

    Raises:
        ConfigError: see `search_coarsely`.
    """
    coarse = search_coarsely(family, record, cluster)
    places = list(coarse)
    at = min(places, key=lambda place: coarse[place].loss)
    worse = [place for place in places if place < at and coarse[place].loss > MARGIN * coarse[at].loss]
    above = [place for place in places if place > at][:2]
    last = above[-1] if above else len(family) - 1
    found, limit = dict(coarse), "the budget"
    for place in range(worse[-1] if worse else 0, last + 1):
        near = [coarse[one] for one in sorted(places, key=lambda one: abs(one - place))[:2]]
        try:
            hints = [one.layout.settings for one in near]
            found[place] = coarse.get(place) or trained(*family[place], record.fitted, cluster, hints)
        except ConfigError:
            limit = f"the memory, into which {family[place][0]} does not fit"
            break  # like larger ones
    best = min(found, key=lambda place: found[place].loss)
    smallest = min(place for place in found if found[place].loss <= WITHIN * found[best].loss)
    for place in {best, smallest}:
        found[place] = trained(*family[place], record.fitted, cluster)
    if best < max(found):
        limit = "the budget"
    elif best == len(family) - 1:
        limit = f"the family, which ends at {FAR} times the weights of the ladder's largest size"
    return [found[place] for place in sorted(found)], found[best], found[smallest], limit


def critical_batch(record: Record, loss: float) -> tuple[float, str] | None:
    """Return the noise scale in tokens at a loss, and where it comes from; None if the ladder has none.

    A power law of the loss (arXiv 2001.08361, equation 5.3) through the rungs' scales, weighted by their precision; with one
    rung, or if the scale does not grow as the loss falls, the last rung's.
    """
    known = [one for one in record.noise if one[1] > 0 and one[2] < TRUSTED * one[1]]
    if not known:
        return None
    losses, scales, errors = np.array(known).T
    last = losses.argmin()
    if np.ptp(np.log(losses)) > 0.02:
        slope, at = np.polyfit(np.log(losses), np.log(scales), 1, w=scales / np.maximum(errors, 1e-3 * scales))
        if slope < 0:
            return math.exp(at + slope * math.log(loss)), f"of {len(known)} rungs, extrapolated to loss {loss:.3f}"
    return float(scales[last]), f"of the rung with loss {losses[last]:.3f}"


def choose_batch(config: RunConfig, record: Record, member: Member, world: int) -> tuple[int, str]:
    """Return the sequences per step, and the reason: the critical batch, but at least `MIN_STEPS` steps and one sequence per
    rank, in multiples of a micro batch and rounded such that several micro batches divide it."""
    length, least = config.data.seq_len, world * (config.train.micro_batch or 1)
    found = critical_batch(record, member.loss)
    if found:
        tokens, why = found[0], f"the noise scale {found[1]}, {found[0]:,.0f} tokens"
    else:
        tokens, why = config.train.global_batch * length, "as set, because the ladder has no noise scale"
    if tokens > member.tokens / MIN_STEPS:
        tokens, why = member.tokens / MIN_STEPS, f"{MIN_STEPS:,} steps; {why}"
    elif not found:
        return config.train.global_batch, why
    number = tokens / length / least
    if number < 1:
        why = f"one micro batch per device; {why}"
    unit = 2 ** max(0, int(number).bit_length() - 3)
    return least * unit * max(1, round(number / unit)), why


@dataclass(frozen=True)
class Recommendation:
    """Members tried, and the two recommended."""

    members: list[Member]
    best: Member
    smallest: Member
    limit: str  # what keeps the best from being larger
    batch: str  # the reason for its batch
    lr: float  # the ladder's best, for this batch


def recommend(config: RunConfig, record: Record, cluster: Cluster) -> Recommendation:
    """Return the members of the family in `config` with the lowest loss, and the smallest within `WITHIN` of it.

    The batch depends on loss and tokens, and these, little, on the batch: a coarse search with the ladder's batch sets it,
    and a second search follows if the first one's best member needs another.

    Raises:
        ConfigError: if the settings change during the run, no member fits, or the budget buys no step.
    """
    if config.train.stages or config.train.time_budget:
        raise ConfigError(
            "--ladder with --budget-gpu-hours sets steps and rates itself; unset train.stages and time_budget."
        )
    world = cluster.nodes * cluster.per_node
    asked = with_settings(config, {"train.global_batch": -(-config.train.global_batch // world) * world})
    coarse = best = min(search_coarsely(members(asked, record), record, cluster).values(), key=lambda one: one.loss)
    for _ in range(2):
        batch, why = choose_batch(config, record, best, world)
        if best is not coarse and batch == asked.train.global_batch:
            break
        asked = with_settings(config, {"train.global_batch": batch})
        found = search(members(asked, record), record, cluster)
        best = found[1]
    tokens = (one.train.global_batch * one.data.seq_len for one in (config, asked))
    return Recommendation(*found, why, record.lr * rate_factor(critical_batch(record, found[1].loss), *tokens))


def rate_factor(found: tuple[float, str] | None, before: float, now: float) -> float:
    """Return the ratio of the best learning rates of batches of `now` and `before` tokens, each (1 + noise scale / batch)^-p
    (arXiv 1812.06162, which found p from 0.5 to 1 for Adam), with p 0.5; 1 without a noise scale."""
    return math.sqrt((1 + found[0] / before) / (1 + found[0] / now)) if found else 1.0


def run_config(member: Member, record: Record, lr: float) -> RunConfig:
    """Return the settings of a member's run: the rate and the ladder's transfer of it, WSD, and the layout."""
    train = member.config.train
    name = f"{member.config.run.name}-{member.size}"
    return with_settings(
        member.config,
        record.settings | member.layout.settings | {
            "train.steps": member.steps, "train.lr": float(f"{lr:.4g}"), "train.schedule": "wsd",
            "train.decay_fraction": DECAY, "train.warmup_steps": min(train.warmup_steps, member.steps // 10),
            "run.name": name,
        },
    )  # fmt: skip


def write_run(config: RunConfig, path: Path, comment: str) -> None:
    """Write the settings that differ from the defaults as YAML that `--config` reads."""
    default = asdict(RunConfig())
    changed = {
        section: {name: value for name, value in values.items() if value != default[section][name]}
        for section, values in asdict(config).items()
    }
    kept = {section: values for section, values in changed.items() if values}
    replace_text(path, f"# {comment}\n{yaml.safe_dump(kept, sort_keys=False)}")


def describe(found: Recommendation, cluster: Cluster) -> str:
    """Return the recommendation as text, with members of up to eight times fewer and more weights."""
    best, smallest = found.best, found.smallest
    layout = best.layout.layout
    goals = [best.weights[0] * 2.0 ** (n / 2) for n in range(-6, 7)]
    near = {
        id(one): one for one in (min(found.members, key=lambda m: abs(math.log(m.weights[0] / goal))) for goal in goals)
    }
    shown = sorted({**near, id(best): best, id(smallest): smallest}.values(), key=lambda one: one.weights)
    lines = [
        f"{cluster.hours:,.1f} device hours on {layout.world} x {cluster.machine.name}, {layout.dtype}, "
        f"{best.layout.tokens_per_step:,.0f} tokens/step: {found.batch}",
        "",
        f"{'size':>9} {'active':>14} {'total':>15} {'tokens':>17} {'tokens/s':>12} {'loss':>8}  layout",
    ]
    for one in shown:
        active, total = one.weights
        mark = {id(smallest): "  smallest within 1 %", id(best): "  best"}.get(id(one), "")
        at = one.layout.layout
        lines.append(
            f"{one.size!s:>9} {active:>14,} {total:>15,} {one.tokens:>17,.0f} {one.layout.tokens_per_s:>12,.0f} "
            f"{one.loss:>8.4f}  expert {at.expert}, zero {at.zero}, micro {at.micro_batch}, {at.recompute}{mark}"
        )
    for title, one in (("lowest loss", best), ("smallest within 1 % of it", smallest)):
        text = one.outlook.describe(one.tokens)
        lines += ["", f"{title}: {one.size}, {one.steps:,} steps in {duration(one.run.seconds)}", f"  {text}"]
    return "\n".join([*lines, "", f"limited by {found.limit}"])


def as_json(found: Recommendation) -> dict[str, Any]:
    """Return the members tried, by weights, and which are recommended."""
    best, smallest = str(found.best.size), str(found.smallest.size)
    members = [
        {
            "size": str(one.size), "active": one.outlook.active, "total": one.outlook.total, "steps": one.steps,
            "tokens": one.tokens, "tokens_per_s": one.layout.tokens_per_s, "settings": one.layout.settings,
            "run": asdict(one.run),
            "loss": dict(zip(("predicted", "low", "high"), one.outlook.predict(one.tokens), strict=True)),
        }
        for one in found.members if one.steps
    ]  # fmt: skip
    return {"best": best, "smallest": smallest, "limit": found.limit, "batch": found.batch, "members": members}
