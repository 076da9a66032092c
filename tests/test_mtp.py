"""Multi-token prediction compared with transformers' models and the paper's equations."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from peer_state import transformers_state_dict
from safetensors.torch import load_file, save_file
from test_model import GQA, KINDS, LATENT, PEERS, build, tokens
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from smolds_dist.config import load_config
from smolds_dist.data.tokenizer import load_tokenizer, save_tokenizer
from smolds_dist.errors import ConfigError
from smolds_dist.inference.drafts import DraftCounts
from smolds_dist.inference.generate import generate
from smolds_dist.inference.samples import continue_prompts
from smolds_dist.interchange.export import build_model, export, open_model
from smolds_dist.interchange.import_model import import_model
from smolds_dist.interchange.transformers_format import transformers_config
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, enable_activation_checkpointing
from smolds_dist.observe.rows import read_rows
from smolds_dist.observe.tensorboard import layout
from smolds_dist.settings import Recomputed
from smolds_dist.training.trainer import train

DEPTHS = 2


def with_depths(settings: dict) -> DeepSeekV3ForCausalLM:
    """Return a model with nonzero selection biases and norms that differ from 1, without its further losses."""
    model = build(dict(settings, num_nextn_predict_layers=DEPTHS), bias_scale=0.2).train()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def mtp_loss(model: DeepSeekV3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor | None = None, **more) -> float:
    model.mtp_loss = torch.zeros(())
    model(input_ids=ids, labels=ids if labels is None else labels, **more)
    return model.mtp_loss.item()


def peer(model: DeepSeekV3ForCausalLM, kind: str, layer: int | None = None):
    """Return transformers' model with the weights of ours, or with only one block of multi-token prediction."""
    settings = KINDS[kind]
    state = model.state_dict()
    if layer is not None:
        settings = dict(settings, num_hidden_layers=1, first_k_dense_replace=0)
        begin = f"model.layers.{layer}."
        own = {n.replace(begin, "model.layers.0."): t for n, t in state.items() if n.startswith(begin)}
        head = {name: state[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        state = own | head | {"model.norm.weight": own["model.layers.0.shared_head.norm.weight"]}
    config = DeepSeekV3Config(**settings)
    theirs = PEERS[kind](transformers_config(config)).eval()
    names = theirs.state_dict().keys()
    given = transformers_state_dict(state, config)
    theirs.load_state_dict({name: given[name] for name in names if name in given}, strict=False)
    assert set(names) <= given.keys()
    return theirs


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_loss_follows_the_equations(kind):
    """Equations 21 to 25; transformers computes the blocks, in each of which a sequence is a token shorter."""
    model = with_depths(KINDS[kind])
    B, S, config = 3, 20, model.config
    ids = tokens(B, S)
    hidden = peer(model, kind).model(input_ids=ids).last_hidden_state
    embedded, losses = model.model.embed_tokens(ids), []
    for depth in range(1, DEPTHS + 1):
        block = model.model.layers[config.num_hidden_layers + depth - 1]
        parts = (
            rms_norm(embedded[:, depth:], block.enorm.weight, config.rms_norm_eps),
            rms_norm(hidden[:, : S - depth], block.hnorm.weight, config.rms_norm_eps),
        )
        inputs = torch.cat(parts, -1) @ block.eh_proj.weight.T
        theirs = peer(model, kind, config.num_hidden_layers + depth - 1)
        hidden = theirs.model(inputs_embeds=inputs).last_hidden_state
        logits = theirs.lm_head(hidden)[:, :-1]
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, depth + 1 :], reduction="sum") / (B * (S - 1)))
    assert mtp_loss(model, ids) == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


