"""`smolds bench upcycle`: a dense model that becomes a mixture, against going on with it and against a new mixture.

A dense model with the preset's sizes, one feed-forward layer as wide as an expert, is trained for --steps. Then everyone has
--further steps on other samples, each with a whole schedule of its own: the dense model, the mixtures that `smolds import
--upcycle` makes of it, and a mixture with new weights. The dense model and the new mixture also get as many steps as cost
the FLOPs of the upcycled run, the new mixture's with those of the dense model before it.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from smolds_dist.bench.common import bench_parser, check_at_least_one, keep, parse, run_python
from smolds_dist.bench.train import processor, say
from smolds_dist.config import load_config
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.memory import with_vocabulary
from smolds_dist.observe.rows import read_rows
from smolds_dist.settings import RunConfig

DENSE = ["--model.num_experts=1", "--model.num_experts_per_tok=1"]


def bench_upcycle(args: list[str]) -> None:
    """Trains everyone, prints a table and, with --json, writes all numbers.

    Raises:
        ConfigError: for options that are none, and where a training fails.
    """
    parser = bench_parser("upcycle", __doc__)
    parser.set_defaults(preset="debug")
    parser.add_argument("--steps", type=int, default=400, help="of the dense model before")
    parser.add_argument("--further", type=int, default=400, help="steps of everyone after")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="those with one of these in their names, such as scratch"
    )
    options, settings = parse(parser, args)
    check_at_least_one(options, "steps", "further")
    given = ["--preset", options.preset, *settings]
    with tempfile.TemporaryDirectory(prefix="bench-upcycle-") as folder:
        found = measure(given, Path(folder), options.steps, options.further, options.only)
    result = {
        "date": time.strftime("%Y-%m-%d"), "machine": processor(), "preset": options.preset, "settings": settings,
        "steps": options.steps, "further": options.further,
    } | found  # fmt: skip
    keep(options, result)
    print(table(result))


def measure(given: list[str], folder: Path, steps: int, further: int, only: list[str]) -> dict[str, Any]:
    """The dense model's loss before, and everyone's after."""
    before = [*given, *DENSE, f"--train.steps={steps}"]
    say(f"dense model, {steps} steps")
    loss = _train(before, folder / "dense")
    run_python(["-m", "smolds_dist", "export", str(folder / "dense"), "--to", str(folder / "model"), "--no-check"])
    mixture = load_config([*given, "--run.name=mixture"])
    dense_cost, mixture_cost = _flops(load_config(before)), _flops(mixture)
    model = mixture.model
    experts = [f"--model.num_experts={model.num_experts}", f"--model.num_experts_per_tok={model.num_experts_per_tok}"]
    finer = [
        "--upcycle-granularity=2", f"--model.num_experts={2 * model.num_experts}",
        f"--model.num_experts_per_tok={2 * model.num_experts_per_tok}",
    ]  # fmt: skip
    # Sizes are those of the model that is imported.
    rest = [one for one in given if not one.startswith("--model.")]
    scratch = [*given, f"--data.tokenizer={folder / 'model'}", "--train.seed=1"]
    equal = {
        "dense": round(further * mixture_cost / dense_cost),
        "scratch": round(further + steps * dense_cost / mixture_cost),
    }
    plans: list[tuple[str, int, list[str] | None, list[str]]] = [
        ("dense, continued", further, [], rest),
        ("dense, continued, equal FLOPs", equal["dense"], [], rest),
        ("upcycled", further, ["--upcycle", *experts], rest),
        ("upcycled, noise 0.1", further, ["--upcycle", "--upcycle-noise=0.1", *experts], rest),
        ("upcycled, half redrawn", further, ["--upcycle", "--upcycle-drop=0.5", *experts], rest),
        ("upcycled, granularity 2", further, ["--upcycle", *finer], rest),
        ("mixture from scratch", further, None, scratch),
        ("mixture from scratch, equal FLOPs", equal["scratch"], None, scratch),
    ]
    runs = {}
    wanted = [plan for plan in plans if any(part in plan[0] for part in only)]
    for number, (name, length, how, settings) in enumerate(wanted):
        say(f"{name}, {length} steps")
        run_dir = folder / f"run{number}"
        options = [f"--train.steps={length}", f"--train.eval_every={max(1, length // 4)}"]
        if how is None:
            options += settings
        else:
            imported = ["import", str(folder / "model"), *how, "--to", str(run_dir), *settings, "--train.seed=1"]
            run_python(["-m", "smolds_dist", *imported])
            options += ["--config", str(run_dir / "config.yaml"), "--checkpoint.resume=auto"]
        last = _train(options, run_dir)
        losses = {row["step"]: row["val_loss"] for row in read_rows(run_dir / "metrics.jsonl") if "val_loss" in row}
        cost = dense_cost if name.startswith("dense") else mixture_cost
        runs[name] = {
            "steps": length,
            "flops": cost * _tokens(mixture) * length,
            "val_loss": last,
            "val_losses": losses,
        }
        say(f"  validation loss {last:.4f}")
    return {"before": {"flops": dense_cost * _tokens(mixture) * steps, "val_loss": loss}, "runs": runs}


def _flops(config: RunConfig) -> float:
    return flops_per_token(with_vocabulary(config), config.data.seq_len)


def _tokens(config: RunConfig) -> int:
    return config.train.global_batch * config.data.seq_len


def _train(options: list[str], run_dir: Path) -> float:
    """The validation loss at the end."""
    names = [f"--run.dir={run_dir.parent}", f"--run.name={run_dir.name}"]
    quiet = ["-q", "--log.sample_every=0", "--log.tensorboard=false", "--checkpoint.every=100000"]
    run_python(["-m", "smolds_dist", "train", *options, *names, *quiet])
    return next(row["val_loss"] for row in reversed(read_rows(run_dir / "metrics.jsonl")) if "val_loss" in row)


def table(result: dict[str, Any]) -> str:
    """Everyone's loss; FLOPs are those after the dense model's, but for mixtures from scratch, which have no other."""
    before = result["before"]
    lines = [
        f"{result['preset']}: a dense model of {result['steps']:,} steps has a validation loss of {before['val_loss']:.4f}",
        f"{'then':34}{'steps':>7}{'FLOPs':>10}{'a quarter':>11}{'half':>9}{'loss':>9}",
    ]
    for name, run in result["runs"].items():
        losses = list(run["val_losses"].values())
        lines.append(
            f"{name:34}{run['steps']:>7,}{run['flops']:>10.2e}{losses[0]:>11.4f}{losses[1]:>9.4f}{run['val_loss']:>9.4f}"
        )
    return "\n".join(lines)
