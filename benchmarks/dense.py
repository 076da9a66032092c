"""`python -m benchmarks dense`: compare a mixture of experts with dense models on the same tokens.

One dense model is as wide as a token's selected experts: it has the mixture's active size and, except for the router, its
FLOPs per token. The other is as wide as all experts: it has the mixture's total size and costs more. All train on the same
samples in the same order, with the same schedule and optimizer, each with its best learning rate of full runs (short ones
favor rates that are too high); outside the feed-forward layers they start with the same weights.

Three budgets are compared: the tokens, FLOPs and seconds of the mixture's --steps. For each, the dense models run as many
steps as fit, with their own full schedule. Seconds are steps times the median step time, measured while the models take
turns; evaluation, data and startup are excluded.
"""

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import mean_validation_loss
from smolds_dist.bench.common import bench_parser, parse, write_result
from smolds_dist.bench.train import log, processor
from smolds_dist.config import load_config
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.memory import parameter_counts
from smolds_dist.data.batch import TrainingData, batch_digest
from smolds_dist.errors import ConfigError
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, empty_model
from smolds_dist.model.moe import SwiGLU
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.engine import Engine, model_inputs
from smolds_dist.parallel.fragments import fill_parameters
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import Model, RunConfig, Train
from smolds_dist.training.initial_values import InitialValues

MIXTURE, ACTIVE, TOTAL = "mixture", "dense, active size", "dense, total size"
UNITS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training steps"}
TURN = 10  # steps per turn of a model
EVALUATIONS = 10  # per run, evenly spaced, the last at the end
NEARLY = 0.02  # relative difference in steps up to which an earlier run is reused


def main(args: list[str]) -> None:
    """Train all models, print a table and, with --json and --plot, write all numbers and a plot.

    Raises:
        ConfigError: for unknown options, and for settings that dense models do not support.
    """
    parser = bench_parser("python -m benchmarks dense", __doc__)
    parser.set_defaults(preset="debug")
    parser.add_argument("--steps", type=int, help="steps of the mixture; default: the preset's")
    rates = "learning rates that each model tries"
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3], help=rates)
    parser.add_argument("--plot", type=Path, help="output file for a plot, .png")
    options, settings = parse(parser, args)
    if any(not rate > 0 for rate in options.learning_rates):
        raise ConfigError(f"--learning-rates {options.learning_rates} must all be more than 0.")
    with tempfile.TemporaryDirectory(prefix="bench-dense-") as folder:
        given = ["--preset", options.preset, "--parallel.engine=local", *settings, f"--run.dir={folder}", "-q"]
        if options.steps is not None:
            given.append(f"--train.steps={options.steps}")
        config = load_config(given)
        check_settings(config)
        result = measure(config, options.learning_rates)
    result = {
        "date": time.strftime("%Y-%m-%d"), "machine": processor(), "preset": options.preset, "settings": settings,
    } | result  # fmt: skip
    write_result(options, result)
    if options.plot:
        draw(result, options.plot)
    print(table(result))


def check_settings(config: RunConfig) -> None:
    """Reject settings that this benchmark's loop does not support.

    Raises:
        ConfigError: naming the setting.
    """
    if config.data.document_mask:
        raise ConfigError("--data.document_mask is not supported by python -m benchmarks dense; remove it.")
    if config.model.num_experts == config.model.num_experts_per_tok:
        raise ConfigError(
            f"--model.num_experts_per_tok {config.model.num_experts_per_tok} selects every expert, so that active and "
            "total size are the same; lower it."
        )


def widths(model: Model) -> dict[str, int | None]:
    """Return the width of each model's dense feed-forward layers, which replace the mixture's experts; None: the mixture."""
    return {
        MIXTURE: None,
        ACTIVE: model.intermediate_size * (model.num_experts_per_tok + model.n_shared_experts),
        TOTAL: model.intermediate_size * (model.num_experts + model.n_shared_experts),
    }


def counted_as(model: Model, width: int | None) -> Model:
    """Return the model that `costs` counts: a dense layer is one shared expert without routed experts."""
    if width is None:
        return model
    return replace(model, num_experts=0, num_experts_per_tok=0, n_shared_experts=1, intermediate_size=width)


def make_model(config: DeepSeekV3Config, width: int | None, seed: int) -> DeepSeekV3ForCausalLM:
    """Return the mixture, or the same model with plain SwiGLU layers of `width` instead of its mixtures and routers."""
    model = empty_model(config)
    if width is not None:
        # There are no routers to balance.
        config.router_aux_loss_coef = config.sequence_balance_coef = config.z_loss_coef = 0.0
        for block in model.model.layers[config.first_k_dense_replace :]:
            block.mlp = SwiGLU(config.hidden_size, width)
    fill_parameters(model, InitialValues(seed, config.initializer_range).fill)
    return model


