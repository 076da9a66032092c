"""Every layout trains the same model: losses, gradient norms, weights and biases match a single process."""

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from parity_cases import (
    CASES,
    CHANGES,
    LONG_CASES,
    LONG_CHANGES,
    LONG_POISONED,
    LONG_SAME,
    POISONED,
    SAME,
    Case,
    local,
    ranks,
    with_long,
)
from parity_worker import MOST_IN_A_FILE, SAVE_AT, STEPS, USUAL, train_case
from ranks import run_ranks
from safetensors.torch import save_file

from smolds_dist.checkpoint.files import open_verified
from smolds_dist.interchange.export import build_model, model_config

TOLERANCE = 1e-5  # relative, of losses; ten times as large for norms, weights and shares


def tolerance_of(case: Case) -> float:
    """Return the tolerance: bf16 rounding differs between layouts, and more so if it changes the selected experts."""
    if "bf16" not in case.names:
        return TOLERANCE
    return 2e-3 if "every" in case.names else 1e-2


class Runs:
    """Train each case once, all cases of a world size in one launch, and keep checkpoints and exports."""

    def __init__(self, folder: Path, everything: bool):
        self.folder = folder
        self.cases = list(dict.fromkeys(CASES + LONG_CASES * everything))
        self.changes = list(dict.fromkeys(CHANGES + LONG_CHANGES * everything))
        self.changes += [(case, case) for case in dict.fromkeys(SAME + LONG_SAME * everything)]
        self.poisoned = POISONED + LONG_POISONED * everything

    def initial_weights(self, case: Case) -> Path:
        """Return the folder with the case's initial weights."""
        return self.folder / str(case) / "initial"

    def checkpoint(self, case: Case) -> Path:
        return self.folder / str(case) / "run" / "checkpoints" / f"step_{SAVE_AT:08}"

    def continued_from(self, source: Case, target: Case) -> Path:
        """Return the folder with the target's weights after loading the source's checkpoint."""
        return self.folder / str(source) / f"as {target}"

    @cache  # noqa: B019
    def local(self, case: Case, skip: bool = False) -> dict:
        """Train in one process in plain PyTorch; `skip` omits step SAVE_AT."""
        if skip:
            return train_case(case.options, case.disturb, skip=True)
        return train_case(
            case.options, case.disturb, save=str(self.folder / str(case)), export=str(self.initial_weights(case))
        )

    @cache  # noqa: B019
    def of_ranks(self, world: int) -> dict:
        """Return the uninterrupted runs by case, and the poisoned ones by case and poison."""
        cases = [case for case in self.cases if case.world == world]
        poisoned = [(case, poison) for case, poison in self.poisoned if case.world == world]
        jobs = [
            self._job(case, save=str(self.folder / str(case)), export=str(self.initial_weights(case))) for case in cases
        ]
        jobs += [self._job(case, poison=poison) for case, poison in poisoned]
        return dict(zip((*cases, *poisoned), self._train(world, jobs), strict=True))

    def uninterrupted(self, case: Case) -> dict:
        return self.of_ranks(case.world)[case] if case.world else self.local(case)

    @cache  # noqa: B019
    def continued(self, world: int) -> dict[tuple[Case, Case], dict]:
        """Return the runs that resume from a checkpoint."""
        pairs = [(source, target) for source, target in self.changes if target.world == world]
        jobs = []
        for source, target in pairs:
            self.uninterrupted(source)
            export = str(self.continued_from(source, target))
            jobs.append(self._job(target, resume=str(self.checkpoint(source)), export=export))
        return dict(zip(pairs, self._train(world, jobs), strict=True))

    def poisoned_run(self, case: Case, poison: str) -> dict:
        if case.world:
            return self.of_ranks(case.world)[case, poison]
        return train_case(case.options, case.disturb, poison=poison)

    @staticmethod
    def _job(case: Case, **more: str) -> dict:
        return dict(options=case.options, disturb=case.disturb, autoep=case.autoep, **more)

    @staticmethod
    def _train(world: int, jobs: list[dict]) -> list[dict]:
        if world == 0:
            return [train_case(**job) for job in jobs]
        lines = run_ranks(world, "parity_worker.py", json.dumps(jobs)).stdout.splitlines()
        return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]


@pytest.fixture(scope="session")
def runs(tmp_path_factory, request):
    return Runs(tmp_path_factory.mktemp("runs"), request.config.getoption("--all"))


