"""On an NVIDIA GPU: kernels compared with plain formulas, models and runs with the CPU. `pytest -m gpu` runs only these.

Nothing here needs more than one GPU: ranks share it (`one_card`). docs/support.md lists what has run on one. With
SMOLDS_TEST_DEVICE=cpu the tests run on a CPU, in the branches that CUDA takes where a test chooses them, with gloo in place
of NCCL and a recorder of operators in place of CUDA graphs: this checks the tests, not CUDA.
"""

import contextlib
import copy
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from one_card import OneCard
from parity_cases import Case, ranks
from parity_worker import train_case
from ranks import smolds
from test_captured import OperatorRecorder, Operators, make_stepper, train
from test_parity import assert_same_numbers

from benchmarks.plan import MEMORY_SIZES, compare_memory
from smolds_dist.checkpoint.files import RANDOM
from smolds_dist.checkpoint.writer import CheckpointWriter
from smolds_dist.config import load_config
from smolds_dist.data.batch import apply_document_mask
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.model.attention import eager_attention
from smolds_dist.model.causal_attention import Documents, causal_attention
from smolds_dist.model.device import as_family
from smolds_dist.model.kernels import expert_ffn, linear_cross_entropy
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.captured import CudaRecorder
from smolds_dist.parallel.make_engine import make_engine
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.training.clock import StepClock, matrix_product_peak
from smolds_dist.training.compiling import try_to_compile, undo_compile

DEVICE = os.environ.get("SMOLDS_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="no CUDA device here"),
]
only_cuda = pytest.mark.skipif(not ON_CUDA, reason="only on CUDA")
GQA = dict(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
GQA |= dict(head_dim=32, vocab_size=512)
LATENT = GQA | dict(attention="latent", scoring_func="sigmoid", n_shared_experts=1)
ATTENTION = pytest.mark.parametrize("settings", [GQA, LATENT], ids=["gqa", "latent"])
DTYPE = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)


def in_cuda_branches() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if ON_CUDA else as_family("cuda")


@contextlib.contextmanager
def no_host_waits() -> Iterator[None]:
    """Raise an error where the host would wait for the GPU; on a CPU, where an operator reads a value."""
    if not ON_CUDA:
        with Operators():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pair(settings: dict) -> tuple[DeepSeekV3ForCausalLM, DeepSeekV3ForCausalLM]:
    """Return the same model on the CPU and on the GPU, with nonzero selection biases."""
    torch.manual_seed(0)
    model = DeepSeekV3ForCausalLM(DeepSeekV3Config(**settings, initializer_range=0.1)).eval()
    for block in model.model.layers:
        block.mlp.gate.e_score_correction_bias.normal_().mul_(0.1)
    return model, copy.deepcopy(model).to(DEVICE)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(1))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    actual, expected = actual.detach().float().cpu(), expected.detach().float().cpu()
    assert actual.isfinite().all()
    assert (actual - expected).norm() <= tolerance * expected.norm()


@DTYPE
@pytest.mark.parametrize("counts", [[8, 0, 64, 24], [0, 0, 0, 16], [64, 64, 64, 64]], ids=str)
def test_experts_equal_an_fp32_loop(dtype, tolerance, counts):
    torch.manual_seed(0)
    exact = [torch.randn(sum(counts), 64), torch.randn(4, 128, 64) / 8, torch.randn(4, 64, 64) / 8]
    exact = [tensor.to(dtype).float().requires_grad_() for tensor in exact]
    given = [tensor.detach().to(DEVICE, dtype).requires_grad_() for tensor in exact]
    x, gate_up, down = exact
    expert = torch.arange(4).repeat_interleave(torch.tensor(counts))
    gate, up = torch.einsum("mh,mjh->mj", x, gate_up[expert]).chunk(2, -1)
    expected = torch.einsum("mi,mhi->mh", F.silu(gate) * up, down[expert])
    actual = expert_ffn(given[0], torch.tensor(counts, device=DEVICE), (given[1],), given[2])
    seed = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, given, seed.to(DEVICE, dtype))
    for ours, wanted in zip([actual, *gradients], [expected, *torch.autograd.grad(expected, exact, seed)], strict=True):
        assert ours.dtype == dtype
        assert_near(ours, wanted, tolerance)