@dataclass
class Run:
    """A model in training, and its results so far."""

    engine: Engine
    balancer: Balancer | None  # of the mixture
    train: Train  # its schedule
    seconds: list[float] = field(default_factory=list)  # per step
    val_losses: dict[int, float] = field(default_factory=dict)  # by step
    digest: int = 0  # of all batches, as `data.batch.batch_digest` of one

    def summary(self) -> dict[str, Any]:
        return {"steps": self.train.steps, "batches": f"{self.digest:08x}", "val_losses": self.val_losses}


@dataclass
class Shared:
    """Objects common to all runs."""

    config: RunConfig
    data: TrainingData
    topology: Topology


def start(shared: Shared, width: int | None, steps: int, rate: float) -> Run:
    """Build a model's run; `rate` is the learning rate after the warm-up."""
    from smolds_dist.parallel.make_engine import make_engine
    from smolds_dist.training.build import make_model_config

    config = shared.config
    model = make_model(make_model_config(config, shared.data), width, config.train.seed)
    engine = make_engine(model, config, shared.topology)
    balance_rate = config.train.balance_rate if config.train.balance == "bias" else 0.0
    balancer = Balancer(engine.model, balance_rate) if width is None else None
    return Run(engine, balancer, replace(config.train, steps=steps, lr=rate))


def train(shared: Shared, runs: list[Run]) -> None:
    """Train all runs, in turns of `TURN` steps, so that slow phases of the machine affect all."""
    for begin in range(0, max(run.train.steps for run in runs), TURN):
        for run in runs:
            for step in range(begin + 1, min(begin + TURN, run.train.steps) + 1):
                train_step(shared, run, step)


def train_step(shared: Shared, run: Run, step: int) -> None:
    """Run one step as `smolds train` does, and an evaluation if due."""
    size = shared.config.train.global_batch
    indices = range((step - 1) * size, step * size)
    ids = shared.data.batch(indices)
    run.digest = (run.digest + batch_digest(ids, indices)) % 2**32
    run.seconds.append(timed_step(run, ids, shared.topology.micro_batch, step))
    steps = run.train.steps
    if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
        run.val_losses[step] = validation_loss(shared, run)


def validation_loss(shared: Shared, run: Run) -> float:
    """Return the loss over the validation sets of all sources, by their weights, as `smolds train` computes it."""
    model, config, data = run.engine.model, shared.config, shared.data

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> float:
        return model(**model_inputs(run.engine.device, ids, labels)).loss.item()

    model.eval()
    losses = {
        name: mean_validation_loss(
            loss_of, data.sources[name].validation.tokens, config.data.seq_len, config.train.eval_sequences
        )
        for name in data.sources
    }
    model.train()
    return sum(weight * losses[name] for name, weight in data.val_weights.items())


def timed_step(run: Run, ids: torch.Tensor, micro_batch: int, step: int) -> float:
    """Train on ids [global batch, S] and return the seconds."""
    from smolds_dist.schedule import learning_rate

    begin = now(run.engine.device)
    for part in ids.split(micro_batch):
        if run.balancer is None:
            loss = run.engine.forward(part, part)
        else:
            with run.balancer.counting():
                loss = run.engine.forward(part, part)
        run.engine.backward(loss)
    rate = learning_rate(step, RunConfig(train=run.train))
    update = run.engine.step(rate)
    if run.balancer is not None:
        run.balancer.step(update.applied, 1.0 if step <= run.train.warmup_steps else rate / run.train.lr)
    return now(run.engine.device) - begin


