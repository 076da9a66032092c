"""The training loop: read from top to bottom, it is what a run does."""

import shlex
import sys
import time
from contextlib import nullcontext

import torch

from smolds_dist.config import RunConfig
from smolds_dist.data.batches import training_batch
from smolds_dist.data.shards import TokenShards, prepare_shards
from smolds_dist.errors import ConfigError, RankFailedError, TrainingStoppedError
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.engine import Engine, end_process_group, largest_over_ranks, start_process_group
from smolds_dist.parallel.failure import RankReport
from smolds_dist.parallel.ranks import rank_from_environment
from smolds_dist.parallel.topology import Topology, detect_machine, plan_topology
from smolds_dist.train.build import Job, Training, build, hold_run, make_model_config, roll_back
from smolds_dist.train.checkpoint import check_resumable, open_checkpoint
from smolds_dist.train.evaluation import evaluate
from smolds_dist.train.guard import LossSpikeError
from smolds_dist.train.metrics import load_table, read_rows
from smolds_dist.train.optim import learning_rate
from smolds_dist.train.samples import sample
from smolds_dist.train.signals import EXIT_CODES, StopRequest


def train(config: RunConfig) -> int:
    """Runs `config` on this rank, from a new model or a checkpoint of any layout, to the exported model.

    Returns:
        The exit code: 0; that of the signal after which it stopped (`train.signals`); or 1 where the loss diverged or a
        checkpoint that was needed could not be written, which has been told then.

    Raises:
        ConfigError: where the run cannot start; nothing has been written then.
    """
    info = rank_from_environment()
    topology = plan_topology(config, detect_machine(), info)
    check_resumable(config)
    shards = prepare_shards(config)
    model_config = make_model_config(config, shards)
    with hold_run(config) if topology.rank == 0 else nullcontext(), StopRequest() as stop:
        report = RankReport(config.run_dir, info, config.parallel) if topology.world_size > 1 else None
        job = Job(config, topology, shards, model_config, stop, report.beat if report else lambda: None)
        try:
            code = run(job)
            outcome = "stopped" if code else "done"
        except ConfigError:
            if report:
                report.end("refused", 2)
            raise
        except TrainingStoppedError as error:
            code, outcome = 1, "failed"
            if job.main:
                print(f"\nsmolds: {error}.", file=sys.stderr, flush=True)
        except Exception as error:
            if report is None:  # a debugger should see the error where it happens
                raise
            report.fail(error)
            raise RankFailedError from error
        if report:
            report.end(outcome, code)
    return code


def run(job: Job) -> int:
    """Trains to the end, going back to a checkpoint where the loss has spiked; returns the exit code."""
    config, topology = job.config, job.topology
    start_process_group(topology)
    if largest_over_ranks(topology, not (config.run_dir / "lock").exists()):
        raise ConfigError(
            f"{config.run_dir} is not seen by all ranks; choose a --run.dir on a file system that all nodes share."
        )
    training = build(job, open_checkpoint(config, topology))
    while True:
        try:
            code = run_steps(job, training)
            break
        except LossSpikeError as spike:
            training.close()
            training = roll_back(job, training.progress, spike)
        except TrainingStoppedError:
            training.close()
            raise
    training.close()
    end_process_group()
    return code


def run_steps(job: Job, training: Training) -> int:
    """The training itself; returns the exit code."""
    config, stop, main = job.config, job.stop, job.main
    engine, progress, metrics, bar = training.engine, training.progress, training.metrics, training.bar
    step_tokens = config.train.global_batch * config.data.seq_len
    begin = progress.step
    for step in range(begin + 1, config.train.steps + 1):
        began = time.perf_counter()
        lr = learning_rate(step, config.train)
        first_sample = progress.skipped_samples + (step - 1) * config.train.global_batch
        loss_part = accumulate_gradients(config, job.topology, engine, training.balancer, job.shards, first_sample)
        grad_norm, applied = engine.step(lr)
        counts_LE = training.balancer.step(applied)
        error = training.checkpoints.failure()
        told = loss_part.new_tensor([*stop.counts(), error is not None])
        loss_sum, *asked, failed = engine.sum_over_ranks(torch.stack((loss_part, *told))).tolist()
        loss = loss_sum / job.topology.world_size
        tokens_per_s = step_tokens / (time.perf_counter() - began)
        progress.step = step
        if step == begin + 1:
            training.checkpoints.prepare(engine)

        last = step == config.train.steps
        if metrics is not None:
            row = {"step": step, "tokens": step * step_tokens, "loss": loss, "lr": lr, "grad_norm": grad_norm}
            row = metrics.training_row(row | {"tokens_per_s": round(tokens_per_s, 1)}, counts_LE if applied else None)
            note = f"MaxVio {row['max_vio']:.2f}" if applied else "update skipped: not finite"
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, {note}", False)
        bar.update()
        if failed:
            heed_failure(config, training, error)
        training.guard.check(step, loss, applied)
        val_loss = None
        if last or (config.train.eval_every and step % config.train.eval_every == 0):
            result = evaluate(config, job.topology, engine, job.shards)
            val_loss = result["val_loss"]
            if metrics is not None:
                metrics.row({"step": step, "tokens": step * step_tokens, **result})
                bar.write(
                    f"step {step}: validation loss {val_loss:.4f}, {result['val_bits_per_byte']:.3f} bits per byte",
                    file=sys.stdout,
                )
        if last or (config.log.sample_every and step % config.log.sample_every == 0):
            write_samples(config, training, job.shards, step)
        signal = None if last else stop.agreed(asked)
        if signal or (config.checkpoint.every and (last or step % config.checkpoint.every == 0)):
            ending = bool(signal) or last
            training.checkpoints.save(engine, training.balancer, progress, val_loss, wait=ending)
            if ending and not is_saved(training, step):
                return 1
        if signal:
            if main:
                bar.close()
                print(
                    f"stopped by {signal.name} after step {step}, which is saved; continue with --checkpoint.resume auto",
                    flush=True,
                )
            return EXIT_CODES[signal]
    bar.close()

    export_model(config, engine, job.model_config, job.shards, main)
    if main:
        print_summary(config, job.shards)
    return 0


