"""Statistics of a step: the same as plain PyTorch's sums, in every layout, without an effect on training."""

import copy
import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from parity_cases import MODELS, ranks
from parity_worker import Shards
from ranks import run_ranks
from statistics_worker import STEPS, statistics_of_run
from test_captured import OperatorRecorder, make_stepper, train
from test_tensorboard import board_of
from torch._dynamo.utils import counters

from smolds_dist.config import load_config
from smolds_dist.model import DeepSeekV3Block, DeepSeekV3ForCausalLM, device
from smolds_dist.observe.curves import over_layers, statistics_of
from smolds_dist.observe.overview import events
from smolds_dist.observe.page import html_page
from smolds_dist.observe.report import report
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.fragments import logical_shapes, split_by_tensor
from smolds_dist.training import trainer
from smolds_dist.training.compiling import try_to_compile, undo_compile
from smolds_dist.training.qk_clip import QkClip
from smolds_dist.training.statistics import group_of
from smolds_dist.training.step import Stepper

LAYOUTS = [ranks(2, 2, 0, "deepseek"), ranks(2, 1, 1), ranks(2, 2, 2, "muon"), ranks(2, 2, 3, "clip", "full")]
LONG_LAYOUTS = {
    2: [ranks(2, expert, zero) for expert, zero in product((1, 2), range(4))] + [ranks(2, 2, 3, "deepseek", "offload")],
    4: [ranks(4, 2, 0), ranks(4, 2, 1, "deepseek"), ranks(4, 4, 2, "muon"), ranks(4, 2, 3)],
}


def plain_squares(tensors: dict[str, torch.Tensor]) -> dict[str, list[float | None]]:
    """Return the root mean square of each part and layer, of parameters by name."""
    values: dict[tuple[str, int], list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        for one in split_by_tensor(logical_shapes(name, tensor.shape), 0, {"value": tensor.flatten()}):
            values.setdefault(group_of(one.name), []).append(one.tensors["value"].double())
    found: dict[str, list[float | None]] = {}
    for (part, layer), several in values.items():
        of_layers = found.setdefault(part, [])
        of_layers += [None] * (layer + 1 - len(of_layers))
        of_layers[layer] = torch.cat(several).square().mean().sqrt().item()
    return found


def assert_close(ours: dict, theirs: dict) -> None:
    """Compare as test_parity.py compares losses and norms: rounding is amplified in gradients of later steps."""
    assert ours.keys() == theirs.keys()
    for kind, parts in theirs.items():
        for part, values in parts.items() if isinstance(parts, dict) else [(kind, parts)]:
            tolerance = 1e-4 if kind in ("gradient", "update") else 1e-5
            mine = ours[kind][part] if isinstance(parts, dict) else ours[kind]
            for one, other in zip(mine, values, strict=True):
                assert one == (None if other is None else pytest.approx(other, rel=tolerance)), (kind, part)


@pytest.mark.parametrize("names", [(), ("deepseek",), ("muon",), ("clip",), ("mtp",)], ids=str)
def test_statistics_equal_plain_sums(names):
    options = [option for name in names for option in MODELS[name]]
    models: list[DeepSeekV3ForCausalLM] = []

    def keep(stepper: Stepper) -> None:
        models.extend([stepper.engine.model, copy.deepcopy(stepper.engine.model)])

    result = statistics_of_run(options, keep)
    after, before = models
    largest: dict[int, float] = {}
    blocks = [module for module in before.modules() if isinstance(module, DeepSeekV3Block)]
    for number, block in enumerate(blocks):
        block.register_forward_hook(
            lambda _, __, out, n=number: largest.__setitem__(n, max(largest.get(n, 0.0), out.abs().max().item()))
        )
    clip = QkClip(SimpleNamespace(model=before, device=torch.device("cpu")), before.config, 1e9)
    for first in range(8 * (STEPS - 1), 8 * STEPS, 2):
        ids = Shards().batch(range(first, first + 2))
        (before(input_ids=ids, labels=ids, use_cache=False).loss / 4).backward()
    weights = {name: parameter.detach() for name, parameter in before.named_parameters()}
    changed = {name: parameter.detach() - weights[name] for name, parameter in after.named_parameters()}
    expected = {
        "weight": plain_squares(weights),
        "gradient": plain_squares({name: p.grad for name, p in before.named_parameters() if p.grad is not None}),
        "update": plain_squares(changed),
        "max_activation": [largest[n] for n in range(len(blocks))],
        "max_logits": clip.take().amax(-1).tolist(),
    }
    assert_close(result["row"], expected)
    if "deepseek" in names:
        assert {"head", "dense", "shared_experts", "attention_kv"} <= result["row"]["weight"].keys()


@pytest.mark.parametrize(
    ("world", "cases"), [(2, LAYOUTS), *(pytest.param(*pair, marks=pytest.mark.long) for pair in LONG_LAYOUTS.items())]
)
def test_every_layout_has_the_statistics_of_one_process(world, cases):
    lines = run_ranks(world, "statistics_worker.py", json.dumps([case.options for case in cases])).stdout.splitlines()
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        expected = statistics_of_run(case.reference.options)
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5), case
        assert_close(result["row"], expected["row"])


