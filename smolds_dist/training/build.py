"""Build everything a run needs before its first step: from a new model, a checkpoint, or after a rollback."""

import math
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from smolds_dist.activity import begin_pass, doing
from smolds_dist.checkpoint.files import CheckpointReader, Manifest, checkpoints_in, remove, step_of
from smolds_dist.checkpoint.resume import OUTLIERS, UNIQUE_TEXTS, open_checkpoint, restore
from smolds_dist.checkpoint.writer import CheckpointWriter, TrainState
from smolds_dist.config import save_config
from smolds_dist.costs.flops import flops_per_token, largest_products
from smolds_dist.data.batch import TrainingData, UniqueTexts
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.data.prepare import epoch_summary
from smolds_dist.data.tokenizer import save_tokenizer
from smolds_dist.errors import ConfigError, TrainingStoppedError
from smolds_dist.launching.signals import StopRequest
from smolds_dist.model import DeepSeekV3Config, change_rotary
from smolds_dist.observe.rows import recent_losses
from smolds_dist.observe.run_log import RunLog
from smolds_dist.observe.trackers import replace_run
from smolds_dist.parallel.autoep_options import FREE
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.expert_parallel import deepspeed_config
from smolds_dist.parallel.make_engine import build_engine
from smolds_dist.parallel.mup import mup_of
from smolds_dist.parallel.process_group import set_group_timeouts
from smolds_dist.parallel.topology import Topology
from smolds_dist.parallel.versions import package_versions
from smolds_dist.rows import RESTARTS, read_rows
from smolds_dist.schedule import learning_rate
from smolds_dist.settings import RunConfig, Train, saved_train
from smolds_dist.stages import Stages, StageSpan
from smolds_dist.training.clock import matrix_product_peak
from smolds_dist.training.compiling import capture_graphs, compile_model, undo_compile
from smolds_dist.training.guard import MAX_ROLLBACKS, LossGuard, LossSpikeError, OutlierFilter
from smolds_dist.training.initial_values import InitialValues
from smolds_dist.training.profiling import Profiler
from smolds_dist.training.rank_checks import StragglerDetector
from smolds_dist.training.step import Stepper


@dataclass(frozen=True)
class Job:
    """The parts of a run that stay the same from start to end, also after a rollback."""

    config: RunConfig
    topology: Topology
    data: TrainingData
    model_config: DeepSeekV3Config  # without what stages change
    stages: Stages
    stop: StopRequest
    compiler: bool  # True if all hosts have Inductor's compilers
    tasks: list[Any] = field(default_factory=list)  # of `eval.tasks`, with their questions

    @property
    def main(self) -> bool:
        return self.topology.rank == 0


@dataclass(kw_only=True)
class Training:
    """The parts of a run that a rollback rebuilds."""

    stage: StageSpan  # of the next step
    engine: Engine
    balancer: Balancer
    state: TrainState
    texts: UniqueTexts | None  # on rank 0
    stepper: Stepper
    guard: LossGuard
    stragglers: StragglerDetector
    checkpoints: CheckpointWriter
    log: RunLog
    profiler: Profiler
    peak: float  # matmul FLOP/s of all ranks together

    @property
    def model_config(self) -> DeepSeekV3Config:
        """The model's configuration in the current stage."""
        return self.engine.model.config  # type: ignore[return-value]

    def save(self, val_loss: float | None = None, wait: bool = False) -> None:
        """Start writing a checkpoint; see `CheckpointWriter.save`. Collective."""
        others: dict[str, torch.Tensor] = {}
        if self.texts is not None:
            kind, content = self.texts.state()
            others[f"{UNIQUE_TEXTS}:{kind}:0"] = torch.from_numpy(content)
        others |= {f"{OUTLIERS}:{kind}:0": tensor for kind, tensor in self.stepper.outliers.state().items()}
        self.checkpoints.save(self.engine, self.balancer, self.state, val_loss, others, wait=wait)

    def close(self, code: int = 0) -> None:
        """Stop all background work; `code` is the exit code of the training."""
        self.stepper.close()
        self.profiler.close()
        self.checkpoints.wait()
        self.log.close(code)
        self.engine.close()


