"""Every topology trains the same model: losses, gradient norms, weights and biases of a single process are the reference."""

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from parity_worker import MOST_IN_A_FILE, SAVE_AT, train_case
from ranks import run_ranks
from safetensors.torch import save_file

from smolds_dist.checkpoint.files import open_verified
from smolds_dist.interchange.export import build_model, model_config

STEPS = 20


def case(*options: str, expert: int | None = None, zero: int | None = None, disturb: bool = False) -> tuple:
    layout = () if expert is None else (f"--parallel.expert={expert}", f"--parallel.zero={zero}")
    return (*layout, *options), disturb


CHECKPOINTING = "--train.activation_checkpointing=full"
LATENT = ("--model.attention=latent", "--model.scoring_func=sigmoid", "--model.n_shared_experts=1")
MUON = "--train.optimizer=muon"
BF16 = "--train.dtype=bf16"
LAYOUTS = {
    1: [case("--parallel.engine=deepspeed", "--parallel.zero=1")],
    2: [case(expert=expert, zero=zero) for expert in (1, 2) for zero in (0, 1, 2, 3)],
    4: [case(expert=2, zero=1), case(expert=4, zero=2)],
}
DISTURBED = {
    "gqa": case(CHECKPOINTING, expert=2, zero=1, disturb=True),
    "latent": case(*LATENT, CHECKPOINTING, expert=2, zero=3, disturb=True),
}
IN_PARTS = [
    case(f"--train.activation_checkpointing={what}", expert=2, zero=zero)
    for what, zero in (("attention", 3), ("experts", 3), ("selective", 3), ("selective", 1))
]
# So low that heads are clipped in every step.
QK_CLIP = "--train.qk_clip=0.5"
CLIPPED = [
    *(case(QK_CLIP, expert=2, zero=zero) for zero in (0, 1, 3)),
    case(QK_CLIP, "--train.optimizer=muon", expert=2, zero=2),
    case(*LATENT, QK_CLIP, expert=2, zero=1),
]
# What published models have besides: dense layers, shared experts, an output weight of their own, YaRN, groups, norms of
# queries and keys; and the routers' losses.
FAMILY = (
    "--model.num_hidden_layers=3", "--model.first_k_dense_replace=1", "--model.dense_intermediate_size=40",
    "--model.n_shared_experts=1", "--model.tie_word_embeddings=false", "--train.sequence_balance_coef=0.05",
    "--train.z_loss_coef=0.01", "--train.seed=4", "--train.lr=0.003",
    '--model.rope_scaling={"factor": 4, "original_max_position_embeddings": 16}',
)  # fmt: skip
DEEPSEEK = (*LATENT, *FAMILY, "--model.n_group=4", "--model.topk_group=2", "--model.latent_norm_eps=1e-6")
QWEN3 = (*FAMILY, "--model.qk_norm=head")
OLMOE = (*FAMILY, "--model.qk_norm=all", "--model.norm_topk_prob=false")
FAMILIES = {
    2: [
        *(case(*DEEPSEEK, expert=expert, zero=zero) for expert in (1, 2) for zero in (0, 1, 2, 3)),
        case(*QWEN3, expert=2, zero=1),
        case(*OLMOE, expert=2, zero=3),
        # Of a micro batch, which is one sequence in every layout here.
        case("--train.balance=aux_loss", "--train.aux_loss_coef=0.05", expert=2, zero=1),
    ],
    4: [case(*DEEPSEEK, expert=2, zero=1), case(*DEEPSEEK, expert=4, zero=2)],
}
WITH_MUON = {
    2: [
        *(case(MUON, expert=2, zero=zero) for zero in (0, 1, 2, 3)),
        *(case(MUON, expert=1, zero=zero) for zero in (0, 1, 3)),
        case(*DEEPSEEK, MUON, expert=2, zero=1),
    ],
    4: [case(MUON, expert=2, zero=zero) for zero in (0, 1, 3)],
}
MUON_IN_BF16 = [case(MUON, BF16, expert=2, zero=zero) for zero in (0, 1, 3)]
# No bucket holds a weight matrix: gradients travel in many pieces, most of them past DeepSpeed's buffers. ZeRO 3 steps
# in many pieces too.
SMALL_BUCKETS = [
    case(f"--parallel.ds_config={Path(__file__).with_name('small_buckets.json')}", expert=2, zero=zero)
    for zero in (1, 3)
]
OFFLOADED = [
    case(f"--parallel.ds_config={Path(__file__).with_name('offload.json')}", expert=2, zero=zero) for zero in (1, 2, 3)
]
IN_BF16 = [case(BF16, expert=2, zero=zero) for zero in (0, 1, 2, 3)]
# What the ranks of a world size train one after the other; they are started once.
CASES = {
    1: LAYOUTS[1],
    2: [
        *LAYOUTS[2],
        *DISTURBED.values(),
        *IN_PARTS,
        *CLIPPED,
        *WITH_MUON[2],
        *SMALL_BUCKETS,
        *OFFLOADED,
        *IN_BF16,
        *MUON_IN_BF16,
        *FAMILIES[2],
    ],
    4: [*LAYOUTS[4], *WITH_MUON[4], *FAMILIES[4]],
}

