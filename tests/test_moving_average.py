"""`--train.ema`: moving averages of weights and selection biases. tests/test_parity.py compares the layouts."""

import json

import pytest
import torch
from safetensors.torch import load_file

from smolds_dist.checkpoint.files import checkpoints_in, open_verified
from smolds_dist.config import load_config
from smolds_dist.costs.layout import Layout
from smolds_dist.costs.memory import rank_memory, state_bytes
from smolds_dist.errors import ConfigError
from smolds_dist.inference.evaluate import evaluate_model
from smolds_dist.inference.generate import generate
from smolds_dist.interchange.export import export
from smolds_dist.settings import Model
from smolds_dist.training.trainer import train


def stored(run_dir, kind: str) -> dict[int, dict[str, torch.Tensor]]:
    """Return weights and selection biases by step."""
    found = {}
    for folder in reversed(checkpoints_in(run_dir / "checkpoints")):
        reader = open_verified(folder)
        tensors = {name: reader.read_full(name, kind) for name in reader.manifest.tensors if kind in reader.kinds(name)}
        tensors |= {name: reader.stored(name)[kind] for name in reader.selection_biases() if kind in reader.kinds(name)}
        found[reader.manifest.step] = tensors
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_average_of_a_resumed_run_equals_a_loop(small_run, tmp_path, capsys, dtype):
    """It starts at step 2, from the weights; another decay continues it, and without one it is dropped."""
    options = [
        *small_run, "--run.name=one", "--checkpoint.every=1", "--checkpoint.keep=20", "--log.tensorboard=false",
        "--train.lr=0.01", f"--train.dtype={dtype}", "--parallel.device=cpu", "--checkpoint.resume=auto",
    ]  # fmt: skip
    train(load_config([*options, "--train.steps=2"]))
    train(load_config([*options, "--train.steps=4", "--train.ema=0.7"]))
    assert "moving averages (--train.ema 0.7) start from the weights of step 2" in capsys.readouterr().out
    train(load_config([*options, "--train.steps=5", "--train.ema=0.9"]))
    assert "moving averages" not in capsys.readouterr().out
    values, averages = (stored(tmp_path / "runs" / "one", kind) for kind in ("value", "ema"))
    assert not averages[1] and not averages[2]
    expected = values[2]
    assert sum(name.endswith("e_score_correction_bias") for name in expected) == 2
    for step, decay in {3: 0.7, 4: 0.7, 5: 0.9}.items():
        assert averages[step].keys() == expected.keys()
        for name, average in averages[step].items():
            expected[name] = decay * expected[name] + (1 - decay) * values[step][name]
            assert average.dtype == torch.float32
            torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-8)
            assert not torch.equal(average, values[step][name]) or not average.any()
    train(load_config([*options, "--train.steps=6"]))
    assert "the checkpoint's moving averages are dropped; set --train.ema" in capsys.readouterr().out
    assert not stored(tmp_path / "runs" / "one", "ema")[6]


def test_commands_use_the_averages_on_request(small_run, kept_run, tmp_path):
    train(load_config([*small_run, "--run.name=one", "--train.ema=0.9", "--train.lr=0.01", "--log.tensorboard=false"]))
    run_dir, to = tmp_path / "runs" / "one", tmp_path / "export"
    export([str(run_dir), "--weights", "ema", "--to", str(to), "--format", "smolds"])
    assert "| weights | moving average, decay 0.9 |" in (to / "README.md").read_text()
    assert "validation loss" not in (to / "README.md").read_text()
    averages, exported = stored(run_dir, "ema")[6], load_file(to / "model.safetensors")
    for name in exported.keys() & averages.keys():
        assert torch.equal(exported[name], averages[name])
    assert any("bias" in name and tensor.any() for name, tensor in averages.items())
    losses, corpus = {}, [option for option in small_run if option.startswith(("--data.source", "--data.seq_len"))]
    for name, options in {"ema": [run_dir, "--weights", "ema"], "export": [to], "trained": [run_dir]}.items():
        evaluate_model([*map(str, options), "--json", str(tmp_path / f"{name}.json"), *corpus])
        losses[name] = json.loads((tmp_path / f"{name}.json").read_text())["loss"]
    assert losses["ema"] == losses["export"] != losses["trained"]
    generate([str(run_dir), "--weights", "ema", "--prompt", "the", "--max-new-tokens", "2"])
    with pytest.raises(ConfigError, match=r"step_00000006 has no moving averages; train with --train.ema"):
        generate([str(kept_run[0]), "--weights", "ema"])
    with pytest.raises(ConfigError, match=r"export is an export, without steps or moving averages; name its run"):
        generate([str(to), "--weights", "ema"])


def test_decay_of_1_is_an_error():
    with pytest.raises(ConfigError, match=r"--train.ema 1.* use a value below 1"):
        load_config(["--preset=debug", "--train.ema=1"])
    with pytest.raises(ConfigError, match=r"--train.ema 1.5 is out of range"):
        load_config(["--preset=debug", "--train.ema=1.5"])


@pytest.mark.parametrize(("zero", "replicas"), [(0, 1), (2, 8), (3, 8)])
def test_planner_counts_four_bytes_per_weight_sharded_as_the_moments(zero, replicas):
    model = Model(vocab_size=1000)
    layouts = [Layout(8, 8, 1, zero, 1, 1, 64, "bf16", "cpu", copies=True, ema=ema) for ema in (False, True)]
    (_, _, without), (_, _, with_ema) = (state_bytes(model, layout) for layout in layouts)
    parameters = without / 12 * replicas  # two moments and a copy of bf16 weights
    assert with_ema - without == pytest.approx(4 * parameters / replicas)
    plain, averaged = (rank_memory(model, layout) for layout in layouts)
    assert averaged.total - plain.total == pytest.approx(with_ema - without + 4 * parameters / 8)  # and its checkpoint
