"""Contenders of `smolds bench train`, each in its own processes, which run steps on request.

Run as `python -m smolds_dist.bench.contenders JSON`, or under torchrun for several ranks. A line "N" on standard input
requests N steps; the answer is a line of JSON with their seconds and the peak of resident (CUDA: allocated) memory. Steps
in which `torch.compile` runs are extra and reported separately. All train the same decoder on the same tokens with AdamW
(smolds also with Muon), in the same dtype; each uses its own weight initialization. "dense" has no experts: a ceiling.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolds_dist.config import load_config
from smolds_dist.settings import RunConfig


@dataclass
class Task:
    """Input of every contender."""

    contender: str  # a key of CONTENDERS
    preset: str
    vocab_size: int
    sequences: int  # per step and rank
    seq_len: int
    dtype: str  # fp32 or bf16
    device: str
    # transformers: EXPERTS/PRECISION or EXPERTS/PRECISION/compile; smolds and dense: "", "compile", or "graphs" (CUDA graphs
    # of compiled code).
    variant: str = ""
    settings: tuple[str, ...] = ()  # that override the preset's

    def batch(self) -> Tensor:
        """Return the same token ids [sequences, seq_len] in every call: speed does not depend on them, balance hardly."""
        generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
        ids = torch.randint(0, self.vocab_size, (self.sequences, self.seq_len), generator=generator)
        return ids.to(self.device)

    def model_config(self) -> Any:
        from smolds_dist.model import DeepSeekV3Config

        return DeepSeekV3Config(**self.config().model.architecture() | {"vocab_size": self.vocab_size})

    def config(self, *more: str) -> RunConfig:
        # Several ranks always use expert parallelism, so that its cost is measured.
        given = ["--preset", self.preset, "--parallel.expert=max", *self.settings, *more]
        return load_config(given, benchmark=True)


class Gate:
    """Run the requested number of steps and time them.

    A step that compiled something is replaced by another: changing shapes, such as an expert's number of tokens, recompile
    until none is new.
    """

    def __init__(self, task: Task, answers: TextIO):
        self._answers = answers
        self._cuda = task.device.startswith("cuda")
        self._left = 0
        self._seconds: list[float] = []
        self._ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self._main = os.environ.get("RANK", "0") == "0"
        self.notes: list[Any] = []  # a contender's own results
        self._compiling: list[float] = []  # seconds of steps that compiled

    def before(self) -> None:
        """Start timing a step; exit the process if no more are requested."""
        if not self._left:
            self._left = self._asked()
        self._compiled = compiled_frames()
        self._began = self._now()

    def after(self) -> None:
        seconds = self._now() - self._began
        if compiled_frames() != self._compiled:
            self._compiling.append(seconds)
            return
        self._seconds.append(seconds)
        self._left -= 1
        if not self._left:
            if self._main:
                answer = {"seconds": self._seconds, "compiling": self._compiling, "memory": self._memory()}
                print(json.dumps(answer | {"notes": self.notes}), file=self._answers, flush=True)
            self._seconds, self.notes = [], []

    def _asked(self) -> int:
        steps = [int((sys.stdin.readline() or "0").strip() or 0)] if self._main else [0]
        if self._ranks > 1:
            torch.distributed.broadcast_object_list(steps)
        if not steps[0]:
            sys.stdout.flush()
            os._exit(0)
        return steps[0]

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _memory(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compiled_frames() -> int:
    """Return the number of frames that `torch.compile` has compiled in this process, with recompilations."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")  # nothing was compiled before its import
    return dynamo.counters["frames"]["total"] if dynamo else 0


def repeat(gate: Gate, step: Callable[[], object]) -> None:
    while True:
        gate.before()
        step()
        gate.after()


