"""The model against transformers' own implementations of the same function."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, DynamicCache, Ernie4_5_MoeForCausalLM

from smolds_dist.costs.flops import flops_per_token
from smolds_dist.interchange.transformers_format import transformers_config, transformers_state_dict
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, enable_activation_checkpointing

SMALL = dict(vocab_size=160, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6)
GQA = dict(SMALL, num_key_value_heads=2, head_dim=8)
LATENT = dict(
    SMALL, attention="latent", scoring_func="sigmoid", q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=12, n_shared_experts=1, routed_scaling_factor=1.7, rms_norm_eps=1e-6,
)  # fmt: skip


def build(settings: dict, bias_scale: float = 0.0) -> DeepSeekV3ForCausalLM:
    torch.manual_seed(0)
    # A wide initialisation makes the scores differ enough that a wrong router shows.
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**settings, initializer_range=0.2)).eval()
    for block in model.model.layers:
        block.mlp.gate.e_score_correction_bias.normal_().mul_(bias_scale)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["gqa", "latent"])
def pair(request):
    """Our model and transformers' with the same weights and non-zero selection biases."""
    settings, peer_class = (GQA, Ernie4_5_MoeForCausalLM) if request.param == "gqa" else (LATENT, DeepseekV3ForCausalLM)
    ours = build(settings, bias_scale=0.2)
    peer = peer_class(transformers_config(ours.config)).eval()
    missing, unexpected = peer.load_state_dict(transformers_state_dict(ours.state_dict(), ours.config), strict=False)
    assert not missing and not unexpected
    return ours, peer


def test_reference_model_has_254_896_512_parameters():
    with torch.device("meta"):
        model = DeepSeekV3ForCausalLM(DeepSeekV3Config())
    assert sum(p.numel() for p in model.parameters()) == 254_896_512


@pytest.mark.parametrize("settings", [GQA, LATENT, dict(LATENT, q_lora_rank=None), dict(GQA, n_shared_experts=2)])
def test_flops_are_those_that_pytorch_counts(settings):
    model = build(settings).train()
    B, S, config = 2, 24, model.config
    config._attn_implementation = "eager"  # ours computes shares twice
    # PyTorch does not count fused attention on CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=tokens(B, S), labels=tokens(B, S)).loss.backward()
    latent = config.attention == "latent"
    dims = config.v_head_dim + config.qk_nope_head_dim + config.qk_rope_head_dim if latent else 2 * config.head_dim
    # Plain attention also multiplies what the mask hides, and the last token of a sequence predicts nothing.
    hidden_keys = S * S - S * (S + 1) / 2
    masked = 6 * B * config.num_hidden_layers * config.num_attention_heads * dims * hidden_keys
    last_tokens = 6 * B * config.hidden_size * config.vocab_size
    assert counter.get_total_flops() == B * S * flops_per_token(config, S) + masked - last_tokens


@pytest.mark.parametrize("settings", [GQA, LATENT])
def test_autocast_trains_fp32_weights_with_bf16_products(settings):
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
    # Some tokens' rounded hidden states choose another expert, so it cannot be 1.
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.9


def test_logits_equal_transformers(pair):
    ours, peer = pair
    ids = tokens(3, 40)
    torch.testing.assert_close(ours(input_ids=ids).logits, peer(input_ids=ids).logits, atol=1e-4, rtol=0)


