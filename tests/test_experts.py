"""`smolds experts`: on models whose experts' tokens are known, against the run's own counts, and on two sources."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import options_of_small_run
from test_mtp import LATENT, as_run, with_depths

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.inference import expert_statistics
from smolds_dist.inference.evaluate import mean_loss
from smolds_dist.inference.experts import experts, load_own_model, recorded, routed_layers, without_expert
from smolds_dist.inference.generate import load_model
from smolds_dist.inference.token_kinds import kind_of, token_texts
from smolds_dist.interchange.export import export
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.observe.rows import read_rows
from smolds_dist.training.trainer import train


class Options:
    """Options of the command for a model built here."""

    model, layer, ablate = "model", None, None


def result_of(folder, *args: str) -> dict:
    experts([str(folder), *args])
    return json.loads((folder / "experts.json").read_text())


@pytest.fixture
def run(kept_run, tmp_path):
    """Return a run's folder that may be changed."""
    shutil.copytree(kept_run[0], tmp_path / "one", symlinks=True)
    return tmp_path / "one"


def config_of(**changed) -> DeepSeekV3Config:
    sizes = dict(
        vocab_size=40, hidden_size=40, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    return DeepSeekV3Config(**sizes | changed)


def model_by_ids(**changed) -> DeepSeekV3ForCausalLM:
    """Return a model whose first layer sends tokens below 10 to expert 0, below 20 to expert 1, and so on."""
    torch.manual_seed(0)
    model = DeepSeekV3ForCausalLM(config_of(**changed)).eval()
    block = model.model.layers[model.config.first_k_dense_replace]
    with torch.no_grad():
        for layer in model.model.layers[: model.config.first_k_dense_replace + 1]:
            layer.self_attn.o_proj.weight.zero_()
        for layer in model.model.layers[: model.config.first_k_dense_replace]:
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(40))
        block.mlp.gate.weight.copy_(torch.eye(4).repeat_interleave(10, 1))
    return model


