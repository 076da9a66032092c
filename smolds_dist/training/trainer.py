"""The training loop, in the order a run executes it."""

import gc
import math
import signal
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from smolds_dist.checkpoint.resume import check_contents, open_checkpoint, prepare_resumed
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.data.workers import background_tokenization
from smolds_dist.errors import ConfigError, RankFailedError, TrainingStoppedError
from smolds_dist.files import path_in_errors
from smolds_dist.inference.harness import evaluate_live, load_tasks
from smolds_dist.inference.samples import complete_lines, sample
from smolds_dist.inference.validation import evaluate
from smolds_dist.interchange.final_export import export_model
from smolds_dist.launching.failure import RankReport
from smolds_dist.launching.signals import EXIT_CODES, StopRequest
from smolds_dist.launching.state import record_run_state
from smolds_dist.observe.summary import summary
from smolds_dist.parallel.process_group import end_process_group, max_over_ranks, start_process_group
from smolds_dist.parallel.ranks import RankInfo, rank_from_environment
from smolds_dist.parallel.rendezvous import WaitPolicy
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.progress import StoppedWaitingError
from smolds_dist.settings import RunConfig
from smolds_dist.training.budget import TimeBudget
from smolds_dist.training.build import Job, Training, build, lock_run_dir, make_model_config, roll_back
from smolds_dist.training.guard import LossSpikeError
from smolds_dist.training.rank_checks import WINDOWS, find_weight_mismatch, format_ranks, host_of
from smolds_dist.training.step_row import summarize_step


def train(config: RunConfig, info: RankInfo | None = None) -> int:
    """Train `config` on this rank, from a new model or a checkpoint of any layout, to the exported model.

    Args:
        info: this process's rank; default: from the environment.

    Returns:
        The exit code: 0; that of the stop signal (`launching.signals`); or 1, with a printed message, if the loss diverged
        or a required checkpoint could not be written.

    Raises:
        ConfigError: if the run cannot start; nothing has been written then.
    """
    info = info or rank_from_environment()
    topology = plan_topology(config, detect_machine(), info)
    data = prepare_resumed(config)
    model_config = make_model_config(config, data)
    background = background_tokenization(config, data, info.ranks_per_node) if info.local_rank == 0 else nullcontext()
    with ExitStack() as stack:
        stack.enter_context(path_in_errors(config.run_dir))
        if topology.rank == 0:
            stack.enter_context(lock_run_dir(config))
        recorder = (
            record_run_state(config.run_dir, topology.world_size)
            if topology.rank == 0
            else nullcontext(lambda *_: None)
        )
        set_outcome = stack.enter_context(recorder)
        on_progress, stop = stack.enter_context(background), stack.enter_context(StopRequest())
        report = RankReport(config.run_dir, info, config.parallel) if topology.world_size > 1 else None
        job = Job(
            config=config,
            topology=topology,
            data=data,
            model_config=model_config,
            flops_per_token=flops_per_token(model_config, config.data.seq_len),
            stop=stop,
            heartbeat=report.heartbeat if report else lambda: None,
            tasks=load_eval_tasks(config),
            on_progress=on_progress,
        )
        code, reason = run_and_report(job, info, report)
        set_outcome(code, reason)
    return code


def run_and_report(job: Job, info: RankInfo, report: RankReport | None) -> tuple[int, str]:
    """Join the process group, call `run` and record the outcome for the other ranks and the launcher.

    Returns:
        The exit code, and the reason if the training failed.
    """
    wait_policy = WaitPolicy(
        timeout=job.config.parallel.timeout or math.inf,
        should_stop=lambda: job.stop.requested is not None,
        heartbeat=report.touch if report else lambda: None,
    )
    reason = ""
    try:
        joined = start_process_group(job.topology, info, wait_policy)
        code = run(job) if joined else EXIT_CODES[signal.Signals(job.stop.requested or 0)]
        outcome = "stopped" if code else "done"
    except ConfigError:
        if report:
            report.end("refused", 2)
        raise
    except TrainingStoppedError as error:
        code, outcome, reason = 1, "failed", str(error)
        if job.main:
            print(f"\nsmolds: {error}.", file=sys.stderr, flush=True)
    except Exception as error:
        if report is None:  # keep the traceback for a debugger
            raise
        report.fail(error)
        raise RankFailedError from error
    if report:
        report.end(outcome, code)
    return code, reason


