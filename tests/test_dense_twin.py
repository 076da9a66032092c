"""A dense twin of a mixture: one expert with the mixture's active weights, computed as a dense layer."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from smolds_dist.config import load_config
from smolds_dist.interchange.export import export
from smolds_dist.model import DeepSeekV3Config
from smolds_dist.model.moe import DeepSeekMoE, SwiGLU
from smolds_dist.planner.family import Size, sized, weights
from smolds_dist.rows import read_rows
from smolds_dist.training.trainer import train


def functions(tensor: torch.Tensor) -> set[str]:
    """Return the names of all functions in a tensor's graph."""
    found, left = set(), [tensor.grad_fn]
    while left:
        if (one := left.pop()) is not None:
            found.add(type(one).__name__)
            left += [parent for parent, _ in one.next_functions]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_is_a_swiglu_without_dispatch(dtype):
    torch.manual_seed(0)
    layer = DeepSeekMoE(DeepSeekV3Config(hidden_size=32, intermediate_size=48, num_experts=1, num_experts_per_tok=1))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    dense = SwiGLU(32, 48)
    gate, up = layer.experts.gate_up_proj[0].chunk(2)
    dense.load_state_dict(
        {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": layer.experts.down_proj[0]}
    )
    layer, dense, x = layer.to(dtype), dense.to(dtype), torch.randn(2, 5, 32, dtype=dtype)
    ours, theirs = layer(x), dense(x)
    torch.testing.assert_close(ours, theirs)
    for output in (ours, theirs):
        output.square().sum().backward()
    torch.testing.assert_close(layer.experts.down_proj.grad[0], dense.down_proj.weight.grad)
    torch.testing.assert_close(layer.experts.gate_up_proj.grad[0].chunk(2)[1], dense.up_proj.weight.grad)
    assert layer.gate.weight.grad.abs().max() < 1e-4
    assert layer.tokens_per_expert.tolist() == [10]
    assert not {name for name in functions(layer(x)) if name.startswith(("_Dispatch", "_Combine"))}


@pytest.mark.parametrize("size", [(192, 4), (64, 2)])
def test_a_twin_has_the_mixtures_active_weights(size):
    config = load_config(["--preset", "debug"])
    mixture, twin = weights(sized(config, Size(*size))), weights(sized(config, Size(*size, 1)))
    assert twin[0] == twin[1] == pytest.approx(mixture[0], rel=0.01)


def test_a_twin_trains_resumes_and_exports_as_a_dense_model(small_run, tmp_path):
    constant = ["--train.schedule=wsd", "--train.decay_fraction=0", "--log.tensorboard=false", "--log.sample_every=0"]
    twin = sized(load_config([*small_run, *constant, "--run.name=whole"]), Size(32, 2, 1))
    train(twin)
    halted = replace(twin, run=replace(twin.run, name="halted"), train=replace(twin.train, steps=4))
    train(halted)
    train(replace(halted, train=twin.train, checkpoint=replace(twin.checkpoint, resume="auto")))
    whole, resumed = (
        {row["step"]: row["loss"] for row in read_rows(tmp_path / "runs" / name / "metrics.jsonl") if "loss" in row}
        for name in ("whole", "halted")
    )
    assert len(whole) == 6 and resumed == whole
    export([str(tmp_path / "runs" / "halted"), "--to", str(tmp_path / "exported")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert isinstance(theirs, LlamaForCausalLM) and theirs.config.intermediate_size == 64
