"""`python -m benchmarks roofline`: a step's time by kind of operation, and its bounds."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import profile

from benchmarks import roofline
from benchmarks.least_bytes import least_bytes, normed_elements, optimizer_bytes, rotated_elements, swiglu_elements
from benchmarks.operations import (
    COPIES,
    ELEMENTWISE,
    EXPERTS,
    KINDS,
    OPTIMIZER,
    OUTSIDE,
    PROJECTIONS,
    ROUTER,
    SCORES,
    VOCABULARY,
    kind_of,
    operations_of,
    product_of,
)  # fmt: skip
from benchmarks.roofline import bounds_of, fastest_products, kind_rows, run_steps
from smolds_dist.bench.contenders import Task
from smolds_dist.costs.flops import flops_per_token, matmul_weights
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.model.causal_attention import ATTENTION_BLOCK

SEQUENCES, SEQ_LEN, VOCAB = 2, 128, 320

NARROW = (
    "--model.hidden_size=64",
    "--model.num_hidden_layers=2",
    "--model.num_attention_heads=4",
    "--model.head_dim=16",
)
MODELS = {
    "grouped-query": (),
    "QK norm, untied embeddings": ("--model.qk_norm=head", "--model.tie_word_embeddings=false"),
    "latent": ("--model.attention=latent", "--model.kv_lora_rank=24", "--model.v_head_dim=24"),
    "latent queries, shared and dense": (
        "--model.attention=latent", "--model.q_lora_rank=40", "--model.kv_lora_rank=24", "--model.n_shared_experts=1",
        "--model.first_k_dense_replace=1", "--model.dense_intermediate_size=96",
    ),
}  # fmt: skip


def small_task(model: str, dtype: str = "fp32") -> Task:
    settings = (*NARROW, f"--data.seq_len={SEQ_LEN}", *MODELS[model])
    return Task("", "debug", VOCAB, SEQUENCES, SEQ_LEN, dtype, "cpu", settings=settings)


def model_of(task: Task) -> DeepSeekV3Config:
    return task.model_config()


@pytest.fixture(autouse=True)
def _short_repetitions(monkeypatch):
    monkeypatch.setattr(roofline, "PRODUCT_SECONDS", 0.001)
    monkeypatch.setattr(roofline, "PEAK_SECONDS", 0.001)


@pytest.fixture(scope="module", params=["grouped-query", "latent queries, shared and dense"])
def profiled(request):
    """Return a model's task, and the operations and seconds of one step."""
    task = small_task(request.param)
    _, (step,) = run_steps(task, 1)
    return task, *step


def flops_by_kind(operations) -> dict[str, int]:
    return {row["kind"]: row["product_flops"] for row in kind_rows(operations, dict.fromkeys(KINDS, 0.0))}


def flops_of_scores(task: Task) -> float:
    """Return a step's attention FLOPs in `causal_attention`: 4 matmuls over the keys' dimensions, of which one
    is recomputation, and 3 over the values'; including the masked half of the diagonal blocks."""
    m = model_of(task)
    latent = m.attention == "latent"
    key, value = (m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim) if latent else (m.head_dim, m.head_dim)
    keys_met = (SEQ_LEN + ATTENTION_BLOCK[torch.float32]) / 2
    return m.num_hidden_layers * m.num_attention_heads * 2 * (4 * key + 3 * value) * keys_met * SEQUENCES * SEQ_LEN


def test_kinds_sum_to_the_steps_time(profiled):
    _, operations, seconds = profiled
    assert {operation.kind for operation in operations} <= set(KINDS)
    assert min(operation.seconds for operation in operations) > -1e-9
    rows = kind_rows(operations, dict.fromkeys(KINDS, 0.0))
    assert sum(row["seconds"] for row in rows) == pytest.approx(seconds, rel=1e-9)
    assert sum(row["calls"] for row in rows) == len(operations)
    spent = {row["kind"]: row["seconds"] for row in rows}
    assert all(0 < spent[kind] < seconds for kind in KINDS)


