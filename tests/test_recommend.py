"""Losses in `smolds plan`: of a known law, whose optimum the recommended model and tokens must be."""

import json
import math
import shutil
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from ranks import ROOT

from smolds_dist.config import load_config
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.hardware import Hardware, load_hardware
from smolds_dist.costs.memory import with_vocabulary
from smolds_dist.errors import ConfigError
from smolds_dist.planner.command import plan
from smolds_dist.planner.family import Size, granularity, sized, weights
from smolds_dist.planner.outlook import Outlook, load_fit
from smolds_dist.planner.recommend import (
    Cluster,
    Recommendation,
    critical_batch,
    depth_of,
    members,
    rate_factor,
    read_record,
    recommend,
    run_config,
    search,
    trained,
)
from smolds_dist.planner.scaling_law import Law, Point, fit_all

LAW = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
SIZES = [Size(64, 2), Size(96, 3), Size(128, 4), Size(160, 5), Size(192, 6)]
OPTIONS = ["--preset", "debug", "--data.seq_len=32", "--train.global_batch=32"]
TRANSFER = {"train.mup": True, "train.mup_base_width": 64, "train.mup_base_depth": 2, "train.warmup_steps": 5}
# One CPU whose time is the matmuls' alone
FLAT = load_hardware("cpu-2")
FLAT = replace(FLAT, bandwidth=1e30, overhead=0.0, host_link=1e30, failures=1e30, utilization=1.0, memory=1e15)


def make_ladder(folder: Path) -> Path:
    """Write a ladder's folder whose losses follow `LAW` exactly."""
    config = load_config(OPTIONS)
    points = []
    for size, ratio in product(SIZES, (10, 20, 40)):
        own = sized(config, size)
        (active, total), tokens = weights(own), ratio * weights(own)[0]
        loss, name = LAW.loss(active, total, tokens), f"{size}-{ratio}"
        points.append(Point(active, total, tokens, loss, granularity=granularity(own), run=name))
    rungs = [
        {"settings": {"model.hidden_size": size.width, "model.num_hidden_layers": size.depth} | TRANSFER}
        for size in SIZES
    ]
    folder.mkdir(exist_ok=True)
    (folder / "ladder.yaml").write_text(yaml.safe_dump({"options": OPTIONS, "rates": [1e-3], "rungs": rungs}))
    results = {"best_rate": 2e-3, "points": [one.run for one in points], "runs": [asdict(one) for one in points]}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "fit.json").write_text(json.dumps(fit_all(points, resamples=4).to_json()))
    return folder


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    return make_ladder(tmp_path_factory.mktemp("ladder") / "debug")


def test_every_layout_shows_the_loss_of_the_same_time(ladder, tmp_path, capsys):
    args = ["--hardware", "h100", "--json", str(tmp_path / "plan.json"), "--target-tokens", "1e8"]
    options = ["--", "--preset", "debug", "--train.dtype=bf16"]
    plan([*args, *options])
    plain, first = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    plan(["--ladder", str(ladder), *args, *options])
    text, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    config = load_config(options[1:])
    outlook = Outlook.of(load_fit(ladder, config), config)
    tokens = found["steps"] * config.train.global_batch * config.data.seq_len
    loss = outlook.fitted.law.loss(*weights(config), tokens, 2.0)
    assert loss == pytest.approx(LAW.loss(*weights(config), tokens), rel=0.01)
    assert found["loss"]["predicted"] == found["layouts"][0]["loss"] == pytest.approx(loss)
    assert found["loss"]["low"] <= loss <= found["loss"]["high"]
    assert f"predicted loss {loss:.4f}" in text and "a guess" not in text
    rows = [line.split() for line in text.partition("expert zero")[2].splitlines()[1:] if "GB" in line]
    losses = [float(row[5]) for row in rows]
    assert len(losses) > 3 and losses == sorted(losses) and losses[0] < losses[-1]
    slower = found["layouts"][-1]
    assert slower["loss"] == pytest.approx(
        outlook.predict(tokens * slower["tokens_per_s"] / found["layouts"][0]["tokens_per_s"])[0]
    )
    # Without a ladder nothing changes.
    assert "loss" not in plain and "loss" not in first
    for one in found["layouts"]:
        del one["loss"]
    assert found["layouts"] == first["layouts"]
    plan(["--ladder", str(ladder), "--target-tokens", "1e12", *options])
    assert "a guess, at" in capsys.readouterr().out


