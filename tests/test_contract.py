"""Our model keeps transformers' contract, feature by feature, so that its tools work without our code.

test_model.py compares loss, gradients and logits with transformers' classes. The models are the same here: both kinds of
attention, each with leading dense layers, shared experts, YaRN and, with latent attention, groups of experts.
"""

import copy
import functools
import json
import os
import sys

import pytest
import test_model
import torch
from ranks import EXTRAS, ROOT, run
from test_model import GQA, GQA_FAMILY, KINDS, LATENT_FAMILY, SMALL, build, mixtures, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedTokenizerFast, pipeline
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import load_balancing_loss_func as ernie_loss
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss

from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, device, enable_activation_checkpointing
from smolds_dist.model.moe import balance_loss
from smolds_dist.parallel.topology import has_compiler

GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
# Two layers compile faster and have all features.
COMPILED = {"gqa": dict(GQA_FAMILY, num_hidden_layers=2), "latent": dict(LATENT_FAMILY, num_hidden_layers=2)}
needs_compiler = pytest.mark.skipif(not has_compiler("cpu"), reason="Inductor needs a C++ compiler")
pair = test_model.pair  # ours and transformers', with the same weights


@pytest.fixture(params=KINDS)
def model(request):
    return build(KINDS[request.param], bias_scale=0.2)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Reset the compiler, for which integers that differ between two compiled models would become dynamic."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def loss_and_gradients(model, forward=None, **inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = (model if forward is None else forward)(**inputs).loss
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def assert_same_step(actual, expected, tolerance=1e-5) -> None:
    torch.testing.assert_close(actual[0], expected[0], atol=tolerance, rtol=tolerance)
    for one, other in zip(actual[1], expected[1], strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm() + 1e-7


# Outputs of a forward pass


def test_requested_outputs_equal_transformers(pair):
    ours, peer = pair
    peer.set_attn_implementation("eager")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    asked = dict(output_hidden_states=True, output_attentions=True, output_router_logits=True)
    for inputs in (dict(input_ids=ids), dict(input_ids=ids, attention_mask=mask)):
        actual, expected = ours(**inputs, **asked), peer(**inputs, **asked)
        real = mask.bool() if "attention_mask" in inputs else torch.ones_like(mask, dtype=torch.bool)
        assert len(actual.hidden_states) == len(actual.attentions) + 1 == 4
        assert len(actual.router_logits) == len(mixtures(ours))
        for one, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one[real], other[real], atol=1e-4, rtol=0)
        for one, other in zip(actual.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(one.transpose(1, 2)[real], other.transpose(1, 2)[real], atol=1e-5, rtol=0)
        if ours.config.attention == "gqa":  # transformers' DeepSeek-V3 does not return router logits
            for one, other in zip(actual.router_logits, expected.router_logits, strict=True):
                torch.testing.assert_close(one[real.flatten()], other[real.flatten()], atol=1e-4, rtol=0)
        torch.testing.assert_close(actual.logits[real], ours(**inputs).logits[real], atol=1e-4, rtol=0)
    for block, logits in zip(mixtures(ours), actual.router_logits, strict=True):
        assert logits.shape == (2 * 12, block.mlp.gate.config.num_experts)
    # None unless requested; also returned with a loss
    plain = ours(input_ids=ids)
    assert plain.hidden_states is plain.attentions is plain.router_logits is None
    with_loss = ours(input_ids=ids, labels=ids, output_hidden_states=True)
    assert with_loss.loss is not None and len(with_loss.hidden_states) == 4


def test_outputs_requested_by_the_configuration(pair):
    ours, _ = pair
    settings = ours.config.to_dict() | dict(output_hidden_states=True, output_router_logits=True, return_dict=False)
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**settings)).eval()
    model.load_state_dict(ours.state_dict())
    logits, _cache, hidden, router_logits = model(input_ids=tokens(2, 12))
    expected = ours(input_ids=tokens(2, 12), output_hidden_states=True, output_router_logits=True)
    assert torch.equal(logits, expected.logits)
    assert all(map(torch.equal, hidden, expected.hidden_states))
    assert all(map(torch.equal, router_logits, expected.router_logits))


def test_return_dict_false_returns_a_tuple_without_absent_outputs(pair):
    ours, peer = pair
    ids = tokens(2, 12)
    for inputs in (dict(use_cache=False), dict(use_cache=False, output_hidden_states=True)):
        actual, expected = (model(input_ids=ids, return_dict=False, **inputs) for model in (ours, peer))
        assert type(actual) is type(expected) is tuple
        assert [type(part) for part in actual] == [type(part) for part in expected]
        torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=0)
    (loss,) = ours(input_ids=ids, labels=ids, use_cache=False, return_dict=False)
    assert torch.equal(loss, ours(input_ids=ids, labels=ids).loss)