@pytest.mark.parametrize(
    "changed",
    [
        {}, {"scoring_func": "sigmoid"}, {"n_shared_experts": 1}, {"attention": "latent"},
        {"num_hidden_layers": 3, "first_k_dense_replace": 1, "dense_intermediate_size": 16},
        {"n_group": 2, "topk_group": 1}, {"num_nextn_predict_layers": 1},
    ],
    ids=lambda changed: next(iter(changed), "plain"),
)  # fmt: skip
def test_choices_of_a_model_that_routes_by_id_are_known(changed):
    model, ids = model_by_ids(**changed), np.random.default_rng(0).integers(0, 40, 300)
    layers = routed_layers(model, Options)
    with recorded(layers, len(ids)) as record:
        mean_loss(model, ids, 32, 4)
    first = model.config.first_k_dense_replace
    assert list(record) == list(range(first, model.config.num_hidden_layers))
    chosen_TK, weight_E = record[first]
    assert chosen_TK[:, 0].tolist() == (ids // 10).tolist()
    counts_E = np.bincount(ids // 10)
    weight = 1.0 if model.config.norm_topk_prob else None
    assert weight_E == pytest.approx(counts_E * weight)


def text_of(sources_T, kinds_T, types_T) -> expert_statistics.Text:
    places_T, counts_U = np.arange(len(types_T)), np.bincount(types_T)
    labels = [
        expert_statistics.Labels([f"{name}{x}" for x in range(labels_T.max() + 1)], labels_T, [places_T * 0])
        for name, labels_T in (("source", sources_T), ("kind", kinds_T))
    ]
    return expert_statistics.Text(*labels, [f"t{u}" for u in range(len(counts_U))], types_T, counts_U)


def test_statistics_of_known_choices_are_exact():
    """Source 0 goes to experts 0 and 1, source 1 to experts 0 and 2; even types to expert 1 or 2 in second place."""
    types_T = np.arange(4000) % 4
    sources_T = types_T // 2
    chosen_TK = np.stack([np.zeros(4000, int), 1 + sources_T], 1)
    weight_E = np.array([3000.0, 500.0, 500.0])
    found = expert_statistics.layer_statistics(text_of(sources_T, types_T % 2, types_T), chosen_TK, weight_E)
    assert found["max_vio"] == pytest.approx(0.5)
    assert found["source_bits"] == pytest.approx(0.5)  # half of the choices name the source
    assert found["kind_bits"] == 0 and found["source_bits_shuffled"] == 0
    assert found["context_bits"] == 0  # a token's type says its source
    zero, one, two = found["experts"]
    assert (zero["load"], one["load"], two["load"]) == (0.5, 0.25, 0.25)
    assert (zero["weight"], one["weight"]) == (0.75, 0.25)
    assert zero["sources"] == {"source0": 0.5, "source1": 0.5} and one["sources"] == {"source0": 0.5, "source1": 0}
    assert one["kinds"] == {"kind0": {"share": 0.5, "lift": 1.0}, "kind1": {"share": 0.5, "lift": 1.0}}
    assert [t["text"] for t in one["tokens"]] == ["t0", "t1"] and [t["text"] for t in two["tokens"]] == ["t2", "t3"]
    assert one["tokens"][0]["lift"] == 2.0 and 1.9 < one["tokens"][0]["lift_at_least"] < 2.0
    assert zero["tokens"] == []  # takes every token: none above chance
    assert one["shared_tokens"] == [[0, 1.0], [2, 0.0]] and zero["shared_tokens"] == [[1, 0.5], [2, 0.5]]
    assert one["same_token_types"] == [[0, pytest.approx(math.sqrt(0.5), abs=1e-5)], [2, 0.0]]


def test_context_is_what_a_source_adds_to_the_token():
    """Every type is in both sources, and only the source decides; then only the type decides."""
    types_T, sources_T = np.arange(4000) % 4, np.arange(4000) // 4 % 2
    for chosen_T, source_bits, context_bits in ((sources_T, 1, 1), (types_T % 2, 0, 0)):
        text = text_of(sources_T, types_T, types_T)
        found = expert_statistics.layer_statistics(text, chosen_T[:, None], np.ones(2))
        assert (found["source_bits"], found["context_bits"]) == pytest.approx((source_bits, context_bits))


def test_a_rare_token_does_not_win_and_chance_is_not_listed():
    random = np.random.default_rng(0)
    types_T = np.repeat([0, 1, 2], [20, 2000, 20000])
    chosen_TK = np.where(
        types_T == 0, 1, np.where(types_T == 1, random.random(22020) < 0.9, random.random(22020) < 0.5)
    )
    found = expert_statistics.layer_statistics(
        text_of(types_T * 0, types_T * 0, types_T), chosen_TK[:, None], np.ones(2)
    )
    tokens = found["experts"][1]["tokens"]
    assert [token["text"] for token in tokens] == ["t1", "t0"]  # 20 of 20 is a higher lift, but less sure
    assert tokens[1]["lift"] > tokens[0]["lift"] and found["experts"][0]["tokens"][0]["text"] == "t2"
    by_chance = random.integers(0, 8, (50_000, 1))
    types_T = random.integers(0, 500, 50_000)
    found = expert_statistics.layer_statistics(text_of(types_T * 0, types_T * 0, types_T), by_chance, np.ones(8))
    assert sum(len(expert["tokens"]) for expert in found["experts"]) < 0.005 * 500 * 8


def test_shuffled_sources_keep_sequences_together():
    labels_T, groups_T = np.repeat([0, 1], 64), np.arange(128) // 8
    for other_T in expert_statistics.shuffled(labels_T, groups_T):
        blocks = other_T.reshape(16, 8)
        assert (blocks == blocks[:, :1]).all() and blocks[:, 0].sum() == 8


@pytest.mark.parametrize("changed", [{}, {"num_experts_per_tok": 2, "scoring_func": "sigmoid"}], ids=["top1", "top2"])
def test_ablation_is_the_model_without_that_expert(changed):
    """Compares with a model that was built without the expert: with one row of the router and one expert fewer."""
    model, ids = model_by_ids(**changed), np.random.default_rng(0).integers(0, 40, 200)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.normal_()
    before, layers = mean_loss(model, ids, 32, 4), routed_layers(model, Options)
    kept = [0, 1, 3]
    smaller = DeepSeekV3ForCausalLM(config_of(**changed)).eval()
    smaller.load_state_dict(model.state_dict())
    layer = smaller.model.layers[0].mlp
    layer.config.__dict__["num_experts"] = layer.gate.config.__dict__["num_experts"] = 4
    layer.gate.weight = torch.nn.Parameter(layer.gate.weight[[*kept, 0]])
    layer.gate.e_score_correction_bias[3] = -1e9  # a fourth expert that is never chosen
    for name in ("gate_up_proj", "down_proj"):
        setattr(layer.experts, name, torch.nn.Parameter(getattr(layer.experts, name)[[*kept, 0]]))
    with without_expert(layers[0], 2):
        without = mean_loss(model, ids, 32, 4)
    assert without[0] == pytest.approx(mean_loss(smaller, ids, 32, 4)[0], rel=1e-6)
    assert abs(without[0] - before[0]) > 1e-5
    assert mean_loss(model, ids, 32, 4) == before  # and the expert is back


def test_the_command_counts_as_the_run_does(run):
    """The run's own statistics over the same validation text: MaxVio and loss."""
    result = result_of(run, "--max-tokens", str(5 * 32), "--ablate", "64", "--min-count", "3")
    evaluated = [row for row in read_rows(run / "metrics.jsonl") if "val_loss" in row][-1]
    assert result["sources"]["text"] == {"tokens": 160, "loss": pytest.approx(evaluated["val_loss"], rel=1e-4)}
    vios = [
        layer["max_vio"] for layer in result_of(run, "--max-tokens", str(4 * 32))["layers"]
    ]  # a fifth one is padded
    assert np.mean(vios) == pytest.approx(evaluated["val_max_vio"], abs=2e-5)
    model, tokenizer = load_own_model(run)
    assert sum(result["kinds"].values()) == 160
    for number, layer in enumerate(result["layers"]):
        assert len(layer["experts"]) == 8 and layer["layer"] == number
        assert sum(expert["load"] for expert in layer["experts"]) == pytest.approx(1, abs=1e-4)
        for expert in layer["experts"]:
            assert all(similar[1] == pytest.approx(0, abs=0.3) for similar in expert["similar_weights"])
    flat = torch.cat([w.flatten(1) for w in (model.model.layers[1].mlp.experts.gate_up_proj,
                                             model.model.layers[1].mlp.experts.down_proj)], 1)  # fmt: skip
    cosines = torch.nn.functional.cosine_similarity(flat[3], flat)
    other, value = result["layers"][1]["experts"][3]["similar_weights"][0]
    assert cosines.topk(2).indices.tolist() == [3, other] and value == pytest.approx(cosines[other].item(), abs=2e-5)
    assert tokenizer.eos_token in token_texts(tokenizer, list(range(len(tokenizer))))[0]


def test_an_export_has_the_same_experts_as_its_run(run):
    of_run = result_of(run, "--max-tokens", "400")
    (run / "link.json").symlink_to(run / "other.json")
    experts([str(run / "export"), "--max-tokens", "400", "--json", str(run / "link.json")])
    assert (run / "link.json").is_symlink()  # as /dev/stdout is
    of_export = json.loads((run / "other.json").read_text())
    assert of_run["layers"] == of_export["layers"] and of_run["sources"] == of_export["sources"]
    ours, theirs = load_own_model(run / "export")[0], load_model(run / "export")[0]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-4)
    shutil.rmtree(run / "checkpoints")  # the run's export is left
    assert result_of(run, "--max-tokens", "400")["layers"] == of_run["layers"]


def test_published_folder_with_more_layers_computes_the_same(kept_run, tmp_path):
    """DeepSeek-V3's format, with latent attention and layers of multi-token prediction."""
    model = with_depths(dict(LATENT, vocab_size=320)).eval()
    export([str(as_run(model, kept_run, tmp_path)), "--to", str(tmp_path / "published"), "--no-check"])
    loaded, ids = load_own_model(tmp_path / "published")[0], torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)


