"""Training from Python, as in a notebook."""

import subprocess
import sys

import pytest
import warm

import smolds_dist
from smolds_dist import ConfigError, DeepSeekV3ForCausalLM, RunResult, launch, load_config, train


def test_train_and_launch_return_their_results(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm.python())
    one = train(load_config([*small_run, "--run.name=one", "--checkpoint.every=0"]))
    two = launch(load_config([*small_run, "--run.name=two", "--checkpoint.every=0", "-q"]), procs=2)
    assert isinstance(one, RunResult) and (one.exit_code, one.steps) == (two.exit_code, two.steps) == (0, 6)
    assert one.val_loss == pytest.approx(two.val_loss, rel=1e-4)
    assert one.loss is not None and one.val_bits_per_byte is not None
    for result in (one, two):
        assert result.export == result.run_dir / "export"
        assert DeepSeekV3ForCausalLM.from_pretrained(result.export).config.hidden_size == 32
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]


def test_invalid_options_are_config_errors(small_run):
    config = load_config([*small_run, "--run.name=one"])
    config.train.lr = -1
    with pytest.raises(ConfigError, match="more than 0"):
        train(config)
    with pytest.raises(ConfigError, match="more than 0"):
        launch(config)


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, smolds_dist\n"
        "smolds_dist.load_config\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules), 'heavy'\n"
        "import smolds_dist.training.trainer\n"
        "assert callable(smolds_dist.train)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        smolds_dist.nothing  # noqa: B018
