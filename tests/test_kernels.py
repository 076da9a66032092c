"""Output and gradients of each kernel compared with the plain formula."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, RMSNorm, device
from smolds_dist.model.causal_attention import causal_attention
from smolds_dist.model.kernels import (
    expert_ffn,
    grouped_expert_ffn,
    linear_cross_entropy,
    row_multiple,
)
from smolds_dist.model.moe import _best_in_turn, place_by_expert, running_counts, sort_by_expert
from smolds_dist.model.rotary import apply_rotary, rotary_angles


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("ignored", [0, 5, 30])
def test_linear_cross_entropy_equals_pytorch(chunk, ignored):
    torch.manual_seed(0)
    hidden = torch.randn(30, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (30,))
    labels[:ignored] = -100
    loss = linear_cross_entropy(hidden, weight, labels, chunk)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    if ignored == 30:
        assert loss == 0 and all((g == 0).all() for g in ours)
        return
    expected = F.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(ours, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_linear_cross_entropy_of_improbable_labels_is_exact():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[300.0, 0.0], [-300.0, 200.0], [0.0, 0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2]))
    expected = F.cross_entropy(hidden @ weight.T, torch.tensor([1, 2]))
    assert loss.item() == pytest.approx(expected.item()) == 400
    for ours, wanted in zip(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("length", [1, 5, 128, 300])
@pytest.mark.parametrize(("groups", "value_dim"), [(1, 16), (2, 24), (6, 16)])
def test_causal_attention_equals_an_fp32_mask(dtype, tolerance, length, groups, value_dim):
    torch.manual_seed(0)
    shapes = [(2, 6, length, 16), (2, groups, length, 16), (2, groups, length, value_dim)]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    query, key, value = exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    repeats = 6 // groups
    scores = query @ key.repeat_interleave(repeats, 1).mT * 0.3
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(-1) @ value.repeat_interleave(repeats, 1)
    actual = causal_attention(*inputs, 0.3)
    seed = torch.randn_like(expected)
    got = [actual, *torch.autograd.grad(actual, inputs, seed.to(dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, seed)]
    for ours, reference in zip(got, wanted, strict=True):
        assert ours.dtype == dtype and ours.shape == reference.shape
        assert (ours - reference).norm() <= tolerance * reference.norm() + 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("counts", [[3, 0, 70, 1], [0, 0, 0, 5], [64, 64, 64, 64]])
@pytest.mark.parametrize("function", [expert_ffn, grouped_expert_ffn])
@pytest.mark.parametrize("packed", [True, False])
def test_expert_ffn_equals_an_fp32_loop_over_rows(dtype, tolerance, counts, function, packed):
    torch.manual_seed(0)
    inputs = [torch.randn(sum(counts), 24), torch.randn(4, 48, 24) / 5, torch.randn(4, 24, 24) / 5]
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    x, gate_up, down = exact = [tensor.detach().float().requires_grad_() for tensor in inputs]

    expert_of_row = torch.arange(4).repeat_interleave(torch.tensor(counts))
    gate, up = torch.einsum("mh,mjh->mj", x, gate_up[expert_of_row]).chunk(2, -1)
    expected = torch.einsum("mi,mhi->mh", F.silu(gate) * up, down[expert_of_row])
    packed = inputs[1:2] if packed else [half.contiguous() for half in inputs[1].chunk(2, dim=1)]
    actual = function(inputs[0], torch.tensor(counts), packed, inputs[2])

    seed = torch.randn_like(expected)
    got = [actual, *torch.autograd.grad(actual, inputs, seed.to(dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, seed)]
    for ours, reference in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert (ours - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("multiple", [1, 8, 64])
@pytest.mark.parametrize("experts", [4, 7])  # selected among four: the others stay empty
def test_rows_sorted_by_expert_have_every_token_once_per_selected_expert(multiple, experts):
    torch.manual_seed(0)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(50)])
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    padded, token, row = sort_by_expert(chosen, counts, multiple)
    assert (padded % multiple == 0).all() and ((padded - counts) < multiple).all() and ((padded - counts) >= 0).all()
    assert len(token) == padded.sum()
    expert_of_row = torch.arange(experts).repeat_interleave(padded)
    assert (expert_of_row[row] == chosen).all()
    assert (token[row] == torch.arange(50)[:, None]).all()
    assert len(row.unique()) == 100


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_norm_equals_pytorchs_in_fp32(dtype, tolerance):
    torch.manual_seed(0)
    x, seed = torch.randn(2, 5, 48) + 0.7, torch.randn(2, 5, 48)
    norm = RMSNorm(48, 1e-5).to(dtype)
    norm.weight.data.normal_()
    x, seed = x.to(dtype).requires_grad_(), seed.to(dtype)
    exact = [tensor.detach().float().requires_grad_() for tensor in (x, norm.weight)]
    expected = F.rms_norm(exact[0], (48,), exact[1], 1e-5)
    got = [actual := norm(x), *torch.autograd.grad(actual, (x, norm.weight), seed)]
    wanted = [expected, *torch.autograd.grad(expected, exact, seed.float())]
    for ours, reference in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert (ours - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rotary_rotates_pairs_as_complex_numbers(dtype, tolerance):
    torch.manual_seed(0)
    x, seed = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    x, seed = x.to(dtype).requires_grad_(), seed.to(dtype)
    exact = x.detach().float().requires_grad_()
    positions = torch.stack((torch.arange(7), torch.arange(7) + 11))
    angles = positions[:, None, :, None] * 100.0 ** (-torch.arange(8) / 8)
    turned = torch.complex(*exact.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    actual = apply_rotary(x, *rotary_angles(positions, 16, 100.0))
    got = [actual, *torch.autograd.grad(actual, x, seed)]
    wanted = [expected, *torch.autograd.grad(expected, exact, seed.float())]
    for ours, reference in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert (ours - reference).norm() <= tolerance * reference.norm()


def test_few_rows_get_little_padding_and_many_rows_few_shapes():
    def padded(rows: int, dtype: torch.dtype) -> int:
        multiple = row_multiple(torch.empty(rows, 2, dtype=dtype))
        return -(-rows // multiple) * multiple

    assert {padded(rows, torch.bfloat16) for rows in range(1, 257)} == {1, 2, 4, 8, 16, 32, 64, 128, 192, 256}
    assert all(padded(rows, torch.float32) == rows for rows in range(1, 257))


@pytest.mark.parametrize(("experts", "top_k", "multiple"), [(8, 2, 8), (5, 3, 1), (64, 8, 8)])
def test_rows_and_choices_of_fused_code_are_the_sorts(experts, top_k, multiple):
    """What Inductor fuses on CUDA: a scan for the sort, a maximum at a time for the best."""
    torch.manual_seed(0)
    scores = torch.randn(50, experts).softmax(-1)
    biased = scores + 0.1 * torch.randn(experts)
    weights, chosen = _best_in_turn(scores, biased, top_k)
    assert torch.equal(chosen, biased.topk(top_k).indices) and torch.equal(weights, scores.gather(1, chosen))
    counts = running_counts(chosen, experts)[:, -1].long()
    assert torch.equal(counts, chosen.flatten().bincount(minlength=experts))
    padded, _, rows = place_by_expert(chosen, counts, multiple)
    expected = sort_by_expert(chosen, counts, multiple)
    assert torch.equal(padded, expected[0]) and torch.equal(rows, expected[2])


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["gqa", "latent"])
def test_gpu_branches_agree_with_the_cpus(attention, dtype, tolerance, kind, monkeypatch):
    """Run every CUDA branch on the CPU: grouped matmuls, rows padded to the upper bound, fused attention and norm, a softmax
    in one piece. Tokens have many experts, so that rounding does not change the routing."""
    torch.manual_seed(0)
    config = DeepSeekV3Config(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=97, num_experts=4, num_experts_per_tok=4, attention=attention, initializer_range=0.1,
    )  # fmt: skip
    model = DeepSeekV3ForCausalLM(config).to(dtype)
    ids = torch.randint(0, 97, (2, 33))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.1, -100)

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = model(input_ids=ids, labels=labels).loss
        return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    asked = set()
    expected = loss_and_gradients()
    monkeypatch.setattr(device, "family", lambda x: asked.add(inspect.stack()[1].function) or kind)
    actual = loss_and_gradients()
    kernels = {"row_multiple", "expert_ffn", "sort_by_expert", "linear_cross_entropy", "_loss_and_gradients"}
    assert asked == {*kernels, "_has_fast_path", "forward"}
    for ours, wanted in zip(actual, expected, strict=True):
        assert ours.isfinite().all()
        assert (ours.float() - wanted.float()).norm() <= tolerance * wanted.float().norm() + 1e-7