def heed_failure(config: RunConfig, training: Training, error: str | None) -> None:
    """A checkpoint could not be written: goes on or stops, as configured. All ranks come here together.

    Args:
        error: what was wrong, on rank 0.

    Raises:
        TrainingStoppedError: where `checkpoint.on_error` is stop.
    """
    what = f"the checkpoint of step {training.checkpoints.failed_step} could not be written ({error})"
    if config.checkpoint.on_error == "stop":
        raise TrainingStoppedError(
            f"{what}, older ones are whole; make room, and continue with --checkpoint.resume auto"
        )
    if training.metrics is not None:
        training.bar.write(f"warning: {what}; training goes on, older checkpoints are whole", file=sys.stderr)


def is_saved(training: Training, step: int) -> bool:
    """Whether the checkpoint of `step`, which was just written, counts; says so if not. Collective."""
    error = training.checkpoints.failure()
    failed = error is not None and training.checkpoints.failed_step == step
    if error is not None:
        print(
            f"\nsmolds: the checkpoint of step {training.checkpoints.failed_step} could not be written ({error}); older "
            "ones are whole: make room, and continue with --checkpoint.resume auto.",
            file=sys.stderr,
            flush=True,
        )
    return not training.engine.sum_over_ranks(torch.tensor(float(failed))).item()


def accumulate_gradients(
    config: RunConfig, topology: Topology, engine: Engine, balancer: Balancer, shards: TokenShards, first_sample: int
) -> torch.Tensor:
    """Forward and backward over this rank's part of a global batch.

    Args:
        first_sample: global index of the batch's first sample.

    Returns:
        The mean loss of this rank's part.
    """
    first = first_sample + topology.rank * topology.per_rank
    total = torch.zeros((), device=engine.device)
    for micro_step in range(topology.accumulation):
        start = first + micro_step * topology.micro_batch
        indices = range(start, start + topology.micro_batch)
        ids = training_batch(shards.train, config.data.seq_len, config.train.seed, indices)
        with balancer.counting():
            loss = engine.forward(ids, ids)
        engine.backward(loss)
        total += loss.detach()
    return total / topology.accumulation


def write_samples(config: RunConfig, training: Training, shards: TokenShards, step: int) -> None:
    """Samples every prompt on all ranks; rank 0 keeps and shows the texts."""
    seed = config.train.seed + step
    texts = {
        prompt: sample(training.engine.model, shards.tokenizer, prompt, config.log.sample_tokens, seed)
        for prompt in config.log.sample_prompts
    }
    if training.metrics is not None and texts:
        training.metrics.samples(step, texts)
        training.bar.write(f"step {step}: {next(iter(texts.values()))!r}", file=sys.stdout)


def export_model(
    config: RunConfig, engine: Engine, model_config: DeepSeekV3Config, shards: TokenShards, main: bool
) -> None:
    """Saves model and tokenizer in Hugging Face format to `export/`. Collective."""
    state = engine.state_dict()
    if main:
        with torch.device("meta"):
            skeleton = DeepSeekV3ForCausalLM(model_config)
        folder = config.run_dir / "export"
        skeleton.config.dtype = state["lm_head.weight"].dtype
        skeleton.save_pretrained(folder, state_dict=state)
        shards.tokenizer.save_pretrained(folder)


def print_summary(config: RunConfig, shards: TokenShards) -> None:
    """The end of a run for a person: what it learned, where the tokens went, and where to look."""
    rows = read_rows(config.run_dir / "metrics.jsonl")
    evaluation = next((row for row in reversed(rows) if "val_loss" in row), None)
    if evaluation:
        print(
            f"\nvalidation loss {evaluation['val_loss']:.4f} nats per token "
            f"({evaluation['val_bits_per_byte']:.3f} bits per byte); "
            f"a model that ignores context reaches {shards.meta.val_unigram_entropy:.4f} (unigram entropy)"
        )
    print(f"\nshare of the tokens per expert, last 20 steps:\n{load_table(rows)}")
    print(f"\nmodel:       {config.run_dir}/export")
    prompt = config.log.sample_prompts[0] if config.log.sample_prompts else ""
    print(f"try it:      smolds generate {config.run_dir} --prompt {shlex.quote(prompt)}")
    print(f"curves:      tensorboard --logdir {config.run_dir}/tensorboard", flush=True)