def chosen(ladder: Path, hours: float, machine: Hardware = FLAT, options: list[str] = OPTIONS) -> Recommendation:
    config = load_config(options)
    return recommend(config, read_record(ladder, config), Cluster(machine, 1, 1, hours, 0.0))


def test_the_recommended_model_and_tokens_are_the_laws_optimum(ladder):
    law, found = load_fit(ladder, load_config(OPTIONS)).law, {}
    for hours in (10, 160):
        best = found[hours] = chosen(ladder, hours).best
        flops = hours * 3600 * FLAT.peak["fp32"]
        spent = best.tokens * flops_per_token(with_vocabulary(best.config), 32)
        assert spent == pytest.approx(flops, rel=1e-3)  # attention's too
        active, tokens = law.optimum(flops)
        assert best.weights[0] == pytest.approx(active, rel=0.06)
        assert best.tokens == pytest.approx(tokens, rel=0.08)
    # N ~ C^(beta / (alpha + beta))
    growth = 16 ** (law.beta / (law.alpha + law.beta))
    assert found[160].weights[0] / found[10].weights[0] == pytest.approx(growth, rel=0.1)


@pytest.mark.parametrize(
    ("sizes", "depth"), [([Size(w, 3) for w in (64, 96, 128)], 3), (SIZES, 10), ([Size(64, 2), Size(256, 4)], 5)]
)
def test_depths_continue_those_of_the_ladder(ladder, sizes, depth):
    """Constant, proportional to the width, or to its root."""
    record = replace(read_record(ladder, load_config(OPTIONS)), sizes=sizes)
    assert depth_of(record, 320) == depth or depth_of(record, 400) == depth == 5


def test_the_smallest_model_within_one_percent(ladder):
    found = chosen(ladder, 40)
    assert found.smallest.loss <= 1.01 * found.best.loss < 1.015 * found.smallest.loss
    assert found.smallest.weights[0] < 0.7 * found.best.weights[0]
    smaller = [one for one in found.members if one.weights < found.smallest.weights]
    assert smaller and all(one.loss > 1.01 * found.best.loss for one in smaller)
    assert found.limit == "the budget"


@pytest.mark.parametrize("hours", [0.05, 2])
def test_the_search_finds_what_trying_every_member_finds(ladder, hours):
    """On GPUs, where layers cost time beyond their FLOPs, members of one size differ in loss by their depth."""
    layout = ["--parallel.expert=1", "--parallel.zero=1", "--train.micro_batch=8"]
    config = load_config([*OPTIONS, *layout, "--train.global_batch=128", "--train.activation_checkpointing=full"])
    record, cluster = read_record(ladder, config), Cluster(load_hardware("h100"), 2, 8, hours, 0.1)
    family = members(config, record)[:70]
    tried = [trained(*one, record.fitted, cluster) for one in family]
    lowest = min(tried, key=lambda one: one.loss)
    small = next(one for one in tried if one.loss <= 1.01 * lowest.loss)
    _, best, smallest, _ = search(family, record, cluster)
    assert (best.size, smallest.size) == (lowest.size, small.size)


def test_less_memory_gives_a_smaller_model(ladder):
    free = chosen(ladder, 160).best
    need = free.layout.memory.total
    tight = chosen(ladder, 160, replace(FLAT, memory=need / 2))
    assert tight.best.weights < free.weights and tight.best.loss > free.loss
    assert tight.best.layout.memory.total < need / 2
    assert tight.limit.startswith("the memory, into which ")


def test_the_rate_grows_with_the_root_of_the_batch_far_below_the_noise_scale_and_not_above(ladder):
    scale = (1e6, "")
    assert rate_factor(scale, 100, 400) == pytest.approx(2, rel=1e-3)
    assert rate_factor(scale, 1e8, 4e8) == pytest.approx(1, rel=0.01)
    assert rate_factor(None, 100, 400) == 1
    config = load_config(OPTIONS)
    record = read_record(ladder, config)
    noisy = replace(record, noise=[(3.0, 8192.0, 80.0)])  # eight times the ladder's batch of 1,024 tokens
    found = recommend(config, noisy, Cluster(FLAT, 1, 1, 40, 0.0))
    assert found.best.config.train.global_batch == 256
    assert found.lr == pytest.approx(2e-3 * ((1 + 8) / (1 + 1)) ** 0.5)
    assert run_config(found.best, noisy, found.lr).train.lr == pytest.approx(found.lr, rel=1e-3)