@DTYPE
def test_loss_at_vocabulary_size_49_152_equals_pytorchs(dtype, tolerance):
    torch.manual_seed(0)
    exact = [torch.randn(2000, 64), torch.randn(49_152, 64) / 8]
    exact = [tensor.to(dtype).float().requires_grad_() for tensor in exact]
    given = [tensor.detach().to(DEVICE, dtype).requires_grad_() for tensor in exact]
    labels = torch.randint(0, 49_152, (2000,))
    labels[:100] = -100
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels)
    actual = linear_cross_entropy(*given, labels.to(DEVICE))
    assert actual.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, wanted in zip(torch.autograd.grad(actual, given), torch.autograd.grad(expected, exact), strict=True):
        assert_near(ours, wanted, tolerance)


@ATTENTION
@DTYPE
def test_logits_equal_the_cpus(settings, dtype, tolerance):
    on_cpu, on_gpu = pair(settings)
    with torch.no_grad():
        expected = on_cpu(input_ids=ids(2, 100)).logits
        actual = on_gpu.to(dtype)(input_ids=ids(2, 100).to(DEVICE)).logits
    # In bf16 some tokens choose another expert.
    assert_near(actual, expected, tolerance if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("shape", [(6, 2, 64, 64), (4, 4, 48, 32), (4, 1, 36, 20)], ids=["gqa", "latent", "odd"])
def test_varlen_attention_equals_a_masked_one(shape):
    """Compare bf16 with the plain formula in fp32."""
    heads, groups, width, value_width = shape
    torch.manual_seed(0)
    batch = ids(3, 300).clamp(min=1)
    batch[0, [0, 10, 40, 41, 298]] = 0
    batch[2, 150] = 0
    positions, _ = apply_document_mask(batch, 0)
    shapes = [(3, heads, 300, width), (3, groups, 300, width), (3, groups, 300, value_width)]
    exact = [torch.randn(one).bfloat16().float().requires_grad_() for one in shapes]
    given = [tensor.detach().to(DEVICE, torch.bfloat16).requires_grad_() for tensor in exact]
    document = (positions == 0).cumsum(1)
    mask = (document[:, :, None] == document[:, None]).tril()[:, None]
    expected = eager_attention(*exact, mask, 0.2)[0].transpose(1, 2)
    actual = causal_attention(*given, 0.2, Documents(positions.to(DEVICE)))
    seed = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, given, seed.to(DEVICE, torch.bfloat16))
    for ours, wanted in zip([actual, *gradients], [expected, *torch.autograd.grad(expected, exact, seed)], strict=True):
        assert ours.dtype == torch.bfloat16
        assert_near(ours, wanted, 3e-2)


@ATTENTION
@DTYPE
def test_documents_of_a_sequence_are_masked_as_on_the_cpu(settings, dtype, tolerance):
    """bf16 uses varlen attention, fp32 a mask."""
    batch = ids(2, 100).clamp(min=1)
    batch[:, [10, 40, 41]] = 0
    positions, labels = apply_document_mask(batch, 0)
    losses, gradients = [], []
    on_cpu, on_gpu = pair(settings)
    for model in (on_cpu, on_gpu.to(dtype)):
        device = next(model.parameters()).device
        inputs = {"input_ids": batch, "labels": labels, "position_ids": positions}
        loss = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == torch.float32 else 2e-2)
    for on_cpu_one, on_gpu_one in zip(*gradients, strict=True):
        # In bf16 some tokens choose another expert.
        assert_near(on_gpu_one, on_cpu_one, 1e-3 if dtype == torch.float32 else 0.5)


