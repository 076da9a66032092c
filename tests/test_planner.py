"""The planner: its counts compared with the model's, its formulas with hand calculation and simulation."""

import contextlib
import gc
import json
import random
from dataclasses import dataclass, replace
from statistics import mean

import pytest
import torch
from ranks import ROOT, smolds

from smolds_dist.config import load_config
from smolds_dist.costs.flops import flops_per_token
from smolds_dist.costs.hardware import FILE, Hardware, Link, load_hardware
from smolds_dist.costs.layout import Layout, load_stretch, most_received
from smolds_dist.costs.memory import (
    activation_bytes,
    parameter_counts,
    rank_memory,
    saved_elements,
    state_bytes,
    with_vocabulary,
)
from smolds_dist.costs.step_time import RESTART_SECONDS, all_to_all_seconds, matmul_seconds, run_time, step_time
from smolds_dist.errors import ConfigError
from smolds_dist.launching.launcher import launch
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, enable_activation_checkpointing
from smolds_dist.observe.rows import read_rows
from smolds_dist.planner.command import plan
from smolds_dist.planner.search import RECOMPUTED, best_first, candidates
from smolds_dist.settings import Model
from smolds_dist.training.step_row import max_received

MODEL = with_vocabulary(load_config(["--preset", "smollm2-deepseek-255m"]))
H100 = load_hardware("h100")
LAYOUT = Layout(16, 8, 8, 1, 4, 2, 1024, "bf16")
SMALL = dict(vocab_size=512, hidden_size=96, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6)
GQA = dict(SMALL, num_key_value_heads=2, head_dim=16)
LATENT = dict(
    SMALL, attention="latent", scoring_func="sigmoid", q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, n_shared_experts=1,
)  # fmt: skip


# Memory


@pytest.mark.parametrize(
    "settings",
    [
        GQA, LATENT, GQA | {"first_k_dense_replace": 2, "dense_intermediate_size": 160},
        GQA | {"num_nextn_predict_layers": 2},
    ],
)  # fmt: skip
@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_activations_match_what_autograd_saves(settings, recompute):
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**settings)).train()
    enable_activation_checkpointing(model, recompute)
    kept: dict[int, int] = {}
    before = live_memory()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 512, (4, 256))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    # Selective checkpointing saves outside autograd.
    kept |= {place: size for place, size in live_memory().items() if place not in before}
    for tensor in model.parameters():
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    losses = 1 + model.config.num_nextn_predict_layers
    vocabulary = losses * 512 * 96 * 4  # the LM head's gradients, counted with the logits
    layout = Layout(1, 1, 1, 0, 4, 1, 256, "fp32", device="cpu", engine="local", recompute=recompute)
    predicted = activation_bytes(Model(**settings), layout)
    # Of recomputed activations, one block's exist at a time, later, in the backward pass.
    whole, rest = (saved_elements(Model(**settings), 2, recompute=what) for what in ("none", recompute))
    predicted -= (whole - rest) / len(model.model.layers) * 1024 * 4
    assert sum(kept.values()) - vocabulary == pytest.approx(predicted, rel=0.05)


def live_memory() -> dict[int, int]:
    """Return the bytes of all tensor storages of this process, by address."""
    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            with contextlib.suppress(RuntimeError):  # fake tensors of another test's compiler, without memory
                found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return found