def test_the_written_run_agrees_with_its_plan(ladder, tmp_path, capsys):
    """The file is a run's settings, and planning that run gives the recommendation's time and loss."""
    flat, to, result = (tmp_path / name for name in ("flat.yaml", "chosen.yaml", "plan.json"))
    entry = {name: value for name, value in asdict(FLAT).items() if name != "key"}
    flat.write_text(yaml.safe_dump({"flat": entry | {"sources": []}}))
    args = ["--ladder", str(ladder), "--hardware", str(flat), "--devices-per-node", "1", "--json", str(result)]
    plan([*args, "--budget-gpu-hours", "30", "--to", str(to), "--", *OPTIONS, "--train.warmup_steps=300"])
    text, found = capsys.readouterr().out, json.loads(result.read_text())
    for path, name in ((to, "best"), (tmp_path / "chosen-small.yaml", "smallest")):
        config = load_config(["--config", str(path)])
        size = found[name]
        assert str(Size(config.model.hidden_size, config.model.num_hidden_layers)) == size
        assert f"wrote {path}; start it with\n  smolds launch --nproc-per-node 1 -- --config {path}\n" in text + "\n"
        train = config.train
        assert (train.schedule, train.decay_fraction, train.warmup_steps) == ("wsd", 0.2, 300)
        assert (train.lr, train.global_batch) == (2e-3, 32)  # without a noise scale
        assert (train.mup, train.mup_base_width, train.mup_base_depth) == (True, 64, 2)
        plan([*args, "--", "--config", str(path)])
        one, again = next(one for one in found["members"] if one["size"] == size), json.loads(result.read_text())
        assert again["run"] == one["run"] and again["loss"] == one["loss"] and again["steps"] == train.steps
        assert again["layouts"][0]["settings"] == one["settings"]
        assert set(yaml.safe_load(path.read_text())) == {
            "run",
            "model",
            "data",
            "train",
            "parallel",
            "checkpoint",
            "log",
        }
        result.unlink()
    row = next(line for line in text.splitlines() if line.endswith("  best")).split()
    assert row[0] == found["best"] and float(row[5]) == pytest.approx(
        min(one["loss"]["predicted"] for one in found["members"]), abs=1e-4
    )
    assert one["run"]["device_hours"] == pytest.approx(30, rel=1e-3)


def with_noise(ladder: Path, to: Path, scales: dict[float, float]) -> Path:
    """Copy a ladder, with noise scales in tokens by loss."""
    shutil.copytree(ladder, to)
    results = json.loads((to / "results.json").read_text())
    results["runs"] = [run for run in results["runs"] if "noise_scale" not in run]
    for loss, scale in scales.items():
        results["runs"].append({"loss": loss, "noise_scale": {"tokens": scale, "error": scale / 10}})
    (to / "results.json").write_text(json.dumps(results))
    return to


def test_the_batch_is_the_noise_scale_at_the_predicted_loss(ladder, tmp_path):
    def scale(loss: float) -> float:
        return 2e4 * (loss / 4) ** -5

    ladder = with_noise(ladder, tmp_path / "noise", {loss: scale(loss) for loss in (6.0, 5.5, 5.2)})
    record = read_record(ladder, load_config(OPTIONS))
    assert critical_batch(record, 3.5)[0] == pytest.approx(scale(3.5), rel=1e-6)
    unsure = replace(record, noise=[*record.noise, (5.1, 1e9, 0.6e9), (5.0, math.inf, math.inf)])
    assert critical_batch(unsure, 3.5)[0] == pytest.approx(scale(3.5), rel=1e-6)
    assert critical_batch(replace(record, noise=record.noise[:1]), 3.5)[0] == pytest.approx(scale(6.0))
    falling = [(6.0, 2e5, 1e4), (5.0, 1e5, 1e4)]
    assert critical_batch(replace(record, noise=falling), 3.5)[0] == pytest.approx(1e5)
    assert critical_batch(replace(record, noise=[]), 3.5) is None
    found = chosen(ladder, 160)
    assert found.best.layout.tokens_per_step == pytest.approx(scale(found.best.loss), rel=0.13)
    assert found.batch.startswith("the noise scale of 3 rungs, extrapolated to loss ")
    few = chosen(with_noise(ladder, tmp_path / "large", {6.0: 1e9}), 1)
    assert few.batch.startswith("1,000 steps; ") and 700 < few.best.steps < 2000