def test_outputs_that_are_asked_for_equal_transformers(pair):
    ours, peer = pair
    peer.set_attn_implementation("eager")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    asked = dict(output_hidden_states=True, output_attentions=True, output_router_logits=True)
    for inputs in (dict(input_ids=ids), dict(input_ids=ids, attention_mask=mask)):
        actual, expected = ours(**inputs, **asked), peer(**inputs, **asked)
        real = mask.bool() if "attention_mask" in inputs else torch.ones_like(mask, dtype=torch.bool)
        assert len(actual.hidden_states) == len(actual.attentions) + 1 == len(actual.router_logits) + 1 == 4
        for one, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one[real], other[real], atol=1e-4, rtol=0)
        for one, other in zip(actual.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(one.transpose(1, 2)[real], other.transpose(1, 2)[real], atol=1e-5, rtol=0)
        if ours.config.attention == "gqa":  # transformers' DeepSeek-V3 keeps its routers' logits to itself
            for one, other in zip(actual.router_logits, expected.router_logits, strict=True):
                torch.testing.assert_close(one[real.flatten()], other[real.flatten()], atol=1e-4, rtol=0)
        torch.testing.assert_close(actual.logits[real], ours(**inputs).logits[real], atol=1e-4, rtol=0)
    for block, logits in zip(ours.model.layers, actual.router_logits, strict=True):
        assert logits.shape == (2 * 12, block.mlp.gate.config.num_experts)
    # nothing of it where nobody asks, and beside a loss where somebody does
    plain = ours(input_ids=ids)
    assert plain.hidden_states is plain.attentions is plain.router_logits is None
    with_loss = ours(input_ids=ids, labels=ids, output_hidden_states=True)
    assert with_loss.loss is not None and len(with_loss.hidden_states) == 4


def test_outputs_that_the_configuration_asks_for(pair):
    ours, _ = pair
    settings = ours.config.to_dict() | dict(output_hidden_states=True, output_router_logits=True, return_dict=False)
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**settings)).eval()
    model.load_state_dict(ours.state_dict())
    logits, _cache, hidden, router_logits = model(input_ids=tokens(2, 12))
    expected = ours(input_ids=tokens(2, 12), output_hidden_states=True, output_router_logits=True)
    assert torch.equal(logits, expected.logits)
    assert all(map(torch.equal, hidden, expected.hidden_states))
    assert all(map(torch.equal, router_logits, expected.router_logits))


def test_return_dict_false_gives_a_tuple_without_what_is_absent(pair):
    ours, peer = pair
    ids = tokens(2, 12)
    for inputs in (dict(use_cache=False), dict(use_cache=False, output_hidden_states=True)):
        actual, expected = (model(input_ids=ids, return_dict=False, **inputs) for model in (ours, peer))
        assert type(actual) is type(expected) is tuple
        assert [type(part) for part in actual] == [type(part) for part in expected]
        torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=0)
    (loss,) = ours(input_ids=ids, labels=ids, use_cache=False, return_dict=False)
    assert torch.equal(loss, ours(input_ids=ids, labels=ids).loss)


def test_generation_hands_out_what_each_step_computed(pair):
    ours, peer = pair
    peer.set_attn_implementation("eager")
    options = dict(
        max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    actual, expected = ours.generate(tokens(2, 7), **options), peer.generate(tokens(2, 7), **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("hidden_states", "attentions"):
        for one, other in zip(getattr(actual, name), getattr(expected, name), strict=True):
            for mine, theirs in zip(one, other, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [GQA, LATENT])
def test_every_attention_computes_the_same(settings):
    model, ids = build(settings), tokens(2, 20)
    logits = model(input_ids=ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(input_ids=ids).logits, logits, atol=1e-4, rtol=0)
    cache = DynamicCache(config=model.config)
    parts = [model(input_ids=part, cache=cache).logits for part in ids.split([7, 12, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-4, rtol=0)


def test_selection_bias_changes_the_choice(pair):
    ours, _ = pair
    ids = tokens(1, 40)
    with_bias = ours(input_ids=ids).logits
    for block in ours.model.layers:
        block.mlp.gate.e_score_correction_bias.zero_()
    assert (ours(input_ids=ids).logits - with_bias).abs().max() > 1e-2


def test_padded_batch_equals_transformers(pair):
    ours, peer = pair
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    real = mask.bool()
    ours_logits, peer_logits = (m(input_ids=ids, attention_mask=mask).logits[real] for m in (ours, peer))
    torch.testing.assert_close(ours_logits, peer_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_transformers(pair, checkpointing):
    ours, peer = pair
    ids = tokens(3, 40)
    if checkpointing:
        enable_activation_checkpointing(ours)
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


def test_latent_cache_holds_the_latent_not_the_heads():
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


def test_configuration_refuses_contradictions():
    for wrong in (dict(num_experts_per_tok=9), dict(num_key_value_heads=4), dict(attention="mha"), dict(head_dim=7)):
        with pytest.raises(Exception, match=next(iter(wrong)) if "head_dim" not in wrong else "even"):
            DeepSeekV3Config(**wrong)