def test_state_shrinks_with_every_zero_stage_and_counts_replicas():
    dense, experts = parameter_counts(MODEL)

    def state(world: int, expert: int, zero: int, dtype: str) -> tuple[float, ...]:
        engine = "deepspeed" if world > 1 else "local"
        return state_bytes(MODEL, Layout(world, world, expert, zero, 1, 1, 1024, dtype, engine=engine))

    every = dense + experts
    assert state(1, 1, 0, "fp32") == (every * 4, every * 4, every * 8)
    assert state(1, 1, 0, "bf16") == (every * 2, every * 4, every * 12)
    own, shared = dense + experts / 8, dense / 8 + experts / 8
    assert state(8, 8, 0, "fp32") == (own * 4, own * 4, own * 8)
    assert state(8, 8, 2, "bf16") == pytest.approx((own * 2, shared * 4, shared * 12))
    assert state(8, 2, 3, "bf16") == pytest.approx((shared * 2, shared * 4, shared * 12))
    sizes = [rank_memory(MODEL, replace(LAYOUT, expert=4, zero=zero)).total for zero in (0, 1, 2)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


DENSE = ("--model.first_k_dense_replace=2", "--model.dense_intermediate_size=100", "--model.tie_word_embeddings=false")


@pytest.mark.parametrize(
    "options",
    [
        (), ("--model.attention=latent", "--model.n_shared_experts=1", "--model.q_lora_rank=24"), DENSE,
        (*DENSE, "--model.qk_norm=head"), (*DENSE, "--model.qk_norm=all", "--model.n_shared_experts=2"),
        ("--model.num_experts=1", "--model.num_experts_per_tok=1"), (*DENSE, "--model.num_nextn_predict_layers=2"),
    ],
)  # fmt: skip
def test_parameter_counts_match_the_model(options):
    config = load_config(["--preset", "debug", "--model.vocab_size=500", *options])
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**config.model.architecture()))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    total = sum(p.numel() for p in model.parameters())
    assert parameter_counts(config.model) == (total - experts, experts)


def test_memory_grows_with_its_causes():
    base = rank_memory(MODEL, LAYOUT, 1e9).total
    assert rank_memory(MODEL, replace(LAYOUT, micro_batch=8), 1e9).total > base
    by_what = {what: rank_memory(MODEL, replace(LAYOUT, recompute=what), 1e9).total for what in RECOMPUTED}
    assert by_what["none"] == base and max(by_what, key=lambda what: by_what[what]) == "none"
    assert min(by_what, key=lambda what: by_what[what]) == "full"
    assert rank_memory(MODEL, replace(LAYOUT, expert=1), 1e9).total > base
    assert rank_memory(MODEL, LAYOUT, 1e9, max_vio=0.5).total > base
    assert rank_memory(MODEL, replace(LAYOUT, copies=True), 1e9).total == base  # a GPU's copies are in host memory
    on_cpu = replace(LAYOUT, device="cpu", expert=1, zero=0)
    assert rank_memory(MODEL, replace(on_cpu, copies=True)).checkpoint * LAYOUT.world == 12 * sum(
        parameter_counts(MODEL)
    )
    assert rank_memory(MODEL, replace(LAYOUT, dtype="fp32"), 1e9).activations > rank_memory(MODEL, LAYOUT).activations
    assert rank_memory(MODEL, replace(LAYOUT, optimizer="muon", zero=0)).optimizer < (
        rank_memory(MODEL, replace(LAYOUT, zero=0)).optimizer
    )