def test_two_sources_part_where_the_tokens_do(corpus, cache, tmp_path, capsys):
    """Digits in one source and letters in the other: experts part by tokens, so by source."""
    for name, letters in (("digits", "0123456789"), ("words", "abcdefghij")):
        (tmp_path / name).mkdir()
        for number in range(12):
            random = np.random.default_rng(number)
            lines = ["".join(random.choice(list(letters), 60)) for _ in range(20)]
            (tmp_path / name / f"{number}.txt").write_text("\n".join(lines))
    options = options_of_small_run(corpus, cache, tmp_path)
    options = [option for option in options if not option.startswith("--data.source=")]
    sources = {name: {"source": f"text:{tmp_path}/{name}/*.txt"} for name in ("digits", "words")}
    (tmp_path / "mix.yaml").write_text(json.dumps({"data": {"sources": sources}}))
    quick = ["--train.steps=20", "--train.lr=0.01", "--run.name=two", "--checkpoint.every=20", "--train.ema=0.9"]
    train(load_config([*options, "--config", str(tmp_path / "mix.yaml"), *quick]))
    capsys.readouterr()
    experts([str(tmp_path / "runs" / "two"), "--layer=1", "--ablate=200"])
    shown = capsys.readouterr().out
    assert "digits" in shown and "e7: " in shown and "of 1.000 bits per choice" in shown
    result = json.loads((tmp_path / "runs" / "two" / "experts.json").read_text())
    assert max(layer["source_bits"] for layer in result["layers"]) > 0.05
    assert all(layer["source_bits_shuffled"] < 0.02 for layer in result["layers"])
    averaged = result_of(tmp_path / "runs" / "two", "--weights=ema")
    assert averaged["sources"]["words"]["loss"] > result["sources"]["words"]["loss"] + 0.01  # behind the fast training
    for expert in result["layers"][0]["experts"]:
        parts = expert["ablation_sources"]
        assert parts.keys() == {"digits", "words"} and min(*parts.values()) - 1e-4 <= expert["ablation"]


