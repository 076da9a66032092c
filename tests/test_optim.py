"""Optimizers and schedules compared with independent references."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from smolds_dist.costs.flops import orthogonalization_flops
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.parallel.optim import PARTS, MuonAdamW, make_optimizer, orthogonalize, parameter_groups
from smolds_dist.settings import Train


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay():
    config = DeepSeekV3Config(
        vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=4, first_k_dense_replace=1, dense_intermediate_size=12,
        n_shared_experts=1, qk_norm="head", tie_word_embeddings=False,
    )  # fmt: skip
    model = DeepSeekV3ForCausalLM(config)
    groups = {group["name"]: group for group in parameter_groups(model.named_parameters(), Train(optimizer="muon"))}
    grouped = [parameter for group in groups.values() for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert {name: (len(group["params"]), group["muon"]) for name, group in groups.items()} == {
        "embeddings": (2, False),
        "attention": (3 * 4, True),
        "dense_layers": (3, True),
        "routers": (2, False),
        "experts/gate_up": (2, True),
        "experts": (2, True),
        "shared_experts": (2 * 3, True),
        "norms": (3 * 4 + 1, False),
    }
    assert {group["part"] for group in groups.values()} == set(PARTS)
    assert groups["norms"]["weight_decay"] == 0
    assert all(parameter.ndim == 1 for parameter in groups["norms"]["params"])


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (3, 2, 16, 16)])
def test_orthogonalize_approximates_the_polar_factor(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    ours = orthogonalize(matrices)
    singular = torch.linalg.svdvals(ours)
    assert 0.7 < singular.median() < 1.2  # the smallest of a square matrix may converge later
    assert singular.max() < 1.3
    cosine = (ours * (left @ right)).sum() / ours.norm() / (left @ right).norm()
    assert cosine > 0.95


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (3, 2, 32, 32)])
def test_orthogonalize_in_bf16_has_the_same_singular_values_up_to_rounding(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, ours = orthogonalize(matrices), orthogonalize(matrices, dtype=torch.bfloat16)
    assert ours.dtype == torch.float32
    singular = torch.linalg.svdvals(ours)
    smallest = singular.min() if len(shape) == 2 else singular.median()  # a square matrix's may converge later
    assert smallest > 0.65 and singular.max() < 1.25
    assert 1e-4 < (ours - exact).norm() / exact.norm() < 0.06


class Products(TorchDispatchMode):
    """Records the shapes of matmuls."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "bmm"):
            self.found.append((*args[0].shape, args[0].dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_computes_matrices_of_one_shape_in_one_product(dtype):
    """With the same numbers as one after the other."""
    torch.manual_seed(0)
    shapes = [(6, 8), (8, 6), (6, 8), (2, 12, 8), (6, 8)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected = [parameter.detach().clone() for parameter in parameters]
    groups = [{"params": parameters[:3], "muon": True}, {"params": parameters[3:4], "muon": True, "matrices": 2}]
    groups += [{"params": parameters[4:], "muon": True, "weight_decay": 0.1}]
    optimizer = MuonAdamW(groups, lr=0.1, betas=(0.9, 0.95), dtype=dtype)
    momenta = [torch.zeros(shape) for shape in shapes]
    for _ in range(2):
        for i, one in enumerate(expected):
            gradient = torch.randn(one.shape)
            parameters[i].grad = gradient.clone()
            momenta[i].lerp_(gradient, 0.05)
            matrices = gradient.lerp(momenta[i], 0.95).view(-1, 6 if i != 1 else 8, one.shape[-1])
            update = torch.stack([orthogonalize(matrix, dtype=dtype) for matrix in matrices])
            update = update * (0.2 * math.sqrt(8))
            one.mul_(1 - 0.1 * (0.1 if i == 4 else 0)).add_(update.view(one.shape), alpha=-0.1)
        with Products() as products:
            optimizer.step()
        for ours, one in zip(parameters, expected, strict=True):
            tolerance = 1e-6 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(ours.detach(), one, rtol=tolerance, atol=tolerance / 10)
        batches = sorted({shape[0] for shape in products.found})
        assert batches == [1, 2, 4] and len(products.found) == 4 * 15
        assert {shape[-1] for shape in products.found} == {dtype}


def test_muon_treats_gate_and_up_of_every_expert_as_its_own_matrix():
    torch.manual_seed(0)
    gradient = torch.randn(4, 2 * 6, 5)
    stacked = nn.Parameter(torch.zeros(4, 12, 5))
    apart = [nn.Parameter(torch.zeros(6, 5)) for _ in range(8)]
    stacked.grad = gradient.clone()
    for parameter, piece in zip(apart, gradient.view(8, 6, 5), strict=True):
        parameter.grad = piece.clone()
    for groups in (
        [{"params": [stacked], "muon": True, "matrices": 2}],
        [{"params": apart, "muon": True, "matrices": 1}],
    ):
        MuonAdamW(groups, lr=0.1, betas=(0.9, 0.95)).step()
    torch.testing.assert_close(stacked.view(8, 6, 5), torch.stack(list(apart)))
    # updates are as large as AdamW's: about 0.2 per entry at full rank
    assert 0.05 < (stacked / 0.1).square().mean().sqrt() < 0.5


LATENT = dict(attention="latent", kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)


@pytest.mark.parametrize("attention", [{}, LATENT, LATENT | dict(q_lora_rank=6)])
def test_flops_of_muon_match_pytorchs_counter(attention):
    config = DeepSeekV3Config(
        vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=4, first_k_dense_replace=1, dense_intermediate_size=12,
        n_shared_experts=1, **attention,
    )  # fmt: skip
    model = DeepSeekV3ForCausalLM(config)
    optimizer = make_optimizer(
        parameter_groups(model.named_parameters(), Train(optimizer="muon")), Train(optimizer="muon")
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == sum(orthogonalization_flops(config))


def test_adamw_half_equals_pytorch():
    torch.manual_seed(0)
    start, gradients = torch.randn(7, 5), torch.randn(6, 7, 5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = MuonAdamW([{"params": [ours], "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95))
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


def test_make_optimizer_leaves_the_rate_to_the_engine():
    groups = [{"name": "matrix", "params": [nn.Parameter(torch.zeros(2, 2))], "muon": False, "matrices": 1}]
    assert make_optimizer(groups, Train()).param_groups[0]["lr"] == 0
