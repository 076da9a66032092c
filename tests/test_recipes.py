"""Published recipes of examples/recipes train, with their sizes, batches and steps divided."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import ROOT

from smolds_dist.config import load_config
from smolds_dist.observe.rows import read_rows
from smolds_dist.schedule import learning_rate
from smolds_dist.stages import resolve_stages
from smolds_dist.training.trainer import train

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
EACH = 2  # steps of a stage


def divided(recipe: dict[str, Any], corpus: Path) -> dict[str, Any]:
    """The recipe with text of this machine, a small model, `EACH` steps per stage, and sequences 64 times shorter."""
    stages = recipe["train"]["stages"]
    for stage in (recipe["data"], recipe["train"], *stages):
        if "seq_len" in stage:
            stage["seq_len"] //= 64
        if "global_batch" in stage:
            stage["global_batch"] = max(2, stage["global_batch"] // 1024)
    for number, stage in enumerate(stages, 1):
        stage["until"] = EACH * number
        if "lr_until" in stage:
            stage["lr_until"] = stage["until"] + EACH
    recipe["train"] |= {"steps": EACH * len(stages), "warmup_steps": 1, "eval_every": 0, "eval_sequences": 4}
    for name, one in recipe["data"].get("sources", {}).items():
        source = corpus / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": f"{name} {n} {n * n} " * 40}) + "\n" for n in range(250)))
        recipe["data"]["sources"][name] = {"source": f"jsonl:{source}", "weight": one.get("weight", 1.0)}
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(path, corpus, cache, tmp_path):
    recipe = divided(yaml.safe_load(path.read_text()), tmp_path)
    if "sources" not in recipe["data"]:
        recipe["data"]["source"] = f"text:{corpus}/*.txt"
    small = tmp_path / "recipe.yaml"
    small.write_text(yaml.safe_dump(recipe))
    given = [
        "--config", str(small), f"--run.dir={tmp_path}", "--run.name=run", "--parallel.device=cpu", "--train.dtype=fp32",
        f"--data.cache_dir={cache}", "--data.tokenizer=train", "--data.tokenizer_vocab_size=300", "-q",
        "--log.tensorboard=false", "--log.sample_every=0", "--data.val_fraction=0.2",
        *(f"--model.{name}={value}" for name, value in SMALL.items()),
    ]  # fmt: skip
    config = load_config(given)
    assert train(config) == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    stages = recipe["train"]["stages"]
    assert len(rows) == EACH * len(stages)
    begun = [row["number"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "stage"]
    assert begun == list(range(2, len(stages) + 1))


@pytest.mark.parametrize(
    ("name", "tokens", "rates"),
    [
        ("smollm2", 11e12, {2000: 5e-4, 4_000_000: 5e-4, 5_245_000: 0.0}),
        # A cosine to a tenth over 1,192,093 steps after 2,000 of warm-up, at step 953,674
        ("olmo2", 4.05e12, {2000: 3e-4, 953_674: 5.587e-5, 965_596: 0.0}),
        (
            "deepseek-v3",
            14.8e12 + 126e9,
            {2000: 2.2e-4, 168_000: 2.2e-4, 236_859: 2.2e-5, 240_000: 2.2e-5, 245_000: 7.3e-6},
        ),
    ],
)
def test_recipe_has_the_published_tokens_and_rates(name, tokens, rates):
    config = load_config(["--config", str(ROOT / "examples" / "recipes" / f"{name}.yaml")])
    assert resolve_stages(config).tokens(config.train.steps) == pytest.approx(tokens, rel=2e-3)
    for step, rate in rates.items():
        assert learning_rate(step, config) == pytest.approx(rate, rel=2e-3, abs=1e-9), step
