"""What a ladder's runs have reached, from their folders: the best learning rate, and `results.json`."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from smolds_dist.checkpoint.files import MANIFEST, checkpoint_name
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.memory import with_vocabulary
from smolds_dist.errors import ConfigError
from smolds_dist.files import replace_text
from smolds_dist.inputs import read_json
from smolds_dist.ladder.plan import DECAY, PLAN, Ladder, LadderRun, read_ladder, runs_of, significant, sweep_of
from smolds_dist.launching.state import read_state
from smolds_dist.observe.rows import read_settings
from smolds_dist.observe.runs import last_rows
from smolds_dist.planner.family import granularity, weights
from smolds_dist.rows import read_rows
from smolds_dist.stages import resolve_stages

RESULTS, NOISE = "results.json", "noise_scale.json"
EXTENSIONS = 2  # most rates added to a sweep whose best one is at its border
DIVERGED = "NaN or infinite"  # in the cause of a failed run
# Settings of a run that a ladder sets by its name, or that do not change what it learns
FREE = {
    "data": ("workers", "cache_dir"),
    "train": (
        "steps", "lr", "schedule", "decay_fraction", "time_budget", "micro_batch", "activation_checkpointing", "compile",
        "cuda_graphs", "eval_every",
    ),
}  # fmt: skip


def open_ladder(folder: Path) -> Ladder:
    """Read the plan, and check that the runs in the folder belong to it: their names have no settings.

    Raises:
        ConfigError: if the plan is invalid, or a run was trained with other settings.
    """
    ladder = read_ladder(folder)
    for rung in ladder.rungs:
        wanted = asdict(ladder.config_of(rung))
        runs = [path.parent for steps in rung.steps for path in folder.glob(f"{rung.name}-{steps}-lr*/config.yaml")]
        for run in runs:
            found = read_settings(run)
            for section in ("model", "data", "train"):
                for name in found[section].keys() - FREE.get(section, ()):
                    if (old := found[section][name]) != (new := wanted[section][name]):
                        raise ConfigError(
                            f"{run} was trained with {section}.{name} {old}, but {PLAN} has {new} for rung {rung.name}; "
                            "undo the edit, plan a ladder in another folder, or delete the run to train it again."
                        )
    return ladder


def final_loss(folder: Path, run: LadderRun) -> float | None:
    """Return the validation loss after a run's last step; infinity if it diverged, None while it is not finished."""
    state = read_state(folder / run.name)
    if state.get("state") == "failed" and DIVERGED in state.get("why", ""):
        return math.inf
    if state.get("state") != "finished":
        return None
    row = next((row for row in reversed(last_rows(folder / run.name / "metrics.jsonl")) if "val_loss" in row), None)
    if row is None or row["step"] != run.steps:
        return None
    return math.inf if row["val_loss"] is None else row["val_loss"]


def sweep(ladder: Ladder, folder: Path) -> tuple[list[LadderRun], float | None]:
    """Return the runs that find the best learning rate, as far as known, and the rate once they are done.

    If the best rate is at the border, one more is tried there, at most `EXTENSIONS` times.

    Raises:
        ConfigError: if all rates diverged.
    """
    rates = sorted({significant(rate) for rate in ladder.rates})
    if len(rates) == 1:
        return [], rates[0]
    for left in range(EXTENSIONS, -1, -1):
        runs = sweep_of(ladder, rates)
        losses = [final_loss(folder, run) for run in runs]
        found = [loss for loss in losses if loss is not None]
        if len(found) < len(runs):
            return runs, None
        if min(found) == math.inf:
            raise ConfigError(f"all runs with rates {rates} diverged; lower `rates` in {folder}/ladder.yaml.")
        best = found.index(min(found))
        if 0 < best < len(rates) - 1 or not left:
            break
        rates = [significant(rates[0] / 2), *rates] if best == 0 else [*rates, significant(rates[-1] * 2)]
    return runs, best_rate(rates, found)


def best_rate(rates: list[float], losses: list[float]) -> float:
    """Return the minimum of the parabola through the lowest loss and its neighbors, over the logarithm of the rate; without
    two finite neighbors, the rate with the lowest loss."""
    at = losses.index(min(losses))
    near = losses[at - 1 : at + 2] if at else []
    if len(near) < 3 or not all(map(math.isfinite, near)) or max(near) == min(near):
        return rates[at]
    x = np.log(rates[at - 1 : at + 2])
    square, linear, _ = np.polyfit(x - x[1], np.array(near) - near[1], 2)
    return significant(float(np.exp(x[1] - linear / (2 * square))))


