"""The model compared with transformers' implementations of the same function."""

from typing import get_args

import pytest
import torch
from peer_state import transformers_state_dict
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Ernie4_5_MoeForCausalLM,
    OlmoeForCausalLM,
    Qwen3MoeForCausalLM,
)

from smolds_dist.costs.flops import flops_per_token
from smolds_dist.interchange.transformers_format import transformers_config
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, enable_activation_checkpointing
from smolds_dist.settings import Recomputed

SMALL = dict(vocab_size=160, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6)
GQA = dict(SMALL, num_key_value_heads=2, head_dim=8)
LATENT = dict(
    SMALL, attention="latent", scoring_func="sigmoid", q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=12, n_shared_experts=1, routed_scaling_factor=1.7, rms_norm_eps=1e-6,
)  # fmt: skip
# Further features of both classes' published checkpoints.
YARN = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0, mscale=1.0,
    mscale_all_dim=0.7,
)  # fmt: skip
FAMILY = dict(first_k_dense_replace=1, dense_intermediate_size=56, tie_word_embeddings=False, rope_scaling=YARN)
GQA_FAMILY = dict(GQA, **FAMILY, n_shared_experts=2, num_experts_per_tok=3)
LATENT_FAMILY = dict(LATENT, **FAMILY, n_group=4, topk_group=2, num_experts_per_tok=3, n_shared_experts=2)
LATENT_FAMILY |= dict(rms_norm_eps=1e-5, latent_norm_eps=1e-6)
KINDS = {"gqa": GQA, "latent": LATENT, "gqa family": GQA_FAMILY, "latent family": LATENT_FAMILY}


def build(settings: dict, bias_scale: float = 0.0) -> DeepSeekV3ForCausalLM:
    torch.manual_seed(0)
    # A wide initialization makes the scores differ enough to expose a wrong router.
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**settings, initializer_range=0.2)).eval()
    for block in mixtures(model):
        block.mlp.gate.e_score_correction_bias.normal_().mul_(bias_scale)
    return model


def mixtures(model: DeepSeekV3ForCausalLM):
    """Return the blocks with experts."""
    return model.model.layers[model.config.first_k_dense_replace :]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


UNBIASED = {
    "qk norm of heads": dict(GQA, qk_norm="head", first_k_dense_replace=1, dense_intermediate_size=56),
    "qk norm of all": dict(GQA, qk_norm="all", norm_topk_prob=False, tie_word_embeddings=False),
}
PEERS = {
    "gqa": Ernie4_5_MoeForCausalLM, "latent": DeepseekV3ForCausalLM, "gqa family": Ernie4_5_MoeForCausalLM,
    "latent family": DeepseekV3ForCausalLM, "qk norm of heads": Qwen3MoeForCausalLM, "qk norm of all": OlmoeForCausalLM,
}  # fmt: skip


@pytest.fixture(params=PEERS)
def pair(request):
    """Return our model and transformers' with the same weights, and nonzero selection biases if both have them."""
    settings, biased = (KINDS | UNBIASED)[request.param], request.param in KINDS
    ours = build(settings, bias_scale=0.2 * biased)
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    peer = PEERS[request.param](transformers_config(ours.config, biased)).eval()
    missing, unexpected = peer.load_state_dict(transformers_state_dict(ours.state_dict(), ours.config), strict=False)
    assert not missing and not unexpected
    return ours, peer


def test_reference_model_has_254_896_512_parameters():
    with torch.device("meta"):
        model = DeepSeekV3ForCausalLM(DeepSeekV3Config())
    assert sum(p.numel() for p in model.parameters()) == 254_896_512


@pytest.mark.parametrize(
    "settings",
    [*KINDS.values(), dict(LATENT, q_lora_rank=None), dict(GQA_FAMILY, num_nextn_predict_layers=2)],
)
def test_flops_match_pytorchs_counter(settings):
    model = build(settings).train()
    B, S, config = 2, 24, model.config
    config._attn_implementation = "eager"  # ours recomputes attention weights
    # PyTorch does not count fused attention on CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=tokens(B, S), labels=tokens(B, S)).loss.backward()
    latent = config.attention == "latent"
    dims = config.v_head_dim + config.qk_nope_head_dim + config.qk_rope_head_dim if latent else 2 * config.head_dim
    # Plain attention also computes masked scores, and a sequence's last token has no label.
    hidden_keys = S * S - S * (S + 1) / 2
    depths = config.num_nextn_predict_layers
    masked = 6 * B * (config.num_hidden_layers + depths) * config.num_attention_heads * dims * hidden_keys
    last_tokens = 6 * B * config.hidden_size * config.vocab_size * (1 + depths)
    assert counter.get_total_flops() == B * S * flops_per_token(config, S) + masked - last_tokens


@pytest.mark.parametrize("settings", [GQA, LATENT])
def test_autocast_trains_fp32_weights_with_bf16_matmuls(settings):
    model, ids = build(settings).train(), tokens(2, 24)
    losses, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1])
    exact, rounded = (torch.cat([gradient.flatten() for gradient in one]) for one in gradients)
    # Some tokens' rounded hidden states select another expert, so it cannot be 1.
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.9


