"""The training loop: read from top to bottom, it is what a run does."""

import math
import signal
import sys
from contextlib import nullcontext

import torch
from transformers import PreTrainedTokenizerBase

from smolds_dist.checkpoint.resume import UNIQUE_TEXTS, open_checkpoint, prepare_resumed
from smolds_dist.config import RunConfig
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.data.tokenizer import save_tokenizer
from smolds_dist.data.waiting import StoppedWaitingError, Waiting, stop_waiting
from smolds_dist.data.workers import tokenising_ahead
from smolds_dist.errors import ConfigError, RankFailedError, TrainingStoppedError
from smolds_dist.inference.held_out import evaluate
from smolds_dist.inference.samples import sample
from smolds_dist.launching.failure import RankReport
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.observe.summary import summary
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.meeting import Patience
from smolds_dist.parallel.process_group import end_process_group, largest_over_ranks, start_process_group
from smolds_dist.parallel.ranks import RankInfo, rank_from_environment
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.training.build import Job, Training, build, hold_run, make_model_config, roll_back
from smolds_dist.training.guard import LossSpikeError
from smolds_dist.training.signals import EXIT_CODES, StopRequest
from smolds_dist.training.step import take_step


def train(config: RunConfig, info: RankInfo | None = None) -> int:
    """Runs `config` on this rank, from a new model or a checkpoint of any layout, to the exported model.

    Args:
        info: this process among the ranks; what the environment says where not given.

    Returns:
        The exit code: 0; that of the signal after which it stopped (`training.signals`); or 1 where the loss diverged or a
        checkpoint that was needed could not be written, which has been told then.

    Raises:
        ConfigError: where the run cannot start; nothing has been written then.
    """
    info = info or rank_from_environment()
    topology = plan_topology(config, detect_machine(), info)
    data = prepare_resumed(config)
    model_config = make_model_config(config, data)
    ahead = tokenising_ahead(config, data, info.ranks_per_node) if info.local_rank == 0 else nullcontext()
    with hold_run(config) if topology.rank == 0 else nullcontext(), ahead as done, StopRequest() as stop:
        report = RankReport(config.run_dir, info, config.parallel) if topology.world_size > 1 else None
        flops = flops_per_token(model_config, config.data.seq_len)
        job = Job(config, topology, data, model_config, flops, stop, report.beat if report else lambda: None, done)
        patience = Patience(
            timeout=config.parallel.timeout or math.inf,
            stopped=lambda: stop.asked is not None,
            alive=report.alive if report else lambda: None,
        )
        try:
            met = start_process_group(topology, info, patience)
            code = run(job) if met else EXIT_CODES[signal.Signals(stop.asked or 0)]
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
    if largest_over_ranks(topology, not (config.run_dir / "lock").exists()):
        raise ConfigError(
            f"{config.run_dir} is not seen by all ranks; choose a --run.dir on a file system that all nodes share."
        )
    training = build(job, open_checkpoint(config, topology))
    while True:
        job.data.tell_progress(Waiting(training.terminal.say, job.beat))
        try:
            code = run_steps(job, training)
            break
        except LossSpikeError as spike:
            training.close()
            training = roll_back(job, training.progress, spike)
        except (TrainingStoppedError, ConfigError):
            training.close()
            raise
    training.close()
    end_process_group()
    return code


