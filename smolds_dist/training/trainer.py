"""The training loop, in the order a run executes it."""

import gc
import math
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from smolds_dist.activity import doing
from smolds_dist.checkpoint.resume import check_contents, open_checkpoint, prepare_resumed
from smolds_dist.data.batch import TrainingData
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
from smolds_dist.parallel.agreement import check_same_text, plan_together
from smolds_dist.parallel.process_group import end_process_group, start_process_group
from smolds_dist.parallel.ranks import RankInfo, host_name, rank_from_environment
from smolds_dist.parallel.rendezvous import Rendezvous, WaitPolicy, rendezvous
from smolds_dist.parallel.topology import Machine, Topology
from smolds_dist.progress import StoppedWaitingError
from smolds_dist.settings import RunConfig
from smolds_dist.training.budget import TimeBudget
from smolds_dist.training.build import Job, Training, begin_stage, build, lock_run_dir, make_model_config, roll_back
from smolds_dist.training.guard import LossSpikeError
from smolds_dist.training.rank_checks import WINDOWS, find_text_mismatch, find_weight_mismatch, format_ranks, host_of
from smolds_dist.training.step_row import summarize_step

# Seconds after `parallel.timeout` in which the wait for the other ranks can report its end, before the watchdog does
WAIT_MARGIN = 30.0


def train(config: RunConfig, info: RankInfo | None = None, report: RankReport | None = None) -> int:
    """Train `config` on this rank, from a new model or a checkpoint of any layout, to the exported model.

    Args:
        info: this process's rank; default: from the environment.
        report: of this rank, if there are several.

    Returns:
        The exit code: 0; that of the stop signal (`launching.signals`); or 1, with a printed message, if the loss diverged
        or a required checkpoint could not be written.

    Raises:
        ConfigError: if the run cannot start; nothing has been written then but the ranks' own files.
    """
    info = info or rank_from_environment()
    if report is None and info.world_size > 1:
        report = RankReport(config.run_dir, info, config.parallel)
    stop, outcome = StopRequest(), "done"
    try:
        with path_in_errors(config.run_dir):
            code = train_on_rank(config, info, report, stop)
    except StoppedWaitingError:
        code = EXIT_CODES[signal.Signals(stop.requested or 0)]
    except ConfigError as error:
        if report:
            report.refuse(error)
        raise
    except TrainingStoppedError as error:
        code, outcome = 1, "failed"
        if info.rank == 0:
            print(f"\nsmolds: {error}.", file=sys.stderr, flush=True)
    except Exception as error:
        if report is None:  # keep the traceback for a debugger
            raise
        report.fail(error)
        raise RankFailedError from error
    if report:
        report.end("stopped" if code and outcome == "done" else outcome, code)
    return code


def train_on_rank(config: RunConfig, info: RankInfo, report: RankReport | None, stop: StopRequest) -> int:
    """Agree with the other ranks on topology and text, and train; return the exit code.

    Raises:
        StoppedWaitingError: if a signal ended the wait for other ranks.
    """
    with ExitStack() as stack:
        if report and info.rank == 0:
            stack.enter_context(lock_run_dir(config))
        with stop:
            ranks, topology, machine = join(config, info, report, stop)
        with doing("preparing the data"):
            data = prepare_together(config, ranks)
        model_config = make_model_config(config, data)
        if not report:
            stack.enter_context(lock_run_dir(config))
        if info.rank == 0:
            set_outcome = stack.enter_context(record_run_state(config.run_dir, topology.world_size))
        if info.local_rank == 0:
            stack.enter_context(background_tokenization(config, data, info.ranks_per_node))
        stack.enter_context(stop)
        job = Job(
            config=config,
            topology=topology,
            compiler=machine.compiler,
            data=data,
            model_config=model_config,
            stages=data.stages,
            stop=stop,
            tasks=load_eval_tasks(config),
        )
        start_process_group(topology, config.parallel.timeout)
        with doing("training"):
            code = run(job)
        if info.rank == 0:
            set_outcome(code, "")
    return code