@ATTENTION
def test_padded_batch_and_gradients_equal_the_cpus(settings):
    models = pair(settings)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :15] = 0
    logits, gradients = [], []
    for model in models:
        device = next(model.parameters()).device
        out = model(input_ids=ids(2, 40).to(device), attention_mask=mask.to(device)).logits
        logits.append(out.cpu()[mask.bool()])
        loss = model(input_ids=ids(2, 40).to(device), labels=ids(2, 40).to(device)).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert_near(logits[1], logits[0], 1e-4)
    for expected, actual in zip(*gradients, strict=True):
        assert_near(actual, expected, 1e-3)


@ATTENTION
def test_generation_with_a_cache_equals_the_cpus(settings):
    on_cpu, on_gpu = pair(settings)
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = on_cpu.generate(ids(2, 9), **options)
    for use_cache in (True, False):
        assert torch.equal(on_gpu.generate(ids(2, 9).to(DEVICE), use_cache=use_cache, **options).cpu(), expected)


@pytest.mark.parametrize("documents", [False, pytest.param(True, marks=only_cuda)])
@ATTENTION
def test_forward_and_backward_never_synchronize(settings, documents):
    config = load_config(
        ["--preset=debug", "--train.global_batch=2", f"--parallel.device={DEVICE}", "--train.dtype=bf16"]
    )
    topology = plan_topology(config, detect_machine(), RankInfo())
    engine = make_engine(pair(settings)[0], config, topology)
    batch = [ids(2, 64)] * 2  # on the host, as are positions and bounds
    if documents:
        batch += [torch.cat((torch.arange(40), torch.arange(24))).repeat(2, 1)]
        batch += [torch.tensor([0, 40, 64, 104, 128], dtype=torch.int32)]
    with in_cuda_branches():
        engine.backward(engine.forward(*batch))  # the first allocates what later ones reuse
        with no_host_waits():
            clock = StepClock(engine)
            clock.begin(1)
            with clock.phase("forward"):
                loss = engine.forward(*batch)
            engine.backward(loss)
    assert clock.seconds["forward"] > 0


def test_the_host_never_waits_in_a_micro_batch_of_a_step():
    """With counting, router statistics and sums, as in training."""
    with in_cuda_branches():
        stepper = make_stepper(2, device=DEVICE)
        stepper.train_step(11, 11)
        with no_host_waits():
            loss, _ = stepper.accumulate(4)
    assert loss.isfinite()