def test_impossible_recommendations_are_config_errors(ladder, tmp_path):
    args = ["--ladder", str(ladder), "--budget-gpu-hours"]
    for words, more in (
        ("repeat its options: --preset debug", ["100", "--", *OPTIONS, "--model.num_experts_per_tok=4"]),
        ("vocabulary of 2,048, but .* 4,000", ["100", "--", *OPTIONS, "--data.tokenizer_vocab_size=4000"]),
        ("best rate is of --train.optimizer adamw, but .* muon", ["100", "--", *OPTIONS, "--train.optimizer=muon"]),
        ("--target-tokens is what", ["100", "--target-tokens=1e9", "--", *OPTIONS]),
        ("--to /nowhere/x.yaml cannot be written", ["100", "--to=/nowhere/x.yaml", "--", *OPTIONS]),
        ("unset train.stages", ["100", "--", *OPTIONS, "--train.stages=[{until: 0.5}, {lr: 1e-4}]"]),
    ):
        with pytest.raises(ConfigError, match=words):
            plan(["--hardware", "cpu-2", "--devices-per-node", "1", *args, *more])
    with pytest.raises(ConfigError, match="add both"):
        plan(["--ladder", str(ladder), "--to", str(tmp_path / "x.yaml"), "--", *OPTIONS])
    with pytest.raises(ConfigError, match="1e-09 buys no step of 32x1"):
        chosen(ladder, 1e-9)
    (tmp_path / "fit.json").write_text((ladder / "fit.json").read_text())
    with pytest.raises(ConfigError, match=r"ladder\.yaml"):
        plan(["--ladder", str(tmp_path), "--budget-gpu-hours", "1", "--", *OPTIONS])


def test_a_ladder_without_a_fit_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"has no fit\.json; write it by `smolds ladder fit"):
        plan(["--ladder", str(tmp_path), "--", "--preset", "debug"])
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"fit.json is invalid .*missing required field `law`"):
        plan(["--ladder", str(tmp_path), "--", "--preset", "debug"])


def test_a_fit_that_is_damaged_or_of_other_runs_or_tokens_is_an_error(ladder, tmp_path):
    shutil.copytree(ladder, tmp_path / "copy")
    own, results = ["--ladder", str(tmp_path / "copy"), "--", *OPTIONS], tmp_path / "copy" / "results.json"
    values, known = json.loads((ladder / "fit.json").read_text()), json.loads(results.read_text())
    for change, words in (
        ({"resampled": []}, "has no runs, or constants"),
        ({"points": []}, "has no runs, or constants"),
        ({"law": values["law"] | {"E": math.nan}}, "constants that are not finite; write it by"),
        ({"law": values["law"] | {"E": "1"}}, "fit.json is invalid .*law.E: expected `float`"),
        ({"noise": "0"}, "fit.json is invalid .*noise: expected `float`"),
        ({"points": values["points"][1:]}, r"fitted before results.json changed \(64x2-10\); write it by `smolds"),
    ):
        (tmp_path / "copy" / "fit.json").write_text(json.dumps(values | change))
        with pytest.raises(ConfigError, match=words):
            plan(own)
    (tmp_path / "copy" / "fit.json").write_text(json.dumps(values))
    known["runs"][0]["loss"] *= 1.01
    results.write_text(json.dumps(known))
    with pytest.raises(ConfigError, match=r"fitted before results.json changed \(64x2-10\)"):
        plan(own)
    results.write_text("{}")
    with pytest.raises(ConfigError, match=r"results.json is invalid"):
        plan(own)
    with pytest.raises(ConfigError, match="vocabulary of 2,048, but the training options have 49,152, whose tokens"):
        plan(["--ladder", str(ladder), "--", *OPTIONS, "--data.tokenizer=x"])


def test_the_measured_ladder_chooses_a_model_of_its_family(tmp_path, capsys):
    """With dense twins, whose noise scales are not the mixtures'; on a budget of minutes."""
    folder = ROOT / "docs" / "ladder"
    options = [str(word) for word in yaml.safe_load((folder / "ladder.yaml").read_text())["options"]]
    args = [
        "--hardware",
        "cpu-2",
        "--devices-per-node",
        "1",
        "--budget-gpu-hours",
        "0.1",
        "--to",
        str(tmp_path / "a.yaml"),
    ]
    plan(["--ladder", str(folder), *args, "--", *options])
    shown = capsys.readouterr().out
    assert "noise scale of 5 rungs" in shown and "limited by the budget" in shown
    train = load_config(["--config", str(tmp_path / "a.yaml")]).train
    assert (train.mup, train.mup_base_width, train.mup_base_depth, train.steps > 100) == (True, 16, 2, True)