def test_logits_equal_transformers(pair):
    ours, peer = pair
    ids = tokens(3, 40)
    torch.testing.assert_close(ours(input_ids=ids).logits, peer(input_ids=ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [*KINDS.values(), dict(GQA, qk_norm="head"), dict(GQA, qk_norm="all")])
def test_attention_implementations_agree(settings):
    model, ids = build(settings), tokens(2, 20)
    logits = model(input_ids=ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(input_ids=ids).logits, logits, atol=1e-4, rtol=0)
    cache = DynamicCache(config=model.config)
    parts = [model(input_ids=part, cache=cache).logits for part in ids.split([7, 12, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pair", KINDS, indirect=True)
def test_selection_bias_changes_the_selection_only(pair):
    ours, _ = pair
    ids = tokens(1, 40)
    with_bias = ours(input_ids=ids).logits
    for block in mixtures(ours):
        block.mlp.gate.e_score_correction_bias.zero_()
    assert (ours(input_ids=ids).logits - with_bias).abs().max() > 1e-2


def test_padded_batch_equals_transformers(pair):
    ours, peer = pair
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    real = mask.bool()
    ours_logits, peer_logits = (m(input_ids=ids, attention_mask=mask).logits[real] for m in (ours, peer))
    torch.testing.assert_close(ours_logits, peer_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("recomputed", get_args(Recomputed))
def test_loss_and_gradients_equal_transformers(pair, recomputed):
    ours, peer = pair
    ids = tokens(3, 40)
    enable_activation_checkpointing(ours, recomputed)
    ours_loss, peer_loss = ours.train()(input_ids=ids, labels=ids).loss, peer.train()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(ours_loss, peer_loss, atol=1e-5, rtol=0)
    ours_loss.backward()
    peer_loss.backward()
    expected = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    actual = transformers_state_dict({name: p.grad for name, p in ours.named_parameters()}, ours.config)
    assert len(actual) > 20
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_greedy_continuation_equals_transformers(pair):
    ours, peer = pair
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = peer.generate(tokens(2, 7), **options)
    assert torch.equal(ours.generate(tokens(2, 7), **options), expected)
    assert torch.equal(ours.generate(tokens(2, 7), use_cache=False, **options), expected)


def test_latent_cache_holds_the_latent_instead_of_heads():
    ours = build(LATENT)
    cache = DynamicCache(config=ours.config)
    ours(input_ids=tokens(2, 9), cache=cache)
    shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
    assert shapes == [((2, 1, 9, 16), (2, 1, 9, 8))] * 3


def test_save_and_load_keeps_biases_in_fp32(tmp_path):
    ours = build(GQA, bias_scale=0.2)
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bias = loaded.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, ours.model.layers[1].mlp.gate.e_score_correction_bias)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_configuration_rejects_contradictions():
    for wrong in (
        dict(num_experts_per_tok=9), dict(num_key_value_heads=4), dict(attention="mha"), dict(head_dim=7),
        dict(first_k_dense_replace=24), dict(first_k_dense_replace=1), dict(n_group=3, topk_group=1), dict(n_group=4),
        dict(n_group=8, topk_group=8), dict(n_group=4, topk_group=5), dict(qk_norm="both"),
        dict(qk_norm="head", attention="latent"), dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    ):  # fmt: skip
        with pytest.raises(Exception, match=next(iter(wrong)) if "head_dim" not in wrong else "odd"):
            DeepSeekV3Config(**wrong)


def test_groups_limit_the_selection():
    config = DeepSeekV3Config(**LATENT_FAMILY)
    router = build(LATENT_FAMILY, bias_scale=0.2).model.layers[1].mlp.gate
    _, chosen, _ = router(torch.randn(500, config.hidden_size))
    assert (chosen // 2).sort(-1).values.unique(dim=0).shape[0] > 4  # many pairs of groups
    assert max(len(set(row)) for row in (chosen // 2).tolist()) == config.topk_group


def test_router_losses():
    """Compare with their equations, written out for every sequence and expert."""
    ids = tokens(3, 20)
    for name, settings in KINDS.items():
        plain = build(settings).train()
        routers = plain(input_ids=ids, output_router_logits=True, labels=ids)
        E, K, config = plain.config.num_experts, plain.config.num_experts_per_tok, plain.config
        balance, squares = [], []
        for logits in routers.router_logits:
            scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
            for s in scores.view(3, 20, E):
                best = s.topk(K).indices
                f = [E / (K * 20) * (best == i).sum() for i in range(E)]
                p = [(s / s.sum(-1, keepdim=True))[:, i].mean() for i in range(E)]
                balance.append(sum(x * y for x, y in zip(f, p, strict=True)))
            squares.append((logits.exp().sum(-1).log() ** 2).mean())
        expected = 0.3 * torch.stack(balance).mean() + 0.2 * torch.stack(squares).mean()
        model = build(dict(settings, sequence_balance_coef=0.3, z_loss_coef=0.2)).train()
        out = model(input_ids=ids, labels=ids)
        torch.testing.assert_close(out.aux_loss, expected, msg=name)
        torch.testing.assert_close(out.loss, routers.loss + expected)
        enable_activation_checkpointing(model)
        recomputed = model(input_ids=ids, labels=ids)
        ours, again = (
            torch.autograd.grad(one.loss, mixtures(model)[0].mlp.gate.weight)[0] for one in (out, recomputed)
        )
        torch.testing.assert_close(ours, again)
        # else each layer's recomputation would stay alive until the next pass
        assert all(block.mlp.router_logits is None for block in mixtures(model))
        assert model.eval()(input_ids=ids, labels=ids).aux_loss is None