def run(job: Job) -> int:
    """Train to the end, rolling back to a checkpoint after loss spikes; return the exit code."""
    config, topology = job.config, job.topology
    if max_over_ranks(topology, not (config.run_dir / "lock").exists()):
        raise ConfigError(
            f"{config.run_dir} is not accessible to all ranks; choose a --run.dir on a file system that all nodes share."
        )
    reader = open_checkpoint(config, topology)
    if reader:
        check_contents(reader, job.data)
    training = build(job, reader)
    while True:
        job.data.reporter.begin_training(training.log.info, job.heartbeat)
        try:
            code = run_steps(job, training)
            break
        except LossSpikeError as error:
            spike = error.with_traceback(None)  # the traceback's frames keep the training in memory
        except (TrainingStoppedError, ConfigError):
            training.close(1)
            raise
        except Exception:
            training.log.close(1)
            raise
        state = training.state
        training.close(1)
        del training
        gc.collect()  # keeps only one model in memory at a time
        training = roll_back(job, state, spike)
    training.close(code)
    end_process_group()
    return code


def run_steps(job: Job, training: Training) -> int:
    """Run the training steps; return the exit code."""
    config, state, clock = job.config, training.state, training.stepper.clock
    begin = state.step
    budget = TimeBudget()
    while state.step < config.train.steps:
        step = state.step + 1
        last = step == config.train.steps
        training.profiler.begin(step)
        first_sample = state.skipped_samples + (step - 1) * config.train.global_batch
        try:
            output = training.stepper.train_step(step, first_sample)
        except (ConfigError, StoppedWaitingError) as error:  # no batch, on all ranks, before the step
            job.data.reporter.stop()
            if step > begin + 1:
                save_last_step(config, training)
            if isinstance(error, ConfigError):
                raise
            return EXIT_CODES[signal.Signals(job.stop.requested or 0)]
        result = summarize_step(job, training, output)
        with clock.paused():
            trace = training.profiler.end(step)
        state.step = step
        if job.on_progress:
            job.on_progress(state.skipped_samples + step * config.train.global_batch)
        if step == begin + 1:
            with clock.paused():
                training.checkpoints.prepare(training.engine)
        with clock.phase("logging"):
            training.log.training_row(result.row, result.counts)
        if trace:
            training.log.info(trace)
        if result.failed:
            handle_checkpoint_error(config, training, result.error)
        training.guard.check(step, result.row["loss"], result.counts is not None)
        report_stragglers(job, training, step)
        budget.after_step(job, training, step)

        with clock.paused():
            val_loss = evaluate_and_sample(job, training, step, last)
        stop_signal = None if last else job.stop.agree_on_stop(result.requested)
        saving = stop_signal or (config.checkpoint.every and is_due(step, config.checkpoint.every, last))
        if config.parallel.check_every and (saving or step % config.parallel.check_every == 0):
            check_weights(job, training, step)
        if saving:
            ending = bool(stop_signal) or last
            with clock.paused():
                training.save(val_loss, wait=ending)
            if ending and not check_saved(training, step):
                return 1
        if stop_signal:
            training.log.close_bar()
            training.log.info(
                f"stopped by {stop_signal.name} after step {step} (saved); continue with --checkpoint.resume auto"
            )
            return EXIT_CODES[stop_signal]
    finish(job, training)
    return 0


def is_due(step: int, every: int, last: bool) -> bool:
    """Return True if an action with interval `every` (0 = only at the end) is due after `step`."""
    return last or bool(every and step % every == 0)


def evaluate_and_sample(job: Job, training: Training, step: int, last: bool) -> float | None:
    """Evaluate, score and sample if due; return the validation loss. Collective."""
    config, val_loss = job.config, None
    if is_due(step, config.train.eval_every, last):
        val_loss = evaluate_and_log(job, training, step)
    if job.tasks and is_due(step, config.eval.every, last):
        score_tasks(job, training, step)
    if is_due(step, config.log.sample_every, last):
        prompts = config.log.sample_prompts + (config.log.final_prompts if last else [])
        write_samples(config, training, job.data.tokenizer, step, prompts)
    return val_loss


def finish(job: Job, training: Training) -> None:
    """Export the model and print the summary after the last step. Collective."""
    training.log.close_bar()
    folder, model_config, tokenizer = job.config.run_dir / "export", job.model_config, job.data.tokenizer
    export_model(folder, training.engine, training.balancer, job.topology, model_config, tokenizer)
    if training.log.shown:
        training.log.info(summary(job.config, job.data.val_unigram_entropy))


def report_stragglers(job: Job, training: Training, step: int) -> None:
    """Log stragglers every `parallel.compare_every` steps. Collective."""
    every = job.config.parallel.compare_every
    if job.topology.world_size == 1 or not every or step % every:
        return
    for rank, times in training.stragglers.compare(training.engine.sum_over_ranks).items():
        host = host_of(job.config.run_dir, rank)
        training.log.row(step, event="slow_rank", rank=rank, host=host, times=round(times, 2))
        training.log.info(
            f"straggler: rank {rank} on host {host} took {times:.1f} times the median compute time in the last "
            f"{WINDOWS * every} steps; the other ranks wait for it"
        )