def test_kinds_of_tokens(run):
    kinds = {
        " the": "word", "ing": "letters inside a word", "1984": "digits", " \n": "whitespace", "->": "punctuation",
        "_name": "identifier", " getName": "identifier", "x1": "identifier", "(self": "mixed", " мир": "cyrillic",
        "漢字": "cjk", "ひ": "hiragana", "é": "letters inside a word", "²": "digits", "__": "identifier",
        "一": "cjk", "ा": "devanagari", "❤\ufe0f": "punctuation", "\x00": "punctuation",
    }  # fmt: skip
    assert {text: kind_of(text) for text in kinds} == kinds
    tokenizer = load_own_model(run)[1]
    ids = [*tokenizer("é", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert token_texts(tokenizer, ids) == (
        ["\\xc3", "\\xa9", tokenizer.eos_token],
        ["first bytes of a character", "later bytes of a character", "special"],
    )


def test_mistakes_raise_errors(run, tmp_path):
    for args, words in (
        ([str(run), "--train.steps=3"], "not an option of smolds experts"),
        ([str(run), "--layer", "2"], "--layer 2 is not a layer with experts; choose from 0 to 1"),
        ([str(run), "--ablate", "1"], "at least 2"),
        ([str(run), "--step", "5"], "no checkpoint of step 5"),
        ([str(run), "--json", str(tmp_path)], "cannot be written"),
        ([str(tmp_path)], "--data.source"),
        ([str(tmp_path), "--data.source=stdlib"], "contains no complete checkpoint"),
        ([str(tmp_path / "none"), "--data.source=stdlib"], "none contains no complete checkpoint"),
    ):
        with pytest.raises(ConfigError, match=words):
            experts(args)
    for changed, words in (
        ({"num_experts": 2, "num_experts_per_tok": 2}, "each token takes all 2"),
        ({"n_group": 2, "topk_group": 1}, "groups of more than 2"),  # would lose its other expert too
    ):
        with pytest.raises(ConfigError, match=words):
            routed_layers(DeepSeekV3ForCausalLM(config_of(**changed)), type("Options", (Options,), {"ablate": 10}))