def join(
    config: RunConfig, info: RankInfo, report: RankReport | None, stop: StopRequest
) -> tuple[Rendezvous, Topology, Machine]:
    """Meet the other ranks, if any, and plan the topology with them. Collective."""
    if report is None or info.world_size == 1:
        return (ranks := Rendezvous(info)), *plan_together(ranks, config, shared=True)
    wait_policy = WaitPolicy(config.parallel.timeout or math.inf, lambda: stop.requested is not None)
    with doing("waiting for the other ranks", WAIT_MARGIN):
        ranks = rendezvous(info, wait_policy)
        token = ranks.first("token", report.make_token)
        shared = report.has_token(token)
    with doing("planning the topology"):
        return ranks, *plan_together(ranks, config, shared)


def prepare_together(config: RunConfig, ranks: Rendezvous) -> TrainingData:
    """Prepare the data on all ranks, which divide the work, and compare what they train on. Collective."""
    found = []

    def prepare() -> dict[str, Any]:
        found.append(prepare_resumed(config))
        return found[0].identity(1) | {"host": host_name()}

    ranks.agree("data", prepare, check_same_text)
    return found[0]


def run(job: Job) -> int:
    """Train to the end, rolling back to a checkpoint after loss spikes; return the exit code."""
    config, topology = job.config, job.topology
    with doing("verifying the checkpoint"):
        reader = open_checkpoint(config, topology)
        if reader:
            check_contents(reader, job.data)
    training = build(job, reader)
    while True:
        job.data.reporter.begin_training(training.log.info)
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
        data_step = step + state.skipped_steps
        if job.stages.at(data_step) is not training.stage:
            with clock.paused():
                begin_stage(job, training, step)
        training.profiler.begin(step)
        try:
            output = training.stepper.train_step(step, data_step)
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
        state.step, state.tokens = step, result.row["tokens"]
        if step == begin + 1:
            with clock.paused():
                training.checkpoints.prepare(training.engine)
        with clock.phase("logging"):
            training.log.training_row(result.row, result.counts)
        if trace:
            training.log.info(trace)
        if result.failed:
            handle_checkpoint_error(config, training, result.error)
        training.guard.check(step, result.row["loss"], result.counts is not None or "outlier" in result.row)
        report_stragglers(job, training, step)
        budget.after_step(job, training, step)

        with clock.paused(), doing("evaluating"):
            val_loss = evaluate_and_sample(job, training, step, last)
        stop_signal = None if last else job.stop.agree_on_stop(result.requested)
        saving = stop_signal or (config.checkpoint.every and is_due(step, config.checkpoint.every, last))
        if config.parallel.check_every and (saving or step % config.parallel.check_every == 0):
            check_ranks(job, training, step)
        if saving:
            ending = bool(stop_signal) or last
            with clock.paused(), doing("saving a checkpoint"):
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
    folder, tokenizer = job.config.run_dir / "export", job.data.tokenizer
    with doing("exporting the model"):
        export_model(folder, training.engine, training.balancer, job.topology, training.model_config, tokenizer)
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


def check_ranks(job: Job, training: Training, step: int) -> None:
    """Compare the text that the ranks were trained on, and the weights of replicas. Collective.

    Raises:
        TrainingStoppedError: if they differ, before they reach a checkpoint.
    """
    if job.topology.world_size == 1:
        return
    samples = job.stages.samples(step + training.state.skipped_steps)
    if ranks := find_text_mismatch(job.data.identity(samples), job.topology):
        raise TrainingStoppedError(
            f"{format_ranks(job.config.run_dir, ranks)} had another text than the others, up to step {step}; copy "
            "the same files to all hosts, and continue from the last checkpoint"
        )
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
    if config.checkpoint.every and state.step % config.checkpoint.every == 0:
        training.checkpoints.wait()
    else:
        training.save(wait=True)
    if not check_saved(training, state.step):  # no rank ends before all have written their files
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
    stage = training.stage
    result = evaluate(job.config, job.topology.at(stage), training.engine, job.data, stage)
    training.log.row(step, tokens=training.state.tokens, **result)
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