@torch.no_grad()
def test_first_depth_drafts_as_transformers_does():
    """Their class predicts one token per depth, greedily; after a prompt, the first is a depth's most likely token."""
    model = with_depths(LATENT).eval()
    config = transformers_config(model.config)
    assert config.num_nextn_predict_layers == DEPTHS
    main = peer(model, "latent")
    main.config = config
    theirs = MtpModel(main, DEPTHS).eval()
    state = transformers_state_dict(model.state_dict(), model.config)
    for depth in range(DEPTHS):
        begin = f"model.layers.{model.config.num_hidden_layers + depth}."
        own = {n.removeprefix(begin): t for n, t in state.items() if n.startswith(begin)}
        layer = theirs.layers[depth]
        layer.post_norm.load_state_dict({"weight": own.pop("shared_head.norm.weight")})
        for name in ("enorm", "hnorm", "eh_proj"):
            layer.get_submodule(name).load_state_dict({"weight": own.pop(f"{name}.weight")})
        layer.mtp_block.load_state_dict(own)
    ids = tokens(1, 12)
    shared: dict = {}
    outputs = model.model(input_ids=ids, use_cache=False, shared=shared)
    embedded = shared.pop("embedded_BSH")
    ours = model.model.layers[model.config.num_hidden_layers](
        outputs.last_hidden_state, embedded.roll(-1, 1), **shared
    )[:, :-1]
    positions = torch.arange(11)[None]
    hidden = theirs.forward_layer(0, outputs.last_hidden_state[:, :-1], positions, None, input_ids=ids[:, 1:])
    torch.testing.assert_close(ours, hidden, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [GQA, LATENT])
@torch.no_grad()
def test_packed_documents_are_predicted_as_each_alone(settings):
    """Documents of one to eight tokens, the shortest of which have no token after the next."""
    model, lengths = with_depths(settings), [8, 2, 1, 6, 3, 4]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    labels[0, 0] = ids[0, 0]
    together = mtp_loss(model, ids, labels, position_ids=positions, num_items_in_batch=1)
    alone = [mtp_loss(model, one, num_items_in_batch=1) for one in ids.split(lengths, 1) if one.shape[1] > DEPTHS]
    assert together == pytest.approx(sum(alone), rel=1e-5)


@torch.no_grad()
def test_padding_is_not_predicted():
    model, ids = with_depths(GQA), tokens(2, 12)
    labels = ids.clone()
    labels[:, 9:] = -100
    assert mtp_loss(model, ids, labels) == pytest.approx(mtp_loss(model, ids[:, :9]), rel=1e-5)
    assert mtp_loss(model, ids, torch.full_like(ids, -100)) == 0


@pytest.mark.parametrize("settings", [GQA, LATENT])
def test_only_training_computes_it(settings):
    """Training adds it to the loss; evaluation and generation neither run the blocks nor change."""
    model, ids = with_depths(settings), tokens(2, 12)
    plain = build(settings)
    plain.load_state_dict(model.state_dict(), strict=False)
    without = plain(input_ids=ids, labels=ids).loss
    expected = without + 0.3 * mtp_loss(model, ids)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    counts = [block.mlp.tokens_per_expert.sum().item() for block in model.model.layers]
    model.eval()
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, without)
    assert torch.equal(model.generate(ids, max_new_tokens=4), plain.generate(ids, max_new_tokens=4))
    after = [block.mlp.tokens_per_expert.sum().item() for block in model.model.layers]
    assert after[-DEPTHS:] == counts[-DEPTHS:] and after[0] > counts[0] == counts[-1]


@pytest.mark.parametrize("recomputed", get_args(Recomputed))
def test_gradients_do_not_depend_on_checkpointing(recomputed):
    model, ids = with_depths(dict(LATENT, sequence_balance_coef=0.1, z_loss_coef=0.1)), tokens(2, 12)
    expected = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    enable_activation_checkpointing(model, recomputed)
    actual = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    torch.testing.assert_close(actual, expected)
    assert all(gradient.any() for gradient in actual)