def parametrize_cases(short: list[Case], long: list[Case]):
    return pytest.mark.parametrize("case", with_long(short, long), ids=str)


def assert_same_numbers(result: dict, expected: dict, steps: slice, tolerance: float = TOLERANCE) -> None:
    """Compare losses and gradient norms of `steps`, and the weights after the last; except in bf16, also the biases."""
    assert result["losses"] == pytest.approx(expected["losses"][steps], rel=tolerance)
    assert result["norms"] == pytest.approx(expected["norms"][steps], rel=10 * tolerance)
    assert result["weights"] == pytest.approx(expected["weights"], rel=10 * tolerance)
    assert result["averages"] == pytest.approx(expected["averages"], rel=10 * tolerance, abs=1e-6)
    if tolerance == TOLERANCE:
        for ours, theirs in zip(result["biases"], expected["biases"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)


def assert_same_run(result: dict, expected: dict) -> None:
    assert_same_numbers(result, expected, slice(None))
    assert result["totals"] == expected["totals"]
    for name in ("shares", "entropies"):  # of every part of the model and of every layer
        for ours, theirs in zip(result[name], expected[name], strict=True):
            assert ours == pytest.approx(theirs, rel=10 * TOLERANCE, abs=TOLERANCE)
    for ours, theirs in zip(result["histograms"], expected["histograms"], strict=True):
        assert [sum(layer) for layer in ours] == [256 * 8] * len(ours)  # 8 sequences x 32 tokens x 8 experts
        # a probability at the edge of two bins may be in either
        assert (
            sum(abs(a - b) for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=True)) < 40
        )


def assert_same_run_but_for_rounding(result: dict, expected: dict, tolerance: float) -> None:
    """Compare bf16 runs: with tight bounds in the first step, which has the same weights, and wider ones in the rest."""
    assert result["losses"][0] == pytest.approx(expected["losses"][0], rel=TOLERANCE)
    assert result["norms"][0] == pytest.approx(expected["norms"][0], rel=2e-3)
    assert result["shares"][0] == pytest.approx(expected["shares"][0], rel=0.02, abs=TOLERANCE)
    assert result["entropies"][0] == pytest.approx(expected["entropies"][0], rel=10 * TOLERANCE)
    assert_same_numbers(result, expected, slice(None), tolerance)
    assert result["totals"] == expected["totals"]


def test_the_reference_learns_and_its_gradients_are_clipped(runs):
    reference = runs.local(local())
    assert reference["losses"][-1] < reference["losses"][0] - 0.2
    assert max(reference["norms"]) > 0.5  # else clipping would have no effect
    # 8 sequences x 32 tokens x 2 experts per step, for any micro batch size
    assert reference["totals"] == [[512.0, 512.0]] * STEPS


@parametrize_cases(CASES, LONG_CASES)
def test_every_layout_starts_from_the_same_model_bit_for_bit(runs, case):
    for one in (case, case.reference):
        runs.uninterrupted(one)
    files = sorted(runs.initial_weights(case.reference).iterdir())
    assert len(files) > 1
    for file in files:
        assert (runs.initial_weights(case) / file.name).read_bytes() == file.read_bytes()


@parametrize_cases(CASES, LONG_CASES)
def test_layout_matches_the_single_process(runs, case):
    result, expected = runs.uninterrupted(case), runs.local(case.reference)
    if "bf16" in case.names:
        assert_same_run_but_for_rounding(result, expected, tolerance_of(case))
    else:
        assert_same_run(result, expected)


def test_autoeps_own_experts_run_where_asked(runs):
    for case in runs.cases:
        own = {"loop", "grouped"} & set(case.names)
        assert runs.uninterrupted(case)["experts"] == ["GroupedExperts" if own else "CpuExperts"] * bool(case.world)


@parametrize_cases([local("full", "disturbed"), local("deepseek", "full", "disturbed")], [])
def test_counts_exclude_evaluation_sampling_and_recomputation(runs, case):
    assert_same_run(runs.local(case), runs.local(case.reference))


def test_all_to_all_takes_time_only_with_expert_parallelism(runs):
    for case in runs.cases:
        for seconds in runs.uninterrupted(case)["seconds"]:
            assert (seconds["all_to_all"] > 0) == (case.expert > 1), case
            assert all(seconds[phase] > 0 for phase in ("data", "forward", "backward", "optimizer"))