def check_weights(job: Job, training: Training, step: int) -> None:
    """Compare the weights of replicas. Collective.

    Raises:
        TrainingStoppedError: if they differ, before they reach a checkpoint.
    """
    if job.topology.world_size == 1:
        return
    from smolds_dist.parallel.expert_parallel import expert_parameters  # needs deepspeed, like several ranks

    found = find_weight_mismatch(training.engine.model, job.topology, expert_parameters(training.engine.model))
    if found is None:
        return
    name, ranks = found
    raise TrainingStoppedError(
        f"{format_ranks(job.config.run_dir, ranks)} differs from its replicas in {name} at step {step}; a device or its "
        "memory is faulty: exclude that host, and continue from the last checkpoint"
    )


def save_last_step(config: RunConfig, training: Training) -> None:
    """Save the last step of a run that has no data for the next one. Collective."""
    state = training.state
    if not (config.checkpoint.every and state.step % config.checkpoint.every == 0):
        training.save(wait=True)
        if not check_saved(training, state.step):
            return
    training.log.info(f"step {state.step} is saved; continue with --checkpoint.resume auto")


def handle_checkpoint_error(config: RunConfig, training: Training, error: str | None) -> None:
    """Continue or stop after a failed checkpoint, as configured. Called by all ranks together.

    Args:
        error: the reason, on rank 0.

    Raises:
        TrainingStoppedError: if `checkpoint.on_error` is stop.
    """
    failure = f"the checkpoint of step {training.checkpoints.failed_step} could not be written ({error})"
    if config.checkpoint.on_error == "stop":
        raise TrainingStoppedError(
            f"{failure}; older ones are complete: free disk space, and continue with --checkpoint.resume auto"
        )
    training.log.warning(f"{failure}; training continues, older checkpoints are complete")


def check_saved(training: Training, step: int) -> bool:
    """Return True if the checkpoint of `step` was written; print the error if not. Collective."""
    error, failed_step = training.checkpoints.failure(), training.checkpoints.failed_step
    failed = error is not None and failed_step == step
    if error is not None:
        text = (
            f"the checkpoint of step {failed_step} could not be written ({error}); older ones are complete: free disk "
            "space, and continue with --checkpoint.resume auto."
        )
        print(f"\nsmolds: {text}", file=sys.stderr, flush=True)
    return not training.engine.sum_over_ranks(torch.tensor(float(failed))).item()


def evaluate_and_log(job: Job, training: Training, step: int) -> float:
    """Compute the validation loss after `step` and log it on rank 0. Collective."""
    result = evaluate(job.config, job.topology, training.engine, job.data)
    tokens = step * job.config.train.global_batch * job.config.data.seq_len
    training.log.row(step, tokens=tokens, **result)
    training.log.info(
        f"step {step}: validation loss {result['val_loss']:.4f}, {result['val_bits_per_byte']:.3f} bits per byte"
    )
    return result["val_loss"]


def load_eval_tasks(config: RunConfig) -> list[Any]:
    """Load the tasks scored during training, with their questions.

    Raises:
        ConfigError: if a task does not exist or its data is not available.
    """
    if not config.eval.names:
        return []
    folder = Path(config.eval.include_path) if config.eval.include_path else None
    return load_tasks(config.eval.names, folder, "--eval.")


def score_tasks(job: Job, training: Training, step: int) -> None:
    """Score the model on the run's tasks and log the scores on rank 0. Collective."""
    scores = evaluate_live(training.engine, job.topology, job.data.tokenizer, job.tasks, job.config.eval)
    training.log.row(step, tasks=scores)
    training.log.info(f"step {step}: " + ", ".join(f"{name} {score:.4g}" for name, score in scores.items()))


def write_samples(
    config: RunConfig, training: Training, tokenizer: PreTrainedTokenizerBase, step: int, prompts: list[str]
) -> None:
    """Sample every prompt on all ranks; rank 0 stores the samples and logs the first."""
    seed, log, model = config.train.seed + step, config.log, training.engine.model
    texts = {
        prompt: sample(model, tokenizer, prompt, log.sample_tokens, seed, log.sample_temperature) for prompt in prompts
    }
    if texts:
        training.log.samples(step, texts)
        training.log.info(f"step {step}, a sample:\n{complete_lines(next(iter(texts.values())))}")