def test_offloading_and_buckets_are_read_from_the_runs_ds_config(tmp_path, capsys):
    file = tmp_path / "offload.json"
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    settings["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 2e8}
    file.write_text(json.dumps(settings))
    asked = ["--preset", "moe-7b-a1b", "--parallel.zero=2", "--parallel.expert=8"]
    found = []
    for more in ([], [f"--parallel.ds_config={file}"]):
        plan(["--json", str(tmp_path / "plan.json"), "--", *asked, *more])
        found.append(json.loads((tmp_path / "plan.json").read_text())["layouts"][0])
    capsys.readouterr()
    assert found[0]["memory"]["optimizer"] > found[1]["memory"]["optimizer"] == 0
    assert found[1]["memory"]["buffers"] - found[0]["memory"]["buffers"] == pytest.approx(2 * 150e6 * 2)
    assert found[0]["seconds"]["optimizer"] < found[1]["seconds"]["optimizer"]


@pytest.mark.parametrize(
    ("top_k", "expert", "most"), [(2, 4, 4.0), (2, 8, 4.0), (8, 2, 1.0), (3, 4, 8 / 3), (2, 1, 1.0)]
)
def test_plan_prints_the_received_rows_it_assumes_and_the_most_possible(capsys, top_k, expert, most):
    # Every token selects the first K of 8 experts, so that rank 0 receives the most.
    rows = torch.zeros(1, 8)
    rows[:, :top_k] = 10
    assert max_received(rows, expert) == pytest.approx(most) == most_received(top_k, 8, expert)
    given = [f"--parallel.expert={expert}", "--model.num_experts=8", f"--model.num_experts_per_tok={top_k}"]
    plan(["--hardware", "h100", "--max-vio", "0.5", "--", "--preset", "moe-1b-a200m", *given])
    printed = capsys.readouterr().out
    assumed = 1 + load_stretch(0.5, 8, expert)
    line = f"a rank receives {assumed:.2f} times the mean rank's rows; the most possible is {most:.2f}\n"
    assert (line in printed) == (expert > 1)


# Time


def test_a_machine_without_other_costs_takes_the_matmuls_time():
    free = replace(H100, bandwidth=1e30, overhead=0.0, utilization=1.0, link=Link(1e30, 0.0), fabric=Link(1e30, 0.0))
    time = step_time(MODEL, LAYOUT, free)
    flops = flops_per_token(MODEL, 1024) * LAYOUT.tokens_per_step / LAYOUT.world
    assert time.total == pytest.approx(flops / 989e12)
    # Recomputation is a forward pass of all but the head.
    head = 2 * 384 * 49_152 * LAYOUT.tokens_per_step / LAYOUT.world / 989e12
    by_what = {what: step_time(MODEL, replace(LAYOUT, recompute=what), free).total for what in RECOMPUTED}
    assert by_what["full"] == pytest.approx(time.total * 4 / 3 - head)
    assert by_what["attention"] + by_what["experts"] == pytest.approx(by_what["full"] + time.total)
    assert by_what["selective"] == by_what["none"] == time.total


def test_all_to_all_by_hand():
    machine = replace(H100, link=Link(100e9, 1e-5), fabric=Link(10e9, 1e-4))
    row = 384 * 2  # bytes
    rows = 4 * 1024 * 2
    inside = 24 * 4 * (7e-5 + rows * row * 7 / 8 / (0.75 * 100e9))
    assert all_to_all_seconds(MODEL, LAYOUT, machine) == pytest.approx(inside)
    crossing = replace(LAYOUT, per_node=2)
    outside = 24 * 4 * (1e-5 + 6e-4 + rows * row * 6 / 8 / (0.75 * 10e9))
    assert all_to_all_seconds(MODEL, crossing, machine) == pytest.approx(outside)
    assert all_to_all_seconds(MODEL, replace(LAYOUT, expert=1), machine) == 0
    assert all_to_all_seconds(MODEL, replace(LAYOUT, recompute="full"), machine) == pytest.approx(inside * 1.5)
    assert all_to_all_seconds(MODEL, replace(LAYOUT, recompute="attention"), machine) == pytest.approx(inside)


def test_rows_sent_once_per_node_by_hand():
    """Over four nodes of two ranks: a row is sent once to each node with one of its two experts; a node is one peer."""
    machine = replace(H100, link=Link(1e30, 1e-5), fabric=Link(10e9, 1e-4))
    layout = replace(LAYOUT, per_node=2, once_per_node=True)
    row_seconds = 4 * 1024 * 384 * 2 / (0.75 * 10e9)
    reached = 4 * (1 - (3 / 4) ** 2) * 3 / 4
    assert all_to_all_seconds(MODEL, layout, machine) == pytest.approx(24 * 4 * (1e-5 + 3e-4 + reached * row_seconds))
    limited = replace(layout, most_nodes=1)
    assert all_to_all_seconds(MODEL, limited, machine) == pytest.approx(24 * 4 * (1e-5 + 3e-4 + 3 / 4 * row_seconds))


def test_fp8_halves_only_the_time_of_linear_layers():
    model = Model(**LATENT)
    free = replace(H100, utilization=1.0)
    wide, fp8 = (matmul_seconds(model, replace(LAYOUT, dtype=dtype), free) for dtype in ("bf16", "fp8"))
    assert fp8[1] == pytest.approx(wide[1] * 989 / 1979)
    # Without the head and attention's own matmuls, only linear layers are left outside the experts.
    kept = 3 * LAYOUT.tokens * (2 * 96 * 512 + 4 * 2 * 6 * 40 * 1025 / 2) / 989e12
    assert fp8[0] - kept == pytest.approx((wide[0] - kept) * 989 / 1979)


def test_several_experts_on_a_rank_average_out_imbalance():
    assert load_stretch(0.4, 8, 8) == pytest.approx(0.4)
    assert load_stretch(0.4, 8, 1) == 0
    assert 0.4 > load_stretch(0.4, 64, 32) > load_stretch(0.4, 64, 8) > 0
    even, uneven = (step_time(MODEL, LAYOUT, H100, vio) for vio in (0.0, 0.5))
    assert uneven.imbalance > even.imbalance == 0 and uneven.all_to_all > even.all_to_all


def test_traffic_of_zero_stages():
    slow = replace(H100, link=Link(1e8, 0.0), fabric=Link(1e8, 0.0))
    times = [
        step_time(MODEL, replace(LAYOUT, expert=1, zero=zero, accumulation=1), slow).gradients for zero in (1, 2, 3)
    ]
    assert times[0] == times[1] < times[2]
    assert step_time(MODEL, replace(LAYOUT, world=1, per_node=1, expert=1), slow).gradients == 0
    per_pass = [step_time(MODEL, replace(LAYOUT, zero=zero, accumulation=4), slow).gradients for zero in (1, 2)]
    assert per_pass[0] < per_pass[1]


# Simulation


@dataclass(frozen=True)
class SimulatedRun:
    seconds: float
    failures: int
    repeated_steps: int


def simulate_run(step: float, steps: int, layout: Layout, machine: Hardware, every: int, seed: int = 0) -> SimulatedRun:
    """Simulate a run with random failures, each of which returns it to its last checkpoint.

    Args:
        step: seconds of a step.
        every: steps between checkpoints; 0: none.
    """
    chance = random.Random(seed)
    rate = layout.world / (machine.failures * 3600)
    now, done, failures, repeated = 0.0, 0, 0, 0
    next_failure = chance.expovariate(rate)
    while done < steps:
        # As many steps as fit before the next failure.
        fit = min(steps - done, int((next_failure - now) // step))
        now, done = now + fit * step, done + fit
        if done < steps:
            saved = done // every * every if every else 0
            failures, repeated, done = failures + 1, repeated + done - saved, saved
            now = next_failure + RESTART_SECONDS
            next_failure = now + chance.expovariate(rate)
    return SimulatedRun(now, failures, repeated)


def test_simulated_failures_cost_what_the_formula_expects():
    layout = replace(LAYOUT, world=16_384)
    expected = run_time(2.0, 50_000, layout, H100, 500, 0.0)
    runs = [simulate_run(2.0, 50_000, layout, H100, 500, seed=seed) for seed in range(60)]
    assert mean(run.failures for run in runs) == pytest.approx(expected.expected_failures, rel=0.2)
    lost = mean(run.seconds for run in runs) - expected.training
    assert lost == pytest.approx(expected.failures, rel=0.3)
    assert all(run.seconds > 100_000 for run in runs)


# Hardware specs


def test_every_hardware_entry_is_complete_and_has_sources():
    import yaml

    for key in yaml.safe_load(FILE.read_text()):
        machine = load_hardware(key)
        assert machine.sources and 0 < machine.utilization <= 1 and machine.memory > 1e9


# The command


def test_plan_prints_the_best_layout_and_a_command_that_launch_accepts(tmp_path, capsys):
    result = tmp_path / "plan.json"
    options = ["--hardware", "h100", "--devices-per-node", "4", "--json", str(result)]
    plan([*options, "--", "--preset", "debug", "--parallel.device=cpu"])
    text = capsys.readouterr().out
    found = json.loads(result.read_text())
    rates = [one["tokens_per_s"] for one in found["layouts"]]
    assert rates == sorted(rates, reverse=True) and len(rates) > 10
    best = found["layouts"][0]["settings"]
    assert f"--parallel.expert={best['parallel.expert']}" in text and "verdict" in text
    line = text.strip().splitlines()[-1].split()
    assert line[:2] == ["smolds", "launch"]
    assert launch([*line[2:4], "--dry-run", *line[4:]]) == 0


def test_plan_for_several_nodes_ends_in_a_batch_script(capsys):
    from smolds_dist.launching.slurm import slurm

    plan(["--hardware", "h100", "--nodes", "4", "--target-tokens", "1e10", "--", "--preset", "moe-1b-a200m"])
    line = capsys.readouterr().out.strip().splitlines()[-1].split()
    slurm(line[2:])
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=4" in script and "--parallel.expert=" in script


def test_recorded_loads_replace_max_vio(kept_run, capsys):
    args = ["--hardware", "a100", "--", "--preset", "debug", "--train.global_batch=16", "--parallel.expert=8"]
    load = next(row["load"] for row in reversed(read_rows(kept_run[0] / "metrics.jsonl")) if "load" in row)
    vio = mean(8 * max(layer) - 1 for layer in load)
    plan(["--loads", str(kept_run[0]), *args])
    assert f"receives {1 + vio:.2f} times" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="8 experts, the model 16"):
        plan(["--loads", str(kept_run[0]), "--", "--preset", "debug", "--model.num_experts=16"])


def test_impossible_plans_are_config_errors(tmp_path):
    huge = ["--preset", "moe-7b-a1b", "--model.hidden_size=8192", "--model.intermediate_size=16384"]
    for args, words in (
        (["--nodes", "1", "--", *huge], "no layout fits"),
        (["--budget-gpu-hours", "1", "--", "--preset", "moe-7b-a1b"], "over --budget-gpu-hours"),
        (["--hardware", "abacus", "--", "--preset", "debug"], "unknown"),
        (["--nodes", "0", "--", "--preset", "debug"], "at least 1"),
        (["--nodes", "3", "--", "--preset", "debug"], "multiple of the world size"),
        (["--loads", str(tmp_path), "--", "--preset", "debug"], "no recorded expert loads"),
        (["--fast"], "does not know"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan(args)
    finished = smolds("plan", "--", *huge)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1, finished.text


def test_the_number_of_tokens_changes_the_choice():
    """Sharding experts saves gradient traffic, once per step, and costs all-to-all, for every token."""
    chosen = []
    for batch in (16, 4096):
        config = load_config(["--preset", "moe-7b-a1b", "--parallel.zero=0", f"--train.global_batch={batch}"])
        machine = replace(H100, memory=1e12)
        chosen.append(best_first(list(candidates(config, machine, 1, 8, 0.0)), machine)[0].layout.expert)
    assert chosen[0] > chosen[1] == 1


# Compared with measurements


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 2)])
def test_predicted_memory_matches_a_process(ranks, zero):
    from benchmarks.plan import MEMORY_SIZES, compare_memory

    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, or none")
    row = compare_memory(MEMORY_SIZES[1], ranks, zero, steps=10)
    assert row["predicted"] == pytest.approx(row["measured"], rel=0.1), row
