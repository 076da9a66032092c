"""The training loop: read from top to bottom, it is what a run does."""

import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from smolds_dist.config import RunConfig, save_config
from smolds_dist.data.batches import training_batch
from smolds_dist.data.shards import TokenShards, prepare_shards
from smolds_dist.errors import ConfigError, RankFailedError
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, enable_activation_checkpointing
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.engine import Engine, make_engine, start_process_group
from smolds_dist.parallel.failure import RankReport
from smolds_dist.parallel.ranks import rank_from_environment
from smolds_dist.parallel.topology import Topology, detect_machine, plan_topology
from smolds_dist.train.checkpoint import check_resumable, load_checkpoint, save_checkpoint
from smolds_dist.train.evaluation import evaluate
from smolds_dist.train.metrics import MetricsWriter, load_table, read_rows
from smolds_dist.train.optim import learning_rate, make_optimizer, parameter_groups
from smolds_dist.train.samples import append_samples, sample
from smolds_dist.train.signals import EXIT_CODES, StopRequest


def train(config: RunConfig) -> int:
    """Runs `config` on this rank, from a new model or the run's newest checkpoint, to the exported model.

    Returns:
        The exit code: 0, or that of the signal after which it stopped (`train.signals`).

    Raises:
        ConfigError: where the run cannot start; nothing has been written then.
    """
    info = rank_from_environment()
    topology = plan_topology(config, detect_machine(), info)
    checkpoint = check_resumable(config, topology)
    shards = prepare_shards(config)
    model_config = make_model_config(config, shards)

    with StopRequest() as stop:
        if topology.world_size == 1:  # a debugger should see the error where it happens
            return run_steps(config, topology, checkpoint, shards, model_config, stop)
        report = RankReport(config.run_dir, info, config.parallel.grace)
        try:
            code = run_steps(config, topology, checkpoint, shards, model_config, stop)
        except ConfigError:
            report.end("refused")
            raise
        except Exception as error:
            report.fail(error)
            raise RankFailedError from error
        report.end("stopped" if code else "done", code)
        return code


def run_steps(
    config: RunConfig,
    topology: Topology,
    checkpoint: Path | None,
    shards: TokenShards,
    model_config: DeepSeekV3Config,
    stop: StopRequest,
) -> int:
    """The training itself, once everything has been checked; returns the exit code."""
    main = topology.rank == 0
    start_process_group(topology)
    torch.manual_seed(config.train.seed)  # every rank builds the same model, whatever the topology
    model = DeepSeekV3ForCausalLM(model_config)
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = make_engine(
        model,
        config,
        topology,
        partial(parameter_groups, train=config.train),
        partial(make_optimizer, train=config.train),
    )
    rate = config.train.balance_rate if config.train.balance == "bias" else 0.0
    balancer = Balancer(engine.model, rate)
    start = load_checkpoint(checkpoint, engine, balancer) if checkpoint else 0

    writer = None
    if main:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, config.run_dir / "config.yaml")
        writer = MetricsWriter(config.run_dir, start, config.log.tensorboard)
        print(f"{config.run.name}: {num_parameters:,} parameters, {topology}", flush=True)
        print(topology.reason, flush=True)
        if start:
            print(f"continuing from {checkpoint}", flush=True)

    bar = tqdm(
        total=config.train.steps,
        initial=start,
        unit="step",
        dynamic_ncols=True,
        disable=not main,
        mininterval=0.1 if sys.stderr.isatty() else 15,
    )
    for step in range(start + 1, config.train.steps + 1):
        began = time.perf_counter()
        lr = learning_rate(step, config.train)
        loss_part = accumulate_gradients(config, topology, engine, balancer, shards, step)
        grad_norm = engine.step(lr)
        counts_LE = balancer.step()
        loss_sum, *asked = engine.sum_over_ranks(
            torch.stack((loss_part, *loss_part.new_tensor(stop.counts())))
        ).tolist()
        loss = loss_sum / topology.world_size
        step_tokens = config.train.global_batch * config.data.seq_len
        tokens_per_s = step_tokens / (time.perf_counter() - began)

        last = step == config.train.steps
        if writer is not None:
            row = {"step": step, "tokens": step * step_tokens, "loss": loss, "lr": lr, "grad_norm": grad_norm}
            row = writer.training_row(row | {"tokens_per_s": round(tokens_per_s, 1)}, counts_LE)
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, MaxVio {row['max_vio']:.2f}", False)
        bar.update()
        if last or (config.train.eval_every and step % config.train.eval_every == 0):
            result = evaluate(config, topology, engine, shards)
            if writer is not None:
                writer.evaluation_row({"step": step, "tokens": step * step_tokens, **result})
                bar.write(
                    f"step {step}: validation loss {result['val_loss']:.4f}, "
                    f"{result['val_bits_per_byte']:.3f} bits per byte",
                    file=sys.stdout,
                )
        if last or (config.log.sample_every and step % config.log.sample_every == 0):
            write_samples(config, engine, shards, step, main, bar)
        signal = None if last else stop.agreed(asked)
        if signal or (config.checkpoint.every and (last or step % config.checkpoint.every == 0)):
            save_checkpoint(config, topology, engine, balancer, step)
        if signal:
            bar.close()
            if writer is not None:
                writer.close()
                print(
                    f"stopped by {signal.name} after step {step}, which is saved; continue with --checkpoint.resume auto",
                    flush=True,
                )
            engine.close()
            return EXIT_CODES[signal]
    bar.close()

    export_model(config, engine, model_config, shards, main)
    if writer is not None:
        writer.close()
        print_summary(config, shards)
    engine.close()
    return 0


def make_model_config(config: RunConfig, shards: TokenShards) -> DeepSeekV3Config:
    """The model's configuration, its vocabulary size and special tokens taken from the tokenizer."""
    settings = asdict(config.model)
    vocabulary = len(shards.tokenizer)
    if settings["vocab_size"] is None:
        settings["vocab_size"] = vocabulary
    if settings["vocab_size"] < vocabulary:
        raise ConfigError(
            f"--model.vocab_size {settings['vocab_size']} is smaller than the tokenizer's {vocabulary}; "
            "raise it, or leave it out."
        )
    if config.train.balance == "aux_loss":
        settings["router_aux_loss_coef"] = config.train.aux_loss_coef
    tokenizer = shards.tokenizer
    return DeepSeekV3Config(**settings, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)


def accumulate_gradients(
    config: RunConfig, topology: Topology, engine: Engine, balancer: Balancer, shards: TokenShards, step: int
) -> torch.Tensor:
    """Forward and backward over this rank's part of the global batch of `step` (from 1); returns its mean loss."""
    first = (step - 1) * config.train.global_batch + topology.rank * topology.per_rank
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


def write_samples(config: RunConfig, engine: Engine, shards: TokenShards, step: int, main: bool, bar: tqdm) -> None:
    """Samples every prompt on all ranks and appends the texts to samples.jsonl."""
    seed = config.train.seed + step
    texts = {
        prompt: sample(engine.model, shards.tokenizer, prompt, config.log.sample_tokens, seed)
        for prompt in config.log.sample_prompts
    }
    if main and texts:
        append_samples(config.run_dir / "samples.jsonl", step, texts)
        bar.write(f"step {step}: {next(iter(texts.values()))!r}", file=sys.stdout)


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
