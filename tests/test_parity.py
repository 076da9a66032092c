"""Every topology trains the same model: losses, gradient norms, weights and biases of a single process are the reference."""

import json
from functools import cache

import pytest
from parity_worker import train_case
from ranks import run_ranks

STEPS = 20


def case(*options: str, expert: int | None = None, zero: int | None = None, disturb: bool = False) -> tuple:
    layout = () if expert is None else (f"--parallel.expert={expert}", f"--parallel.zero={zero}")
    return (*layout, *options), disturb


CHECKPOINTING = "--train.activation_checkpointing=true"
LATENT = ("--model.attention=latent", "--model.scoring_func=sigmoid", "--model.n_shared_experts=1")
MUON = "--train.optimizer=muon"
LAYOUTS = {
    1: [case("--parallel.engine=deepspeed", "--parallel.zero=1")],
    2: [case(expert=expert, zero=zero) for expert in (1, 2) for zero in (0, 1, 2, 3)],
    4: [case(expert=2, zero=1), case(expert=4, zero=2)],
}
DISTURBED = {
    "gqa": case(CHECKPOINTING, expert=2, zero=1, disturb=True),
    "latent": case(*LATENT, CHECKPOINTING, expert=2, zero=3, disturb=True),
}
WITH_MUON = case(MUON, expert=2, zero=0)
IN_BF16 = [case("--train.dtype=bf16", expert=2, zero=zero) for zero in (0, 1, 2, 3)]
# What the ranks of a world size train one after the other; they are started once.
CASES = {1: LAYOUTS[1], 2: [*LAYOUTS[2], *DISTURBED.values(), WITH_MUON, *IN_BF16], 4: LAYOUTS[4]}


@cache
def reference(*options: str) -> dict:
    return train_case(list(options), disturb=False, steps=STEPS)


@cache
def results_of(world: int) -> dict[tuple, dict]:
    cases = [dict(options=list(options), disturb=disturb, steps=STEPS) for options, disturb in CASES[world]]
    lines = run_ranks(world, "parity_worker.py", json.dumps(cases)).stdout.splitlines()
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    return dict(zip(CASES[world], results, strict=True))


def assert_same_run(result: dict, expected: dict, tolerance: float = 1e-4) -> None:
    assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert result["norms"] == pytest.approx(expected["norms"], rel=10 * tolerance)
    assert result["totals"] == expected["totals"]
    for ours, theirs in zip(result["biases"], expected["biases"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert result["weights"] == pytest.approx(expected["weights"], rel=10 * tolerance)


def test_the_reference_learns_and_its_gradients_are_clipped():
    losses, norms = reference()["losses"], reference()["norms"]
    assert losses[-1] < losses[0] - 0.5
    assert max(norms) > 0.5  # else no topology's clipping would be seen
    # 8 sequences x 32 tokens x 2 experts a step, however they are cut into micro batches
    assert reference()["totals"] == [[512.0, 512.0]] * STEPS


@pytest.mark.parametrize(("world", "topology"), [(world, one) for world, cases in LAYOUTS.items() for one in cases])
def test_topology_gives_the_single_process_run(world, topology):
    assert_same_run(results_of(world)[topology], reference())


@pytest.mark.parametrize(("attention", "model"), [("gqa", ()), ("latent", LATENT)])
def test_counts_leave_out_evaluation_sampling_and_recomputation(attention, model):
    assert_same_run(train_case([*model, CHECKPOINTING], disturb=True, steps=STEPS), reference(*model))
    assert_same_run(results_of(2)[DISTURBED[attention]], reference(*model))


def test_muon_gives_the_single_process_run():
    assert_same_run(results_of(2)[WITH_MUON], reference(MUON))


def test_bf16_follows_fp32_and_keeps_the_biases_in_fp32():
    local = train_case(["--train.dtype=bf16"], disturb=False, steps=STEPS)
    for result in [local, *(results_of(2)[one] for one in IN_BF16)]:
        assert result["losses"] == pytest.approx(reference()["losses"], rel=0.02)
        assert result["bias_dtypes"] == ["torch.float32"]
        assert result["totals"] == [[512.0, 512.0]] * STEPS