def test_a_run_logs_its_loss_and_layer(small_run, tmp_path):
    """Its loss is logged apart, coefficient 0 trains the model as without, and its layer is balanced like the others."""
    further = ["--model.num_nextn_predict_layers=1", "--train.steps=3", "--train.grad_clip=0", "--log.sample_every=0"]
    seen = {}
    for coefficient in ("0.5", "0"):
        train(load_config([*small_run, *further, f"--run.name={coefficient}", f"--train.mtp_coef={coefficient}"]))
        seen[coefficient] = read_rows(tmp_path / "runs" / coefficient / "metrics.jsonl")
    train(load_config([*small_run, *further[1:], "--run.name=without"]))
    without = [row for row in read_rows(tmp_path / "runs" / "without" / "metrics.jsonl") if "loss" in row]
    steps = {name: [row for row in rows if "loss" in row] for name, rows in seen.items()}
    assert [row["loss"] for row in steps["0"]] == pytest.approx([row["loss"] for row in without], abs=1e-6)
    first, other = steps["0.5"][0], without[0]
    assert first["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert 5 < first["mtp_loss"] < 6.5 and "mtp_loss" not in other
    assert steps["0.5"][2]["loss"] != pytest.approx(without[2]["loss"], abs=1e-4)
    assert len(first["load"]) == 3 and sum(first["load"][2]) == pytest.approx(1, abs=1e-3)
    biases = steps["0.5"][-1]["bias"]
    assert len(biases) == 3 and any(biases[2])
    assert all(0 <= row["val_max_vio"] < 8 for row in seen["0.5"] if "val_loss" in row)
    config = {"model": {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "num_experts": 8}}
    assert "load, layer 2" in layout(config)["Experts"]


def test_too_short_sequences_raise_an_error(small_run):
    with pytest.raises(ConfigError, match="needs 42 tokens"):
        load_config([*small_run, "--model.num_nextn_predict_layers=40"])


def as_run(model: DeepSeekV3ForCausalLM, kept_run: tuple, folder: Path) -> Path:
    """Return a run with the model's weights."""
    model.save_pretrained(folder / "ours")
    save_tokenizer(load_tokenizer(str(kept_run[0] / "tokenizer")), folder / "ours")
    import_model([str(folder / "ours"), "--to", str(folder / "run"), "--data.seq_len=32"])
    return folder / "run"


def imported(run: Path) -> DeepSeekV3ForCausalLM:
    reader, config, _ = open_model(run / "checkpoints" / "step_00000000")
    return build_model(reader, config).eval()


@torch.no_grad()
def test_published_names_go_out_and_in(kept_run, tmp_path):
    """transformers' class ignores the layers and computes the same; an import has all of them, or those that it finds."""
    model = with_depths(dict(LATENT, vocab_size=320, tie_word_embeddings=False)).eval()
    run, theirs = as_run(model, kept_run, tmp_path), tmp_path / "theirs"
    export([str(run), "--to", str(theirs), "--no-check"])
    assert json.loads((theirs / "config.json").read_text())["num_nextn_predict_layers"] == DEPTHS
    stored = load_file(theirs / "model.safetensors")
    for name in (
        "enorm",
        "hnorm",
        "eh_proj",
        "embed_tokens",
        "shared_head.norm",
        "shared_head.head",
        "self_attn.o_proj",
    ):
        assert f"model.layers.4.{name}.weight" in stored
    assert torch.equal(stored["model.layers.3.shared_head.head.weight"], model.lm_head.weight)
    loaded, ids = AutoModelForCausalLM.from_pretrained(theirs).eval(), tokens(2, 20)
    assert type(loaded) is PEERS["latent"]
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=0)

    import_model([str(theirs), "--to", str(tmp_path / "again"), "--data.seq_len=32"])
    again = imported(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=0, rtol=0, msg=name)
    save_file({n: t for n, t in stored.items() if "layers.4." not in n}, theirs / "model.safetensors", {"format": "pt"})
    import_model([str(theirs), "--to", str(tmp_path / "fewer"), "--data.seq_len=32"])
    assert imported(tmp_path / "fewer").config.num_nextn_predict_layers == 1