def now(device: torch.device) -> float:
    """Synchronize the device and return the time in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def measure(config: RunConfig, rates: list[float]) -> dict[str, Any]:
    """Measure each model's size, cost, learning rate and step time, and its run for each budget."""
    from smolds_dist.data.prepare import prepare_data
    from smolds_dist.parallel.ranks import rank_from_environment
    from smolds_dist.parallel.topology import detect_machine, plan_topology
    from smolds_dist.parallel.versions import package_versions

    topology = plan_topology(config, detect_machine(), rank_from_environment())
    shared = Shared(config, prepare_data(config), topology)
    model = replace(config.model, vocab_size=config.model.vocab_size or len(shared.data.tokenizer))
    steps = config.train.steps
    tried = {rate: interleaved_runs(shared, rate) for rate in rates}
    models: dict[str, dict[str, Any]] = {}
    for name, width in widths(config.model).items():
        counted = counted_as(model, width)
        losses = {rate: last_loss(runs[name]) for rate, (runs, _) in tried.items()}
        models[name] = {
            "parameters": sum(parameter_counts(counted)),
            "flops_per_token": flops_per_token(counted, config.data.seq_len),
            "step_seconds": median([one for _, seconds in tried.values() for one in seconds[name]]),
            "learning_rates": {f"{rate:g}": loss for rate, loss in losses.items()},
            "learning_rate": min(losses, key=lambda rate: losses[rate]),
        }
    runs = {"tokens": {name: tried[one["learning_rate"]][0][name] for name, one in models.items()}}
    for budget, cost in (("flops", "flops_per_token"), ("seconds", "step_seconds")):
        runs[budget] = {}
        for name, one in models.items():
            fitting = max(1, round(steps * models[MIXTURE][cost] / one[cost]))
            runs[budget][name] = fitting_run(shared, name, fitting, one["learning_rate"], list(runs.values()))
    return {
        "dtype": topology.dtype,
        "device": topology.device,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "optimizer": config.train.optimizer,
        "steps": steps,
        "tokens_per_step": config.train.global_batch * config.data.seq_len,
        "models": models,
        "runs": runs,
    }


def interleaved_runs(shared: Shared, rate: float) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Train all models on the same tokens with a learning rate; return their runs and step times."""
    steps = shared.config.train.steps
    log(f"all three models in turns, {steps} steps, learning rate {rate:g}")
    runs = {name: start(shared, width, steps, rate) for name, width in widths(shared.config.model).items()}
    train(shared, list(runs.values()))
    for name, run in runs.items():
        log(f"  {name}: validation loss {run.val_losses[steps]:.4f}, {median(run.seconds):.3f} s/step")
    return {name: run.summary() for name, run in runs.items()}, {name: run.seconds for name, run in runs.items()}


def last_loss(run: dict[str, Any]) -> float:
    """Return the last validation loss of a run's summary."""
    return list(run["val_losses"].values())[-1]


def fitting_run(
    shared: Shared, name: str, steps: int, rate: float, before: list[dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Train a model for `steps` steps, or return an earlier run with about as many."""
    for runs in before:
        if name in runs and abs(runs[name]["steps"] / steps - 1) <= NEARLY:
            return runs[name]
    log(f"{name}, {steps} steps")
    run = start(shared, widths(shared.config.model)[name], steps, rate)
    train(shared, [run])
    log(f"  validation loss {run.val_losses[steps]:.4f}")
    return run.summary()


def per_step(result: dict[str, Any], name: str) -> dict[str, float]:
    """Return a step's cost in each budget."""
    model, tokens = result["models"][name], result["tokens_per_step"]
    return {"tokens": tokens, "flops": tokens * model["flops_per_token"], "seconds": model["step_seconds"]}


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot validation loss over each budget, one panel per budget, whose curves all end at the same value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 3, figsize=(12, 4.2), dpi=110, facecolor="white", layout="constrained", sharey=True
    )
    for axes, (budget, runs) in zip(panels, result["runs"].items(), strict=True):
        for name, run in runs.items():
            points = [(int(step) * per_step(result, name)[budget], loss) for step, loss in run["val_losses"].items()]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{name}: {points[-1][1]:.3f}")
        axes.set_title(f"The same {UNITS[budget]}")
        axes.set_xlabel(UNITS[budget])
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=6)
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", title="loss at the end")
    panels[0].set_ylabel("validation loss, nats per token")
    figure.savefig(path)
    pyplot.close(figure)


def table(result: dict[str, Any]) -> str:
    """Format each model's size, cost, and loss at the end of each budget."""
    lines = [
        f"{result['preset']}, {result['optimizer']}, {result['steps']:,} steps of {result['tokens_per_step']:,} tokens: "
        "validation loss and steps for the mixture's budget of",
        f"{'':20}{'parameters':>13}{'FLOPs/token':>15}{'s/step':>10}{'lr':>9}"
        + "".join(f"{budget:>17}" for budget in result["runs"]),
    ]
    for name, one in result["models"].items():
        ends = [runs[name] for runs in result["runs"].values()]
        losses = "".join(f"{last_loss(run):>9.4f} {run['steps']:>7,}" for run in ends)
        lines.append(
            f"{name:20}{one['parameters']:>13,}{one['flops_per_token']:>15,.0f}{one['step_seconds']:>10.3f}"
            f"{one['learning_rate']:>9g}{losses}"
        )
    return "\n".join(lines)