@pytest.mark.parametrize("options", [(), ("--train.qk_clip=0.5",)])
def test_captured_passes_stay_and_give_the_same_steps(options):
    with device.as_family("cuda"):
        plain, captured = (make_stepper(3, *options, f"--log.statistics_every={every}") for every in (0, 10))
        captured.capture(torch.randint(0, 97, (2, 24)), OperatorRecorder())
        for one, other in zip(train(plain), train(captured), strict=True):
            for name in one.keys() - ({"logits"} if not options else set()):
                assert torch.equal(one[name], other[name]), name
        assert captured.engine._captured is not None and captured.statistics._sums


def test_compiled_blocks_stay_and_nothing_is_compiled_again():
    stepper = make_stepper(2, "--log.statistics_every=10")
    engine, topology = stepper.engine, stepper.topology
    try:
        assert try_to_compile(engine, topology, 24, engine.model.config, "aot_eager") is None
        stepper.train_step(9, 9)
        compiled = [block.compiled_attend for block in engine.model.model.layers]
        graphs = counters["stats"]["unique_graphs"]
        assert graphs and all(compiled)
        for step in (10, 11):
            output = stepper.train_step(step, step)
            if step == 10:
                row = stepper.statistics.row(output.update.grad_norm, output.logits)
        assert counters["stats"]["unique_graphs"] == graphs
        assert [block.compiled_attend for block in engine.model.model.layers] == compiled
        assert min(row["max_activation"]) > 0 and min(row["max_logits"]) > 0
    finally:
        undo_compile(engine.model)


def test_a_run_shows_its_statistics(small_run, tmp_path):
    config = load_config([*small_run, "--run.name=one", "--train.steps=4", "--log.statistics_every=2"])
    trainer.train(config)
    run_dir = tmp_path / "runs" / "one"
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("event") == "statistics"]
    assert [row["step"] for row in rows] == [2, 4]
    scalars = board_of(run_dir)["scalars"]
    for kind, parts in statistics_of(rows[1]).items():
        for part, values in parts.items():
            assert scalars[f"statistics/{kind}/{part}"][1] == (4, pytest.approx(over_layers(values)))
    assert scalars["statistics_layer_01/ratio/experts"][0] == (
        2,
        pytest.approx(rows[0]["update"]["experts"][1] / rows[0]["weight"]["experts"][1]),
    )
    assert scalars["statistics/max_logits"][0][1] == pytest.approx(max(rows[0]["max_logits"]))
    page = html_page([run_dir])
    assert "<h2>Statistics</h2>" in page and "Update relative to weights" in page
    assert "Largest attention logit by layer" in page
    assert not any("statistics" in line for line in events(rows))
    report([str(run_dir)])