@contextmanager
def lock_run_dir(config: RunConfig) -> Iterator[None]:
    """Create the run's folder and lock it against other training processes.

    Raises:
        ConfigError: if it cannot be written, or another process has locked it.
    """
    lock = FileLock(config.run_dir / "lock")
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{config.run_dir} is in use by another training process; wait for its end, or choose another --run.name."
        ) from None
    except OSError as error:
        raise ConfigError(f"{config.run_dir} cannot be written ({error.strerror}); choose another --run.dir.") from None
    try:
        yield
    finally:
        lock.release()


def make_model_config(config: RunConfig, data: TrainingData) -> DeepSeekV3Config:
    """Return the model's configuration, with vocabulary size and special tokens from the tokenizer."""
    tokenizer = data.tokenizer
    settings = config.model.architecture(tokenizer) | loss_coefficients(config.train)
    if settings["vocab_size"] is None:
        settings["vocab_size"] = len(tokenizer)
    if settings["vocab_size"] < len(tokenizer):
        raise ConfigError(
            f"--model.vocab_size {settings['vocab_size']} is smaller than the tokenizer's {len(tokenizer)}; "
            "raise it, or omit it."
        )
    return DeepSeekV3Config(**settings)


def loss_coefficients(train: Train) -> dict[str, float]:
    """Return the coefficients of further losses under `DeepSeekV3Config`'s names."""
    return {
        "router_aux_loss_coef": train.aux_loss_coef if train.balance == "aux_loss" else 0.0,
        "sequence_balance_coef": train.sequence_balance_coef,
        "z_loss_coef": train.z_loss_coef,
        "mtp_coef": train.mtp_coef,
    }


def build(job: Job, reader: CheckpointReader | None) -> Training:
    """Build the model, engine and writers, from a checkpoint if there is one. Collective."""
    stage = job.stages.at(reader.manifest.data_step + 1 if reader else 1)
    config, topology, model_config = stage.config, job.topology.at(stage), make_model_config(stage.config, job.data)
    torch.manual_seed(config.train.seed)
    with doing("loading the model"):
        engine = new_engine(model_config, config, topology, reader)
    set_group_timeouts(config.parallel.timeout)
    engine.model.register_forward_pre_hook(lambda *_: begin_pass())
    rate = config.train.balance_rate if config.train.balance == "bias" else 0.0
    balancer = Balancer(engine.model, rate, config.train.ema)
    with doing("loading the optimizer"):
        state = restore(reader, engine, balancer, topology) if reader else TrainState()
    tensors = engine.tensor_shapes()
    num_parameters = sum(math.prod(shape) for shape in tensors.values())
    shapes = largest_products(model_config, topology.micro_batch * stage.seq_len)
    dtype = torch.bfloat16 if topology.dtype == "bf16" else torch.float32
    mine = matrix_product_peak(engine.device, dtype, shapes=shapes)
    peak = engine.sum_over_ranks(torch.tensor(mine)).item()
    history = stage_losses(job, state, stage) if config.train.spike_threshold else ()

    log = start_log(job, state.step, environment(job, num_parameters, peak))
    if reader:
        log.info(f"continuing from {reader.folder}")
        for line in filter(None, (lr_change(reader.manifest, job.config), ema_change(reader, config.train.ema))):
            log.info(line)
    stepper = Stepper(
        engine,
        balancer,
        topology,
        job.config,
        BatchPrefetcher(
            job.data,
            (topology.rank, topology.world_size),
            [job.topology.at(span).micro_batch for span in job.stages.spans],
            pinned=topology.device == "cuda",
        ),
        should_stop=lambda: job.stop.requested is not None,
        outliers=OutlierFilter(config.train.skip_steps, reader.stored(OUTLIERS) if reader else None),
    )
    compile_model(stepper, config, seconds_left(job, state, peak), job.compiler, log)
    capture_graphs(stepper, config, log)
    return Training(
        stage=stage,
        engine=engine,
        balancer=balancer,
        state=state,
        texts=restore_unique_texts(job.data, reader) if job.main else None,
        stepper=stepper,
        guard=LossGuard(config.train, history),
        stragglers=StragglerDetector(topology),
        checkpoints=CheckpointWriter(job.config, topology, tensors, job.data.identity),
        log=log,
        profiler=Profiler(config, topology),
        peak=peak,
    )