# Checkpoints go from the first layout (world size, case) to the second; world size 0 is one process in plain PyTorch.
LOCAL = (0, case())
CHANGES = [
    (LOCAL, (2, case(expert=2, zero=3))),
    (LOCAL, (4, case(expert=2, zero=1))),
    ((2, case(expert=2, zero=3)), LOCAL),
    ((2, case(expert=1, zero=0)), LOCAL),
    ((4, case(expert=4, zero=2)), LOCAL),
    ((2, case(expert=2, zero=1)), (1, LAYOUTS[1][0])),
    ((1, LAYOUTS[1][0]), (2, case(expert=1, zero=3))),
    ((2, case(expert=2, zero=3)), (2, case(expert=1, zero=2))),
    ((2, case(expert=1, zero=2)), (2, case(expert=2, zero=3))),
    ((2, case(expert=2, zero=0)), (2, case(expert=2, zero=1))),
    ((4, case(expert=2, zero=1)), (2, case(expert=2, zero=0))),
    ((2, case(expert=1, zero=3)), (4, case(expert=4, zero=2))),
    ((2, OFFLOADED[2]), LOCAL),
    ((2, OFFLOADED[0]), (2, OFFLOADED[2])),
    (LOCAL, (2, OFFLOADED[1])),
    ((0, case(MUON)), (2, case(MUON, expert=2, zero=0))),
    ((2, case(MUON, expert=2, zero=0)), (4, case(MUON, expert=2, zero=3))),
    ((4, case(MUON, expert=2, zero=1)), (2, case(MUON, expert=1, zero=3))),
    ((2, case(MUON, expert=2, zero=3)), (2, case(MUON, expert=2, zero=1))),
    ((2, case(MUON, expert=2, zero=2)), (0, case(MUON))),
    ((0, case(*DEEPSEEK)), (2, case(*DEEPSEEK, expert=2, zero=3))),
    ((2, case(*DEEPSEEK, expert=2, zero=3)), (4, case(*DEEPSEEK, expert=4, zero=2))),
]
# Within one layout, also with latent attention and in bf16, the resumed run is the uninterrupted one to the last bit.
SAME = [
    LOCAL,
    *((2, case(expert=2, zero=zero)) for zero in (0, 1, 2, 3)),
    (0, case(BF16)),
    *((2, one) for one in IN_BF16),
    (2, OFFLOADED[2]),
    (2, DISTURBED["latent"]),
    (2, case(MUON, expert=2, zero=1)),
    (2, case(MUON, BF16, expert=2, zero=3)),
    (4, case(expert=2, zero=1)),
]
CONTINUED = [*CHANGES, *((one, one) for one in SAME)]
POISONED = [(0, case(), 0), (0, case(BF16), 1)] + [
    (2, one, kind) for kind, one in enumerate([*LAYOUTS[2][4:], *IN_BF16])
]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Where the runs of all layouts leave their checkpoints."""
    return tmp_path_factory.mktemp("saved")


def folder_of(saved, world: int, one: tuple) -> str:
    return str(saved / f"{world}_{hashlib.sha256(repr(one).encode()).hexdigest()[:16]}")


@cache
def reference(*options: str) -> dict:
    return train_case(list(options), disturb=False, steps=STEPS)


def train_all(world: int, cases: list[dict]) -> list[dict]:
    """Trains the cases one after the other in `world` ranks, or in this process if `world` is 0."""
    if world == 0:
        return [train_case(**one) for one in cases]
    lines = run_ranks(world, "parity_worker.py", json.dumps(cases)).stdout.splitlines()
    return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]


@cache
def results_of(world: int, saved) -> dict[tuple, dict]:
    """Every case without a break; each leaves a checkpoint on its way."""
    cases = CASES.get(world, [one for place, one in CONTINUED_FROM if place == 0])
    todo = [
        dict(
            options=list(options),
            disturb=disturb,
            steps=STEPS,
            save=folder_of(saved, world, (options, disturb)),
            export=f"{folder_of(saved, world, (options, disturb))}/begun",
        )
        for options, disturb in cases
    ]
    return dict(zip(cases, train_all(world, todo), strict=True))


CONTINUED_FROM = list(dict.fromkeys(source for source, _ in CONTINUED))


def exported_to(saved, source: tuple, target: tuple) -> str:
    return f"{folder_of(saved, *source)}/as_{Path(folder_of(saved, *target)).name}"


@cache
def continued_of(world: int, saved) -> dict[tuple, dict]:
    """Every case that begins at a checkpoint, by where that is from and what it is."""
    wanted = [(source, target) for source, target in CONTINUED if target[0] == world]
    for place in {source[0] for source, _ in wanted}:
        results_of(place, saved)
    todo = [
        dict(
            options=list(target[1][0]),
            disturb=target[1][1],
            steps=STEPS,
            resume=f"{folder_of(saved, *source)}/run/checkpoints/step_{SAVE_AT:08}",
            export=exported_to(saved, source, target),
        )
        for source, target in wanted
    ]
    return dict(zip(wanted, train_all(world, todo), strict=True))


@cache
def poisoned_of(world: int) -> dict[tuple, dict]:
    wanted = [(one, kind) for place, one, kind in POISONED if place == world]
    todo = [dict(options=list(one[0]), disturb=False, steps=STEPS, poison=kind % 2) for one, kind in wanted]
    return dict(zip(wanted, train_all(world, todo), strict=True))


def assert_same_run(result: dict, expected: dict, tolerance: float = 1e-4) -> None:
    assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert result["norms"] == pytest.approx(expected["norms"], rel=10 * tolerance)
    assert result["totals"] == expected["totals"]
    for name in ("shares", "entropies"):  # of every part of the model, of every layer
        for ours, theirs in zip(result[name], expected[name], strict=True):
            assert ours == pytest.approx(theirs, rel=10 * tolerance, abs=1e-5)
    for ours, theirs in zip(result["histograms"], expected["histograms"], strict=True):
        assert [sum(layer) for layer in ours] == [256 * 8] * 2  # 8 sequences x 32 tokens x 8 experts
        # a probability at the edge of two bins may fall into either
        assert (
            sum(abs(a - b) for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=True)) < 40
        )
    for ours, theirs in zip(result["biases"], expected["biases"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert result["weights"] == pytest.approx(expected["weights"], rel=10 * tolerance)


def test_the_reference_learns_and_its_gradients_are_clipped():
    losses, norms = reference()["losses"], reference()["norms"]
    assert losses[-1] < losses[0] - 0.5
    assert max(norms) > 0.5  # else no topology's clipping would be seen
    # 8 sequences x 32 tokens x 2 experts a step, however they are cut into micro batches
    assert reference()["totals"] == [[512.0, 512.0]] * STEPS


@pytest.mark.parametrize(("world", "one"), [(world, one) for world, cases in CASES.items() for one in cases])
def test_every_layout_starts_from_the_same_model_bit_for_bit(saved, tmp_path, world, one):
    results_of(world, saved)
    train_case(list(options_without_layout(one)), disturb=False, steps=0, export=str(tmp_path))
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1
    for file in files:
        assert (Path(folder_of(saved, world, one)) / "begun" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("world", "topology"), [(world, one) for world, cases in LAYOUTS.items() for one in cases])
def test_topology_gives_the_single_process_run(saved, world, topology):
    assert_same_run(results_of(world, saved)[topology], reference())


def options_without_layout(one: tuple) -> tuple[str, ...]:
    return tuple(option for option in one[0] if not option.startswith("--parallel."))


@pytest.mark.parametrize(("world", "one"), [(world, one) for world, cases in FAMILIES.items() for one in cases])
def test_family_of_published_models_gives_the_single_process_run(saved, world, one):
    assert_same_run(results_of(world, saved)[one], reference(*options_without_layout(one)))


def test_only_all_to_all_between_ranks_takes_time(saved):
    for world, topology in [(world, one) for world, cases in LAYOUTS.items() for one in cases]:
        crossing = "--parallel.expert=1" not in topology[0] and world > 1
        for seconds in results_of(world, saved)[topology]["seconds"]:
            assert (seconds["all_to_all"] > 0) == crossing, topology
            assert all(seconds[phase] > 0 for phase in ("data", "forward", "backward", "optimizer"))


def test_shares_of_the_gradient_and_entropies_are_sound():
    squares = [sum(shares) for shares in reference()["shares"]]
    assert squares == pytest.approx([1.0] * STEPS)
    assert all(0 < entropy <= math.log(8) for layers in reference()["entropies"] for entropy in layers)


@pytest.mark.parametrize(("attention", "model"), [("gqa", ()), ("latent", LATENT)])
def test_counts_leave_out_evaluation_sampling_and_recomputation(saved, attention, model):
    assert_same_run(train_case([*model, CHECKPOINTING], disturb=True, steps=STEPS), reference(*model))
    assert_same_run(results_of(2, saved)[DISTURBED[attention]], reference(*model))


@pytest.mark.parametrize("one", IN_PARTS)
def test_computing_parts_again_gives_the_single_process_run(saved, one):
    assert_same_run(results_of(2, saved)[one], reference())


@pytest.mark.parametrize(("world", "one"), [(world, one) for world, cases in WITH_MUON.items() for one in cases])
def test_muon_gives_the_single_process_run(saved, world, one):
    assert_same_run(results_of(world, saved)[one], reference(*options_without_layout(one)))


@pytest.mark.parametrize("one", CLIPPED)
def test_clipped_attention_gives_the_single_process_run(saved, one):
    options = options_without_layout(one)
    expected = reference(*options)
    assert expected["losses"] != reference(*(option for option in options if option != QK_CLIP))["losses"]
    assert_same_run(results_of(2, saved)[one], expected)


@pytest.mark.parametrize("one", OFFLOADED, ids=("zero1", "zero2", "zero3"))
def test_an_optimizer_in_the_hosts_memory_gives_the_single_process_run(saved, one):
    assert_same_run(results_of(2, saved)[one], reference())


@pytest.mark.parametrize("one", SMALL_BUCKETS, ids=("zero1", "zero3"))
def test_gradients_in_many_pieces_give_the_single_process_run(saved, one):
    assert_same_run(results_of(2, saved)[one], reference())


def test_bf16_follows_fp32_and_keeps_the_biases_in_fp32(saved):
    for optimizer, cases in (([], IN_BF16), ([MUON], MUON_IN_BF16)):
        local = train_case([BF16, *optimizer], disturb=False, steps=STEPS)
        for result in [local, *(results_of(2, saved)[one] for one in cases)]:
            assert result["losses"] == pytest.approx(reference(*optimizer)["losses"], rel=0.02)
            assert result["bias_dtypes"] == ["torch.float32"]
            assert result["totals"] == [[512.0, 512.0]] * STEPS


@pytest.mark.parametrize(("source", "target"), CHANGES)
def test_checkpoint_continues_in_another_layout(saved, source, target):
    """Ten steps after the change, because the optimizer's state shows from the second on."""
    result = continued_of(target[0], saved)[source, target]
    expected = reference(*options_without_layout(target[1]))
    assert len(result["losses"]) == STEPS - SAVE_AT
    assert result["losses"] == pytest.approx(expected["losses"][SAVE_AT:], rel=1e-4)
    assert result["norms"] == pytest.approx(expected["norms"][SAVE_AT:], rel=1e-3)
    for ours, theirs in zip(result["biases"], expected["biases"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert result["weights"] == pytest.approx(expected["weights"], rel=1e-3)


@pytest.mark.parametrize("layout", SAME)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(saved, layout):
    world, one = layout
    result, expected = continued_of(world, saved)[layout, layout], results_of(world, saved)[one]
    for name in ("losses", "norms", "totals"):
        assert result[name] == expected[name][SAVE_AT:]
    for name in ("biases", "weights"):
        assert result[name] == expected[name]


# Of every layout, and with AdamW and Muon, in fp32 and bf16.
@pytest.mark.parametrize(("source", "target"), CONTINUED)
def test_all_ranks_together_write_the_files_that_one_process_writes(saved, tmp_path, source, target):
    continued_of(target[0], saved)
    written = Path(exported_to(saved, source, target))
    checkpoint = open_verified(Path(folder_of(saved, *source)) / "run" / "checkpoints" / f"step_{SAVE_AT:08}")
    tokens = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    model = build_model(checkpoint, model_config(checkpoint.manifest, tokens))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if BF16 in target[1][0] else torch.float32)
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


@pytest.mark.parametrize(("world", "one", "kind"), POISONED)
def test_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(world, one, kind):
    result = poisoned_of(world)[one, kind]
    assert result["applied"] == [step != SAVE_AT for step in range(1, STEPS + 1)]
    assert not math.isfinite(result["losses"][SAVE_AT - 1])
    expected = reference()["losses"]
    assert result["losses"][: SAVE_AT - 1] == pytest.approx(expected[: SAVE_AT - 1], rel=0.02)
    # The next step's loss is that of the same weights on other samples; a poisoned model would have none.
    assert all(math.isfinite(loss) for loss in result["losses"][SAVE_AT:])
    assert result["losses"][-1] < expected[0] - 0.5