def test_matmuls_of_the_step_match_the_flops_per_token(profiled):
    task, operations, _ = profiled
    m, tokens = model_of(task), SEQUENCES * SEQ_LEN
    made = flops_by_kind(operations)
    vocabulary = 6 * m.hidden_size * VOCAB
    assert made[VOCABULARY] == vocabulary * (tokens - SEQUENCES)  # a sequence's last token has no label
    assert made[SCORES] == flops_of_scores(task)
    assert made[EXPERTS] == 6 * 3 * m.hidden_size * swiglu_elements(m) * tokens
    mixtures = m.num_hidden_layers - m.first_k_dense_replace
    assert made[ROUTER] == 6 * m.hidden_size * m.num_experts * mixtures * tokens
    weights = 6 * sum(matmul_weights(m)) * tokens
    assert made[PROJECTIONS] == weights - made[EXPERTS] - made[ROUTER] - vocabulary * tokens
    assert not made[ELEMENTWISE] and not made[OPTIMIZER] and not made[COPIES]
    # The total matches flops_per_token, except for scores that are recomputed or masked.
    needed = flops_per_token(m, SEQ_LEN) * tokens
    assert needed < sum(made.values()) < 1.25 * needed


def test_bf16_adds_only_padded_rows():
    task = small_task("grouped-query", "bf16")
    _, ((operations, _),) = run_steps(task, 1)
    rows = SEQUENCES * SEQ_LEN * 2
    m, made = model_of(task), flops_by_kind(operations)
    least = 6 * 3 * m.hidden_size * swiglu_elements(m) * SEQUENCES * SEQ_LEN
    assert least <= made[EXPERTS] <= least * (rows + 8 * 63) / rows
    assert {operation.dtype for operation in operations if operation.kind == EXPERTS and operation.product} == {
        torch.bfloat16
    }


def test_bounds_come_from_matmuls_and_bytes(profiled):
    task, operations, _ = profiled
    m, tokens = model_of(task), SEQUENCES * SEQ_LEN
    fastest = fastest_products(operations, torch.device("cpu"), torch.float32)
    bounds = bounds_of(operations, fastest, m, tokens, task, 1e12, 1e9)
    idle = {kind for kind, bound in bounds.items() if not bound}
    assert idle == set(KINDS[-4:]) - {ELEMENTWISE} and min(bounds.values()) == 0
    moved = least_bytes(m, tokens, 4)
    assert all(bounds[kind] == moved[kind] / 1e9 for kind in moved if kind != ROUTER)
    spent = {row["kind"]: row["seconds"] for row in kind_rows(operations, bounds)}
    assert all(bounds[kind] <= spent[kind] for kind in (EXPERTS, SCORES, PROJECTIONS, VOCABULARY))


@pytest.mark.parametrize("name", MODELS)
def test_least_bytes_count_the_elements_that_the_model_normalizes_rotates_and_gates(name):
    m = model_of(small_task(name))
    model = DeepSeekV3ForCausalLM(m).train()
    ids = torch.zeros(1, SEQ_LEN, dtype=torch.long)
    with profile(record_shapes=True) as trace:
        model(input_ids=ids, labels=ids)
    numbers = dict.fromkeys(("_RMSNorm", "_Rotate", "aten::silu"), 0)
    for event in trace.events():
        if event.name in numbers:
            numbers[event.name] += torch.Size(event.input_shapes[0]).numel()
    assert numbers["_RMSNorm"] == normed_elements(m) * SEQ_LEN
    assert numbers["_Rotate"] == rotated_elements(m) * SEQ_LEN
    assert numbers["aten::silu"] == swiglu_elements(m) * SEQ_LEN
    count = sum(parameter.numel() for parameter in model.parameters())
    fp32, bf16 = (least_bytes(m, SEQ_LEN, size) for size in (4, 2))
    assert fp32["optimizer"] == count * (4 + 4 + 6 * 4) == optimizer_bytes(count, 4)
    assert bf16["optimizer"] == count * (2 + 2 + 6 * 4 + 2)
    assert set(fp32) <= set(KINDS) and min(fp32.values()) > 0
    twice = least_bytes(m, 2 * SEQ_LEN, 4)
    assert all(twice[kind] == 2 * fp32[kind] for kind in fp32 if kind != "optimizer")


