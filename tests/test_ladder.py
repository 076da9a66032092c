"""Ladders: sizes of a family, the plan's arithmetic, and a ladder of two tiny rungs from plan to results."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import warm
from ranks import PATIENCE, ROOT, rows_without_timing

from smolds_dist.config import load_config, save_config
from smolds_dist.costs.hardware import load_hardware
from smolds_dist.errors import ConfigError
from smolds_dist.inputs import read_json
from smolds_dist.ladder import command
from smolds_dist.ladder.costs import cost_of, table
from smolds_dist.ladder.plan import LadderRun, parse_tokens, read_ladder, runs_of, steps_of
from smolds_dist.ladder.results import best_rate, open_ladder
from smolds_dist.planner.family import Size, granularity, parse_size, sized, weights
from smolds_dist.planner.ladder_fit import read_points
from smolds_dist.planner.scaling_law import FittedLaw, Law, fit_all

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
    further = replace(mixture, model=replace(mixture.model, num_nextn_predict_layers=1))
    assert weights(further) == weights(mixture)  # the predicted loss is not that of multi-token prediction
    assert [str(parse_size(text, "")) for text in ("64x2", "64x2x16")] == ["64x2", "64x2x16"]


# Plan


def planned(tmp_path, *options, train=("--preset", "debug")):
    """Plan a ladder in `tmp_path`/ladder and return it."""
    command.ladder(["plan", "--to", str(tmp_path / "ladder"), "--hardware=cpu-2", *options, "--", *train])
    return read_ladder(tmp_path / "ladder")


def test_steps_are_multiples_of_the_smallest_and_checkpoints_fall_where_decays_begin():
    assert steps_of([97.3, 194.6, 389.2], most=1000) == ([95, 190, 380], 76)
    assert steps_of([0.2], most=100) == ([5], 4)
    for amount, most in ((9050.0, 1000), (905.0, 180), (517.0, 7), (100.0, 0)):
        (first, last), every = steps_of([amount, 3 * amount], most)
        assert last == 3 * first and first == pytest.approx(amount, rel=0.03)
        assert first % 5 == 0 and (first * 4 // 5) % every == 0
        assert every <= max(1.1 * most, 100) or not most
    assert [one.tokens(1000) for one in parse_tokens("40,10,20")] == [10_000, 20_000, 40_000]
    assert [one.tokens(1000) for one in parse_tokens("4M,1.5B")] == [4e6, 1.5e9]
    for text, error in (
        ("10,25", "25 is not a multiple of 10"), ("10,4M", "write all in one form"), ("10,", "'' is not a number"),
        ("20000", "write a total with K"), ("0", "'0' is not a number"), ("-5", "'-5' is not a number"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=error):
            parse_tokens(text)


def test_a_plan_has_the_sizes_steps_and_rates_of_its_options(tmp_path, capsys):
    ladder = planned(
        tmp_path, "--sizes=96x3,64x2", "--hold-out=256x6", "--experts=8,16", "--dense-twins", "--hold-out-rates=3"
    )
    rungs = {rung.name: rung for rung in ladder.rungs}
    assert list(rungs) == ["64x2", "96x3", "64x2x16", "64x2x1", "96x3x16", "96x3x1", "256x6"]
    assert ladder.rates == [0.00075, 0.0015, 0.003, 0.006, 0.012]
    active = weights(sized(ladder.config, Size(96, 3)))[0]
    assert rungs["96x3"].steps[0] == pytest.approx(10 * active / (8 * 256), rel=0.02)
    assert [steps / rungs["96x3"].steps[0] for steps in rungs["96x3"].steps] == [1, 2, 4]
    assert rungs["96x3"].steps == rungs["96x3x16"].steps == rungs["96x3x1"].steps
    assert len(rungs["256x6"].steps) == 1 and rungs["256x6"].held_out and rungs["256x6"].factors == [0.5, 2]
    assert ladder.config_of(rungs["96x3"]).model == sized(ladder.config, Size(96, 3)).model
    trunk, short, middle = runs_of(rungs["64x2"], 0.003)
    assert [run.steps for run in (trunk, short, middle)] == [rungs["64x2"].steps[n] for n in (2, 0, 1)]
    assert short.first == short.steps * 4 // 5 and short.first % rungs["64x2"].every == 0
    assert [run.lr for run in runs_of(rungs["256x6"], 0.003)] == [0.003, 0.0015, 0.006]
    shown = capsys.readouterr().out
    assert shown.startswith("rung ") and "64x2, rates" in shown and "256x6, hold-out" in shown and "sum " in shown
    with pytest.raises(ConfigError, match="exists; choose another"):
        planned(tmp_path)
    with pytest.raises(ConfigError, match=r"rung \d+x\d+: no layout fits"):
        planned(tmp_path / "large", "--hold-out=1536x18", train=["--preset", "moe-1b-a200m"])


def test_a_size_named_twice_is_one_rung_and_a_plan_says_what_a_fit_lacks(tmp_path, capsys):
    twice = "--sizes=32x1,32x1x8,32x1x16,64x2"
    ladder = planned(tmp_path, twice, "--hold-out=96x2", "--tokens=0.1,0.3", "--experts=16")
    assert [rung.name for rung in ladder.rungs] == ["32x1", "32x1x16", "64x2", "64x2x16", "96x2"]
    assert [steps / ladder.rungs[0].steps[0] for steps in ladder.rungs[0].steps] == [1, 3]
    assert "fit` will not be possible: a law of 6 constants" in capsys.readouterr().out
    planned(tmp_path / "enough", "--sizes=32x1,64x2,96x2,128x2")
    assert "not be possible" not in capsys.readouterr().out


def test_tokens_of_a_rung_with_another_batch_are_its_own(plan_text, tmp_path):
    (tmp_path / "ladder.yaml").write_text(plan_text.replace("settings: {", "settings: {train.global_batch: 32, ", 1))
    ladder = read_ladder(tmp_path)
    assert [ladder.step_tokens(rung) for rung in ladder.rungs] == [32 * 256, 8 * 256, 8 * 256]
    small, other = (cost_of(ladder, rung, 10, load_hardware("cpu-2"), 1) for rung in ladder.rungs[:2])
    assert (small.tokens, other.tokens) == (10 * 32 * 256, 10 * 8 * 256)
    shown = table(ladder, load_hardware("cpu-2"), 1).splitlines()
    most = ladder.rungs[0].steps[-1] * 32 * 256
    assert f"{most / 1e6:.3g}M" in shown[2]


def test_unset_sizes_are_five_below_the_presets_and_the_largest_is_held_out(tmp_path):
    ladder = planned(tmp_path, "--hardware=h100", train=("--preset", "moe-1b-a200m"))
    sizes = [parse_size(rung.name, "") for rung in ladder.rungs]
    active = [weights(sized(ladder.config, size))[0] for size in sizes]
    assert (
        len(sizes) == 5
        and active == sorted(active)
        and [rung.held_out for rung in ladder.rungs] == [False] * 4 + [True]
    )
    assert sizes[-1].width < ladder.config.model.hidden_size


@pytest.mark.parametrize(
    ("options", "train", "error"),
    [
        (["--sizes=64x2"], [], "leaves 0 sizes without the hold-out 64x2"),
        (["--sizes=64x2,96x2,100x2"], [], "use 96 or 128"),
        (["--experts=x"], [], "'x' is not a list of numbers"),
        (["--experts=0"], [], "'0' is not a list of numbers"),
        (["--tokens=900T"], [], "'900T' is not a number up to"),
        ([], ["--train.steps=7"], "--train.steps is set by the ladder"),
        ([], ["--train.time_budget=7"], "--train.time_budget is set by the ladder"),
        ([], ["--train.stages=[{lr: 1e-3}]"], "--train.stages is set by the ladder"),
        (["--sizes=64x2,96x2,128x2", "--tokens=10,15"], [], "15 is not a multiple of 10"),
    ],
)
def test_a_plan_that_cannot_be_is_an_error_and_writes_nothing(options, train, error, tmp_path):
    with pytest.raises(ConfigError, match=error):
        planned(tmp_path, *options, train=["--preset", "debug", *train])
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    planned(folder, "--sizes=64x2,96x3", "--hold-out=128x4")
    return (folder / "ladder" / "ladder.yaml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("steps: [", "steps: [7, ", "not ascending multiples of 5"),
        ("every: ", "every: 1", "does not divide"),
        ("name: 96x3", "name: 64x2", "is not a unique folder name"),
        ("model.hidden_size: 64", "model.hidden_sise: 64", "model.hidden_sise is not a setting"),
        ("model.hidden_size: 64", "model.hidden_size: big", "rung 64x2 is invalid .*hidden_size: expected"),
        ("model.num_hidden_layers: 2", "model.num_hidden_layers: 0", "rung 64x2: --model.num_hidden_layers 0 is out of"),
        ("rates: [", "rates: [0, ", "one rate above 0"),
        ("debug]", "debug, --train.steps, '7']", "--train.steps is set by the ladder"),
        ("settings: {", "settings: {train.steps: 7, ", "rung 64x2: train.steps is set by the ladder"),
        ("settings: {", "settings: {train.lr: 1, ", "rung 64x2: train.lr is set by the ladder"),
        ("rungs:", "rings:", "is invalid"),
    ],
)  # fmt: skip
def test_an_edit_that_makes_a_plan_invalid_is_an_error(old, new, error, plan_text, tmp_path):
    (tmp_path / "ladder.yaml").write_text(plan_text.replace(old, new))
    with pytest.raises(ConfigError, match=error):
        read_ladder(tmp_path)


def test_finished_runs_of_other_settings_are_an_error_and_not_counted(plan_text, tmp_path):
    (tmp_path / "ladder.yaml").write_text(plan_text)
    ladder = read_ladder(tmp_path)
    for run in runs_of(ladder.rungs[0], 0.003):
        (tmp_path / run.name).mkdir()
        trained = load_config([*ladder.options, *LadderRun(run.rung, run.steps, run.lr).options(tmp_path)])
        save_config(trained, tmp_path / run.name / "config.yaml")
    assert open_ladder(tmp_path).rungs == ladder.rungs
    for old, new, error in (
        ("debug]", "debug, --data.seq_len=512]", "data.seq_len 256, but ladder.yaml has 512 for rung 64x2; undo"),
        ("debug]", "debug, '--data.source=text:a/*.txt']", "data.source stdlib, but .* text:a/"),
        ("debug]", "debug, --train.global_batch=16]", "train.global_batch 8, but"),
        ("model.num_attention_heads: 2", "model.num_attention_heads: 4", "model.num_attention_heads 2, but"),
    ):
        assert old in plan_text
        (tmp_path / "ladder.yaml").write_text(plan_text.replace(old, new, 1))
        with pytest.raises(ConfigError, match=rf"64x2-\d+-lr0.003 was trained with {error}"):
            open_ladder(tmp_path)
    for words in (["run"], ["fit"], ["slurm", "--time=60"]):
        with pytest.raises(ConfigError, match=r"64x2-.* was trained with model.num_attention_heads 2"):
            command.ladder([*words, str(tmp_path)])
    free = plan_text.replace("debug]", "debug, --train.micro_batch=1, --data.workers=1, --train.lr=1]")
    (tmp_path / "ladder.yaml").write_text(free)
    open_ladder(tmp_path)


def test_the_best_rate_is_the_parabolas_minimum_over_the_rates_logarithm():
    rates = [0.001 * 2**n for n in range(5)]
    losses = [3 + (math.log2(rate / 0.005)) ** 2 / 10 for rate in rates]
    assert best_rate(rates, losses) == pytest.approx(0.005, rel=1e-3)
    assert best_rate(rates, [1, 2, 3, 4, 5]) == 0.001  # at the border there is no parabola
    assert best_rate(rates, [5, 4, 3, 2.9, math.inf]) == 0.008  # nor next to a run that diverged


# Runs

TIMES = ("seconds", "tokens_per_s")


def plan_tiny(folder: Path, small_run: list[str], *options: str) -> Path:
    """Plan two rungs and a hold-out of a second each, at one rate."""
    own = "--run.dir --train.steps --model.hidden_size --model.num_attention_heads --checkpoint.every".split()
    train = [word for word in small_run if word.partition("=")[0] not in own]
    train += ["--model.hidden_size=64", "--model.num_attention_heads=4", "--train.lr=0.02", "--log.level=quiet"]
    sizes = ["--sizes=32x1,48x2", "--hold-out=64x2", "--tokens=2.56K,5.12K", "--rates=1", "--hardware=cpu-2"]
    assert command.ladder(["plan", "--to", str(folder), *sizes, *options, "--", *train]) == 0
    return folder


@pytest.fixture
def fast(monkeypatch):
    """Runs start from a Python that has imported everything."""
    monkeypatch.setattr(sys, "executable", warm.python())
    monkeypatch.setenv("PYTHONPATH", warm.environment()["PYTHONPATH"])


def results(folder: Path) -> dict:
    found = json.loads((folder / "results.json").read_text())
    for run in found["runs"]:
        assert all(run.pop(name) > 0 for name in TIMES)
    return found


@pytest.fixture
def started():
    """Return a function that starts `smolds ladder`; it and its runs, which die with it, end with the test."""
    with ExitStack() as stack:

        def start(*words: str) -> subprocess.Popen:
            process = subprocess.Popen(
                [warm.python(), "-c",
                 "import sys; sys.executable = sys.argv.pop(1); from smolds_dist.cli import main; main()",
                 warm.python(), "ladder", *words],
                env=warm.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def wait_for_step(run: Path, step: int) -> list[psutil.Process]:
    """Wait until a run has trained a step; return the processes of all runs."""
    deadline = time.monotonic() + 60 * PATIENCE
    while not any(row["step"] >= step for row in rows_without_timing(run) if "loss" in row):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [one for one in psutil.process_iter(["cmdline"]) if str(run.parent) in " ".join(one.info["cmdline"] or ())]


def test_a_killed_ladder_continues_to_the_same_results(small_run, tmp_path, fast, started, capsys):
    whole, killed = (plan_tiny(tmp_path / name, small_run) for name in ("whole", "killed"))
    assert command.ladder(["run", str(whole), "--jobs=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("validation loss") == 5 and "5 runs finished, 5 of them at the best rate" in shown
    expected = results(whole)
    assert expected["best_rate"] == 0.02 and len(expected["points"]) == 5
    assert [run["held_out"] for run in expected["runs"]] == [False] * 4 + [True]
    by_name = {run["run"]: run for run in expected["runs"]}
    long, short = by_name["32x1-20-lr0.02"], by_name["32x1-10-lr0.02"]
    assert (long["tokens"], short["tokens"], short["own_steps"]) == (20 * 8 * 32, 10 * 8 * 32, 2)
    # Of trunks whose checkpoint before the decay stays for a branch
    assert long["noise_scale"]["tokens"] > 0 and "32x1-20-lr0.02: noise scale " in shown
    assert sorted(run["run"] for run in expected["runs"] if run["noise_scale"]) == ["32x1-20-lr0.02", "48x2-20-lr0.02"]
    # A branch is the run that it would have been by itself.
    rates = [[row["lr"] for row in rows_without_timing(whole / run["run"]) if "lr" in row] for run in (long, short)]
    assert rates[0][:8] == rates[1][:8] and rates[1][-1] == pytest.approx(0.1 * 0.02)
    assert [run["loss"] for run in (long, short)] == [
        [row["val_loss"] for row in rows_without_timing(whole / run["run"]) if "val_loss" in row][-1]
        for run in (long, short)
    ]

    with pytest.raises(ConfigError, match="cannot be fitted to 4 runs of 2 sizes"):
        command.ladder(["fit", str(whole)])
    only = ["run", str(killed), "--only=48x2"]
    process = started(*only)
    for one in wait_for_step(killed / "48x2-20-lr0.02", 9):
        one.kill()
    process.communicate(timeout=60)
    assert not (killed / "results.json").exists()
    assert command.ladder([*only, "--jobs=2"]) == 0
    assert capsys.readouterr().out.count("validation loss") == 2
    assert results(killed)["runs"] == [run for run in expected["runs"] if run["rung"] == "48x2"]
    assert command.ladder(only) == 0
    assert "validation loss" not in capsys.readouterr().out
    shutil.rmtree(killed / "48x2-20-lr0.02" / "checkpoints")
    shutil.rmtree(killed / "48x2-10-lr0.02")
    assert command.ladder(only) == 1
    lost = (
        f"48x2-10-lr0.02 cannot begin, because {killed}/48x2-20-lr0.02 no longer has the checkpoint of step 8; delete"
    )
    assert lost in capsys.readouterr().err

    # Slurm's warning during the last measurement: what is known is written, and the task is requeued.
    for path in [whole / "results.json", *whole.glob("*/noise_scale.json")]:
        path.unlink()
    process = started("run", str(whole))
    assert process.stdout and "32x1-20-lr0.02: noise scale" in process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 75
    measured = [run["run"] for run in results(whole)["runs"] if run["noise_scale"]]
    assert measured == ["32x1-20-lr0.02"]


def test_rates_are_tried_until_the_best_is_not_at_the_border_and_failures_are_named(small_run, tmp_path, fast, capsys):
    folder = plan_tiny(tmp_path / "ladder", small_run, "--rates=3")
    text = (folder / "ladder.yaml").read_text()
    assert "rates: [0.01, 0.02, 0.04]" in text
    (folder / "ladder.yaml").write_text(text.replace("rates: [0.01, 0.02, 0.04]", "rates: [0.0001, 0.0002, 1000.0]"))
    (folder / "32x1-20-lr0.0001").write_text("in the way")
    assert command.ladder(["run", str(folder), "--only=rates"]) == 1
    shown = capsys.readouterr()
    assert re.search(r"32x1-20-lr0.0001 failed: exit code 2; see \S+\.log; smolds: .* cannot be written", shown.out)
    assert "32x1-20-lr0.0002: validation loss" in shown.out
    assert "1 runs failed: 32x1-20-lr0.0001" in shown.err
    (folder / "32x1-20-lr0.0001").unlink()
    (folder / "ladder.yaml").write_text(text.replace("rates: [0.01, 0.02, 0.04]", "rates: [0.0001, 0.0002]"))
    assert command.ladder(["run", str(folder), "--only=rates"]) == 0
    found = results(folder)
    assert [one["lr"] for one in found["sweep"]] == [0.0001, 0.0002, 0.0004, 0.0008]
    assert found["best_rate"] == 0.0008 and "at the border of the rates tried" in capsys.readouterr().out


def test_ctrl_c_stops_all_runs_which_save_and_resume(small_run, tmp_path, fast, started):
    folder = plan_tiny(tmp_path / "ladder", small_run, "--tokens=2M,4M")
    process = started("run", str(folder), "--jobs=2")
    run = next(rung for rung in read_ladder(folder).rungs if rung.name == "48x2")
    trunk = folder / f"48x2-{run.steps[-1]}-lr0.02"
    wait_for_step(trunk, 1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == 130 and "failed" not in stdout + stderr
    assert any((trunk / "checkpoints").glob("step_*"))
    assert json.loads((trunk / "state.json").read_text())["state"] == "stopped"
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]


def test_a_ladder_is_fitted_from_its_results_alone(tmp_path, capsys):
    law = Law(1.5, 40.0, 300.0, 0.4, 0.35)
    runs = [
        {"run": f"{active}-{tokens}", "held_out": active == 4e6, "active": active, "total": 2 * active, "tokens": tokens,
         "loss": law.loss(active, 2 * active, tokens), "losses": {}, "granularity": 2.0, "seconds": 1.0, "lr": 0.01}
        for active in (1e5, 2e5, 4e5, 8e5, 4e6)
        for tokens in (10 * active, 20 * active, 40 * active)
    ]  # fmt: skip
    contents = {"best_rate": 0.01, "sweep": [], "points": [run["run"] for run in runs], "runs": runs}
    (tmp_path / "results.json").write_text(json.dumps(contents))
    assert command.ladder(["fit", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "12 runs of 4 sizes" in shown and f"written to {tmp_path}/fit.json" in shown
    fitted = read_json(tmp_path / "fit.json", "", FittedLaw)
    assert fitted.predict(4e6, 8e6, 1.6e8)[0] == pytest.approx(law.loss(4e6, 8e6, 1.6e8), rel=0.01)
    assert (tmp_path / "fit.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match=r"results.json.*smolds ladder run"):
        command.ladder(["fit", str(tmp_path / "none")])


def test_the_measured_ladder_predicts_its_hold_out_and_the_docs_have_its_numbers(tmp_path):
    shutil.copytree(ROOT / "docs" / "ladder", tmp_path / "kept")
    assert command.ladder(["fit", str(tmp_path / "kept")]) == 0  # without the runs' folders
    for name in ("results.json", "ladder.yaml"):
        assert (tmp_path / "kept" / name).read_text() == (ROOT / "docs" / "ladder" / name).read_text()
    fitted, text = (
        fit_all(read_points(ROOT / "docs" / "ladder"), resamples=20),
        (ROOT / "docs" / "ladder.md").read_text(),
    )
    (hold_out,) = (point for point in fitted.points if point.held_out)
    loss, low, high = fitted.predict(hold_out.active, hold_out.total, hold_out.tokens, hold_out.granularity)
    assert abs(loss / hold_out.loss - 1) < 0.015 and low < hold_out.loss < high
    assert hold_out.flops >= 4 * max(point.flops for point in fitted.fitted)
    kept = json.loads((ROOT / "docs" / "ladder" / "fit.json").read_text())
    assert kept["law"]["E"] == pytest.approx(fitted.law.E, rel=1e-3)
    for number in (loss, hold_out.loss, *(point.loss for point in fitted.fitted)):
        assert f"{number:.3f}" in text