def smolds_engine(task: Task) -> tuple[Any, Any, Any]:
    """Return our model in its engine (plain PyTorch in one process, DeepSpeed with expert parallelism in several), its
    balancer and its topology. The contender "dense" is the same decoder with one SwiGLU per layer, as wide as a token's
    experts together; it has no balancer."""
    from smolds_dist.model import DeepSeekV3ForCausalLM
    from smolds_dist.model.moe import SwiGLU as DenseLayer
    from smolds_dist.parallel.balancer import Balancer
    from smolds_dist.parallel.make_engine import make_engine
    from smolds_dist.parallel.process_group import start_process_group
    from smolds_dist.parallel.ranks import rank_from_environment
    from smolds_dist.parallel.topology import detect_machine, plan_topology

    info = rank_from_environment()
    config = task.config(
        f"--train.global_batch={task.sequences * info.world_size}", f"--train.micro_batch={task.sequences}",
        f"--train.dtype={task.dtype}", f"--parallel.device={task.device.partition(':')[0]}",
    )  # fmt: skip
    topology = plan_topology(config, detect_machine(), info)
    start_process_group(topology)
    torch.manual_seed(0)
    m = task.model_config()
    model: Any = DeepSeekV3ForCausalLM(m)
    if task.contender == "dense":
        for block in model.model.layers[m.first_k_dense_replace :]:
            block.mlp = DenseLayer(m.hidden_size, m.intermediate_size * (m.num_experts_per_tok + m.n_shared_experts))
        return make_engine(model, config, topology), None, topology
    engine = make_engine(model, config, topology)
    return engine, Balancer(engine.model, config.train.balance_rate), topology


def smolds(task: Task, gate: Gate) -> None:
    """Train our model in its engine, or its dense counterpart."""
    from smolds_dist.parallel.captured import CudaRecorder
    from smolds_dist.training.compiling import try_to_compile

    engine, balancer, topology = smolds_engine(task)
    ids = task.batch()
    if task.variant and (error := try_to_compile(engine, topology, task.seq_len, task.model_config())):
        sys.exit(error)
    if task.variant == "graphs":
        engine.capture(ids, CudaRecorder())
    repeat(gate, partial(smolds_step, engine, balancer, ids))


def smolds_step(engine: Any, balancer: Any, ids: Tensor) -> None:
    """Run a training step on a micro batch `ids` [sequences, tokens]; a dense model has no `balancer`."""
    with balancer.counting() if balancer else nullcontext():
        loss = engine.forward(ids, ids)
    engine.backward(loss)
    engine.step(1e-4)
    if balancer:
        balancer.step()


def transformers_model(task: Task) -> tuple[Any, str, bool]:
    """Return `Ernie4_5_MoeForCausalLM` of the same shape with the variant's experts, its precision, and True if compiled."""
    from transformers import Ernie4_5_MoeForCausalLM

    from smolds_dist.interchange.transformers_format import transformers_config

    experts, precision, *mode = task.variant.split("/")
    config: Any = transformers_config(task.model_config())
    config._experts_implementation = experts
    torch.manual_seed(0)
    model: Any = Ernie4_5_MoeForCausalLM(config)
    model = model.to(task.device).train()
    return (model.to(torch.bfloat16) if precision == "bf16" else model), precision, mode == ["compile"]


def plain_step(model: nn.Module, task: Task, precision: str, loss_of: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Return a plain PyTorch step: forward, backward, clip and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = task.batch()

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "autocast"):
            loss = loss_of(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_loop(task: Task, gate: Gate) -> None:
    """Train transformers' model in a plain loop."""
    model, precision, compiles = transformers_model(task)
    forward = torch.compile(model) if compiles else model
    step = plain_step(model, task, precision, lambda ids: forward(input_ids=ids, labels=ids, use_cache=False).loss)
    repeat(gate, step)


def transformers_trainer(task: Task, gate: Gate) -> None:
    """Train transformers' model under its Trainer."""
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, precision, compiles = transformers_model(task)

    class GateCallback(TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs):
            gate.before()

        def on_step_end(self, *_args, **_kwargs):
            gate.after()

    ids = task.batch().cpu()
    samples = [{"input_ids": row, "labels": row} for row in ids] * 10_000
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=task.sequences, max_steps=10_000, learning_rate=1e-4, adam_beta2=0.95,
            weight_decay=0.1, bf16=precision == "autocast", use_cpu=task.device == "cpu", report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True, torch_compile=compiles,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=samples, callbacks=[GateCallback()]).train()