def test_gradient_shares_sum_to_1_and_entropies_are_in_range(runs):
    reference = runs.local(local())
    assert [sum(shares) for shares in reference["shares"]] == pytest.approx([1.0] * STEPS)
    assert all(0 < entropy <= math.log(8) for layers in reference["entropies"] for entropy in layers)


@parametrize_cases([local("clip"), local("clip", "muon"), local("latent", "clip")], [])
def test_attention_is_clipped(runs, case):
    free = local(*(name for name in case.names if name != "clip"))
    assert runs.local(case)["losses"][1:] != runs.local(free)["losses"][1:]


def test_bf16_without_zero_sums_gradients_of_all_ranks_in_fp32():
    """Otherwise the first norms differ by 1e-4: two ranks have the micro batches of one."""
    one, two = (Runs._train(world, [Runs._job(ranks(world, 1, 0, "bf16"))])[0] for world in (1, 2))
    assert two["norms"][0] == pytest.approx(one["norms"][0], rel=1e-6)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)


@parametrize_cases([local("bf16", "every"), local("muon", "bf16")], [])
def test_bf16_follows_fp32_and_keeps_the_biases_in_fp32(runs, case):
    exact = runs.local(local(*(name for name in case.names if name != "bf16")))
    assert runs.local(case)["losses"] == pytest.approx(exact["losses"], rel=0.02)
    for result in [runs.local(case), *(runs.uninterrupted(one) for one in runs.cases if one.reference == case)]:
        assert result["bias_dtypes"] == ["torch.float32"]


@pytest.mark.parametrize(("source", "target"), with_long(CHANGES, LONG_CHANGES), ids=str)
def test_checkpoint_continues_in_another_layout(runs, source, target):
    """Check several steps after the change, because optimizer state affects the second step and later ones."""
    result = runs.continued(target.world)[source, target]
    assert len(result["losses"]) == STEPS - SAVE_AT
    assert_same_numbers(result, runs.local(target.reference), slice(SAVE_AT, None))


@parametrize_cases(SAME, LONG_SAME)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(runs, case):
    result, expected = runs.continued(case.world)[case, case], runs.uninterrupted(case)
    for name in ("losses", "norms", "totals"):
        assert result[name] == expected[name][SAVE_AT:]
    for name in ("biases", "weights", "averages"):
        assert result[name] == expected[name]


CONTINUED = with_long(CHANGES + [(one, one) for one in SAME], LONG_CHANGES + [(one, one) for one in LONG_SAME])


# In every layout, with AdamW and Muon, in fp32 and bf16.
@pytest.mark.parametrize(("source", "target"), CONTINUED, ids=str)
def test_all_ranks_together_write_the_same_files_as_one_process(runs, tmp_path, source, target):
    runs.continued(target.world)
    written = runs.continued_from(source, target)
    checkpoint = open_verified(runs.checkpoint(source))
    tokens = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    model = build_model(checkpoint, model_config(checkpoint.manifest, tokens))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if "bf16" in target.names else torch.float32)
    state = model.state_dict()
    split = split_torch_state_dict_into_shards(
        {name: tensor for name, tensor in state.items() if name in dict(model.named_parameters()) or "bias" in name},
        max_shard_size=MOST_IN_A_FILE * state["lm_head.weight"].itemsize,
    )
    assert len(split.filename_to_tensors) > 1
    for name, tensors in split.filename_to_tensors.items():
        save_file({one: state[one] for one in tensors}, tmp_path / name, metadata={"format": "pt"})
        assert (written / name).read_bytes() == (tmp_path / name).read_bytes()
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"]["total_size"] == split.metadata["total_size"]


@pytest.mark.parametrize(("case", "poison"), with_long(POISONED, LONG_POISONED), ids=str)
def test_nonfinite_or_outlying_step_on_one_rank_is_skipped_on_all(runs, case, poison):
    """The run equals that of one process that skips the step."""
    result = runs.poisoned_run(case, poison)
    assert result["applied"] == [step != SAVE_AT for step in range(1, STEPS + 1)]
    assert not result["losses"].pop(SAVE_AT - 1) < USUAL
    result["norms"].pop(SAVE_AT - 1)
    assert_same_numbers(result, runs.local(case.reference, skip=True), slice(None), tolerance_of(case))
