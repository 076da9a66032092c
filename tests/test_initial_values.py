"""A new model's initial values; test_parity.py checks that they are equal in every layout."""

import pytest
import torch

from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, empty_model
from smolds_dist.parallel.fragments import Fragment, fill_parameters
from smolds_dist.training.initial_values import BLOCK, InitialValues

NAME, SHAPE = "model.layers.3.mlp.experts.5.gate_proj.weight", (500, 300)


def values(start: int, length: int, name: str = NAME, seed: int = 7, dtype=torch.float32) -> torch.Tensor:
    out = torch.full((length,), torch.nan, dtype=dtype)
    InitialValues(seed, 0.02).fill(Fragment(name, SHAPE, start, {"value": out}))
    return out


def test_values_match_recorded_ones():
    """Runs started with different versions start from the same model."""
    assert [values(start, 2).tolist() for start in (0, BLOCK - 1, 149_998)] == [
        [-0.017888706177473068, 0.019686328247189522],
        [0.006927177309989929, -0.03995584324002266],
        [-0.008585087023675442, -0.026469461619853973],
    ]


@pytest.mark.parametrize(("start", "length"), [(0, 1), (5, 70), (BLOCK - 3, 7), (BLOCK, BLOCK), (1000, 2 * BLOCK)])
def test_any_range_equals_a_slice_of_the_full_tensor(start, length):
    whole = values(0, 150_000)
    assert torch.equal(values(start, length), whole[start : start + length])
    assert torch.equal(values(start, length, dtype=torch.bfloat16), whole[start : start + length].bfloat16())


def test_values_are_normal_and_differ_by_seed_name_and_position():
    whole = values(0, 150_000)
    assert whole.mean().abs() < 2e-4 and whole.std() == pytest.approx(0.02, rel=0.01)
    assert (whole.abs() < 0.02).float().mean() == pytest.approx(0.6827, abs=0.005)
    assert torch.unique(whole).numel() > 140_000  # no block repeats another
    for other in (values(0, 150_000, seed=8), values(0, 150_000, name=NAME.replace("5", "6"))):
        assert torch.corrcoef(torch.stack([whole, other]))[0, 1].abs() < 0.01


def test_a_model_is_initialized_like_transformers():
    config = DeepSeekV3Config(
        vocab_size=500, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_experts=4, initializer_range=0.03, qk_norm="head",
    )  # fmt: skip
    ours, theirs = empty_model(config), DeepSeekV3ForCausalLM(config)
    fill_parameters(ours, InitialValues(0, config.initializer_range).fill)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        if tensor.ndim == 1:
            assert torch.equal(tensor, expected[name])
        else:
            assert tensor.std().item() == pytest.approx(expected[name].std().item(), rel=0.2)