def test_generation_returns_each_steps_outputs(pair):
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


def test_router_logits_work_with_transformers_balance_loss(pair):
    """transformers' loss sums over a token's K experts, ours is the mean: a factor of K."""
    ours, _ = pair
    config, ids = ours.config, tokens(3, 20)
    logits = ours(input_ids=ids, output_router_logits=True).router_logits
    assert isinstance(logits, tuple) and len(logits) == len(mixtures(ours))
    E, K = config.num_experts, config.num_experts_per_tok
    for loss in (mixtral_loss, ernie_loss):
        each = [loss((one,), E, K) for one in logits]
        for one, theirs in zip(logits, each, strict=True):
            torch.testing.assert_close(theirs, K * balance_loss(one[None], "softmax", K))
        assert loss(logits, E, K, torch.ones_like(ids)).item() == pytest.approx(loss(logits, E, K).item())
        assert min(each) >= K


def test_router_logits_have_gradients(model):
    logits = model.train()(input_ids=tokens(2, 12), output_router_logits=True).router_logits
    config = model.config
    mixtral_loss(logits, config.num_experts, config.num_experts_per_tok).backward()
    assert all(block.mlp.gate.weight.grad.any() for block in mixtures(model))


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 7])])
def test_logits_to_keep_limits_the_computed_logits(model, kept):
    ids = tokens(2, 12)
    places = kept if isinstance(kept, torch.Tensor) else slice(-kept, None)
    expected = model(input_ids=ids).logits[:, places]
    actual = model(input_ids=ids, logits_to_keep=kept).logits
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_inputs_embeds_replace_input_ids(model):
    ids = tokens(2, 12)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=embedded)


@pytest.mark.long  # compiles C++ for a minute and a half
@needs_compiler
@pytest.mark.parametrize("kind", ["gqa", "latent"])
def test_flex_attention_agrees(kind):
    """Full, padded and packed sequences. Not generation: for dynamic lengths Inductor can generate invalid C++. Nor 40
    tokens: PyTorch 2.13's AVX2 kernel reads past such a length if heads are narrower than 32."""
    model, ids = build(KINDS[kind]), tokens(2, 64)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = torch.cat((torch.arange(25), torch.arange(39))).expand(2, -1)
    calls = {"whole": {}, "padded": dict(attention_mask=mask), "packed": dict(position_ids=positions, use_cache=False)}

    def outputs():
        with torch.no_grad():
            return {name: model(input_ids=ids, **inputs).logits[mask.bool()] for name, inputs in calls.items()}

    expected = outputs()
    model.set_attn_implementation("flex_attention")
    actual = outputs()
    for name, logits in actual.items():
        torch.testing.assert_close(logits, expected[name], atol=1e-4, rtol=0, msg=name)
    assert (expected["packed"] - expected["whole"]).abs().max() > 0.1
    # PyTorch has no gradient for it on the CPU and raises an error.
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        model.train()(input_ids=ids, labels=ids)


def test_attention_weights_need_an_implementation_that_returns_them():
    model = build(GQA)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="'flex_attention' has no attention weights"):
        model(input_ids=tokens(1, 4), output_attentions=True)


# Weights


@pytest.mark.parametrize("size", [SMALL["vocab_size"] + 9, SMALL["vocab_size"] - 9])
def test_embeddings_can_be_resized(model, size):
    ids = tokens(2, 12) % (SMALL["vocab_size"] - 9)
    kept = min(size, SMALL["vocab_size"])
    expected = model(input_ids=ids).logits[..., :kept]
    model.resize_token_embeddings(size, mean_resizing=False)
    logits = model(input_ids=ids).logits
    assert logits.shape[-1] == model.config.vocab_size == size
    assert torch.equal(logits[..., :kept], expected)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
    assert model.train()(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("most", ["5GB", "60KB"])
def test_saved_model_loads(model, most, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=most)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (most == "60KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DeepSeekV3ForCausalLM and not loaded.training
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    state = model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in loaded.state_dict().items())
    actual, expected = (one(input_ids=tokens(2, 12)).logits for one in (loaded, model))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_tied_if_configured(tied, tmp_path):
    model = build(dict(GQA, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (one.lm_head.weight is one.get_input_embeddings().weight) == tied
    E, H = SMALL["vocab_size"], SMALL["hidden_size"]
    untied = build(dict(GQA, tie_word_embeddings=False)).num_parameters()
    assert untied - model.num_parameters() == (E * H if tied else 0)


@pytest.mark.parametrize("kind", ["gqa", "latent"])
def test_checkpointed_activations_change_no_gradient(kind):
    model, inputs = build(KINDS[kind]).train(), dict(input_ids=tokens(2, 24), labels=tokens(2, 24))
    expected = loss_and_gradients(model, **inputs)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_same_step(loss_and_gradients(model, **inputs), expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


# Generation


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=4, num_return_sequences=2, length_penalty=0.5)])
def test_beam_search_equals_transformers_model(pair, options):
    ours, peer = pair
    expected = peer.generate(tokens(2, 7), **GREEDY, **options)
    assert torch.equal(ours.generate(tokens(2, 7), **GREEDY, **options), expected)


def test_generation_with_a_static_cache_is_the_same(model):
    expected = model.generate(tokens(2, 7), **GREEDY)
    assert torch.equal(model.generate(tokens(2, 7), cache_implementation="static", **GREEDY), expected)


def test_assisted_generation_is_the_same(model):
    """Assisted by another model, and by the model itself, whose guesses are all accepted."""
    ids, expected = tokens(1, 7), model.generate(tokens(1, 7), **GREEDY)
    other = DeepSeekV3Config(**model.config.to_dict() | dict(num_hidden_layers=2))
    for assistant in (DeepSeekV3ForCausalLM(other).eval(), copy.deepcopy(model)):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)