def begin_stage(job: Job, training: Training, step: int) -> None:
    """Change what the stage that begins with `step` changes: batches, rotary embedding, and code compiled for their
    shapes. Collective."""
    before, training.stage = training.stage, job.stages.at(step + training.state.skipped_steps)
    stage, stepper, log = training.stage, training.stepper, training.log
    stage_row(job, training)
    training.guard = LossGuard(job.config.train)  # other text or lengths have another loss, which is not a spike
    if before.config == stage.config:
        return
    config, topology = stage.config, job.topology.at(stage)
    stepper.topology = topology
    training.engine.set_accumulation(topology)
    change_rotary(training.engine.model, make_model_config(config, job.data))
    if compiled_for(job, before) != compiled_for(job, stage):
        undo_compile(training.engine.model)
        compile_model(stepper, config, seconds_left(job, training.state, training.peak), job.compiler, log)
    capture_graphs(stepper, config, log)


def compiled_for(job: Job, stage: StageSpan) -> tuple:
    """Return what compiled code depends on."""
    data = stage.config.data
    return job.topology.at(stage).micro_batch, data.seq_len, data.document_mask, stage.config.model.rope_scaling


def stage_losses(job: Job, state: TrainState, stage: StageSpan) -> list[float]:
    """Return the losses of the stage's steps so far."""
    return recent_losses(job.config.run_dir / "metrics.jsonl", stage.first - state.skipped_steps, state.step)


def stage_row(job: Job, training: Training) -> None:
    """Log the stage that begins."""
    stage, step = training.stage, training.state.step
    of = f"stage {stage.number} of {len(job.stages.spans)}"
    training.log.row(step, event="stage", number=stage.number, seq_len=stage.seq_len, global_batch=stage.global_batch)
    training.log.info(f"step {step + 1}: {of}, {stage}, learning rate {learning_rate(step + 1, job.config):.2e}")


def seconds_left(job: Job, state: TrainState, peak: float) -> float:
    """Return the seconds of the rest of the run at the matmuls' peak rate."""
    rest = 0.0
    for span in job.stages.spans:
        last = job.config.train.steps if span is job.stages.spans[-1] else min(span.last, job.config.train.steps)
        steps = max(0, last - max(span.first, state.step))
        rest += steps * span.global_batch * span.seq_len * flops_per_token(job.model_config, span.seq_len)
    return rest / peak


def new_engine(
    model_config: DeepSeekV3Config, config: RunConfig, topology: Topology, reader: CheckpointReader | None
) -> Engine:
    """Create the run's engine around a model with initial weights or a checkpoint's; each rank makes or reads only its
    slices."""
    mup = mup_of(config.train, model_config)
    initial = InitialValues(config.train.seed, model_config.initializer_range, mup)
    return build_engine(model_config, config, topology, reader.fill if reader else initial.fill)


def start_log(job: Job, step: int, facts: dict) -> RunLog:
    """Open the run's log and write its first rows (`environment`); on rank 0 also write the files that describe the run."""
    config = job.config
    log = RunLog(config, step, job.main)
    if job.main:
        save_config(config, config.run_dir / "config.yaml")
        save_tokenizer(job.data.tokenizer, config.run_dir / "tokenizer")
        log.row(step, event="start", **facts)
        for failure in unlogged_failures(config.run_dir):
            log.row(step, event="restart", **failure)
    log.info(f"{config.run.name}: {facts['parameters']:,} parameters, {job.topology}")
    log.info(job.topology.reason)
    if mup := mup_of(config.train, job.model_config):
        log.info(str(mup))
    if job.topology.engine == "deepspeed":
        used = deepspeed_config(config, job.topology, job.model_config)["expert_parallel"]
        if chosen := ", ".join(f"{key} {used[key]}" for key in FREE if used.get(key)):
            log.info(f"AutoEP: {chosen}")
    for line in epoch_summary(config, job.data):
        log.info(line)
    if log.verbose:
        log.info((config.run_dir / "config.yaml").read_text(encoding="utf-8"))
    return log


def ema_change(reader: CheckpointReader, ema: float) -> str | None:
    """Describe moving averages that a resumed run begins or ends, with its decay `ema`."""
    if ema and not reader.has_ema:
        return f"the moving averages (--train.ema {ema}) start from the weights of step {reader.manifest.step}"
    dropped = reader.has_ema and not ema
    return "the checkpoint's moving averages are dropped; set --train.ema to keep them" if dropped else None


