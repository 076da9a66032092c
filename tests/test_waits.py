"""What the host waits for in a training step. CPU tensors stand in for a GPU's, in the branches that CUDA takes."""

import pytest
import torch
from parity_worker import BASE, VOCAB, Shards
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smolds_dist.config import load_config
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.model import DeepSeekV3Config, causal_attention, device
from smolds_dist.parallel import engine, local_engine
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.training.build import new_engine
from smolds_dist.training.step import Stepper

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "bincount")


class Waits(TorchDispatchMode):
    """Records operators that read a tensor's values on the host, unless all are from `read_together`, which copied them."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.reads, self._on_host = [], 0, []
        monkeypatch.setattr(local_engine, "read_together", self._read)

    def _read(self, tensors):
        self.reads += 1
        copied = engine.read_together(tensors)
        self._on_host += copied
        return copied

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        result = function(*args, **(kwargs or {}))
        storages = {one.untyped_storage().data_ptr() for one in self._on_host}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if given and all(one.untyped_storage().data_ptr() in storages for one in given):
            self._on_host += [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        elif name in READS or masks:
            self.found.append(name)
        return result


def make_stepper(*options: str, end_of_text: int | None = None) -> Stepper:
    config = load_config([*BASE, "--parallel.engine=local", "--run.name=run", *options])
    topology = plan_topology(config, detect_machine(), RankInfo())
    settings = config.model.architecture() | {"vocab_size": VOCAB, "initializer_range": 0.2}
    local = new_engine(DeepSeekV3Config(**settings), config, topology, None)
    ahead = BatchPrefetcher(Shards(config, end_of_text), (0, 1), [topology.micro_batch])
    return Stepper(local, Balancer(local.model, 0.01), topology, config, ahead)


@pytest.mark.parametrize(
    "options", [[], ["--train.dtype=bf16", "--train.qk_clip=0.05"], ["--train.optimizer=muon"]], ids=str
)
def test_the_host_waits_once_in_a_step_of_one_process(monkeypatch, options):
    stepper = make_stepper(*options)
    stepper.train_step(1, 1)  # the first creates the optimizer's state
    monkeypatch.setattr(device, "family", lambda x: "cuda")
    with Waits(monkeypatch) as waits:
        output = stepper.train_step(2, 2)
    assert (waits.found, waits.reads) == ([], 1)
    assert output.update.applied and output.update.grad_norm > 0 and output.loss.item() > 0
    assert output.counts.sum(-1).tolist() == [8 * 32 * 2] * 2
    assert set(output.update.squares) == {"embeddings", "attention", "routers", "experts", "norms"}
    stepper.close()


def test_the_host_does_not_wait_for_the_bounds_of_documents(monkeypatch):
    stepper = make_stepper("--train.dtype=bf16", end_of_text=5)
    # In place of the kernel, which only CUDA has: its values do not matter here.
    kernel = lambda query, key, value, *_, **__: value.repeat_interleave(query.shape[1] // value.shape[1], 1)  # noqa: E731
    monkeypatch.setattr(causal_attention, "_varlen", lambda: (kernel, True))
    monkeypatch.setattr(device, "family", lambda x: "cuda")
    with Waits(monkeypatch) as waits:
        stepper.train_step(1, 1)
    assert (waits.found, waits.reads) == ([], 1)
    stepper.close()
