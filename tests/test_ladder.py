"""Ladders: sizes of a family, the plan's arithmetic, and a ladder of two tiny rungs from plan to results."""

import pytest

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.planner.family import Size, granularity, parse_size, sized, weights

# Sizes of a family


def test_a_size_keeps_heads_whole_and_everything_else_in_proportion():
    config = load_config(["--preset", "debug"])  # 192 channels, 6 heads of 32, 2 key/value heads, experts of 64
    small, wide = sized(config, Size(64, 2)).model, sized(config, Size(384, 9)).model
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (2, 1, 32)
    assert (wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim) == (12, 4, 32)
    assert (small.intermediate_size, wide.intermediate_size) == (24, 128)
    assert (small.num_hidden_layers, small.num_experts, small.num_experts_per_tok) == (2, 8, 2)
    assert sized(config, Size(192, 4)) == config
    assert sized(config, Size(160, 4)).model.num_key_value_heads == 1  # of 5 heads, 5/3 are not possible
    latent = sized(load_config(["--preset", "smollm2-deepseek-255m-mla"]), Size(192, 3)).model
    assert latent.kv_lora_rank == 64 and latent.qk_rope_head_dim == 32


def test_a_width_without_whole_heads_names_the_nearest():
    config = load_config(["--preset", "debug"])
    with pytest.raises(ConfigError, match=r"width 100 of 100x2 .* one per 32 channels; use 96 or 128\."):
        sized(config, Size(100, 2))
    with pytest.raises(ConfigError, match=r"channels; use 32\."):
        sized(config, Size(8, 2))
    with pytest.raises(ConfigError, match="--sizes '64' is not a size"):
        parse_size("64", "--sizes")
    with pytest.raises(ConfigError, match=r"size 64x2: .*first_k_dense_replace 2 leaves no layer"):
        sized(load_config(["--model.first_k_dense_replace=2", "--model.dense_intermediate_size=64"]), Size(64, 2))


def test_weights_count_every_expert_in_the_total_and_a_dense_twin_has_the_active_ones():
    config = load_config(["--preset", "debug", "--model.n_shared_experts=1"])
    mixture, dense, sparse = (sized(config, Size(64, 2, experts)) for experts in (None, 1, 16))
    # attention: 2 heads of 32, 1 for keys and values; router; two experts and a shared one; head
    expert = 3 * 64 * 24
    outside = 2 * (64 * 64 * 2 + 2 * 32 * 64 + expert) + 64 * 2048
    assert weights(mixture) == (outside + 2 * (64 * 8 + 2 * expert), outside + 2 * (64 * 8 + 8 * expert))
    assert weights(dense) == (outside + 2 * (64 * 1 + 2 * expert),) * 2
    assert weights(sparse)[1] - weights(mixture)[1] == 2 * 8 * (64 + expert)
    assert (granularity(mixture), granularity(dense)) == (3, 1)
    assert [str(parse_size(text, "")) for text in ("64x2", "64x2x16")] == ["64x2", "64x2x16"]