def event(name, begin, end, parent=None, on_device=0.0, **more):
    return SimpleNamespace(
        name=name, cpu_parent=parent, time_range=SimpleNamespace(start=begin, end=end), sequence_nr=-1,
        device_type=torch.autograd.DeviceType.CPU, self_cpu_time_total=1.0, self_device_time_total=on_device,
        input_shapes=[], **more,
    )  # fmt: skip


def test_on_cuda_kernels_count_and_the_rest_is_outside():
    step = event("step", 0, 100)
    norm = event("aten::rms_norm", 10, 20, event("RMSNorm", 5, 25, step), on_device=30.0)
    before = event("aten::mul", -20, -10, on_device=50.0)
    operations, seconds = operations_of([before, step, norm.cpu_parent, norm], on_cuda=True)
    assert seconds == pytest.approx(100e-6)
    assert [(one.kind, one.seconds) for one in operations] == [
        ("norms", pytest.approx(30e-6)),
        (OUTSIDE, pytest.approx(70e-6)),
    ]


def test_matmuls_are_read_without_fields_that_older_versions_lack():
    grouped = event("aten::_grouped_mm", 0, 1)
    grouped.input_shapes = [[96, 64], [8, 64, 32], [8]]
    product, dtype = product_of(grouped)
    assert (product.batch, product.M, product.K, product.N) == (0, 96, 64, 32) and dtype is None
    batched = event("aten::bmm", 0, 1, structured_input_strides=[[12, 1, 3], [20, 5, 1]], input_dtypes=["float"] * 2)
    batched.input_shapes = [[7, 3, 4], [7, 4, 5]]
    product, dtype = product_of(batched)
    assert product.flops == 2 * 7 * 3 * 4 * 5 and product.transposed == (True, False) and dtype is torch.float32
    assert product_of(event("aten::mul", 0, 1)) == (None, None)


@pytest.mark.parametrize(
    ("name", "scope", "kind"),
    [
        ("_flash_attention_backward", "attention", SCORES),
        ("silu_backward", "expert layer", "SwiGLU"),
        ("argsort", "expert layer", "dispatch and combine"),
        ("copy_", "norms", COPIES),
        ("copy_", "optimizer", OPTIMIZER),
        ("index_add_", "mixture", ROUTER),
        ("add", "mixture", ELEMENTWISE),
        ("embedding", "", ELEMENTWISE),
    ],
)
def test_kinds_of_device_specific_operations(name, scope, kind):
    assert kind_of(name, scope, is_product=False) == kind


@pytest.mark.long
def test_command_prints_and_writes_kinds_by_their_gap(tmp_path, capsys):
    file = tmp_path / "roofline.json"
    options = ["--preset", "debug", "--sequences", "1", "--steps", "1", "--dtype", "fp32", "--json", str(file)]
    roofline.main([*options, *NARROW, f"--data.seq_len={SEQ_LEN}", "--data.tokenizer_vocab_size=320"])
    shown = capsys.readouterr().out
    result = json.loads(file.read_text())
    rows = result["kinds"]
    assert [row["kind"] for row in rows] == sorted(
        (row["kind"] for row in rows), key=lambda kind: shown.index(f"\n{kind} ")
    )
    gaps = [row["gap_seconds"] for row in rows]
    assert gaps == sorted(gaps, reverse=True) and {row["kind"] for row in rows} == set(KINDS)
    assert sum(row["seconds"] for row in rows) == pytest.approx(result["profiled_seconds"])
    assert sum(row["bound_seconds"] for row in rows) == pytest.approx(result["bound_seconds"])
    assert sum(row["product_flops"] for row in rows) / SEQ_LEN == result["product_flops_per_token_as_run"]
    assert result["tokens_per_s_limit"] == pytest.approx(SEQ_LEN / result["bound_seconds"])
    assert 0 < result["flops_utilization"] < 1
    assert result["profiled_seconds"] in result["profiled_step_seconds"] and len(result["step_seconds"]) == 1
    assert f"of at most {result['tokens_per_s_limit']:,.0f} by these bounds" in shown