@torch.no_grad()
def test_formats_without_these_layers_lack_them(kept_run, tmp_path, capsys):
    model = with_depths(dict(GQA, vocab_size=320)).eval()
    run, ids = as_run(model, kept_run, tmp_path), tokens(2, 20)
    export([str(run), "--to", str(tmp_path / "theirs"), "--no-check"])
    assert "Ernie4_5_MoeForCausalLM has no layers for multi-token prediction" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=0)
    export([str(run), "--to", str(tmp_path / "gguf" / "model.gguf"), "--format", "gguf"])
    assert "GGUF has no layers for multi-token prediction" in capsys.readouterr().out
    names = {name for name, _ in imported(run).named_parameters()}
    export([str(run), "--to", str(tmp_path / "same"), "--format", "smolds", "--no-check"])
    assert names == {n for n, _ in AutoModelForCausalLM.from_pretrained(tmp_path / "same").named_parameters()}


@torch.no_grad()
def test_a_dense_model_with_these_layers_is_upcycled(kept_run, tmp_path):
    """The mixture computes the same in all its layers."""
    dense = dict(GQA, vocab_size=320, num_experts=1, num_experts_per_tok=1, n_shared_experts=0, first_k_dense_replace=0)
    model, ids, ours = with_depths(dense), tokens(2, 20), tmp_path / "ours"
    as_run(model, kept_run, tmp_path)
    mixture = ["--model.num_experts=4", "--model.num_experts_per_tok=2", "--data.seq_len=32"]
    import_model([str(ours), "--upcycle", "--to", str(tmp_path / "upcycled"), *mixture])
    upcycled = imported(tmp_path / "upcycled").train()
    assert len(upcycled.model.layers[-1].mlp.experts.down_proj) == 4
    torch.testing.assert_close(upcycled(input_ids=ids, labels=ids).loss, model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("settings", [GQA, LATENT])
@pytest.mark.parametrize(
    "sampling", [dict(temperature=0), dict(temperature=1.5, top_k=5), dict(temperature=0.7, top_p=0.9)]
)
def test_text_with_drafts_is_the_same(kept_run, settings, sampling):
    """Also where drafts are accepted: the layer predicts the rest of a repetition, as a random head does."""
    model = with_depths(dict(settings, vocab_size=320)).eval()
    model.lm_head.weight.data[3:] *= 0.02  # few tokens, which random layers often agree on
    tokenizer, accepted, drafted = load_tokenizer(str(kept_run[0] / "tokenizer")), 0, 0
    for seed, prompt in enumerate(["def add", "for "]):
        counts = DraftCounts()
        more = dict(tokens=20, seed=seed, stop_at_end=seed % 2 == 0, **sampling)
        expected = continue_prompts(model, tokenizer, [prompt], **more)
        assert continue_prompts(model, tokenizer, [prompt], drafts=counts, **more) == expected
        assert counts.tokens <= 20 and counts.accepted <= counts.drafted
        accepted, drafted = accepted + counts.accepted, drafted + counts.drafted
    assert 0 < accepted < drafted


def test_command_with_drafts_tells_speed_and_share(kept_run, tmp_path, capsys):
    model = with_depths(dict(GQA, vocab_size=320)).eval()
    run = str(as_run(model, kept_run, tmp_path))
    capsys.readouterr()
    plain, drafted = ["--prompt", "def add", "--max-new-tokens", "9"], ["--draft", "mtp"]
    generate([run, *plain])
    expected = capsys.readouterr().out
    generate([run, *plain, *drafted])
    told = capsys.readouterr()
    assert told.out == expected and expected.startswith("def add")
    assert re.search(r"tokens/s, \d of \d drafted tokens accepted \(\d+%\)", told.err)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def\nfor")
    with pytest.raises(ConfigError, match="set --batch-size 1, not 16"):
        generate([run, "--prompts", str(prompts), "--draft", "mtp"])
    generate([run, "--prompts", str(prompts), "--draft", "mtp", "--batch-size", "1", "--max-new-tokens", "3"])
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["def", "for"]
    with pytest.raises(ConfigError, match=r"has none; train one with --model\.num_nextn_predict_layers 1"):
        generate([str(kept_run[0]), "--draft", "mtp"])
    export([run, "--to", str(tmp_path / "theirs"), "--no-check"])
    with pytest.raises(ConfigError, match="needs a model in smolds' format"):
        generate([str(tmp_path / "theirs"), "--draft", "mtp"])