class MaskedExperts(nn.Module):
    """Straightforward mixture of experts: a loop over experts that selects each one's tokens by a mask."""

    def __init__(self, m: Any):
        super().__init__()
        self.chosen = m.num_experts_per_tok
        self.gate = nn.Linear(m.hidden_size, m.num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(m.hidden_size, m.intermediate_size) for _ in range(m.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, choice = self.gate(flat).softmax(-1).topk(self.chosen, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(flat.dtype)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (choice == number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view_as(x)


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def decoder_with(task: Task, make_mixture: Callable[[Any], nn.Module]) -> nn.Module:
    """Return our decoder with another mixture of experts, built from its configuration."""
    from smolds_dist.model import DeepSeekV3ForCausalLM

    torch.manual_seed(0)
    model: Any = DeepSeekV3ForCausalLM(task.model_config())
    for block in model.model.layers:
        block.mlp = make_mixture(model.config)
    model = model.to(task.device).train()
    return model.to(torch.bfloat16) if task.variant == "bf16" else model


def full_logits_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def masked_loop(task: Task, gate: Gate) -> None:
    """Train a straightforward reference: an expert loop with masks."""
    model = decoder_with(task, MaskedExperts)
    repeat(gate, plain_step(model, task, task.variant, partial(full_logits_loss, model)))


def deepspeed_moe(task: Task, gate: Gate) -> None:
    """Train the same decoder with DeepSpeed's `deepspeed.moe.layer.MoE`, on its engine, without dropping tokens."""
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    from smolds_dist.parallel.process_group import start_process_group
    from smolds_dist.parallel.ranks import rank_from_environment
    from smolds_dist.parallel.topology import detect_machine, plan_topology

    info = rank_from_environment()
    config = load_config(["--preset", task.preset, "--parallel.engine=deepspeed", "--train.global_batch=1"])
    start_process_group(plan_topology(config, detect_machine(), info))

    class Mixture(nn.Module):
        def __init__(self, m: Any):
            super().__init__()
            self.moe = MoE(
                m.hidden_size, SwiGLU(m.hidden_size, m.intermediate_size), m.num_experts, k=m.num_experts_per_tok,
                drop_tokens=False,
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(x)[0]

    model = decoder_with(task, Mixture)
    groups = split_params_into_different_moe_groups_for_optimizer({
        "name": "all", "params": list(model.parameters()), "weight_decay": 0.1
    })  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    settings = {
        "train_batch_size": task.sequences * info.world_size, "train_micro_batch_size_per_gpu": task.sequences,
        "gradient_clipping": 1.0, "bf16": {"enabled": task.variant == "bf16"},
        "zero_optimization": {"stage": 1 if task.variant == "bf16" else 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    ids = task.batch()

    def step() -> None:
        engine.backward(full_logits_loss(engine, ids))
        engine.step()

    repeat(gate, step)


CONTENDERS: dict[str, Callable[[Task, Gate], None]] = {
    "smolds": smolds,
    "dense": smolds,
    "transformers": transformers_loop,
    "trainer": transformers_trainer,
    "deepspeed": deepspeed_moe,
    "masked": masked_loop,
}


def answer(contenders: dict[str, Callable[[Task, Gate], None]]) -> None:
    """Run the contender that this process's argument names. Only answers go to standard output; libraries' output goes to
    standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = Task(**json.loads(sys.argv[1]))
    contenders[task.contender](task, Gate(task, answers))


if __name__ == "__main__":
    answer(CONTENDERS)