def test_prompt_lookup_is_the_same(model):
    ids = tokens(1, 5).repeat(1, 4)  # something to find
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)


def test_a_left_padded_prompt_continues_as_without_padding(model):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5], ids[0, :5] = 0, 0
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, padding in ((0, 5), (1, 0)):
        alone = model.generate(ids[row : row + 1, padding:], **GREEDY)
        assert torch.equal(together[row, padding:], alone[0])


def test_a_pipeline_generates_text():
    words = [f"w{number}" for number in range(SMALL["vocab_size"])]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", eos_token="w0")
    model = build(GQA)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["w5 w6 w7", "w9"]
    texts = generate(prompts, max_new_tokens=4, do_sample=False, return_full_text=False, batch_size=2)
    assert len(texts) == 2
    for prompt, (text,) in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=0)
        assert text["generated_text"] == tokenizer.decode(expected[0, ids.shape[1] :])


# torch.compile and torch.export. "aot_eager" does everything except generating machine code.


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("gqa", False),
        ("latent", True),
        *(pytest.param(*one, marks=pytest.mark.long) for one in (("gqa", True), ("latent", False))),
    ],
)
def test_compiled_training_is_the_same(kind, checkpointing):
    losses = {} if checkpointing else dict(z_loss_coef=0.1, sequence_balance_coef=0.1)
    model = build(COMPILED[kind] | losses, bias_scale=0.2).train()
    if checkpointing:
        enable_activation_checkpointing(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = dict(input_ids=tokens(2, 24), labels=tokens(2, 24))
    expected = loss_and_gradients(model, **inputs)
    for block in mixtures(model):
        block.mlp.tokens_per_expert.zero_()
    assert_same_step(loss_and_gradients(model, compiled, **inputs), expected)
    if not checkpointing:  # counted once, for the balancer
        rows = 2 * 24 * model.config.num_experts_per_tok
        assert [block.mlp.tokens_per_expert.sum() for block in mixtures(model)] == [rows] * len(mixtures(model))


def test_compiled_training_takes_sequences_of_any_length():
    model = build(dict(GQA, num_hidden_layers=1)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for shape in ((2, 24), (3, 30), (4, 7)):
        inputs = dict(input_ids=tokens(*shape), labels=tokens(*shape))
        assert_same_step(loss_and_gradients(model, compiled, **inputs), loss_and_gradients(model, **inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_router_losses_with_activation_checkpointing_compile_with_graph_breaks():
    model = build(dict(GQA, num_hidden_layers=1, z_loss_coef=0.1)).train()
    inputs = dict(input_ids=tokens(2, 24), labels=tokens(2, 24))
    expected = loss_and_gradients(model, **inputs)
    enable_activation_checkpointing(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_step(loss_and_gradients(model, compiled, **inputs), expected)


def test_compiled_training_masks_packed_documents():
    model, ids = build(dict(GQA, num_hidden_layers=1)).train(), tokens(2, 40)
    inputs = dict(input_ids=ids, labels=ids, position_ids=torch.cat((torch.arange(15), torch.arange(25))).expand(2, -1))
    expected = loss_and_gradients(model, **inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_step(loss_and_gradients(model, compiled, **inputs), expected)
    del inputs["position_ids"]
    assert (loss_and_gradients(model, **inputs)[0] - expected[0]).abs() > 1e-3


@pytest.mark.long  # test_compile.py has a run in machine code
@needs_compiler
@pytest.mark.parametrize("kind", ["gqa", "latent"])
def test_torch_compile_trains_and_evaluates(kind):
    """In machine code, one in fp32, the other in bf16, with all experts for each token, so that rounding cannot change the
    selection. One layer, with shared experts instead of a dense layer: C++ compilers take minutes for more."""
    dtype, tolerance = (torch.float32, 1e-5) if kind == "gqa" else (torch.bfloat16, 0.05)
    every = {} if kind == "gqa" else dict(num_experts=4, num_experts_per_tok=4, n_group=None, topk_group=None)
    settings = COMPILED[kind] | dict(num_hidden_layers=1, first_k_dense_replace=0) | every
    model, ids = build(settings).to(dtype), tokens(2, 24)
    compiled = torch.compile(model)
    assert_same_step(
        *(loss_and_gradients(model.train(), forward, input_ids=ids, labels=ids) for forward in (compiled, model)),
        tolerance,
    )
    model.eval()
    with torch.no_grad():
        actual, expected = (forward(input_ids=ids).logits.float() for forward in (compiled, model))
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.long])])
def test_gpu_branches_of_blocks_compile(monkeypatch, backend):
    """Inductor could not compile our autograd functions with dynamic lengths."""
    monkeypatch.setattr(device, "family", lambda x: "cuda")
    settings = dict(GQA, num_hidden_layers=1, num_experts=4, num_experts_per_tok=4)
    model, plain = (build(settings).train().bfloat16() for _ in range(2))
    model.model.layers[0].compile(backend=backend)
    for shape in ((2, 24), (3, 30)):
        inputs = dict(input_ids=tokens(*shape), labels=tokens(*shape))
        assert_same_step(loss_and_gradients(model, **inputs), loss_and_gradients(plain, **inputs), 0.05)


def test_autocast_compiles():
    model = build(dict(GQA, num_hidden_layers=1, num_experts=4, num_experts_per_tok=4)).train()
    compiled, ids = torch.compile(model, backend="aot_eager", fullgraph=True), tokens(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(model, input_ids=ids, labels=ids)
        actual = loss_and_gradients(model, compiled, input_ids=ids, labels=ids)
    assert_same_step(actual, expected, 0.05)
    assert expected[0] != loss_and_gradients(model, input_ids=ids, labels=ids)[0]


@pytest.mark.parametrize("kind", COMPILED)
def test_generation_compiles_without_graph_breaks(kind):
    model = build(COMPILED[kind], bias_scale=0.2)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers compiles only on GPUs by default
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = dict(GREEDY, attention_mask=mask)
    expected = model.generate(ids, **options)
    actual = model.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", COMPILED)
def test_exported_graph_has_only_pytorch_operations(kind):
    model = build(COMPILED[kind], bias_scale=0.2)
    ids = tokens(2, 24)
    exported = torch.export.export(model, (), dict(input_ids=ids, use_cache=False))
    expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(exported.module()(input_ids=ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)
    lowered = exported.run_decompositions()
    assert {node.target.namespace for node in lowered.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}
    assert not lowered.graph_signature.buffers_to_mutate


@pytest.mark.parametrize("kind", ["gqa", pytest.param("latent", marks=pytest.mark.long)])
def test_an_exported_graph_takes_any_batch_and_length(kind, tmp_path):
    model = build(COMPILED[kind], bias_scale=0.2)
    shape = {0: torch.export.Dim("batch", max=16), 1: torch.export.Dim("length", min=2, max=64)}
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    exported = torch.export.export(
        model,
        (),
        dict(input_ids=ids, attention_mask=mask, use_cache=False),
        dynamic_shapes=dict(input_ids=shape, attention_mask=shape, use_cache=None),
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    for size in ((2, 24), (1, 2), (3, 40)):
        ids, mask = tokens(*size), torch.ones(size, dtype=torch.long)
        mask[0, : size[1] // 3] = 0
        inputs = dict(input_ids=ids, attention_mask=mask, use_cache=False)
        actual, expected = (one(**inputs).logits[mask.bool()] for one in (graph, model))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


# With packages from .venv/extras, in contract_worker.py.


@functools.cache
def outcomes(folder) -> dict[str, str]:
    path = os.pathsep.join((str(EXTRAS), str(ROOT), str(ROOT / "tests")))
    finished = run(
        [sys.executable, str(ROOT / "tests" / "contract_worker.py"), str(folder)], timeout=300, PYTHONPATH=path
    )
    assert finished.returncode == 0, finished.text
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.skipif(not (EXTRAS / "peft").is_dir(), reason="no PEFT in .venv/extras; ./launch/test.sh puts it there")
@pytest.mark.parametrize(
    "promise",
    [
        "trainer_checkpoints_activations",
        "lora_trains_adapters_alone",
        "lora_is_merged",
        "lora_is_saved_and_loaded",
        "device_maps",
        "weights_are_offloaded",
        "trainer_compiles",
    ],
)
def test_with_accelerate_and_peft(promise, tmp_path_factory):
    outcome = outcomes(tmp_path_factory.getbasetemp() / "contract")[promise]
    assert not outcome, outcome