def lr_change(manifest: Manifest, config: RunConfig) -> str | None:
    """Describe how a resumed run's next and last learning rates differ from those of the checkpoint's settings."""
    if manifest.weights_only:
        return None
    saved = replace(config, train=saved_train(manifest.config["train"]))
    step, steps, old_steps = manifest.step + 1, config.train.steps, saved.train.steps
    before, now = learning_rate(min(step, old_steps), saved), learning_rate(step, config)
    end, old_end = learning_rate(steps, config), learning_rate(old_steps, saved)
    line = f"the learning rate of step {step} is {now:.2e}"
    if not math.isclose(before, now, rel_tol=1e-6):
        line += f", but {before:.2e} with the checkpoint's settings; see --train.schedule to continue at the same rate"
    elif steps == old_steps and math.isclose(end, old_end, rel_tol=1e-6):
        return None
    else:
        line += " as before"
    return f"{line}; it ends at {end:.2e} in step {steps}, before at {old_end:.2e} in step {old_steps}"


def restore_unique_texts(data: TrainingData, reader: CheckpointReader | None) -> UniqueTexts:
    """Restore from a checkpoint which documents were trained on; none without a checkpoint."""
    texts = UniqueTexts(data)
    for kind, content in (reader.stored(UNIQUE_TEXTS) if reader else {}).items():
        texts.restore(kind, content.numpy())
    return texts


def unlogged_failures(run_dir: Path) -> list[dict]:
    """Return the failures in `restarts.jsonl` that `metrics.jsonl` lacks, or lost in a rollback."""
    failures = read_rows(run_dir / RESTARTS)
    if not failures:  # the usual case; do not read a long metrics file
        return []
    logged = {row["number"] for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == "restart"}
    keys = {"number": "number", "step": "failed_after", "cause": "cause", "logs": "logs"}
    return [{new: row[old] for old, new in keys.items()} for row in failures if row["number"] not in logged]


def environment(job: Job, num_parameters: int, peak: float) -> dict:
    """Return the run's environment as plain values."""
    topology = job.topology
    device = torch.cuda.get_device_name(topology.torch_device) if topology.device == "cuda" else platform.machine()
    return {
        "topology": str(topology),
        "world_size": topology.world_size,
        "reason": topology.reason,
        "parameters": num_parameters,
        "dense_layers": job.model_config.first_k_dense_replace,
        "data": {"limits": job.data.limits},
        "host": socket.gethostname(),
        "system": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "matrix_product_peak": round(peak),
        "versions": package_versions(),
    }


def roll_back(job: Job, state: TrainState, spike: LossSpikeError) -> Training:
    """Rebuild the training from the last checkpoint before the spike and skip the samples since then. Collective.

    Raises:
        TrainingStoppedError: if there is no such checkpoint, or after too many rollbacks.
    """
    reader = open_checkpoint(job.config, job.topology, before=spike.begin)
    if reader is None or state.rollbacks >= MAX_ROLLBACKS:
        reason = "there is no older checkpoint" if reader is None else f"{MAX_ROLLBACKS} rollbacks did not help"
        raise TrainingStoppedError(f"{spike}, and {reason}; lower --train.lr, or raise --train.spike_threshold")
    if job.main:
        for newer in checkpoints_in(job.config.run_dir / "checkpoints"):
            if step_of(newer) > reader.manifest.step:
                remove(newer)
        replace_run(job.config.run_dir)
    training = build(job, reader)
    training.state.skipped_steps += spike.end - reader.manifest.step
    training.state.rollbacks = state.rollbacks + 1
    step, ends = reader.manifest.step, {"spike_begin": spike.begin, "spike_end": spike.end}
    before = job.stages.samples(reader.manifest.data_step)
    skipped = job.stages.samples(reader.manifest.step + training.state.skipped_steps) - before
    steps = training.state.skipped_steps
    training.log.row(step, event="rollback", **ends, skipped_samples=skipped, skipped_steps=steps)
    training.log.info(f"{spike}; rolled back to step {step}, continuing with other samples")
    return training
