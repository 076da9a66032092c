"""Maximal update parametrization: activations keep their size over widths, and rates follow the tensor's shape."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from smolds_dist.checkpoint.files import Manifest
from smolds_dist.checkpoint.resume import check_compatible
from smolds_dist.errors import ConfigError
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, empty_model
from smolds_dist.parallel.fragments import fill_parameters
from smolds_dist.parallel.mup import MuP, mup_of
from smolds_dist.parallel.optim import make_optimizer, parameter_groups
from smolds_dist.settings import RunConfig, Train
from smolds_dist.training.initial_values import InitialValues

VOCABULARY, BASE = 64, 64


def model_config(width: int, latent: bool, depth: int = 2) -> DeepSeekV3Config:
    """Return a member of a family whose shapes all grow with the width, except heads and numbers of experts."""
    shape = dict(head_dim=16, num_key_value_heads=width // 32)
    if latent:
        shape = dict(kv_lora_rank=width // 2, q_lora_rank=width // 2, qk_nope_head_dim=8, qk_rope_head_dim=8)
        shape |= dict(v_head_dim=16, n_shared_experts=1, attention="latent", tie_word_embeddings=False)
        shape |= dict(num_nextn_predict_layers=1)
    return DeepSeekV3Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width // 2, num_hidden_layers=depth,
        num_attention_heads=width // 16, num_experts=4, initializer_range=0.1, **shape,
    )  # fmt: skip


def activation_sizes(config: DeepSeekV3Config, train: Train, steps: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """Train on one batch; return the root mean square of every module's output after each of `steps`."""
    model, mup = empty_model(config).train(), mup_of(train, config)
    fill_parameters(model, InitialValues(0, config.initializer_range, mup).fill)
    for buffer in model.buffers():
        buffer.zero_()
    optimizer = make_optimizer(parameter_groups(model.named_parameters(), train, mup), train)
    outputs: dict[str, float] = {}

    def record(name: str):
        def hook(module: nn.Module, inputs: tuple, output) -> None:
            values = output[2 if name.endswith(".gate") else 0] if isinstance(output, tuple) else output
            if isinstance(values, Tensor):
                outputs[name] = values.detach().square().mean().sqrt().item()

        return hook

    for name, module in model.named_modules():
        if name and name != "lm_head":  # which returns the loss
            module.register_forward_hook(record(name))
    ids = torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
    found = {}
    for step in range(max(steps) + 1):
        output = model(input_ids=ids, labels=ids)
        if step in steps:
            found[step] = dict(outputs)
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            found[step]["logits"] = logits.square().mean().sqrt().item()
        output.loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = train.lr * group["rate"]
        optimizer.step()
        optimizer.zero_grad()
    return found


def growth(narrow: DeepSeekV3Config, wide: DeepSeekV3Config, train: Train) -> dict[str, float]:
    """Return how many times larger each output is in the wider or deeper model, at most over steps 1, 3 and 10."""
    small, large = (activation_sizes(config, train, (1, 3, 10)) for config in (narrow, wide))
    names = small[1].keys() & large[1].keys()
    assert {"logits", "model.layers.1.mlp.experts", "model.layers.1.self_attn"} <= names
    return {name: max(large[step][name] / small[step][name] for step in small) for name in names}


def settings(optimizer: str, mup: bool = True) -> Train:
    return Train(optimizer=optimizer, lr=0.01, mup=mup, mup_base_width=BASE, mup_base_depth=2)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_activation_grows_with_the_width(optimizer, latent):
    """The coordinate check of arXiv 2203.03466, appendix D.1."""
    found = growth(model_config(64, latent), model_config(512, latent), settings(optimizer))
    assert max(found.values()) < 1.5, {name: ratio for name, ratio in found.items() if ratio >= 1.5}


def test_the_coordinate_check_sees_the_standard_parametrization():
    found = growth(model_config(64, False), model_config(256, False), settings("adamw", mup=False))
    assert max(found.values()) > 5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_residual_stream_keeps_its_size_over_depths(optimizer):
    shallow, deep = model_config(64, False), model_config(64, False, depth=16)
    names = {"model.layers.1": "model.layers.15", "logits": "logits"}

    def sizes(mup: bool) -> float:
        train = settings(optimizer, mup)
        a, b = (activation_sizes(config, train, (10,))[10] for config in (shallow, deep))
        return max(b[last] / a[first] for first, last in names.items())

    assert sizes(True) < 1.5 < 3 < sizes(False)