def run_steps(job: Job, training: Training) -> int:
    """The training itself; returns the exit code."""
    config, progress, metrics = job.config, training.progress, training.metrics
    terminal, clock = training.terminal, training.clock
    begin = progress.step
    for step in range(begin + 1, config.train.steps + 1):
        training.profiler.begin(step)
        try:
            done = take_step(job, training, step)
        except (ConfigError, StoppedWaitingError) as error:  # no text, on all ranks alike, before the step has begun
            job.data.tell_progress(stop_waiting)
            if step > begin + 1:
                save_without_text(config, training)
            if isinstance(error, ConfigError):
                raise
            return EXIT_CODES[signal.Signals(job.stop.asked or 0)]
        with clock.paused():
            trace = training.profiler.end(step)
        progress.step = step
        if job.done:
            job.done(progress.skipped_samples + step * config.train.global_batch)
        if step == begin + 1:
            with clock.paused():
                training.checkpoints.prepare(training.engine)
        if metrics is not None:
            with clock.phase("logging"):
                terminal.step(metrics.training_row(done.row, done.counts))
        if trace:
            terminal.say(trace)
        if done.failed:
            heed_failure(config, training, done.error)
        training.guard.check(step, done.row["loss"], done.counts is not None)

        last = step == config.train.steps
        val_loss = None
        if last or (config.train.eval_every and step % config.train.eval_every == 0):
            with clock.paused():
                val_loss = evaluate_and_tell(job, training, step)
        if last or (config.log.sample_every and step % config.log.sample_every == 0):
            with clock.paused():
                prompts = config.log.sample_prompts + (config.log.final_prompts if last else [])
                write_samples(config, training, job.data.tokenizer, step, prompts)
        asked = None if last else job.stop.agreed(done.asked)
        if asked or (config.checkpoint.every and (last or step % config.checkpoint.every == 0)):
            ending = bool(asked) or last
            with clock.paused():
                training.checkpoints.save(
                    training.engine, training.balancer, progress, val_loss, seen_so_far(training), wait=ending
                )
            if ending and not is_saved(training, step):
                return 1
        if asked:
            terminal.close()
            terminal.say(
                f"stopped by {asked.name} after step {step}, which is saved; continue with --checkpoint.resume auto"
            )
            return EXIT_CODES[asked]
    terminal.close()

    export_model(config, training.engine, job.model_config, job.data.tokenizer, job.main)
    if terminal.shown:
        terminal.say(summary(config, job.data.val_unigram_entropy))
    return 0


def save_without_text(config: RunConfig, training: Training) -> None:
    """Saves the last step of a run that has no text for the next one. Collective."""
    progress = training.progress
    if not (config.checkpoint.every and progress.step % config.checkpoint.every == 0):
        training.checkpoints.save(training.engine, training.balancer, progress, None, seen_so_far(training), wait=True)
        if not is_saved(training, progress.step):
            return
    training.terminal.say(f"step {progress.step} is saved; continue with --checkpoint.resume auto")


def seen_so_far(training: Training) -> dict[str, torch.Tensor]:
    """What rank 0 adds to a checkpoint."""
    if training.texts is None:
        return {}
    kind, content = training.texts.state()
    return {f"{UNIQUE_TEXTS}:{kind}:0": torch.from_numpy(content)}


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
    training.terminal.warn(f"{what}; training goes on, older checkpoints are whole")


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


def evaluate_and_tell(job: Job, training: Training, step: int) -> float:
    """The validation loss after `step`, which rank 0 writes down. Collective."""
    result = evaluate(job.config, job.topology, training.engine, job.data)
    if training.metrics is not None:
        tokens = step * job.config.train.global_batch * job.config.data.seq_len
        training.metrics.row({"step": step, "tokens": tokens, **result})
    training.terminal.say(
        f"step {step}: validation loss {result['val_loss']:.4f}, {result['val_bits_per_byte']:.3f} bits per byte"
    )
    return result["val_loss"]


def write_samples(
    config: RunConfig, training: Training, tokenizer: PreTrainedTokenizerBase, step: int, prompts: list[str]
) -> None:
    """Samples every prompt on all ranks; rank 0 keeps the texts and shows the first."""
    seed = config.train.seed + step
    texts = {
        prompt: sample(training.engine.model, tokenizer, prompt, config.log.sample_tokens, seed) for prompt in prompts
    }
    if training.metrics is not None and texts:
        training.metrics.samples(step, texts)
        training.terminal.say(f"step {step}: {next(iter(texts.values()))!r}")


def export_model(
    config: RunConfig, engine: Engine, model_config: DeepSeekV3Config, tokenizer: PreTrainedTokenizerBase, main: bool
) -> None:
    """Saves model and tokenizer in Hugging Face format to `export/`. Collective."""
    state = engine.state_dict()
    if main:
        with torch.device("meta"):
            skeleton = DeepSeekV3ForCausalLM(model_config)
        folder = config.run_dir / "export"
        skeleton.config.dtype = state["lm_head.weight"].dtype
        skeleton.save_pretrained(folder, state_dict=state)
        save_tokenizer(tokenizer, folder)