@ATTENTION
@DTYPE
def test_compiled_blocks_have_the_losses_and_gradients_of_uncompiled_ones(settings, dtype, tolerance):
    """Full blocks as one region each, by Inductor; on a CPU traced only."""
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    config = load_config(
        ["--preset=debug", "--train.global_batch=2", f"--parallel.device={DEVICE}", f"--train.dtype={name}"]
    )
    topology = plan_topology(config, detect_machine(), RankInfo())
    engine = make_engine(pair(settings)[0], config, topology)
    model, batch = engine.model, ids(2, 64).to(DEVICE)

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    torch._dynamo.reset()
    try:
        with in_cuda_branches():
            expected = loss_and_gradients()
            assert try_to_compile(engine, topology, 64, model.config, "inductor" if ON_CUDA else "aot_eager") is None
            assert all(block.compiled_layer is not None for block in model.model.layers)
            actual = loss_and_gradients()
    finally:
        undo_compile(model)
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=1e-5 if name == "fp32" else 2e-2)
    for ours, wanted in zip(actual[1:], expected[1:], strict=True):
        # In bf16 some tokens choose another expert.
        assert_near(ours, wanted, tolerance if name == "fp32" else 0.5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_graphs_train_like_plain_passes_and_the_host_never_waits(accumulation):
    with in_cuda_branches():
        plain, captured = (make_stepper(accumulation, device=DEVICE) for _ in range(2))
        captured.capture(torch.randint(0, 97, (2, 24)), CudaRecorder() if ON_CUDA else OperatorRecorder())
        for expected, actual in zip(train(plain), train(captured), strict=True):
            assert actual["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-3)
            assert actual["norm"].item() == pytest.approx(expected["norm"].item(), rel=1e-3)
            assert actual["counts"].sum() == expected["counts"].sum()
        batch = torch.randint(0, 97, (2, 24)).to(DEVICE)
        assert captured.engine._captured.takes(captured.engine._captured._inputs | {"input_ids": batch})
        with no_host_waits():
            captured.engine.backward(captured.engine.forward(batch, batch))


def losses_of(small_run: list[str], tmp_path, name: str, *options: str) -> list[float]:
    finished = smolds("train", *small_run, f"--run.name={name}", "--train.dtype=fp32", *options, timeout=300)
    assert finished.returncode == 0, finished.text
    return [row["loss"] for row in read_rows(tmp_path / "runs" / name / "metrics.jsonl") if "loss" in row]


TWENTY = (
    "--train.steps=20",
    "--train.schedule=wsd",
    "--train.decay_fraction=0",
    "--train.eval_every=0",
    "--log.sample_every=0",
)
LATENT_RUN = ("--model.attention=latent", "--model.scoring_func=sigmoid", "--model.n_shared_experts=1")


@pytest.mark.parametrize(
    "options",
    [
        ("--parallel.engine=local",),
        ("--parallel.engine=local", *LATENT_RUN),
        ("--parallel.engine=local", "--train.activation_checkpointing=full"),
        ("--parallel.engine=local", "--train.activation_checkpointing=selective"),
        *((f"--parallel.zero={zero}", "--parallel.engine=deepspeed") for zero in range(4)),
        ("--parallel.zero=1", "--parallel.engine=deepspeed", *LATENT_RUN),
    ],
    ids=["local", "latent", "full", "selective", "zero 0", "zero 1", "zero 2", "zero 3", "zero 1 latent"],
)
def test_twenty_steps_equal_the_cpus(small_run, tmp_path, options):
    model = [option for option in options if option.startswith("--model.")]
    expected = losses_of(
        small_run, tmp_path, "cpu", *TWENTY, *model, "--parallel.device=cpu", "--parallel.engine=local"
    )
    actual = losses_of(small_run, tmp_path, "gpu", *TWENTY, *options, f"--parallel.device={DEVICE}")
    assert len(actual) == 20
    assert actual == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "devices", [("cpu", DEVICE, "cpu"), (DEVICE, "cpu", DEVICE)], ids=["from the cpu", "from the gpu"]
)
def test_checkpoint_resumes_on_the_other_device_and_back(small_run, tmp_path, devices):
    steady = ("--train.schedule=wsd", "--train.decay_fraction=0")
    expected = losses_of(small_run, tmp_path, "cpu", *steady, "--parallel.device=cpu")
    for device, steps in zip(devices, (2, 4, 6), strict=True):
        part = (f"--parallel.device={device}", f"--train.steps={steps}", "--checkpoint.resume=auto")
        actual = losses_of(small_run, tmp_path, "both", *steady, *part)
    assert actual == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("background", ["true", "false"])
def test_background_checkpoint_equals_a_synchronous_one(small_run, tmp_path, background):
    options = (f"--parallel.device={DEVICE}", f"--checkpoint.background={background}")
    losses_of(small_run, tmp_path, "whole", *options)
    assert smolds("checkpoint", "verify", str(tmp_path / "runs" / "whole")).returncode == 0
    for steps in (2, 6):
        part = losses_of(small_run, tmp_path, "parts", *options, f"--train.steps={steps}", "--checkpoint.resume=auto",
                         "--train.schedule=wsd", "--train.decay_fraction=0")  # fmt: skip
    assert len(part) == 6


@only_cuda
def test_profile_has_the_kernels_and_a_memory_snapshot(small_run, tmp_path):
    losses_of(small_run, tmp_path, "traced", f"--parallel.device={DEVICE}", "--profile.steps=3:4")
    names = {path.name for path in (tmp_path / "runs" / "traced" / "profile").iterdir()}
    assert names == {"steps_3-4.rank_0.pt.trace.json.gz", "steps_3-4.rank_0.memory.pickle"}


def test_bf16_learns_and_logs_its_time_by_phase(small_run, tmp_path):
    options = [*small_run, "--run.name=bf16", "--train.dtype=bf16", f"--parallel.device={DEVICE}", "--train.steps=40"]
    finished = smolds("train", *options, timeout=300)
    assert finished.returncode == 0, finished.text
    rows = [row for row in read_rows(tmp_path / "runs" / "bf16" / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert {"forward", "backward", "optimizer"} <= rows[-1]["seconds"].keys()
    assert rows[-1]["memory_gb"] > 0 and 0 < rows[-1]["mfu"] < 1


def sleep_on_device(seconds: float) -> None:
    """Keep the device busy, without the host where it can be; at up to 2 GHz at least that long."""
    if ON_CUDA:
        torch.cuda._sleep(int(2e9 * seconds))
    else:
        time.sleep(seconds)


def test_a_phase_is_timed_on_the_device_without_a_wait():
    """By events: the host returns from a phase before the device has ended it."""
    engine = make_stepper(1, device=DEVICE).engine
    clock = StepClock(engine)
    clock.begin(1)
    sleep_on_device(0.001)  # the first may compile
    began = time.perf_counter()
    for name, seconds in (("forward", 0.1), ("backward", 0.0), ("optimizer", 0.1)):
        with clock.phase(name):
            sleep_on_device(seconds)
    if ON_CUDA:
        assert time.perf_counter() - began < 0.05
    seconds = clock.seconds
    assert min(seconds["forward"], seconds["optimizer"]) > 0.09 and seconds["backward"] < 0.05


def test_autoeps_fast_paths_train_like_the_local_engine(small_run, tmp_path):
    """With one rank; on a CPU those that DeepSpeed has there."""
    options = ["--train.dtype=bf16", f"--parallel.device={DEVICE}", "--train.micro_batch=8"]
    fast = ["--parallel.engine=deepspeed", "--parallel.zero=1"]
    if not ON_CUDA:
        fast.append(f"--parallel.ds_config={Path(__file__).with_name('grouped.json')}")
    expected = losses_of(small_run, tmp_path, "local", *TWENTY, *options)
    finished = smolds("train", *small_run, "--run.name=fast", *TWENTY, *options, *fast, timeout=300)
    assert finished.returncode == 0, finished.text
    combine = "fused_weighted_sum" if ON_CUDA else "weighted_sum"
    assert f"AutoEP: use_grouped_mm True, gate_up_impl fused, combine_impl {combine}" in finished.stdout
    actual = [row["loss"] for row in read_rows(tmp_path / "runs" / "fast" / "metrics.jsonl") if "loss" in row]
    assert actual == pytest.approx(expected, rel=2e-2)


def test_muon_in_bf16_follows_fp32_on_the_cpu(small_run, tmp_path):
    options = [*TWENTY, "--train.optimizer=muon", "--train.lr=3e-3"]
    expected = losses_of(small_run, tmp_path, "cpu", *options, "--parallel.device=cpu")
    actual = losses_of(small_run, tmp_path, "gpu", *options, f"--parallel.device={DEVICE}", "--train.dtype=bf16")
    assert actual == pytest.approx(expected, rel=2e-2) and actual[-1] < actual[0] - 0.5


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_peak_is_plausible_for_a_gpu(dtype):
    assert 1e12 < matrix_product_peak(torch.device(DEVICE), dtype) < 1e16


@only_cuda
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", range(4))
def test_peak_memory_matches_the_planner(zero, dtype):
    row = compare_memory(MEMORY_SIZES[2], 1, zero, dtype, steps=3)
    assert row["predicted"] == pytest.approx(row["measured"], rel=0.1), row


@only_cuda
def test_checkpoint_is_copied_to_pinned_memory(small_run):
    """Only copies to pinned memory are asynchronous and run at the link's full bandwidth."""
    config = load_config([*small_run, f"--parallel.device={DEVICE}", "--parallel.engine=local"])
    topology = plan_topology(config, detect_machine(), RankInfo())
    engine = make_engine(pair(GQA)[0], config, topology)
    batch = ids(2, 64).to(DEVICE)
    engine.backward(engine.forward(batch, batch))
    engine.step(1e-3)
    writer = CheckpointWriter(config, topology, {}, lambda samples: {})
    writer.prepare(engine)
    writer.wait()
    staged = writer.staging
    assert staged and all(tensor.is_pinned() for name, tensor in staged.items() if not name.startswith(RANDOM))
    assert sum(tensor.nbytes for tensor in staged.values()) >= 12 * sum(p.numel() for p in engine.model.parameters())


# Several ranks on one GPU

ONE_CARD = [
    *(ranks(2, expert, zero, *names) for names in ((), ("muon",)) for expert in (1, 2) for zero in range(4)),
    ranks(4, 2, 1), ranks(4, 4, 3), ranks(4, 2, 2, "muon"),
]  # fmt: skip


@pytest.fixture(scope="session")
def one_card():
    with contextlib.ExitStack() as cleanup:
        yield OneCard(cleanup)


@pytest.fixture(scope="session")
def trained(one_card, request):
    """Return a function to train a case; all selected ones of a world size share a launch, which is not repeated if it
    fails."""
    specs = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = {spec.params["case"] for spec in specs if spec and isinstance(spec.params.get("case"), Case)}
    done: dict[int, dict[Case, dict] | str] = {}

    def train_all(cases: list[Case]) -> dict[Case, dict]:
        jobs = [dict(options=[*one.options, f"--parallel.device={DEVICE}"], disturb=False) for one in cases]
        output = one_card.run(cases[0].world, str(Path(__file__).with_name("parity_worker.py")), json.dumps(jobs))
        lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
        return dict(zip(cases, (json.loads(line.removeprefix("RESULT ")) for line in lines), strict=True))

    def train_case_of(case: Case) -> dict:
        if case.world not in done:
            try:
                done[case.world] = train_all([one for one in ONE_CARD if one.world == case.world and one in wanted])
            except AssertionError as error:
                done[case.world] = str(error)
        results = done[case.world]
        if isinstance(results, str):
            pytest.fail(results, pytrace=False)
        return results[case]

    return train_case_of


@pytest.mark.parametrize("case", ONE_CARD, ids=str)
def test_ranks_on_one_card_match_one_process(trained, case):
    result = trained(case)
    options = [*case.reference.options, f"--parallel.device={DEVICE}"]
    expected = train_case(options, disturb=False)
    assert_same_numbers(result, expected, slice(None), 1e-3 if ON_CUDA else 1e-5)


def test_a_job_of_two_ranks_on_one_card_has_the_losses_of_one_process(one_card, small_run, tmp_path):
    """The command, with its rendezvous, checkpoints and export."""
    options = [*small_run, *TWENTY, "--train.dtype=fp32", f"--parallel.device={DEVICE}", "--parallel.expert=2"]
    one_card.run(2, "-m", "smolds_dist", "train", *options, "--run.name=pair")
    rows = read_rows(tmp_path / "runs" / "pair" / "metrics.jsonl")
    assert f"2 ranks over {'nccl' if ON_CUDA else 'gloo'} on 2 nodes" in rows[0]["topology"]
    alone = losses_of(small_run, tmp_path, "alone", *TWENTY, f"--parallel.device={DEVICE}", "--parallel.expert=1")
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(alone, rel=1e-3)
    assert (tmp_path / "runs" / "pair" / "export" / "model.safetensors").exists()