def all_runs(ladder: Ladder, folder: Path) -> list[LadderRun]:
    """Return the runs that are known: the sweep's, and once it is done those of the rungs, each once."""
    runs, best = sweep(ladder, folder)
    if best is not None:
        runs = runs + [run for rung in ladder.rungs for run in runs_of(rung, best)]
    return list({run.name: run for run in reversed(runs)}.values())[::-1]


def measure_noise(ladder: Ladder, folder: Path, only: str | None) -> None:
    """Measure the gradient noise scale of each finished trunk that lacks it, where its decay begins, if that checkpoint was
    kept for branches; write `NOISE` into the run's folder.

    Args:
        only: rung to measure.
    """
    from smolds_dist.training.noise_scale import measure  # imports torch

    best = sweep(ladder, folder)[1]
    for run in all_runs(ladder, folder) if best else []:
        step, path = run.steps // DECAY * (DECAY - 1), folder / run.name
        kept = (path / "checkpoints" / checkpoint_name(step) / MANIFEST).is_file()
        wanted = run.trunk is None and run.lr == best and only in (None, run.rung.name)
        if not (kept and wanted) or (path / NOISE).exists() or not math.isfinite(final_loss(folder, run) or math.inf):
            continue
        try:
            scale = measure(path, step)
        except ConfigError as error:
            print(f"{run.name}: no noise scale: {error}", flush=True)
            continue
        if math.isfinite(scale.tokens):
            replace_text(path / NOISE, json.dumps(asdict(scale)) + "\n")
        print(f"{run.name}: noise scale {scale.tokens:,.0f} +- {scale.error:,.0f} tokens", flush=True)


def result_of(ladder: Ladder, folder: Path, run: LadderRun, loss: float) -> dict[str, Any]:
    """Return a finished run's entry in `RESULTS`: losses in nats per token; seconds of all its steps without evaluation and
    checkpoints, a branch's with those of its trunk; `measure_noise`'s noise scale."""
    config = ladder.config_of(run.rung)
    rows = read_rows(folder / run.name / "metrics.jsonl")
    steps = [row for row in rows if row.get("tokens_per_s")]
    end: dict[str, Any] = next((row for row in reversed(rows) if "val_loss" in row), {})
    tokens, active = resolve_stages(config).tokens(run.steps), weights(config)
    seconds = sum(ladder.step_tokens(run.rung) / row["tokens_per_s"] for row in steps)
    noise = folder / run.name / NOISE
    return {
        "run": run.name, "rung": run.rung.name, "held_out": run.rung.held_out, "lr": run.lr, "steps": run.steps,
        "own_steps": run.steps - run.first, "active": active[0], "total": active[1],
        "granularity": granularity(config), "tokens": tokens, "loss": loss if math.isfinite(loss) else None,
        "losses": {name.partition("/")[2]: value for name, value in end.items() if name.startswith("val_loss/")},
        "max_vio": end.get("val_max_vio"),
        "noise_scale": read_json(noise, "delete it", dict[str, Any]) if noise.is_file() else None,
        "flops": flops_per_token(with_vocabulary(config), config.data.seq_len) * tokens,
        "seconds": round(seconds, 3), "tokens_per_s": median(row["tokens_per_s"] for row in steps) if steps else None,
    }  # fmt: skip


def hold_out_rate(done: list[tuple[LadderRun, float]]) -> float | None:
    """Return the best rate of the finished runs of the hold-out rung; None if they are fewer than three."""
    tried = sorted((run.lr, loss) for run, loss in done if run.rung.held_out)
    rates, losses = [rate for rate, _ in tried], [loss for _, loss in tried]
    return best_rate(rates, losses) if len(tried) > 2 and math.isfinite(min(losses)) else None


def gather(ladder: Ladder, folder: Path) -> dict[str, Any]:
    """Write `RESULTS` and return its contents.

    `best_rate` is None until the sweep is done, `hold_out_best_rate` unless the hold-out has more rates. `runs` has an entry
    for every finished run (`result_of`); `points` names those at the best rate, which a law is fitted to or, for the
    hold-out rung, compared with.
    """
    sweep_runs, best = sweep(ladder, folder)
    done = {run.name: (run, loss) for run in all_runs(ladder, folder) if (loss := final_loss(folder, run)) is not None}
    results = {
        "best_rate": best,
        "sweep": [{"lr": run.lr, "run": run.name} for run in sweep_runs],
        "hold_out_best_rate": hold_out_rate(list(done.values())),
        "points": [name for name, (run, _) in done.items() if run.lr == best],
        "runs": [result_of(ladder, folder, run, loss) for run, loss in done.values()],
    }
    replace_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    return results
