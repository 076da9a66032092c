"""`smolds launch` with real ranks: equal to one process, errors, resume."""

import json
import os
import re
import shlex

import pytest
import torch
from ranks import ROOT, smolds
from safetensors.torch import load_file

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.launching.launcher import launch
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.expert_parallel import deepspeed_config
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.training.trainer import train


def test_two_ranks_with_a_resume_equal_one_process(small_run, tmp_path):
    """Launched by torchrun, resumed by deepspeed: rows and model equal those of an uninterrupted run in this process.

    The newest checkpoint is damaged in between, in a file that only the second rank verifies.
    """
    options = [*small_run, "--parallel.device=cpu", "--train.dtype=fp32", "--train.schedule=wsd"]
    options += ["--train.decay_fraction=0"]  # so that four steps are the first of six
    train(load_config([*options, "--run.name=single"]))

    options += ["--run.name=pair", "--parallel.zero=3", "--parallel.expert=2"]
    begun = smolds("launch", "--nproc-per-node=2", "--", *options, "--train.steps=4", timeout=180)
    assert begun.returncode == 0, begun.text
    for text in ("2 ranks over gloo", "expert parallel size 2", "share of routed tokens per expert"):
        assert text in begun.stdout
    newest = tmp_path / "runs" / "pair" / "checkpoints" / "step_00000004"
    with (newest / "rank_00001.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    resume = ["--launcher=deepspeed", "--", *options, "--checkpoint.resume=auto"]
    resumed = smolds("launch", "--nproc-per-node=2", *resume, timeout=180)
    assert resumed.returncode == 0, resumed.text
    assert f"{newest} is damaged: rank_00001.safetensors differs from what was written" in resumed.stdout
    assert re.search("continuing from .*step_00000002\n", resumed.stdout)

    rows = {name: read_rows(tmp_path / "runs" / name / "metrics.jsonl") for name in ("pair", "single")}
    steps = {name: [row for row in part if "loss" in row] for name, part in rows.items()}
    for ours, theirs in zip(steps["pair"], steps["single"], strict=True):
        assert ours["step"] == theirs["step"]
        for name in ("loss", "grad_norm", "max_vio"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    assert rows["pair"][-1]["val_loss"] == pytest.approx(rows["single"][-1]["val_loss"], rel=1e-3)
    ours, theirs = (load_file(tmp_path / "runs" / name / "export" / "model.safetensors") for name in rows)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (["--nproc-per-node=2", "--", "--parallel.expert=3"], "valid values: 1, 2"),
        (["--nproc-per-node=3", "--"], "use 6 or 9"),
        (["--nproc-per-node=0", "--"], "1 or more"),
        (["--nproc-per-node=two", "--"], "1 or more"),
        (["--launcher=mpich", "--"], "torchrun"),
        (["--restarts=-1", "--"], "0 or more"),
        (["--restarts=1", "--spares=1", "--"], "use --launcher slurm"),
        (["--spares=1", "--"], "needs --restarts"),
        (["--restarts-shrink", "--"], "needs --restarts"),
        (["--train.steps=3"], "after `--`"),
        (["--nproc-per-node=2", "--", "--data.source=text:/nowhere/*"], "check the pattern"),
    ],
)
def test_mistake_is_one_sentence_before_any_rank_starts(small_run, tmp_path, options, fix):
    if "--" in options:
        options = [*options[: options.index("--") + 1], *small_run, *options[options.index("--") + 1 :]]
    result = smolds("launch", *options)
    assert result.returncode == 2, result.text
    assert fix in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_a_command_that_works(small_run):
    result = smolds("launch", "--nproc-per-node=1", "--dry-run", "--", *small_run, "--run.name=dry run")
    assert result.returncode == 0, result.text
    command = shlex.split(result.stdout)
    assert command[1:4] == ["-m", "smolds_dist", "train"]
    assert command[-1] == "--run.name=dry run"


