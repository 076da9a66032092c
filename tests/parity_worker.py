"""Train a tiny model in each topology listed as JSON on the command line; rank 0 prints one JSON line per case.

Run by test_parity.py under torchrun, and in-process for the single-process reference.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from smolds_dist.checkpoint.resume import open_checkpoint, restore
from smolds_dist.checkpoint.writer import CheckpointWriter, TrainState
from smolds_dist.config import load_config
from smolds_dist.data.mixture import mixture_of
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.interchange.final_export import write_weights
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.parallel import deepspeed_engine
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.expert_parallel import autoep_layers
from smolds_dist.parallel.fragments import tensor_shapes
from smolds_dist.parallel.optim import PARTS
from smolds_dist.parallel.process_group import end_rank, start_process_group
from smolds_dist.parallel.ranks import rank_from_environment
from smolds_dist.parallel.router_statistics import entropy_and_histogram
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.schedule import learning_rate
from smolds_dist.settings import RunConfig
from smolds_dist.stages import resolve_stages
from smolds_dist.training.build import loss_coefficients, new_engine
from smolds_dist.training.guard import MIN_OUTLIER_STEPS, OutlierFilter
from smolds_dist.training.step import Stepper

VOCAB = 96
STEPS = 8
SAVE_AT = 4
USUAL = 50.0  # more than any loss and gradient norm here
MOST_IN_A_FILE = 25_000  # elements per export file: more than any tensor, fewer than any model
BASE = [
    # With some seeds, and more of them at larger learning rates, a token's second and third expert have equal scores up to
    # rounding, and runs diverge.
    "--train.seed=3",
    "--preset=debug", "--parallel.device=cpu", "--train.dtype=fp32", "--train.global_batch=8", "--train.micro_batch=2",
    f"--train.steps={STEPS}", "--train.warmup_steps=2", "--train.lr=0.01", "--train.grad_clip=0.5", "--data.seq_len=32",
    "--model.hidden_size=32", "--model.intermediate_size=24", "--model.num_hidden_layers=2",
    "--model.num_attention_heads=2", "--model.num_key_value_heads=1", "--model.head_dim=16",
]  # fmt: skip


class Shards:
    """The part of TrainingData that the training loop reads: a Markov chain of tokens, which can be learned."""

    def __init__(self, config: RunConfig | None = None, end_of_text: int | None = None):
        config = config or RunConfig()
        masked = replace(config.data, document_mask=end_of_text is not None)
        self.stages = resolve_stages(replace(config, data=masked))
        self.tokenizer = SimpleNamespace(eos_token_id=end_of_text)
        generator = torch.Generator().manual_seed(3)
        successors = torch.randint(0, VOCAB, (VOCAB, 4), generator=generator)
        choices = torch.randint(0, 4, (20_000,), generator=generator)
        tokens, token = [], 0
        for choice in choices.tolist():
            token = int(successors[token, choice])
            tokens.append(token)
        self.tokens = torch.tensor(tokens)

    def wait_for_samples(self, samples: int) -> None:
        """Do nothing: all samples are ready."""

    def batch(self, indices: range) -> torch.Tensor:
        return torch.stack([self.tokens[(start := 32 * (index % 600)) : start + 32] for index in indices])


def train_case(
    options: list[str],
    disturb: bool,
    save: str = "",
    resume: str = "",
    export: str = "",
    poison: str = "",
    skip: bool = False,
    autoep: bool = False,
) -> dict:
    """Train; return losses, gradient norms and counts of all steps, and the final weights and biases.

    Args:
        disturb: evaluate before and sample after every step, which must change nothing.
        save: run folder to write a checkpoint to after step SAVE_AT.
        resume: checkpoint to resume from.
        export: folder to write the initial weights to.
        poison: factor of the last rank's loss in step SAVE_AT: "nan", "inf", or "1000", which makes it an outlier.
        skip: omit step SAVE_AT.
        autoep: keep AutoEP's own experts, as on GPUs.
    """
    options = [*options, f"--run.dir={save or 'unused'}", "--run.name=run"]
    config = load_config([*BASE, *options, *([f"--checkpoint.resume={resume}"] if resume else [])])
    info = rank_from_environment()
    topology = plan_topology(config, detect_machine(), info)
    if not torch.distributed.is_initialized():
        start_process_group(topology)
    settings = config.model.architecture() | loss_coefficients(config.train)
    model_config = DeepSeekV3Config(**(settings | {"vocab_size": VOCAB, "initializer_range": 0.2}))
    with torch.device("meta"):
        tensors = tensor_shapes(DeepSeekV3ForCausalLM(model_config))
    reader = open_checkpoint(config, topology)
    own = mock.patch.object(deepspeed_engine, "patch_cpu_experts") if autoep else nullcontext()
    with own:
        engine = new_engine(model_config, config, topology, reader)
    balancer = Balancer(engine.model, config.train.balance_rate, config.train.ema)
    progress = restore(reader, engine, balancer, topology) if reader else TrainState()
    if export:
        with torch.device("meta"):
            skeleton = DeepSeekV3ForCausalLM(model_config)
        if topology.dtype == "bf16":
            skeleton.bfloat16()
        write_weights(
            Path(export),
            skeleton,
            engine,
            balancer,
            topology,
            file_bytes=MOST_IN_A_FILE * skeleton.lm_head.weight.itemsize,
        )
    shards = Shards(config)
    ahead = BatchPrefetcher(shards, (topology.rank, topology.world_size), [topology.micro_batch])
    stepper = Stepper(engine, balancer, topology, config, ahead)
    outliers = OutlierFilter(6.0)
    for _ in range(MIN_OUTLIER_STEPS):
        outliers.add(USUAL, USUAL)
    routers, clock, clip = stepper.routers, stepper.clock, stepper.qk_clip
    losses, norms, totals, applied = [], [], [], []
    shares, entropies, histograms, seconds = [], [], [], []
    for step in range(progress.step + 1, STEPS + 1):
        if skip and step == SAVE_AT:
            continue
        if disturb:
            evaluation_pass(engine, shards)
        forward = engine.forward
        if poison and step == SAVE_AT and topology.rank == topology.world_size - 1:
            factor = float(poison)
            engine.forward = lambda *batch, forward=forward, factor=factor, **more: forward(*batch, **more) * factor
        clock.begin(step)
        loss, _ = stepper.accumulate(step)
        engine.forward = forward
        with clock.phase("optimizer"):
            logits = clip.take()
            results = {"mean_loss": engine.sum_over_ranks(loss.clone()) / topology.world_size}
            norm, updated, squares, _, outlier = engine.step(
                learning_rate(step, config),
                by_part=True,
                results=results | ({} if logits is None else {"logits": logits}),
                factors=lambda read: clip.factors(read.get("logits")),
                accept=outliers.accepts,
            )
            assert outlier == (poison == "1000" and step == SAVE_AT)
        seconds.append(clock.seconds)
        clock.lap()
        squares = engine.sum_over_ranks(torch.tensor([float(squares.get(part, 0.0)) for part in PARTS]))
        shares.append((squares / squares.sum()).tolist())
        entropy_L, histogram = entropy_and_histogram(engine.sum_over_ranks(routers.take()))
        entropies.append(entropy_L.tolist())
        histograms.append(histogram.tolist())
        norms.append(norm)
        applied.append(updated)
        counts = balancer.step(updated)
        totals.append(counts.sum(-1).tolist())
        losses.append((engine.sum_over_ranks(loss) / topology.world_size).item())
        if disturb:
            engine.model.eval()
            prompt = torch.tensor([[1, 2, 3]], device=engine.device)
            engine.model.generate(prompt, do_sample=False, min_new_tokens=3, max_new_tokens=3, eos_token_id=None)
            engine.model.train()
        if save and step == SAVE_AT:
            writer = CheckpointWriter(
                config, topology, tensors, lambda samples: {"schedule": mixture_of(config).schedule()}
            )
            writer.save(engine, balancer, TrainState(step), None)  # in the background
    if save:
        writer.wait()
        assert writer.failure() is None
        engine.barrier()  # rank 0 is done
    weights = weight_norms(engine, tensors, "value")
    averages = weight_norms(engine, tensors, "ema") if config.train.ema else {}
    biases, state = balancer.named_biases(), balancer.state()
    averages |= {f"{name} {number}": x for name in biases for number, x in enumerate(state.get((name, "ema"), []))}
    engine.close()
    result = {"options": options, "losses": losses, "norms": norms, "totals": totals, "applied": applied}
    result |= {"shares": shares, "entropies": entropies, "histograms": histograms, "seconds": seconds}
    result["biases"] = [biases[name].tolist() for name in sorted(biases)]
    result["bias_dtypes"] = sorted({str(tensor.dtype) for tensor in biases.values()})
    result["experts"] = sorted({type(layer.experts).__name__ for layer in autoep_layers(engine.model).values()})
    return result | {"weights": weights, "averages": {name: float(x) for name, x in averages.items()}}


def weight_norms(engine, tensors: dict[str, tuple[int, ...]], kind: str) -> dict[str, float]:
    """Return the norm of each logical tensor's values or averages, over all ranks."""
    squares = torch.zeros(len(tensors), dtype=torch.float64)
    places = {name: place for place, name in enumerate(tensors)}
    for fragment in engine.fragments():
        share = fragment.share()
        squares[places[share.name]] += share.tensors[kind].double().square().sum().cpu()
    return dict(zip(tensors, engine.sum_over_ranks(squares).sqrt().tolist(), strict=True))


@torch.no_grad()
def evaluation_pass(engine, shards) -> None:
    ids = shards.batch(range(100, 102)).to(engine.device)
    engine.model.eval()
    engine.model(input_ids=ids, labels=ids, use_cache=False)
    engine.model.train()


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        outcome = train_case(**case)
        if rank_from_environment().rank == 0:
            print("RESULT " + json.dumps(outcome), flush=True)
    end_rank(0)
