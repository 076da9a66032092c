"""Each kernel against the plain formula, in forward and gradients."""

import pytest
import torch
import torch.nn.functional as F

from smolds_dist.model.kernels import expert_ffn, expert_ffn_reference, linear_cross_entropy


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("counts", [[3, 0, 70, 1], [0, 0, 0, 5], [64, 64, 64, 64]])
@pytest.mark.parametrize("function", [expert_ffn, expert_ffn_reference])
@pytest.mark.parametrize("packed", [True, False])
def test_expert_ffn_equals_an_fp32_loop_over_rows(dtype, tolerance, counts, function, packed):
    torch.manual_seed(0)
    inputs = [torch.randn(sum(counts), 24), torch.randn(4, 40, 24) / 5, torch.randn(4, 24, 20) / 5]
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    x, gate_up, down = exact = [tensor.detach().float().requires_grad_() for tensor in inputs]

    expert_of_row = torch.arange(4).repeat_interleave(torch.tensor(counts))
    gate, up = torch.einsum("mh,mjh->mj", x, gate_up[expert_of_row]).chunk(2, -1)
    expected = torch.einsum("mi,mhi->mh", F.silu(gate) * up, down[expert_of_row])
    packed = inputs[1:2] if packed else [half.contiguous() for half in inputs[1].chunk(2, dim=1)]
    actual = function(inputs[0], counts, packed, inputs[2])

    seed = torch.randn_like(expected)
    got = [actual, *torch.autograd.grad(actual, inputs, seed.to(dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, seed)]
    for ours, reference in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert (ours - reference).norm() <= tolerance * reference.norm()