def test_failing_rank_fails_the_launch(small_run, tmp_path):
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": "large"}}))
    result = smolds("launch", "--nproc-per-node=2", "--", *small_run, f"--parallel.ds_config={ds_config}", timeout=180)
    assert result.returncode == 2, result.text
    assert "reduce_bucket_size: Input should be a valid integer" in result.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "is invalid"),
        ('{"bf16": true}', "is invalid (bf16: expected"),
        ('{"fp16": {"enabled": true}}', "enables fp16, but smolds computes in fp32 or bf16"),
        ('{"fp16": true}', "is invalid (fp16: expected"),
        ('{"optimizer": {}}', "remove it"),
        ('{"expert_parallel": {"autoep_size": 7}}', "sets expert_parallel.autoep_size to 7, but the run needs 2"),
        ('{"expert_parallel": {"top_k": 1}}', "sets expert_parallel.top_k to 1, but the run needs 'auto'"),
        ('{"expert_parallel": {"comine_impl": 1}}', "sets expert_parallel.comine_impl, which the installed DeepSpeed"),
        ('{"expert_parallel": {"gate_up_impl": "fast"}}', "expert_parallel: gate_up_impl must be one of"),
        ('{"expert_parallel": {"gate_up_impl": "fused"}}', "use_grouped_mm=false selects the sequential expert loop."),
        ('{"expert_parallel": {"comm_num_sm": [1]}}', "comm_num_sm must be a positive integer"),
        (
            '{"expert_parallel": {"async_split_plan": true}}',
            "async_split_plan to True, which needs NVIDIA GPUs; remove it",
        ),
        ('{"expert_parallel": {"comm_backend": "deepep"}}', "comm_backend to 'deepep', which needs NVIDIA GPUs, "),
        (
            '{"expert_parallel": {"combine_impl": "fused_weighted_sum"}}',
            "which needs NVIDIA GPUs and Triton; remove it",
        ),
        ('{"zero_optimization": {"offload_param": "cpu"}}', "(zero_optimization.offload_param: expected"),
        ("", "is not valid JSON"),
        ('{"zero_optimization": {"offload_param": {"device": "cpu"}}}', "sets offload_param to cpu"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}', "use none or cpu"),
    ],
)
def test_invalid_deepspeed_configuration_is_one_sentence(small_run, tmp_path, text, complaint):
    (tmp_path / "ds.json").write_text(text)
    options = [*small_run, f"--parallel.ds_config={tmp_path / 'ds.json'}", "--parallel.device=cpu"]
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        launch(["--nproc-per-node=2", "--dry-run", "--", *options])


def test_users_expert_parallel_section_is_merged(small_run, tmp_path):
    (tmp_path / "ds.json").write_text('{"expert_parallel": {"combine_impl": "legacy_bmm", "enabled": true}}')
    config = load_config([*small_run, f"--parallel.ds_config={tmp_path / 'ds.json'}", "--parallel.device=cpu"])
    topology = plan_topology(config, detect_machine(), RankInfo(0, 0, 2, 2))
    found = deepspeed_config(config, topology, config.model)["expert_parallel"]
    assert found["combine_impl"] == "legacy_bmm" and found["autoep_size"] == 2 and found["router_pattern"] == "gate"


def test_a_run_with_options_of_autoep(small_run, tmp_path):
    """`async_split_plan` has no effect where every rank holds all experts."""
    options = {"async_split_plan": True, "use_grouped_mm": True, "gate_up_impl": "fused"}
    (tmp_path / "ds.json").write_text(json.dumps({"expert_parallel": options}))
    run = [*small_run, f"--parallel.ds_config={tmp_path / 'ds.json'}", "--parallel.device=cpu", "--train.steps=2"]
    result = smolds("launch", "--nproc-per-node=2", "--", *run, "--parallel.expert=1", timeout=180)
    assert result.returncode == 0, result.text
    assert "AutoEP: use_grouped_mm True, gate_up_impl fused, async_split_plan True\n" in result.stdout
    result = smolds("launch", "--nproc-per-node=2", "--", *run, "--parallel.expert=2")
    assert result.returncode == 2 and "expert_parallel.async_split_plan" in result.stderr
    assert result.stderr.count("\n") == 1


def test_users_deepspeed_configuration_is_used(small_run, tmp_path):
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    settings["zero_optimization"]["overlap_comm"] = False
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    options = ["--parallel.zero=2", f"--parallel.ds_config={tmp_path / 'ds.json'}", "--train.steps=2"]
    result = smolds("train", *small_run, "--run.name=own", *options, timeout=180)
    assert result.returncode == 0, result.text
    assert "DeepSpeed ZeRO 2" in result.stdout
    assert os.path.exists(tmp_path / "runs" / "own" / "export" / "model.safetensors")