def test_a_block_of_multi_token_prediction_keeps_its_size_over_depths():
    """Its branches are the only ones between its projection and its norm."""

    def sizes(depth: int) -> list[float]:
        found = activation_sizes(model_config(64, True, depth), settings("adamw"), (1, 10))
        return [
            found[step][f"model.layers.{depth}.{name}"] for step in (1, 10) for name in ("eh_proj", "self_attn", "mlp")
        ]

    shallow, deep = sizes(2), sizes(16)
    assert deep == pytest.approx(shallow, rel=0.5), (shallow, deep)


def test_initial_values_and_rates_at_the_base_are_the_runs():
    mup = MuP(width_ratio=1.0, base_width=BASE, depth_ratio=1.0, layers=2)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.3.down_proj"):
        tensor = f"model.layers.0.{name}.weight"
        assert mup.initial(tensor, (BASE, BASE)) == 1
        assert mup.rate(tensor, (BASE, BASE), False) == mup.rate(tensor, (BASE, BASE), True) == 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert mup.initial(name, (99, BASE)) == mup.rate(name, (99, BASE), False) == 1


def test_rates_by_part_of_a_model_four_times_as_wide_and_deep():
    """Table 8 of arXiv 2203.03466 for AdamW, and table 1 of arXiv 2310.02244: 1 / width, and 1 / sqrt(depth) twice for the
    last matrix of a branch. Experts count with their own width."""
    train = settings("adamw")
    config = model_config(4 * BASE, latent=False, depth=8)
    model, mup = DeepSeekV3ForCausalLM(config), mup_of(train, config)
    groups = parameter_groups(model.named_parameters(), train, mup)
    rate = {id(p): group["rate"] for group in groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters()}
    block = "model.layers.3."
    for name, expected in {
        "model.embed_tokens.weight": 1, "model.norm.weight": 1 / 4, block + "input_layernorm.weight": 1 / 2,
        block + "self_attn.k_proj.weight": 1 / 8, block + "self_attn.o_proj.weight": 1 / 16,
        block + "mlp.gate.weight": 1 / 8, block + "mlp.experts.gate_up_proj": 1 / 8,
        block + "mlp.experts.down_proj": 1 / 8,  # half as wide as the model, so 1 / 2 for the width and 1 / 4 for the depth
    }.items():  # fmt: skip
        assert found[name] == pytest.approx(expected), name
    assert mup.initial("model.norm.weight", (256,)) == 1 / 4
    for group in groups:  # a step's decay does not depend on the width
        decay = group["rate"] * group["weight_decay"]
        assert decay == pytest.approx(0 if group["part"] == "norms" else train.weight_decay)


def saved(config: RunConfig, weights_only: bool) -> Manifest:
    """Return the manifest of a checkpoint of step 0 that a run with these settings wrote."""
    data = {"schedule": [], "contents": {}, "limits": {}}
    return Manifest(0, "", 0, 0, 0, None, asdict(config), {}, data, {}, {}, {}, weights_only=weights_only)


@pytest.mark.parametrize(
    ("before", "weights_only", "now", "error"),
    [
        (Train(), True, Train(mup=True), "imported weights, whose last norm lacks the factor of --train.mup"),
        (Train(), False, Train(mup=True), "was written with --train.mup False, but this run has True"),
        (Train(mup=True), False, Train(mup=True, mup_base_depth=3), "with --train.mup_base_depth 24, but this run has 3"),
        (Train(), False, Train(mup_base_depth=3), None),
        (Train(mup=True), True, Train(mup=True), None),
    ],
)  # fmt: skip
def test_only_weights_of_the_same_parametrization_resume(before, weights_only, now, error):
    manifest = saved(RunConfig(train=before), weights_only)
    if not before.mup:
        del manifest.config["train"]["mup"]  # as an older version wrote it
    with pytest.raises(ConfigError, match=error) if error else nullcontext():
        check_compatible(RunConfig(train=now), Path("step_0"), manifest)


def test_a_run_logs_the_shape_that_its_rate_is_of():
    text = str(mup_of(Train(mup=True), model_config(64, False)))
    assert text == ("muP: learning rate and initial weights are of width 384 with 24 layers, scaled to width 64 with 2")
