"""Micro batches as graphs: the same losses and weights as without. A recorder of operators stands for CUDA's graphs: like
them, it repeats what was recorded, on the same memory, without any of the model's Python."""

import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smolds_dist.config import load_config
from smolds_dist.data.batch import Batch, MicroBatch
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, device
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.make_engine import make_engine
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import Machine, plan_topology
from smolds_dist.training.compiling import try_to_compile, undo_compile
from smolds_dist.training.step import Stepper

MODEL = (
    "hidden_size=64 intermediate_size=32 num_hidden_layers=2 num_attention_heads=4 num_key_value_heads=2 head_dim=16"
)


class Operators(TorchDispatchMode):
    """Records operators while they run. Those that read a value on the host fail, as in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list = []
        self.most = 10**9

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        if len(self.recorded) >= self.most:
            raise RuntimeError("operation failed due to a previous error during capture")
        out = func(*args, **(kwargs or {}))
        self.recorded.append((func, args, kwargs or {}, out))
        return out

    def poison(self) -> None:
        """Remove what the recorded operators have computed: CUDA records without running them."""
        for func, args, _, out in self.recorded:
            fresh = not func.is_view and not any(one is out for one in args)
            for one in tensors(out) if fresh else ():
                if one.is_floating_point():
                    one.data.fill_(torch.nan)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, before in self.recorded:
                if func.is_view:
                    continue
                after = func(*args, **kwargs)
                for old, new in zip(*map(tensors, (before, after)), strict=True):
                    if old.data_ptr() != new.data_ptr():  # else it was changed in place
                        old.copy_(new)


def tensors(result) -> list[Tensor]:
    several = result if isinstance(result, tuple | list) else (result,)
    return [one for one in several if isinstance(one, Tensor) and one.numel()]


class OperatorRecorder:
    def warm_up(self):
        return nullcontext()

    @contextmanager
    def record(self):
        with Operators() as operators:
            yield operators
        operators.poison()


class CrowdedRecorder(OperatorRecorder):
    """Finds the largest tensor in memory while it records."""

    def __init__(self) -> None:
        self.largest = 0

    @contextmanager
    def record(self):
        everything = [one for one in gc.get_objects() if type(one) is Tensor and one._base is None]
        self.largest = max(one.numel() for one in everything)
        with super().record() as operators:
            yield operators


class LazyRecorder(OperatorRecorder):
    """Its graphs do nothing."""

    @contextmanager
    def record(self):
        with super().record() as operators:
            yield operators
        operators.recorded.clear()


class BrokenBackward(OperatorRecorder):
    """Fails after some operators of the backward pass."""

    def __init__(self) -> None:
        self.graphs = 0

    @contextmanager
    def record(self):
        self.graphs += 1
        with Operators() as operators:
            operators.most = 60 if self.graphs == 2 else operators.most
            yield operators


class Batches:
    """Other tokens in every step."""

    def __init__(self, size: int):
        self.size = size

    def take(self, step, _should_stop):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 97, (self.size, 24), generator=generator)
        return Batch([MicroBatch(part, part) for part in ids.split(2)], None, 0)

    def prefetch_next(self) -> None:
        pass


def make_stepper(accumulation: int, *options: str, device: str = "cpu") -> Stepper:
    config = load_config([
        *(f"--model.{one}" for one in MODEL.split()), "--model.vocab_size=97", "--data.seq_len=24", "--train.dtype=bf16",
        f"--train.global_batch={2 * accumulation}", "--train.micro_batch=2", f"--parallel.device={device}",
        "--train.lr=1e-2", *options,
    ])  # fmt: skip
    topology = plan_topology(config, Machine((device, "cpu"), 1, True), RankInfo())
    torch.manual_seed(0)
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**config.model.architecture(None)))
    engine = make_engine(model, config, topology)
    return Stepper(engine, Balancer(engine.model, 0.1), topology, config, Batches(config.train.global_batch))


def train(stepper: Stepper) -> list[dict]:
    """Return what some steps give, the tenth of which is measured."""
    rows = []
    for step in (9, 10, 11, 12):
        output = stepper.train_step(step, step * 4)
        row = dict(loss=output.loss, norm=torch.tensor(output.update.grad_norm), counts=output.counts)
        row |= dict(logits=torch.zeros(()) if output.logits is None else output.logits)
        row |= output.update.squares | ({} if output.mtp_loss is None else {"mtp_loss": output.mtp_loss})
        rows.append(row | dict(routers=stepper.routers.take()))
    return rows


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--train.activation_checkpointing=full", "--train.qk_clip=0.5", "--model.num_nextn_predict_layers=1"],
    ],
)
def test_steps_are_the_same(accumulation, options):
    with device.as_family("cuda"):
        plain, captured = (make_stepper(accumulation, *options) for _ in range(2))
        captured.capture(torch.randint(0, 97, (2, 24)), OperatorRecorder())
        for one, other in zip(train(plain), train(captured), strict=True):
            assert one.keys() == other.keys()
            for name in one:
                assert torch.equal(one[name], other[name]), name
    for one, other in zip(plain.engine.model.parameters(), captured.engine.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("recorder", "family", "message"),
    [
        (LazyRecorder(), "cuda", "gradient norms"),  # a replay that differs
        (OperatorRecorder(), "cpu", "capturing"),  # rows per expert were read on the host
        (BrokenBackward(), "cuda", "previous error"),  # while gradients are collected
    ],
)
def test_what_cannot_be_captured_runs_without(recorder, family, message):
    with device.as_family(family):
        plain, other = (make_stepper(1) for _ in range(2))
        with pytest.raises(RuntimeError, match=message):
            other.capture(torch.randint(0, 97, (2, 24)), recorder)
        for one, two in zip(train(plain), train(other), strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_wrong_code_of_a_compiler_is_not_used():
    """Every product of the compiled blocks is doubled."""

    def backend(graph, _inputs):
        def run(*inputs):
            return [2 * one if one.is_floating_point() else one for one in graph.forward(*inputs)]

        return run

    with device.as_family("cuda"):
        for compiler, message in (("eager", None), (backend, "gradients differ")):
            stepper = make_stepper(1)
            error = try_to_compile(stepper.engine, stepper.topology, 24, stepper.engine.model.config, compiler)
            undo_compile(stepper.engine.model)
            assert error is None if message is None else message in error


def test_other_batches_end_the_graphs():
    """A step of another shape, or with its own number of labels, runs without."""
    with device.as_family("cuda"):
        plain, captured = (make_stepper(1).engine for _ in range(2))
        captured.capture(torch.randint(0, 97, (2, 24)), OperatorRecorder())
        ids = torch.randint(0, 97, (2, 12))
        losses = []
        for engine in (plain, captured):
            loss = engine.forward(ids, ids, num_labels=torch.tensor(7.0))
            engine.backward(loss)
            losses.append((loss.item(), engine.step(1e-3).grad_norm))
        assert losses[0] == losses[1]


def test_probabilities_of_any_number_are_counted():
    """Also of a step with NaN, whose update is skipped, and more than fp32 counts one by one."""
    stepper = make_stepper(1)
    router = stepper.engine.model.model.layers[1].mlp.gate.weight
    before = router.detach().clone()
    router.data[0, 0] = torch.nan
    assert not stepper.train_step(10, 0).update.applied
    router.data.copy_(before)
    stepper.routers.take()
    logits = torch.zeros(2**16, 32)
    for _ in range(9):
        with stepper.routers.recording():
            for layer in stepper.balancer.layers:
                layer.observe(logits)
    assert stepper.routers.take()[:, 2:].sum(-1).tolist() == [9 * 2.0**21] * 2


def test_graphs_leave_memory_for_the_moments():
    """A new run's first step allocates them: without that memory it would end, where recording falls back."""
    with device.as_family("cuda"):
        stepper, recorder = make_stepper(1), CrowdedRecorder()
        stepper.capture(torch.randint(0, 97, (2, 24)), recorder)
        weights = sum(parameter.numel() for parameter in stepper.engine.model.parameters())
        assert recorder.largest == 2 * weights
        stepper.train_step(1, 0)
        stepper.capture(torch.randint(0, 97, (2, 24)), recorder)
    assert recorder.largest < weights
