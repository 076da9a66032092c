"""AutoEP's options on GPUs, as far as a machine without one can check them: DeepSpeed itself validates every combination."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.moe.ep_experts import GroupedExperts

from smolds_dist.costs.layout import Layout
from smolds_dist.costs.memory import fused_weights_bytes
from smolds_dist.errors import ConfigError
from smolds_dist.parallel import autoep_options
from smolds_dist.parallel.autoep_options import check_options, fast_paths, has_deepep
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import Model

GPUS = Topology(
    rank=0, local_rank=0, world_size=8, device="cuda", backend="nccl", engine="deepspeed", expert=8, zero=1, dtype="bf16",
    micro_batch=4, accumulation=1,
)  # fmt: skip
MODEL = Model(
    num_hidden_layers=1, num_experts=8, num_experts_per_tok=2, hidden_size=384, intermediate_size=256, vocab_size=100
)
FAST = {"use_grouped_mm": True, "gate_up_impl": "fused", "combine_impl": "fused_weighted_sum", "async_split_plan": True}
OWN = [
    {}, {"use_grouped_mm": False}, {"gate_up_impl": "separate"}, {"combine_impl": "weighted_sum"},
    {"combine_impl": "fused_weighted_sum"}, {"async_split_plan": False}, {"comm_backend": "comm"},
    {"comm_backend": "deepep"}, {"comm_backend": "deepep", "row_weighting_impl": "fused"},
    {"comm_max_tokens_per_rank": 5}, {"disable_triton_grouped_mm": True},
]  # fmt: skip


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Triton, as on every machine with an NVIDIA GPU."""
    from deepspeed.ops.triton_ops import autoep_fused_token_ops

    monkeypatch.setattr(autoep_fused_token_ops, "is_available", lambda: True)


@pytest.fixture
def deepep(monkeypatch, tmp_path):
    """An installed DeepEP on a GPU that supports it."""
    (tmp_path / "deep_ep.py").write_text("class ElasticBuffer: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 4))


def test_gpus_get_the_faster_options():
    assert fast_paths(GPUS, MODEL, 4096, {}) == FAST
    assert fast_paths(replace(GPUS, expert=1), MODEL, 4096, {}) == FAST | {"async_split_plan": False}
    assert fast_paths(replace(GPUS, device="cpu"), MODEL, 4096, {}) == {"use_grouped_mm": False}


def test_the_triton_grouped_matmul_has_no_fused_gate_and_up(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "prefer_triton_grouped_mm", lambda _: True)
    assert fast_paths(GPUS, MODEL, 4096, {})["gate_up_impl"] == "separate"
    check_options(Path("ds.json"), {"enabled": True} | fast_paths(GPUS, MODEL, 4096, {}), GPUS)


@pytest.mark.parametrize(("tokens", "impl"), [(256, "separate"), (1024, "fused")])
def test_gate_and_up_are_fused_where_that_moves_less_memory(tokens, impl):
    """The planner counts the copy of both weights, the largest tensor that the experts here save for the backward pass."""
    assert fast_paths(replace(GPUS, expert=2), MODEL, tokens, {})["gate_up_impl"] == impl
    experts = GroupedExperts(MODEL.hidden_size, MODEL.intermediate_size, 4, gate_up_impl=impl).bfloat16()
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}, [0]

    def note(saved: torch.Tensor) -> torch.Tensor:
        if (storage := saved.untyped_storage()).data_ptr() not in own:
            kept.append(storage.nbytes())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        experts(torch.zeros(64, 384, dtype=torch.bfloat16, requires_grad=True), torch.tensor([16] * 4))
    predicted = fused_weights_bytes(MODEL, Layout(8, 8, 2, 1, 1, 1, tokens, "bf16", engine="deepspeed"))
    assert max(kept) == predicted if impl == "fused" else (predicted == 0 and max(kept) < 100_000)


def test_options_that_the_installed_deepspeed_lacks_are_not_set(monkeypatch):
    monkeypatch.setattr(autoep_options, "known_options", lambda: {"use_grouped_mm": True, "combine_impl": "auto"})
    assert fast_paths(GPUS, MODEL, 4096, {}) == {"use_grouped_mm": True, "combine_impl": "fused_weighted_sum"}


def test_deepep_is_used_where_it_runs(deepep, monkeypatch):
    found = fast_paths(GPUS, MODEL, 4096, {})
    assert found["comm_backend"] == "deepep" and found["comm_max_tokens_per_rank"] == 4096
    assert found["combine_impl"] == "auto" and not found["async_split_plan"]
    for topology in (replace(GPUS, expert=1), replace(GPUS, dtype="fp32")):
        assert "comm_backend" not in fast_paths(topology, MODEL, 4096, {})
    assert fast_paths(GPUS, MODEL, 4096, {"combine_impl": "fused_weighted_sum"})["async_split_plan"]
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 0))
    assert not has_deepep()


@pytest.mark.parametrize(
    ("own", "expert"),
    [(own, expert) for own in OWN for expert in (1, 8) if expert > 1 or "row_weighting_impl" not in own],
)
def test_deepspeed_accepts_every_users_option_with_ours(deepep, own, expert):
    topology = replace(GPUS, expert=expert)
    section = {"enabled": True, "autoep_size": expert} | fast_paths(topology, MODEL, 4096, own)
    check_options(Path("ds.json"), section, topology)
    assert own.items() <= section.items()


def test_deepep_needs_its_package_and_bf16(deepep):
    section = {"enabled": True, "autoep_size": 8} | fast_paths(GPUS, MODEL, 4096, {"comm_backend": "deepep"})
    with pytest.raises(ConfigError, match=r"needs NVIDIA GPUs, --train\.dtype bf16 and the package deep_ep"):
        check_options(Path("ds.json"), section, replace(GPUS, dtype="fp32"))
