"""mlx-lm reads exports and computes what transformers computes, with the exceptions stated here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import options_of_small_run
from ranks import READERS, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smolds_dist.config import load_config
from smolds_dist.data.tokenizer import load_tokenizer
from smolds_dist.interchange.export import export
from smolds_dist.training.trainer import train

pytestmark = pytest.mark.skipif(not READERS.exists(), reason="no .venv/readers; ./launch/test.sh makes it")

# For logits of up to 1, computed by both in fp32; they differ by at most 6e-7 here. Without the selection biases, or with
# the rotary halves swapped, a model of so few steps already differs by 1e-2.
BOUND = 1e-5
LATENT = (
    "--model.attention=latent", "--model.scoring_func=sigmoid", "--model.n_shared_experts=1",
    "--model.rms_norm_eps=1e-6", "--train.balance_rate=0.01",
)  # fmt: skip
TEXTS = [
    "of  the   quick brown fox ",
    "def add(first, second):\n    return first + second\n\tx = {'a': [1, 22, 333]}\r\n",
    "äöü ÄÖÜ ß, naïve café — 東京",
    "😀 and 👩\u200d👩\u200d👧",
    "a<|endoftext|>b",
]
# Logits of a batch of two sequences, and of the first as in generation: a prefix, then token by token.
MLX = """
import json, sys
from pathlib import Path
import mlx.core as mx, mlx_lm
from mlx_lm.models.cache import make_prompt_cache
mx.set_default_device(mx.cpu)
folder = Path(sys.argv[1])
texts = json.loads((folder / "texts.json").read_text())
ids = mx.load(str(folder / "ids.safetensors"))["ids"]
read = []
for number, model in enumerate(sys.argv[2:]):
    model, tokenizer = mlx_lm.load(model)
    cache = make_prompt_cache(model)
    parts = [model(ids[:1, :9], cache=cache)]
    parts += [model(ids[:1, i : i + 1], cache=cache) for i in range(9, ids.shape[1])]
    logits = {"at once": model(ids), "one by one": mx.concatenate(parts, axis=1)}
    mx.save_safetensors(str(folder / f"logits{number}.safetensors"), logits)
    tokens = [tokenizer.encode(text) for text in texts]
    read.append([tokens, [tokenizer.decode(each) for each in tokens], sorted(tokenizer.eos_token_ids)])
(folder / "read.json").write_text(json.dumps(read))
"""


@pytest.fixture(scope="module")
def models(kept_run, corpus, cache, tmp_path_factory):
    """Return folders of exports by name, some with their selection biases set to 0."""
    folder = tmp_path_factory.mktemp("readers")
    options = [*options_of_small_run(corpus, cache, folder), *LATENT, "--train.eval_every=0", "--log.sample_every=0"]
    train(load_config([*options, "--run.name=latent"]))
    train(load_config([*options, "--run.name=latent_queries", "--model.q_lora_rank=24"]))
    runs = {"gqa": kept_run[0]} | {name: folder / "runs" / name for name in ("latent", "latent_queries")}
    for name, run_dir in runs.items():
        export([str(run_dir), "--to", str(folder / name), "--no-check"])
        tensors = load_file(folder / name / "model.safetensors")
        biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
        assert len(biases) == 2 and all(tensors[name].any() for name in biases)
        assert ("model.layers.0.self_attn.q_b_proj.weight" in tensors) == (name == "latent_queries")
        if name == "gqa":
            shutil.copytree(folder / "gqa", folder / "gqa_unbiased")
            zeros = {name: torch.zeros_like(tensors[name]) for name in biases}
            save_file(tensors | zeros, folder / "gqa_unbiased" / "model.safetensors", metadata={"format": "pt"})
    return {name: folder / name for name in (*runs, "gqa_unbiased")}


@pytest.fixture(scope="module")
def read_by_mlx(models, tmp_path_factory):
    """Return each model's logits by its name; also checks its tokens of `TEXTS`."""
    scratch = tmp_path_factory.mktemp("scratch")
    save_file({"ids": some_ids(models["gqa"])}, scratch / "ids.safetensors")
    (scratch / "texts.json").write_text(json.dumps(TEXTS))
    finished = run([str(READERS), "-c", MLX, str(scratch), *map(str, models.values())], timeout=120)
    assert finished.returncode == 0, finished.text
    read = json.loads((scratch / "read.json").read_text())
    for theirs, model in zip(read, models.values(), strict=True):
        tokenizer = load_tokenizer(str(model))
        assert theirs == [[tokenizer(text).input_ids for text in TEXTS], TEXTS, [tokenizer.eos_token_id]]
    return {name: load_file(scratch / f"logits{number}.safetensors") for number, name in enumerate(models)}


def read_with_transformers(model: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(input_ids=ids).logits


def some_ids(model: Path) -> torch.Tensor:
    """Return two sequences of 48 tokens."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    return torch.randint(0, vocabulary, (2, 48), generator=torch.Generator().manual_seed(0))


def assert_same(mlx: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(mlx["at once"], expected, rtol=0, atol=BOUND)
    torch.testing.assert_close(mlx["one by one"], expected[:1], rtol=0, atol=BOUND)


def test_mlx_computes_a_grouped_query_model_without_its_selection_biases(models, read_by_mlx):
    ids = some_ids(models["gqa"])
    expected = read_with_transformers(models["gqa_unbiased"], ids)
    assert_same(read_by_mlx["gqa_unbiased"], expected)
    # mlx-lm drops the selection biases of ERNIE's models. If this fails because it now uses them, document it for
    # `smolds export` and expect `read_with_transformers(models["gqa"], ids)`.
    assert_same(read_by_mlx["gqa"], expected)
    assert (read_with_transformers(models["gqa"], ids) - expected).abs().max() > 100 * BOUND


@pytest.mark.parametrize("name", ["latent", "latent_queries"])
def test_mlx_computes_what_transformers_does_of_latent_attention(models, read_by_mlx, name):
    assert_same(read_by_mlx[name], read_with_transformers(models[name], some_ids(models[name])))
